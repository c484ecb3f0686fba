"""Families: what their lists of weights hold and in which order, and that a new one is a single file."""

from __future__ import annotations

import pytest

from entrenar_gpu.errors import UserError
from entrenar_gpu.graph.caps import Caps
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.model import families, registry
from entrenar_gpu.model.decoder import Transformer
from entrenar_gpu.model.parameters import Storage, declared_weights
from entrenar_gpu.model.registry import known_families, parse_model_config
from tests.helpers.runs import train
from tests.helpers.tiny import QWEN3, make_data, make_model

LAYER = [
    *("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    *("self_attn.o_proj.weight", "post_attention_layernorm.weight"),
    *("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
]
# What a layer has beyond that.
EXTRA = {
    "llama": set(),
    "qwen2": {f"self_attn.{name}_proj.bias" for name in "qkv"},
    "qwen3": {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
}


def config_of(family: str, **changes):
    (architecture,) = known_families()[family].ARCHITECTURES
    return parse_model_config(QWEN3 | {"architectures": [architecture], "model_type": family} | changes)


@pytest.mark.parametrize("family", EXTRA)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_a_family(family, tied):
    names = [spec.name for spec in config_of(family, tie_word_embeddings=tied).weights]
    inner = [name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")]
    assert [name for name in inner if name not in EXTRA[family]] == LAYER
    assert set(inner) - set(LAYER) == EXTRA[family]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == ("model.norm.weight" if tied else "lm_head.weight")
    assert len(names) == 2 + 2 * len(inner) + (not tied)


@pytest.mark.parametrize("family", EXTRA)
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_weights_are_listed_in_the_order_the_model_runs(family, method):
    """The graph declares each as it comes to it."""
    config = config_of(family, tie_word_embeddings=False)
    graph, storage = Graph("g"), Storage(method)
    Transformer(graph, config, storage, Caps(), 1, 8).loss_sum()
    declared = [
        tensor.name for weight in declared_weights(config.weights, storage, Caps()) for tensor in weight.tensors
    ]
    of_weights = set(declared)
    assert [name for name in graph.persistents if name in of_weights] == declared


def test_kinds_say_what_is_quantised_adapted_and_sharded():
    kinds = {spec.name: (spec.kind, spec.adaptable) for spec in config_of("qwen2", tie_word_embeddings=False).weights}
    assert kinds["model.embed_tokens.weight"] == ("embedding", False)
    assert kinds["lm_head.weight"] == ("head", False)
    assert kinds["model.layers.1.self_attn.k_proj.weight"] == ("projection", True)
    assert kinds["model.layers.1.self_attn.k_proj.bias"] == ("bias", False)
    assert kinds["model.norm.weight"] == ("norm", False)


def test_architectures_win_over_the_model_type():
    both = QWEN3 | {"architectures": ["LlamaForCausalLM"], "model_type": "qwen3"}
    assert parse_model_config(both).architecture == "llama"
    assert parse_model_config(QWEN3 | {"architectures": None}).architecture == "qwen3"
    with pytest.raises(
        UserError, match=r"architecture 'Other' is not supported; supported: ArceeForCausalLM, .*LlamaForCausalLM, "
    ):
        parse_model_config(QWEN3 | {"architectures": ["Other"]})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_bias_is_on_all_four_projections(family):
    names = {spec.name for spec in config_of(family, attention_bias=True).weights}
    assert {f"model.layers.1.self_attn.{name}_proj.bias" for name in "qkvo"} <= names


NEW_FAMILY = """
from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("ToyForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    plain = Layer(Attention.read(file), FeedForward.read(file), RmsNorm.read(file))
    first = Layer(Attention.read(file, qkv_bias=True, qk_norm="heads"), FeedForward.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [first, *[plain] * (file.num_layers - 1)])
"""


def test_a_family_is_one_file(tmp_path, monkeypatch):
    """Its layers may differ from each other, and it trains."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "toy.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    registry.known_families.cache_clear()
    try:
        small = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96}
        make_model(tmp_path / "model", architectures=["ToyForCausalLM"], model_type="toy", **small)
        make_data(tmp_path / "train.jsonl", vocab=96)
        losses = train(tmp_path, method="full", device="numpy", steps=6, lr=1e-2)
    finally:
        registry.known_families.cache_clear()
    assert losses[-1] < losses[0]
