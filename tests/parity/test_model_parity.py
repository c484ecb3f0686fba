"""Loss, gradients and logits of whole models against transformers and PEFT, in f32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes.functional")

from entrenar_gpu.export.merge import merge_adapter  # noqa: E402
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint  # noqa: E402
from entrenar_gpu.session.graphs import logits_graph  # noqa: E402
from entrenar_gpu.session.session import Session  # noqa: E402
from entrenar_gpu.train.trainer import Trainer  # noqa: E402
from tests.helpers.runs import config_of, gradients, run_micro_batches  # noqa: E402
from tests.helpers.tiny import make_data  # noqa: E402
from tests.helpers.whole_row import next_logits  # noqa: E402
from tests.parity import reference  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.gpu]

LOSS_BAR, GRADIENT_BAR = 1e-6, 2e-5  # relative; DESIGN's "whole model vs transformers + PEFT"
# Logits have no bar of their own: sums of at most 112 products through two layers, each good for about 1e-6.
LOGITS_BAR = 1e-5


def make_run(folder: Path, architecture: str, dtype: Any = None, **changes: Any) -> Path:
    reference.save_model(folder / "model", architecture, dtype=dtype or torch.float32, **changes)
    make_data(folder / "train.jsonl", vocab=reference.SMALL["vocab_size"])
    return folder


def compare(folder: Path, kernels: Any, model: Any, **options: Any) -> None:
    """Loss and every gradient of the first step. `model` holds what we load from `folder`."""
    trainer = Trainer(config_of(folder, **options), kernels=kernels)
    try:
        step = next(trainer.batches)
        loss = reference.loss_of(model, step.micro_batches, trainer.config.label_smoothing)
        loss.backward()
        run_micro_batches(trainer, step)
        assert abs(trainer.executor.read("loss")[0] / loss.item() - 1) <= LOSS_BAR
        check_gradients(gradients(trainer), reference.gradients(model))
    finally:
        trainer.session.close()


def check_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        norm = np.linalg.norm(want.astype(np.float64))
        assert norm > 0, name
        error = np.linalg.norm(ours[name].astype(np.float64) - want) / norm
        assert error <= GRADIENT_BAR, f"{name}: gradient is {error:.1e} off"


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("architecture", reference.ARCHITECTURES)
def test_loss_and_adapter_gradients(tmp_path, kernels, architecture, method):
    """All seven projections, samples packed; the peer sees each sample alone."""
    folder = make_run(tmp_path, architecture)
    base = reference.load_model(folder / "model", quantised=True if method == "qlora" else None)
    model = reference.random_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    compare(folder, kernels, model, method=method, adapter_init=str(tmp_path / "adapter"))


@pytest.mark.parametrize("family", reference.FAMILIES)
def test_families(tmp_path, kernels, family):
    """NF4 weights, so that every kind of product is met; adapters on each of them."""
    folder = make_run(tmp_path, family)
    base = reference.load_model(folder / "model", quantised=True)
    model = reference.random_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    compare(folder, kernels, model, method="qlora", adapter_init=str(tmp_path / "adapter"))


@pytest.mark.parametrize("family", reference.SEEING)
def test_language_parts_of_models_that_also_see(tmp_path, kernels, family):
    """The language part is trained as PEFT trains it; merged, transformers loads the whole, the rest as it was."""
    folder = tmp_path
    reference.save_seeing_model(folder / "model", family)
    make_data(folder / "train.jsonl", vocab=reference.SMALL["vocab_size"])
    base = reference.load_model(folder / "model", sees=True)
    rest = {
        n: p.detach().clone() for n, p in base.named_parameters() if "language_model" not in n and "lm_head" not in n
    }
    assert rest
    wanted = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
    model = reference.random_adapter(tmp_path / "adapter", base, target_modules=wanted)
    compare(folder, kernels, model, method="lora", adapter_init=str(tmp_path / "adapter"))
    merge_adapter(HFCheckpoint.open(folder / "model"), tmp_path / "adapter", folder / "merged")
    merged = reference.load_model(folder / "merged", sees=True)
    check_logits(their_logits(merged, IDS), their_logits(model, IDS))
    for name, parameter in merged.named_parameters():
        assert name not in rest or torch.equal(parameter, rest[name]), name


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "q and v alone": ({"target_modules": ["q_proj", "v_proj"]}, {}),
    "mlp, one layer left out": ({"target_modules": r".*\.0\.mlp\.(gate|down)_proj|.*up_proj"}, {}),
    "rslora, one odd rank": ({"target_modules": "all-linear", "use_rslora": True, "r": 3}, {}),
    "rank and alpha patterns": (
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 1, r"layers\.1\.mlp.*": 9, "o_proj": 48},
            "alpha_pattern": {"v_proj": 1.5},
        },
        {},
    ),
    "label smoothing, two micro-batches": (
        {"target_modules": ["k_proj", "o_proj", "up_proj"]},
        {"label_smoothing": 0.15, "accumulate": 2},
    ),
    "one row a sample": ({"target_modules": ["q_proj", "down_proj"]}, {"pack": False}),
    "single quantisation": ({"target_modules": ["k_proj", "gate_proj"]}, {"method": "qlora", "double_quant": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_of_every_selection(tmp_path, kernels, variant):
    selection, options = VARIANTS[variant]
    folder = make_run(tmp_path, "qwen3-tied")
    base = reference.load_model(folder / "model", quantised=options.get("double_quant"))
    model = reference.random_adapter(tmp_path / "adapter", base, **selection)
    compare(folder, kernels, model, **({"method": "lora", "adapter_init": str(tmp_path / "adapter")} | options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_stored_in_16_bits(tmp_path, kernels, dtype):
    """Widened exactly: no bar of its own."""
    folder = make_run(tmp_path, "qwen2", getattr(torch, dtype))
    model = reference.random_adapter(
        tmp_path / "adapter", reference.load_model(folder / "model"), target_modules="all-linear"
    )
    compare(folder, kernels, model, method="lora", adapter_init=str(tmp_path / "adapter"))


FULL = ["qwen3-tied", "qwen2", "llama31", "gemma2", "gemma3", "granite4", "olmo2", "phi4", "glm4", "arcee"]


@pytest.mark.parametrize("architecture", FULL)
def test_gradients_of_every_weight(tmp_path, kernels, architecture):
    """Full training: norms, biases and embeddings too, the tied one with both its uses."""
    folder = make_run(tmp_path, architecture)
    model = reference.load_model(folder / "model")
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    trainer = Trainer(config_of(folder, method="full"), kernels=kernels)
    try:
        step = next(trainer.batches)
        loss = reference.loss_of(model, step.micro_batches)
        loss.backward()
        run_micro_batches(trainer, step)
        assert abs(trainer.executor.read("loss")[0] / loss.item() - 1) <= LOSS_BAR
        theirs = reference.gradients(model)
        assert {n.removesuffix(".shard0") for n in trainer.session.trainable()} == theirs.keys()
        paged = {f"{name}.shard0" if name in embeddings else name: gradient for name, gradient in theirs.items()}
        check_gradients(gradients(trainer), paged)
    finally:
        trainer.session.close()


def our_logits(
    kernels: Any, model: Path, ids: list[int], adapter: Path | None = None, method: str = "lora"
) -> np.ndarray:
    """Logits [len(ids), V], one prefix at a time."""

    def trace(shape: Any, caps: Any) -> Any:
        return {"logits": logits_graph(shape, caps)}

    config = config_of(model.parent, model=str(model), batch=1, method=method, adapter_init=adapter and str(adapter))
    session = Session.open(config, trace, with_adapter=adapter is not None, kernels=kernels)
    try:
        return np.stack([next_logits(session, ids[: n + 1]) for n in range(len(ids))])
    finally:
        session.close()


def their_logits(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def check_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.linalg.norm(ours - theirs) <= LOGITS_BAR * np.linalg.norm(theirs)


IDS = [5, 17, 200, 3, 90, 91, 92, 150, 8]


def test_our_adapter_in_peft_and_merged_in_transformers(tmp_path, kernels):
    """Trained by us, loaded by them: one function, three ways to it."""
    folder = make_run(tmp_path, "qwen3-tied")
    options = {"method": "lora", "steps": 5, "lr": 2e-2, "rslora": True, "target": "q,o,up,down"}
    trainer = Trainer(config_of(folder, **options), kernels=kernels)
    for _ in trainer.steps():
        pass
    trainer.session.close()
    ours = our_logits(kernels, folder / "model", IDS, folder / "run")
    base = reference.load_model(folder / "model")
    untrained = their_logits(base, IDS)
    assert np.linalg.norm(ours - untrained) > 1e-2 * np.linalg.norm(untrained)
    check_logits(ours, their_logits(peft.PeftModel.from_pretrained(base, folder / "run"), IDS))
    merge_adapter(HFCheckpoint.open(folder / "model"), folder / "run", folder / "merged")
    check_logits(ours, their_logits(reference.load_model(folder / "merged"), IDS))
    check_logits(our_logits(kernels, folder / "merged", IDS), ours)


def test_our_full_training_in_transformers(tmp_path, kernels):
    folder = make_run(tmp_path, "llama2")
    trainer = Trainer(config_of(folder, method="full", steps=3), kernels=kernels)
    for _ in trainer.steps():
        pass
    trainer.session.close()
    ours = our_logits(kernels, folder / "run", IDS)
    untrained = their_logits(reference.load_model(folder / "model"), IDS)
    assert np.linalg.norm(ours - untrained) > 1e-2 * np.linalg.norm(untrained)
    check_logits(ours, their_logits(reference.load_model(folder / "run"), IDS))


@pytest.mark.parametrize("double", [False, True])
def test_a_checkpoint_of_bitsandbytes_is_used_as_it_is(tmp_path, kernels, double):
    """Its own codes and scales, rounded to bfloat16 as its state says. Widths of whole blocks: see test_nf4_parity."""
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    reference.save_model(tmp_path / "dense", "qwen3-tied", dtype=torch.bfloat16, **wide)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    stored = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    stored.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]["load_in_4bit"]
    dequantised = reference.load_model(tmp_path / "dense")
    quantised = {n: p for n, p in stored.named_parameters() if hasattr(p, "quant_state")}
    assert len(quantised) == 2 * 7
    for name, parameter in dequantised.named_parameters():
        if name in quantised:
            values = bnb.dequantize_4bit(quantised[name].data, quantised[name].quant_state)
            parameter.data = values.float()
    ours = our_logits(kernels, tmp_path / "model", IDS, method="qlora")
    check_logits(ours, their_logits(dequantised, IDS))
