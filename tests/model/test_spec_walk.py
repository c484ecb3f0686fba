"""A model whose layers differ in all that kernels know: spec x engine x precision x (training, prefill, decode).

The engine is the one that the tests run on (`make test`: wgpu, `make dawn`: Dawn), and the other executor is NumPy, in
f32; what f16 and int8 may be off is what they are on real weights (docs/equality.md), where a variant that is taken for
another is off by as much as there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.infer import decoder, graphs
from entrenar_gpu.infer.decoder import Decoder
from entrenar_gpu.model import registry
from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, NormNames, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile
from entrenar_gpu.model.rope import Rope
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.runs import config_of, gradients, run_micro_batches
from tests.helpers.tiny import make_data, make_model

SANDWICH = NormNames("input_layernorm", "after_attention", "before_mlp", "after_mlp")
# Relative error of loss, of every gradient, and of logits, against NumPy in f32.
BARS = {"f32": (1e-6, 2e-5, 1e-5), "f16": (2e-3, 5e-2, 2e-2), "int8": (3e-2, 3e-1, 1e-1)}
IDS = [3, 80, 41, 9, 9, 77, 12, 64, 30, 5, 18]


def layers_of(file: ConfigFile) -> list[Layer]:
    """Each with what the one before has not; the window is shorter than rows."""
    norm = RmsNorm.read(file)
    plain = Layer(Attention.read(file), FeedForward.read(file), norm)
    attention = plain.attention
    longer = replace(attention, head_dim=80, num_heads=2, num_kv_heads=1, rope=Rope(80, 500.0))
    capped = replace(attention, softcap=1.5, scale=0.3, window=7, qk_norm="heads", norm=replace(norm, offset=1.0))
    fused = replace(attention, rope=Rope(8, 1e4, interleaved=True), fused=True, qk_norm="width", norm=norm)
    ungated = FeedForward(attention.hidden_size, 96, "relu2", gated=False, bias=True)
    return [
        Layer(replace(attention, rope=None, qkv_bias=True, out_bias=True), ungated, norm).windowed(5),
        replace(plain, attention=longer),
        replace(plain, attention=capped, norms=SANDWICH, mlp=replace(plain.mlp, activation="gelu_pytorch_tanh")),
        Layer(fused, replace(plain.mlp, gate_up_path="mlp.gate_up_proj"), norm, residual_multiplier=0.4),
    ]


def read(file: ConfigFile) -> ModelConfig:
    return ModelConfig.read(file, layers_of(file), embedding_multiplier=3.0, logits_multiplier=0.5, softcap=4.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A checkpoint of such a model, which is a family while the tests run."""
    family = ModuleType("walked")
    family.ARCHITECTURES, family.read = ("WalkedForCausalLM",), read  # type: ignore[attr-defined]
    registry.known_families.cache_clear()
    known = {**registry.known_families(), "walked": family}
    path = tmp_path_factory.mktemp("walk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "known_families", lambda: known)
        for module in (decoder, graphs):  # one pass for tokens one by one, one for prompts
            patch.setattr(module, "HEAD_ROWS", 1)
        sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "vocab_size": 96}
        make_model(path / "model", architectures=["WalkedForCausalLM"], model_type="walked", **sizes)
        make_data(path / "train.jsonl", vocab=96)
        yield path


def trained(folder: Path, kernels: Any, **options: Any) -> tuple[float, dict[str, np.ndarray]]:
    """The loss and every gradient of the first step, from an adapter in which nothing is zero."""
    trainer = Trainer(config_of(folder, batch=1, lora_init="gaussian", **options), kernels=kernels)
    try:
        rng = np.random.default_rng(0)
        for name, shape in trainer.session.adapters.shapes().items():
            trainer.executor.write(name, 0.1 * rng.standard_normal(shape, np.float32))
        run_micro_batches(trainer, next(trainer.batches))
        scale = trainer.executor.read("loss_scale")[0]
        return float(trainer.executor.read("loss")[0]), {n: g / scale for n, g in gradients(trainer).items()}
    finally:
        trainer.session.close()


def decoded(folder: Path, kernels: Any, **options: Any) -> np.ndarray:
    """The logits after a prompt's last token, by the passes of prompts, and after each of the next."""
    with Decoder.open(config_of(folder, **options), 1, 48, chunk=32, kernels=kernels) as made:
        first = made.extend({0: IDS[:8]}, prompt=True)[0]
        return np.concatenate([first, *(made.extend({0: [token]}, prompt=False)[0] for token in IDS[8:])])


@pytest.fixture(scope="module")
def exact(folder) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
    options = {"device": "numpy", "precision": "f32"}
    return (*trained(folder, None, **options), decoded(folder, None, **options))


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", BARS)
def test_every_variant_in_training_prefill_and_decode(folder, kernels, exact, precision):
    if precision == "f16" and not kernels.device.caps.f16:
        pytest.skip("the device has no f16")
    (loss, found), (want, wanted, logits) = trained(folder, kernels, precision=precision), exact
    loss_bar, gradient_bar, logits_bar = BARS[precision]
    assert abs(loss / want - 1) <= loss_bar
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert error(found[name], gradient) <= gradient_bar, name
    assert error(decoded(folder, kernels, precision=precision), logits) <= logits_bar
