"""What a user can get wrong, as one kind of exception.

The command line prints the message of a `UserError` on one line and exits with status 2; every other exception is a
fault of ours and keeps its traceback. A message names the file, key or flag at fault and what to do about it.
"""

import contextlib
import re
from collections.abc import Iterator


class UserError(Exception):
    """Bad input: one clear line, naming the file, key or flag."""


class DeviceLost(UserError):
    """The GPU went away (driver reset, unplugged). The last checkpoint stands."""


class OutOfDeviceMemory(UserError):
    """The GPU has no memory left for what a run needs; `remedy` is what to do, in the words of who asked for it."""

    remedy = "lower --memory-budget, --batch or --seq, or end what else uses it"

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.remedy}"


class TrainingDiverged(UserError):
    """Too many consecutive steps had a loss or gradient that is not finite."""


_OPTION = re.compile(r"(?<![\w/=-])--(?:no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
_flags_are_spoken = False


@contextlib.contextmanager
def speaking_flags() -> Iterator[None]:
    """While a command line runs, messages name flags: `--save-every`."""
    global _flags_are_spoken
    before, _flags_are_spoken = _flags_are_spoken, True
    try:
        yield
    finally:
        _flags_are_spoken = before


@contextlib.contextmanager
def naming_arguments() -> Iterator[None]:
    """Has errors of a Python program name the argument, `save_every`, where the command line has a flag."""
    try:
        yield
    except UserError as error:
        if not _flags_are_spoken:
            error.args = tuple(_as_argument(str(part)) for part in error.args)
            if isinstance(error, OutOfDeviceMemory):
                error.remedy = _as_argument(error.remedy)
        raise


def _as_argument(text: str) -> str:
    return _OPTION.sub(lambda found: found[1].replace("-", "_"), text)
