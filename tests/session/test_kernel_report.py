"""What `plan` says of kernels: the variant that a faster one lacks takes one that has it, and is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.graph import Caps
from entrenar_gpu.infer.graphs import plan_decoder
from entrenar_gpu.session.plan_report import PROFILES, plan_run
from tests.ops.test_matrix_units import NVIDIA

SMALL = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
GEMMA2 = SMALL | {"architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 192}
MATRICES = replace(PROFILES["large"], matrices=(NVIDIA,))


@pytest.fixture
def model(tmp_path: Path) -> str:
    raw = GEMMA2 | {"sliding_window": 16, "attn_logit_softcapping": 50.0, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return str(tmp_path)


def told(report: list[dict[str, Any]], what: str) -> dict[str, tuple[int, dict[str, list[str]]]]:
    return {use["variant"]: (use["layers"], use["kernels"]) for use in report if use["what"] == what}


def training(model: str, caps: Caps, precision: str = "f16") -> list[dict[str, Any]]:
    config = TrainConfig(model=model, batch=1, seq=64, precision=precision)
    return plan_run(config, caps, 1 << 30, evaluates=False).to_mapping()["kernels"]


def test_layers_that_differ_have_lines_of_their_own(model):
    """Soft caps are not multiplied by matrix units; everything else of such a device is."""
    found = told(training(model, MATRICES), "attention")
    assert found.keys() == {"heads of 64, window 16, soft cap 50", "heads of 64, soft cap 50"}
    for layers, kernels in found.values():
        assert layers == 2
        assert kernels["forward"] == ["attention"]
        assert kernels["backward"][:2] == ["attention_dscores", "attention_grad"]
    layers, kernels = told(training(model, MATRICES), "projections")["NF4, f16"]
    assert layers == 4
    assert "matmul_matrix" in kernels["forward"]
    assert told(training(model, PROFILES["webgpu"], "f32"), "projections").keys() == {"NF4, f32"}


def test_without_a_cap_attention_is_on_matrix_units(model):
    raw = json.loads((Path(model) / "config.json").read_text()) | {"attn_logit_softcapping": None}
    (Path(model) / "config.json").write_text(json.dumps(raw))
    for _, kernels in told(training(model, MATRICES), "attention").values():
        assert "attention_matrix" in kernels["forward"]
        assert {"attention_dscores_matrix", "attention_grad_matrix"} <= set(kernels["backward"])


def test_a_decoder_has_kernels_of_its_own(model):
    config = TrainConfig(model=model, batch=2, precision="f16")
    report = plan_decoder(config, MATRICES, 1 << 30, context=64).to_mapping()["kernels"]
    for _, kernels in told(report, "attention").values():
        assert kernels.keys() == {"decode", "prefill"}
        assert kernels["decode"][0] == "cached_attention"
        assert kernels["prefill"][0] == "cached_attention_block"
    (heads,) = told(report, "head").values()
    assert heads[1]["decode"] == ["gemv"]
