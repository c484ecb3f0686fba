"""From graphs to a plan: gradients, recomputation, memory, launches."""

from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.compiler.fuse_rows import fuse_rows
from entrenar_gpu.compiler.memory import FittedPlan, MemoryBudgetError, fit
from entrenar_gpu.compiler.pages import PAGED_ROLES, ParameterPage, page_layout, page_sizes, parameter_pages
from entrenar_gpu.compiler.plan import RING, Plan, PlanOptions, Step, make_plan, queries_of
from entrenar_gpu.compiler.recompute import Recompute
from entrenar_gpu.compiler.trace_groups import TraceGroup

__all__ = [
    "PAGED_ROLES",
    "RING",
    "FittedPlan",
    "MemoryBudgetError",
    "ParameterPage",
    "Plan",
    "PlanOptions",
    "Recompute",
    "Step",
    "TraceGroup",
    "backward",
    "fit",
    "fuse_rows",
    "make_plan",
    "page_layout",
    "page_sizes",
    "parameter_pages",
    "queries_of",
]
