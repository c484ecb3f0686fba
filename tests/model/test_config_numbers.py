"""Numbers of a config.json from a stranger: each is checked before use, and refused in one line that names its key."""

import json
import time

import pytest

from entrenar_gpu.errors import UserError
from entrenar_gpu.model.registry import load_model_config

GOOD = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512, "head_dim": 16, "rope_theta": 1e4,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
COUNTS = [key for key, value in GOOD.items() if isinstance(value, int)]
REALS = ["rms_norm_eps", "rope_theta"]
LONG = ["9" * 4000, "1" + "0" * 400, '"' + "x" * 9999 + '"']
NO_NUMBERS = ["1e400", "-1e400", "NaN", "0", "-3", '"64"', "true", "[1]", "{}", *LONG]
CASES = [(key, text) for key in COUNTS for text in [*NO_NUMBERS, "2.5", str(2**41), "2147483648000"]]
CASES += [(key, text) for key in REALS for text in NO_NUMBERS]


def refusal(folder, text: str) -> str:
    (folder / "config.json").write_text(text)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_model_config(folder)
    assert time.monotonic() - start < 1
    line = str(error.value)
    assert line.startswith(f"{folder}/config.json: ")
    assert "\n" not in line
    assert len(line.removeprefix(str(folder))) < 300
    return line


@pytest.mark.parametrize(("key", "text"), CASES, ids=lambda value: value[:20])
def test_a_number_that_cannot_be_is_refused_by_its_key(tmp_path, key, text):
    assert key in refusal(tmp_path, json.dumps(GOOD | {key: "?"}).replace('"?"', text))


@pytest.mark.parametrize("key", [key for key in LLAMA3 if key != "rope_type"])
@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda value: value[:20])
def test_a_rope_factor_that_cannot_be_is_refused_by_its_key(tmp_path, key, text):
    if key.startswith("original") and text in ("0", "{}"):
        return  # as good as missing: max_position_embeddings stands in
    raw = json.dumps(GOOD | {"rope_scaling": LLAMA3 | {key: "?"}}).replace('"?"', text)
    assert key in refusal(tmp_path, raw)


OTHERS = {
    "shapes whose product overflows": ({"hidden_size": 2**24, "intermediate_size": 2**24}, "parameters"),
    "more layers than anything": ({"num_hidden_layers": 2**31}, "num_hidden_layers"),
    "architectures as a number": ({"architectures": 3}, "architectures"),
    "architectures as text": ({"architectures": "LlamaForCausalLM"}, "architectures"),
    "tied by a word": ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    "layer types as a number": (
        {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": 3},
        "layer_types",
    ),
    "rotary part as a word": ({"partial_rotary_factor": "half"}, "partial_rotary_factor"),
    "rope scaling as a list": ({"rope_scaling": [1] * 999}, "rope_scaling"),
    "an activation of lists": ({"hidden_act": [["silu"] * 999]}, "hidden_act"),
}


@pytest.mark.parametrize(("changes", "key"), OTHERS.values(), ids=OTHERS)
def test_other_values_that_cannot_be(tmp_path, changes, key):
    assert key in refusal(tmp_path, json.dumps(GOOD | changes))


def test_what_is_refused_here_is_only_what_was_changed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GOOD | {"rope_scaling": LLAMA3}))
    assert load_model_config(tmp_path).hidden_size == 64
