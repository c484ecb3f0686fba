"""The command line: one function per command in main.py, and what they print."""

from entrenar_gpu.cli.main import run

__all__ = ["run"]
