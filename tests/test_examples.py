"""The examples run as they stand, on a small model of the same family."""

import runpy

import pytest
import yaml

from entrenar_gpu.config import TrainConfig
from tests import ROOT
from tests.helpers.tiny import make_data, make_model

LLAMA2 = ROOT / "examples/llama2"
TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}


@pytest.mark.parametrize("name", ["train", "finetune_lora", "finetune_qlora"])
def test_llama2_examples_train_a_small_llama(tmp_path, monkeypatch, capsys, name):
    make_model(tmp_path / "model", **TINY, architectures=["LlamaForCausalLM"], model_type="llama")
    make_data(tmp_path / "train.jsonl", vocab=96, samples=8)
    options = yaml.safe_load((LLAMA2 / f"{name}.yaml").read_text())
    assert TrainConfig(**options).model == "meta-llama/Llama-2-7b-hf"
    small = options | {"device": "numpy", "batch": 1, "seq": 32, "accumulate": 1}
    monkeypatch.setattr(yaml, "safe_load", lambda text: dict(small))
    arguments = [str(tmp_path / "train.jsonl"), str(tmp_path / "run"), str(tmp_path / "model")]
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(LLAMA2 / f"{name}.py"), run_name="__main__")
    assert "finished after" in capsys.readouterr().out
    result = "model.safetensors" if name == "train" else "adapter_model.safetensors"
    assert (tmp_path / "run" / result).exists()
