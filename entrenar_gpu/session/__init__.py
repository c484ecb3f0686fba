"""A model ready to run: the graphs of a run, its plan, weights read and put onto an executor."""

from entrenar_gpu.session.base_identity import BaseIdentity
from entrenar_gpu.session.default_base import default_base
from entrenar_gpu.session.graphs import (
    EVAL_LOSS_NAME,
    LOSS_SCALE_NAME,
    STATE_NAME,
    RunShape,
    Trace,
    evaluate_graph,
    fit_run,
    logits_graph,
    training_graphs,
)
from entrenar_gpu.session.loader import adapter_tensors, load_weights, storage_of, write_adapter
from entrenar_gpu.session.plan_report import PROFILES, PlanReport, caps_for, plan_graphs, plan_run
from entrenar_gpu.session.session import Session, fit_on, memory_budget
from entrenar_gpu.session.weight_cache import WeightCache

__all__ = [
    "EVAL_LOSS_NAME",
    "LOSS_SCALE_NAME",
    "PROFILES",
    "STATE_NAME",
    "BaseIdentity",
    "PlanReport",
    "RunShape",
    "Session",
    "Trace",
    "WeightCache",
    "adapter_tensors",
    "caps_for",
    "default_base",
    "evaluate_graph",
    "fit_on",
    "fit_run",
    "load_weights",
    "logits_graph",
    "memory_budget",
    "plan_graphs",
    "plan_run",
    "storage_of",
    "training_graphs",
    "write_adapter",
]
