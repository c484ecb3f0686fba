"""Standard output that takes any text."""

from __future__ import annotations

import io
import sys


def print_any_text() -> None:
    """From here on what standard output's encoding lacks (σ, in many) is printed as "?", and ends no run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
