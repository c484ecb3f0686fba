"""Where `AnomalyProcessor` was before the package had rooms: programs written then go on working."""

from observability.detect.live_spans import AnomalyProcessor

__all__ = ["AnomalyProcessor"]
