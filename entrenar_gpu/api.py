"""What a Python program calls beside Trainer and load: one function for each command that is done when it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from entrenar_gpu.config import TrainConfig, path_text, whole_number
from entrenar_gpu.errors import naming_arguments


def evaluate(
    model: str | Path, data: Any, adapter: str | Path | None = None, window: int | None = None, **options: Any
) -> dict[str, Any]:
    """{"loss", "perplexity", "tokens", "samples"} of a model, with an adapter or without, on data.

    data: whatever `Trainer` takes; of a folder the valid file.
    window: samples longer than `seq` are not cut but read in pieces of `seq` tokens, each so many tokens further on;
        every token is scored once.
    options: those of `TrainConfig` that matter here, `seq`, `batch`, `completions`, `device` and the like. Without a
        `method` the base is what the adapter was trained on, else as stored.

    The loss is the mean cross-entropy, in nats, over all tokens that are trained. Raises UserError.
    """
    from entrenar_gpu.session import default_base
    from entrenar_gpu.train import evaluate_data

    with naming_arguments():
        folder = None if adapter is None else path_text(adapter, "--adapter")
        window = None if window is None else whole_number(window, "--window", 1)
        defaults, _ = default_base(model, folder, options)
        config = TrainConfig.from_mapping({"model": model, "adapter_init": folder, **defaults, **options}, "evaluate")
        return evaluate_data(config, folder is not None, data, window)


def merge(model: str | Path, adapter: str | Path, output: str | Path, base: str = "stored") -> list[str]:
    """Fold a PEFT adapter into its model, as safetensors that transformers loads; returns what is worth knowing of it.

    base: "stored" for the weights as they are, each in its dtype; "nf4" for their NF4 form, in float32, which a QLoRA
        run trains on.

    Raises UserError, with nothing written.
    """
    from entrenar_gpu.export import merge_model

    with naming_arguments():
        return merge_model(model, adapter, output, base)


def export_model(
    model: str | Path,
    output: str | Path,
    to: str = "gguf",
    adapter: str | Path | None = None,
    dtype: str = "F16",
    base: str = "stored",
    adapter_only: bool = False,
) -> None:
    """Write a model, with its adapter folded in, or an adapter alone, as another program reads it.

    to: "gguf" (llama.cpp, Ollama, LM Studio), "peft" or "mlx"; the last two are the adapter alone, and so is GGUF with
        `adapter_only`.
    adapter: a folder of PEFT, of mlx-lm, or of a run.
    dtype: of a GGUF's weights: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.
    base: fold the adapter into the "stored" weights, or into their "nf4" form.

    Raises UserError, with nothing written.
    """
    from entrenar_gpu import export

    with naming_arguments():
        export.export_model(model, output, to, adapter, dtype, base, adapter_only)


def plan(model: str | Path, profile: str | None = None, evaluates: bool = False, **options: Any) -> dict[str, Any]:
    """What a run would allocate, in bytes by purpose, without weights or a GPU: "peak_bytes", "activation_bytes", ...

    profile: capabilities to plan for: "webgpu", "desktop" (the default), "large"; or give `device`.
    evaluates: plan for evaluation during training too.
    options: those of `TrainConfig`; one row a batch unless `batch` says otherwise.

    Raises UserError, as where nothing fits into `memory_budget`.
    """
    from entrenar_gpu.session import caps_for, memory_budget, plan_run

    with naming_arguments():
        config = TrainConfig.from_mapping({"model": model, "batch": 1, **options}, "plan")
        caps = caps_for(config.device, config.engine, profile)
        return plan_run(config, caps, memory_budget(config, caps).nbytes, evaluates).to_mapping()


def quantize(model: str | Path, output: str | Path, double_quant: bool = True) -> None:
    """Write a model with its projections in NF4, in bitsandbytes' layout, which transformers loads as it is.

    double_quant: quantise the block scales to 8 bits too (QLoRA, arXiv 2305.14314, section 3).

    Raises UserError, with nothing written.
    """
    from entrenar_gpu.export import quantize_model
    from entrenar_gpu.files import FolderLock, sweep
    from entrenar_gpu.model import HFCheckpoint, resolve_model

    with naming_arguments():
        folder = Path(path_text(output, "--output"))
        checkpoint = HFCheckpoint.open(resolve_model(model))
        with FolderLock(folder):
            sweep(folder)
            quantize_model(checkpoint, folder, double_quant)
