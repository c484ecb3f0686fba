"""Where `LiveDetector` was before the package had rooms: programs written then go on working."""

from observability.detect.live import LiveDetector

__all__ = ["LiveDetector"]
