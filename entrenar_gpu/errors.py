"""What a user can get wrong, as one kind of exception.

The command line prints the message of a `UserError` on one line and exits with status 2; every other exception is a
fault of ours and keeps its traceback. A message names the file, key or flag at fault and what to do about it.
"""


class UserError(Exception):
    """Bad input: one clear line, naming the file, key or flag."""


class DeviceLost(UserError):
    """The GPU went away (driver reset, unplugged). The last checkpoint stands."""


class OutOfDeviceMemory(UserError):
    """The GPU has no memory left for what a run needs."""


class TrainingDiverged(UserError):
    """Too many consecutive steps had a loss or gradient that is not finite."""
