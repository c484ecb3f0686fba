"""GGUF files against transformers, which reads them, and llama.cpp (npm's node-llama-cpp, where it is installed)."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from entrenar_gpu.export import export_model, merge_model
from tests import ROOT
from tests.data.test_chat import model_folder
from tests.export.test_gguf import make, make_adapter

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
reference = pytest.importorskip("tests.parity.reference")
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


NEEDS_NODE = pytest.mark.skipif(
    not (NODE / "node_modules").is_dir() or shutil.which("node") is None, reason="make llama-cpp"
)


def llama_cpp(model: Path, lora: Path | None, count: int = 12, prompts: Sequence[str] = PROMPTS) -> list[dict]:
    command = ["node", "llama_cpp_check.mjs", str(model), str(lora) if lora else "-", str(count), *prompts]
    run = subprocess.run(command, cwd=NODE, capture_output=True, text=True, timeout=600, check=True)
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


# A configuration of transformers for every family that llama.cpp knows, with weights so large that no two tokens are
# near each other; windows are shorter than the prompt.
SMALL = {
    **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5, "max_position_embeddings": 512},
    **{"bos_token_id": None, "eos_token_id": None},
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
SPREAD = {
    "short_factor": [1 + i / 8 for i in range(8)],
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama31": ("Llama", {"rope_parameters": reference.LLAMA31}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "llama-yarn": ("Llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "qwen3-yarn": ("Qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("Phi3", {}),
    "phi4-mini": ("Phi3", {"tie_word_embeddings": True, "partial_rotary_factor": 0.5}),
    "phi4-longrope": ("Phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **SPREAD}}),
    "granite": ("Granite", {**reference.GRANITE, "logits_scaling": 0.5}),
    "olmo2": ("Olmo2", {}),
    "glm4": ("Glm4", {"head_dim": 32, "partial_rotary_factor": 0.5}),
    "smollm3": ("SmolLM3", {}),
    "arcee": ("Arcee", {}),
}


TIE = 0.05  # keys and values are kept in f16: relative errors of 2^-11 in sums of products that reach about 50


def make_family(tmp_path: Path, name: str):
    """A random model as transformers writes it, with a tokenizer."""
    kind, values = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**(SMALL | values)))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if parameter_name.endswith("norm.weight") else 0.0, 0.2)
    model.save_pretrained(tmp_path / "model")
    model_folder(tmp_path / "model", {"bos_token": "<s>", "eos_token": "</s>"}, bos=True)
    return model.eval()


@NEEDS_NODE
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(tmp_path, name):
    """Greedy tokens of every family that is written, with an adapter of its own beside it."""
    from entrenar_gpu.model import HFCheckpoint

    model = make_family(tmp_path, name)
    folder, prompts = str(tmp_path / "model"), ["the quick brown fox ab", "hello world", "once upon a time there was"]
    # Two of GLM's products ask for f32 sums there, and llama.cpp (node-llama-cpp 3.21.1) forgets that an adapter may
    # follow them.
    target = {"target": "q_proj,k_proj,v_proj,gate_up_proj"} if name == "glm4" else {}
    adapter = make_adapter(tmp_path, HFCheckpoint.open(folder), **target)
    export_model(folder, tmp_path / "model.gguf", dtype="F32")
    export_model(folder, tmp_path / "lora.gguf", adapter=adapter, adapter_only=True)
    merge_model(folder, adapter, tmp_path / "merged", "stored")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for theirs, lora in ((model, None), (merged, tmp_path / "lora.gguf")):
        compared = 0
        for found in llama_cpp(tmp_path / "model.gguf", lora, prompts=prompts):
            ids = torch.tensor([found["prompt"]])
            told = theirs.generate(
                ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            said = told.sequences[0, ids.shape[1] :].tolist()
            best = torch.cat(told.logits).topk(2).values
            sure = [bool(gap > TIE) for gap in best[:, 0] - best[:, 1]]
            count = min(len(found["tokens"]), sure.index(False) if False in sure else len(sure))
            assert found["tokens"][:count] == said[:count]
            compared += count
        assert compared >= 4  # llama.cpp stops at tokens that its vocabulary says end something


@NEEDS_NODE
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
