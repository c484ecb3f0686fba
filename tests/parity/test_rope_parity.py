"""Every rope scaling against transformers' own function for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

from entrenar_gpu.model.config_file import ConfigFile  # noqa: E402
from entrenar_gpu.model.rope import SCALINGS, Rope  # noqa: E402

pytestmark = pytest.mark.parity

HEAD, PAIRS = 32, 16
LISTS = {"short_factor": [1.0 + i / 4 for i in range(PAIRS)], "long_factor": [2.0 + i for i in range(PAIRS)]}
# rope_type -> what describes it; rows are of 200 positions, past the 128 of the model and the original 64.
DESCRIBED: dict[str, list[dict[str, Any]]] = {
    "linear": [{"factor": 4.0}],
    "dynamic": [{"factor": 3.0}],
    "yarn": [
        {"factor": 4.0, "original_max_position_embeddings": 64},
        {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
        {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.3},
        {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.7},
    ],
    "longrope": [
        {**LISTS, "original_max_position_embeddings": 64},
        {**LISTS, "original_max_position_embeddings": 640, "attention_factor": 1.3},
        {**LISTS, "original_max_position_embeddings": 64, "factor": 9.0},
    ],
    "llama3": [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    ],
    "proportional": [{"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.5, "factor": 3.0}],
}
CASES = [(kind, described) for kind, all_ in DESCRIBED.items() for described in all_]


@pytest.mark.parametrize(("kind", "described"), CASES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(CASES)])
def test_frequencies_and_attention_factor(kind, described):
    parameters = {"rope_type": kind, "rope_theta": 5000.0, **described}
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": HEAD, "max_position_embeddings": 128}
    theirs = transformers.LlamaConfig(**sizes, rope_parameters=dict(parameters))
    want, factor = rope_utils.ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=200)
    rope = Rope.read(ConfigFile({**sizes, "rope_parameters": parameters}, "config.json", "llama"), HEAD)
    np.testing.assert_allclose(rope.frequencies(200), want.double().numpy(), rtol=2e-6)
    table = rope.table(200)
    angles = 150 * np.array(rope.frequencies(200))
    np.testing.assert_allclose(
        table[150], factor * np.concatenate([np.cos(angles), np.sin(angles)]), rtol=1e-5, atol=1e-6
    )


def test_every_scaling_is_compared():
    assert SCALINGS.keys() - {"default", "su"} == DESCRIBED.keys() == rope_utils.ROPE_INIT_FUNCTIONS.keys()
