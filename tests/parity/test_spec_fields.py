"""A wrong value in any field of a model's description shows: in the loss beside transformers', or as an error.

The fields are those of the classes themselves, so that a new one without an entry here fails.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from entrenar_gpu.data import eval_batches  # noqa: E402
from entrenar_gpu.errors import UserError  # noqa: E402
from entrenar_gpu.model import hf_checkpoint, load_model_config  # noqa: E402
from entrenar_gpu.model import rope as ropes  # noqa: E402
from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, NormNames, RmsNorm  # noqa: E402
from entrenar_gpu.model.config import ModelConfig  # noqa: E402
from entrenar_gpu.model.rope import Rope  # noqa: E402
from entrenar_gpu.train.evaluate import evaluate_data  # noqa: E402
from entrenar_gpu.train.run_data import DataReader  # noqa: E402
from tests.helpers.runs import config_of  # noqa: E402
from tests.helpers.tiny import make_data  # noqa: E402
from tests.parity import reference  # noqa: E402

pytestmark = pytest.mark.parity

BAR = 1e-6  # of a loss, relative: as for the models themselves
ATTENTION, MLP, NORM, NAMES, ROPE, MODEL = "attention", "mlp", "norm", "norms", "rope", "model"
# (class, field) -> (family of reference.FAMILIES, where the field is, a wrong value for it). "model": of ModelConfig.
WRONG: dict[tuple[type, str], tuple[str, str, Any]] = {
    (Attention, "hidden_size"): ("gemma3", ATTENTION, 44),
    (Attention, "num_heads"): ("gemma3", ATTENTION, 2),
    (Attention, "num_kv_heads"): ("gemma3", ATTENTION, 1),
    (Attention, "head_dim"): ("gemma3", ATTENTION, 16),
    (Attention, "rope"): ("gemma3", ATTENTION, None),
    (Attention, "qkv_bias"): ("llama-biases-linear", ATTENTION, False),
    (Attention, "out_bias"): ("llama-biases-linear", ATTENTION, False),
    (Attention, "qk_norm"): ("olmo3", ATTENTION, None),
    (Attention, "norm"): ("gemma3", ATTENTION, RmsNorm(20, 1e-6, 0.0)),
    (Attention, "window"): ("gemma3", ATTENTION, None),
    (Attention, "scale"): ("gemma3", ATTENTION, None),
    (Attention, "softcap"): ("gemma2", ATTENTION, None),
    (Attention, "fused"): ("phi4", ATTENTION, False),
    (Attention, "query_rope"): ("ministral3", ATTENTION, None),
    (FeedForward, "hidden_size"): ("gemma3", MLP, 44),
    (FeedForward, "intermediate_size"): ("gemma3", MLP, 100),
    (FeedForward, "activation"): ("gemma3", MLP, "gelu"),
    (FeedForward, "gated"): ("gemma3", MLP, False),
    (FeedForward, "bias"): ("arcee", MLP, False),
    (FeedForward, "gate_path"): ("gemma3", MLP, "mlp.up_proj"),
    (FeedForward, "up_path"): ("gemma3", MLP, "mlp.gate_proj"),
    (FeedForward, "down_path"): ("granite4", MLP, "mlp.down_proj"),
    (FeedForward, "gate_up_path"): ("granite4", MLP, None),
    (RmsNorm, "size"): ("gemma3", NORM, 44),
    (RmsNorm, "eps"): ("gemma3", NORM, 1e-3),
    (RmsNorm, "offset"): ("gemma3", NORM, 0.0),
    (NormNames, "before_attention"): ("gemma3", NAMES, None),
    (NormNames, "after_attention"): ("gemma3", NAMES, None),
    (NormNames, "before_mlp"): ("gemma3", NAMES, None),
    (NormNames, "after_mlp"): ("gemma3", NAMES, None),
    (Layer, "attention"): ("granite3", "layer", lambda layer: replace(layer.attention, scale=None)),
    (Layer, "mlp"): ("granite3", "layer", lambda layer: replace(layer.mlp, activation="gelu")),
    (Layer, "norm"): ("granite3", "layer", lambda layer: replace(layer.norm, eps=1e-2)),
    (Layer, "norms"): ("glm4", "layer", NormNames()),
    (Layer, "residual_multiplier"): ("granite3", "layer", 1.0),
    (Rope, "rotary_dim"): ("glm4", ROPE, 20),
    (Rope, "theta"): ("glm4", ROPE, 500.0),
    (Rope, "scaling"): ("qwen3-yarn", ROPE, None),
    (Rope, "interleaved"): ("glm4", ROPE, False),
    (Rope, "growth"): ("ministral3", "query_rope", None),
    (ModelConfig, "vocab_size"): ("gemma3", MODEL, 210),
    (ModelConfig, "hidden_size"): ("gemma3", MODEL, 44),
    (ModelConfig, "layers"): ("gemma3", MODEL, lambda model: model.layers[::-1]),
    (ModelConfig, "norm"): ("gemma3", MODEL, lambda model: replace(model.norm, offset=0.0)),
    (ModelConfig, "tie_word_embeddings"): ("granite3", MODEL, False),
    (ModelConfig, "embedding_multiplier"): ("gemma3", MODEL, 1.0),
    (ModelConfig, "logits_multiplier"): ("granite3", MODEL, 1.0),
    (ModelConfig, "softcap"): ("gemma2", MODEL, None),
    (ModelConfig, "prefix"): ("gemma3", MODEL, "model.language_model."),
}
# A name, and a bound that refuses rows: nothing is computed from these.
NOT_COMPUTED = {(ModelConfig, "architecture"), (ModelConfig, "max_positions")}
# Frequencies are held to transformers' in test_rope_parity.py, field by field of what describes them.
CLASSES = (Attention, FeedForward, RmsNorm, NormNames, Layer, Rope, ModelConfig)


def test_every_field_has_a_wrong_value():
    fields = {(kind, field.name) for kind in CLASSES for field in dataclasses.fields(kind)}
    assert fields - NOT_COMPUTED == WRONG.keys()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Makes a family's model, once, and says what transformers' loss is."""

    @functools.cache
    def make(family: str) -> tuple[Path, float]:
        folder = tmp_path_factory.mktemp(family)
        reference.save_model(folder / "model", family)
        make_data(folder / "train.jsonl", vocab=reference.SMALL["vocab_size"], samples=6)
        config = settings(folder)
        batches = list(eval_batches(DataReader(config).named("valid"), batch=2, seq=config.seq, pack=True))
        with torch.no_grad():
            return folder, float(reference.loss_of(reference.load_model(folder / "model").double(), batches))

    return make


