"""The command line: one function per command in main.py, and what they print."""

from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status."""
    from entrenar_gpu.cli.main import run  # late: `__main__` takes signals before anything heavy is loaded

    return run(list(arguments))


__all__ = ["run"]
