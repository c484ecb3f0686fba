"""Records of a run to spans and metrics: into the run's file, and to a collector."""

from observability.write.logs import TraceIdFilter
from observability.write.observer import TraceObserver, TraceSummary, observe

__all__ = ["TraceIdFilter", "TraceObserver", "TraceSummary", "observe"]