def settings(folder: Path) -> Any:
    data = str(folder / "train.jsonl")
    return config_of(folder, method="lora", device="numpy", eval_data=data, batch=2)


def loss_of(folder: Path, monkeypatch: Any, change: Callable[[ModelConfig], ModelConfig]) -> float:
    """Our loss, of a model whose description is changed."""

    def changed(path: Any) -> ModelConfig:
        return change(load_model_config(path))

    monkeypatch.setattr(hf_checkpoint, "load_model_config", changed)
    return float(evaluate_data(settings(folder), with_adapter=False)["loss"])


@pytest.mark.parametrize("family", sorted({family for family, _, _ in WRONG.values()}))
def test_the_right_values_hold_the_bar(saved, monkeypatch, family):
    folder, want = saved(family)
    assert abs(loss_of(folder, monkeypatch, lambda config: config) / want - 1) <= BAR


@pytest.mark.parametrize(("kind", "field"), WRONG, ids=[f"{kind.__name__}-{field}" for kind, field in WRONG])
def test_a_wrong_value_shows(saved, monkeypatch, kind, field):
    family, where, value = WRONG[kind, field]
    folder, want = saved(family)

    def change(config: ModelConfig) -> ModelConfig:
        if where == MODEL:
            return with_field(config, field, value)
        layers = tuple(with_field_in(layer, where, field, value) for layer in config.layers)
        return replace(config, layers=layers)

    try:
        loss = loss_of(folder, monkeypatch, change)
    except (UserError, KeyError, ValueError):
        return
    assert abs(loss / want - 1) > 2 * BAR


def with_field(thing: Any, field: str, value: Any) -> Any:
    return replace(thing, **{field: value(thing) if callable(value) else value})


def with_field_in(layer: Layer, where: str, field: str, value: Any) -> Layer:
    if where == "layer":
        return with_field(layer, field, value)
    if where in (ROPE, "query_rope"):
        rope = with_field(getattr(layer.attention, where), field, value)
        return replace(layer, attention=replace(layer.attention, **{where: rope}))
    return replace(layer, **{where: with_field(getattr(layer, where), field, value)})


def test_every_scaling_is_a_class_of_its_own():
    """What `test_rope_parity` compares by name is what a description holds."""
    kinds = {kind for kind in vars(ropes).values() if isinstance(kind, type) and kind.__name__.endswith("Scaling")}
    assert len(kinds - {ropes.Scaling}) == len(ropes.SCALINGS) - 2
