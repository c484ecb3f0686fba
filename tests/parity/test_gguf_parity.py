"""GGUF files against transformers, which reads them, and llama.cpp (npm's node-llama-cpp, where it is installed)."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from entrenar_gpu.export import export_model, merge_model
from tests import ROOT
from tests.export.test_gguf import make, make_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytestmark = pytest.mark.parity

SMOLLM2 = ROOT / "artifacts/models/smollm2"  # make models
NODE = ROOT / "build/llama-cpp"  # make llama-cpp
PROMPTS = ["The capital of France is", "Once upon a time"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_transformers_computes_the_same_logits_from_the_file(tmp_path, name):
    # sizes that transformers does not read from a file are those that it takes then
    defaults = {"qwen3": {"head_dim": 128}, "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256}}
    make(tmp_path, name, **defaults.get(name, {}))
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf", dtype="F32")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        stored = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)(ids).logits
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)(
            ids
        ).logits
    np.testing.assert_allclose(read.numpy(), stored.numpy(), rtol=0, atol=1e-4 * float(stored.abs().max()))


def llama_cpp(model: Path, lora: Path | None, count: int = 12) -> list[dict]:
    command = ["node", "llama_cpp_check.mjs", str(model), str(lora) if lora else "-", str(count), *PROMPTS]
    run = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=600, check=True)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.mark.skipif(not (NODE / "node_modules").is_dir() or shutil.which("node") is None, reason="make llama-cpp")
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="make models")
def test_llama_cpp_says_what_transformers_says(tmp_path):
    """The merged model, and the adapter beside the base: the tokens that transformers draws greedily from what
    `merge` wrote, in F32 throughout."""
    from entrenar_gpu.model import HFCheckpoint

    adapter = make_adapter(tmp_path, HFCheckpoint.open(SMOLLM2), alpha=1.0)
    model = str(SMOLLM2)
    export_model(model, tmp_path / "base.gguf", dtype="F32")
    export_model(model, tmp_path / "merged.gguf", dtype="F32", adapter=adapter)
    export_model(model, tmp_path / "lora.gguf", adapter=adapter, adapter_only=True)
    merge_model(model, adapter, tmp_path / "merged", "stored")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMOLLM2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    beside, merged = (
        llama_cpp(tmp_path / "base.gguf", tmp_path / "lora.gguf"),
        llama_cpp(tmp_path / "merged.gguf", None),
    )
    plain = llama_cpp(tmp_path / "base.gguf", None)
    assert [p["tokens"] for p in plain] != [m["tokens"] for m in merged]  # the adapter says something
    for prompt, with_lora, whole in zip(PROMPTS, beside, merged, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert whole["prompt"] == ids[0].tolist()
        said = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
        assert whole["tokens"] == said
        assert with_lora["tokens"] == said
