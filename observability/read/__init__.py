"""Traces in: files and addresses to columns of spans, and those to a table of steps."""

from __future__ import annotations

from observability.read.kernel_sums import KernelGroup, KernelSums
from observability.read.span_table import (
    KERNEL,
    LAYER,
    NO_STEP,
    OTHER,
    PHASE,
    RUN,
    RUN_STEP,
    Floats,
    Ints,
    SpanTable,
    one_line,
    printable,
    whole,
)
from observability.read.step_table import (
    HOST_VALUES,
    PAUSES,
    Kind,
    Pause,
    StepTable,
    Told,
    number,
    pause_seconds,
    step_table,
)
from observability.read.trace_reader import is_address, newest_run, read_steps, read_trace, trace_files, trace_path

__all__ = [
    "HOST_VALUES",
    "KERNEL",
    "LAYER",
    "NO_STEP",
    "OTHER",
    "PAUSES",
    "PHASE",
    "RUN",
    "RUN_STEP",
    "Floats",
    "Ints",
    "KernelGroup",
    "KernelSums",
    "Kind",
    "Pause",
    "SpanTable",
    "StepTable",
    "Told",
    "is_address",
    "newest_run",
    "number",
    "one_line",
    "pause_seconds",
    "printable",
    "read_steps",
    "read_trace",
    "step_table",
    "trace_files",
    "trace_path",
    "whole",
]
