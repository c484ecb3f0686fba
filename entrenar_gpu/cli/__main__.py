"""`python -m entrenar_gpu`, and the `entrenar-gpu` script.

Nothing heavy is imported before signals are taken: loading the rest is most of the first second, and an interrupt then
is a clean exit too.
"""

from __future__ import annotations

import os
import sys

from entrenar_gpu import signals


def main() -> None:
    """Run the command line and exit with its status."""
    _open_standard_streams()
    with signals.ending(signals.leave):
        from entrenar_gpu.cli import main

        main.main()


def _open_standard_streams() -> None:
    """Else the first file that is opened would take the place of a closed one, and get what is printed."""
    for name, descriptor, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


if __name__ == "__main__":
    main()
