"""The graphs of a run, weights onto an executor, the training loop and what surrounds it."""

from entrenar_gpu.train.base_identity import BaseIdentity
from entrenar_gpu.train.control import RunControl
from entrenar_gpu.train.default_base import default_base
from entrenar_gpu.train.evaluate import evaluate_data
from entrenar_gpu.train.graphs import RunShape, Trace, fit_run, logits_graph, training_graphs
from entrenar_gpu.train.loader import load_weights, storage_of
from entrenar_gpu.train.plan_report import PROFILES, PlanReport, caps_for, plan_graphs, plan_run
from entrenar_gpu.train.results import plot_run
from entrenar_gpu.train.run_data import DataReader
from entrenar_gpu.train.session import Session, fit_on, memory_budget
from entrenar_gpu.train.trainer import Trainer
from entrenar_gpu.train.weight_cache import WeightCache

__all__ = [
    "PROFILES",
    "BaseIdentity",
    "DataReader",
    "PlanReport",
    "RunControl",
    "RunShape",
    "Session",
    "Trace",
    "Trainer",
    "WeightCache",
    "caps_for",
    "default_base",
    "evaluate_data",
    "fit_on",
    "fit_run",
    "load_weights",
    "logits_graph",
    "memory_budget",
    "plan_graphs",
    "plan_run",
    "plot_run",
    "storage_of",
    "training_graphs",
]
