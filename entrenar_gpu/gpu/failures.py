"""What a device's errors mean to a user: its memory has run out, or it went away.

WebGPU libraries say both in errors of several kinds, and some of it only in their logs: where memory runs out in a
call that reports nothing, the device is lost by the next one that does. Those logs are listened to here, and what is
told in an error is not printed as well.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from entrenar_gpu.errors import DeviceLost, OutOfDeviceMemory, UserError

_SHORTAGE = re.compile(r"not enough memory|out[ _]?of[ _]?(device[ _]?|host[ _]?)?memory", re.IGNORECASE)
_LOSS = re.compile(r"DEVICE LOST|device was lost", re.IGNORECASE)


class _Listener(logging.Filter):
    """Keeps what the log says of memory and loss."""

    shortage = False

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        shortage = bool(_SHORTAGE.search(text))
        self.shortage = self.shortage or shortage
        return not (shortage or _LOSS.search(text))


_listener = _Listener()


def listen(library: str) -> None:
    """Listen to the log of a library, by the name of its module, which has been loaded."""
    logging.getLogger(library).addFilter(_listener)


def _is(error: BaseException | None, name: str) -> bool:
    """Whether an error is of a class of that name: each library has its own."""
    return any(kind.__name__ == name for kind in type(error).__mro__)


def meaning(error: BaseException, device: str) -> UserError | None:
    """The user's error that an error of the library amounts to; None where it is a fault of ours."""
    if error.__cause__ is not None and _is(error.__cause__, "GPUError"):
        error = error.__cause__  # ours, with more text: that of a shader
    text = str(error)
    lost = next((line.strip() for line in text.splitlines() if "lost" in line.lower()), None)
    short = _is(error, "GPUOutOfMemoryError") or _SHORTAGE.search(text)
    if short or (lost is not None and _listener.shortage):
        _listener.shortage = False
        return OutOfDeviceMemory(f"{device} has no memory left")
    return None if lost is None else DeviceLost(f"device {device} was lost ({lost})")


@contextlib.contextmanager
def device_errors(device: str = "the GPU") -> Iterator[None]:
    """Around work on a device: raises DeviceLost or OutOfDeviceMemory for what an error of any kind says."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, RuntimeError) or _is(error, "GPUError")):
            raise
        told = meaning(error, device)
        if told is None:
            raise
        raise told from error
