"""Fine-tune language models on any Vulkan, Metal or DX12 GPU: QLoRA through WGSL."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from entrenar_gpu.api import evaluate as evaluate
    from entrenar_gpu.api import export_model as export_model
    from entrenar_gpu.api import merge as merge
    from entrenar_gpu.api import plan as plan
    from entrenar_gpu.api import quantize as quantize
    from entrenar_gpu.cli.display import Progress as Progress
    from entrenar_gpu.config import TrainConfig as TrainConfig
    from entrenar_gpu.custom_op import CustomOp as CustomOp
    from entrenar_gpu.custom_op import OpCall as OpCall
    from entrenar_gpu.eager import tensor as tensor
    from entrenar_gpu.errors import UserError as UserError
    from entrenar_gpu.events import CheckpointRecord as CheckpointRecord
    from entrenar_gpu.events import EvalRecord as EvalRecord
    from entrenar_gpu.events import RunInfo as RunInfo
    from entrenar_gpu.events import RunSummary as RunSummary
    from entrenar_gpu.events import SampleRecord as SampleRecord
    from entrenar_gpu.events import StepObserver as StepObserver
    from entrenar_gpu.events import StepRecord as StepRecord
    from entrenar_gpu.infer import Completion as Completion
    from entrenar_gpu.infer import LanguageModel as LanguageModel
    from entrenar_gpu.infer import Score as Score
    from entrenar_gpu.infer import load as load
    from entrenar_gpu.train import RunControl as RunControl
    from entrenar_gpu.train import Trainer as Trainer
    from entrenar_gpu.train import plot_run as plot_run

# Loaded when first used: importing the package must not open a GPU or read tokenizers.
_HOMES = {
    "CheckpointRecord": "events",
    "Completion": "infer",
    "CustomOp": "custom_op",
    "EvalRecord": "events",
    "LanguageModel": "infer",
    "OpCall": "custom_op",
    "Progress": "cli.display",
    "RunControl": "train",
    "RunInfo": "events",
    "RunSummary": "events",
    "SampleRecord": "events",
    "Score": "infer",
    "StepObserver": "events",
    "StepRecord": "events",
    "TrainConfig": "config",
    "Trainer": "train",
    "UserError": "errors",
    "evaluate": "api",
    "export_model": "api",
    "load": "infer",
    "merge": "api",
    "plan": "api",
    "plot_run": "train",
    "quantize": "api",
    "tensor": "eager",
}
__all__ = [*_HOMES, "__version__"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"entrenar_gpu.{_HOMES[name]}"), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("entrenar-gpu")
    except PackageNotFoundError:  # a checkout that was never installed
        return "0+checkout"
