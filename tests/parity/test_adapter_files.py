"""Files of adapters and checkpoints, exchanged with PEFT, transformers and bitsandbytes in both directions."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from entrenar_gpu.adapters.peft_files import load_adapter, save_adapter
from entrenar_gpu.adapters.spec import AdapterSpec, init_adapter
from entrenar_gpu.export.hf_writer import copy_model_files, save_checkpoint
from entrenar_gpu.files.tensor_source import TensorSource
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from entrenar_gpu.model.registry import load_model_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes.functional")

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random Qwen3 with grouped heads and tied embeddings, in bfloat16; see test_nf4_parity on its widths."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def base(folder: Path):
    return transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora_layers(model) -> dict[str, object]:
    """PEFT's LoRA layers by the path of the module they wrap."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix): m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}


SELECTIONS = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "mlp.up_proj", "proj"], "exclude_modules": ["model.layers.1.mlp.up_proj"]},
    {"target_modules": r".*\.(1|2)\..*\.(q|down)_proj", "use_rslora": True},
    {"target_modules": ["q_proj", "model.layers.0.mlp.gate_proj"], "layers_to_transform": [2]},
    {"target_modules": ["v_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "layers"]},
    {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {r"layers\.1\..*": 2, "proj": 30, "up_proj": 5, "model.layers.2.self_attn.k_proj": 7},
        "alpha_pattern": {r".*\.0\.[^.]*\.k_proj": 3, "k_proj": 1, "q_proj": 9},
    },
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: json.dumps(s)[:60])
def test_adapters_of_peft_are_read(folder, tmp_path, selection):
    """The same modules, ranks and scales, and every tensor to the bit."""
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, **selection)
    model = peft.get_peft_model(base(folder), config)
    model.save_pretrained(tmp_path)
    spec, tensors = load_adapter(tmp_path, load_model_config(folder))
    layers = lora_layers(model)
    assert {path: (m.rank, m.scale) for path, m in spec.modules.items()} == {
        path: (layer.r["default"], layer.scaling["default"]) for path, layer in layers.items()
    }
    for path, module in spec.modules.items():
        assert tensors[module.a_name].tobytes() == layers[path].lora_A["default"].weight.detach().numpy().tobytes()
        assert tensors[module.b_name].tobytes() == layers[path].lora_B["default"].weight.detach().numpy().tobytes()


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: json.dumps(s)[:60])
def test_peft_reads_our_adapters(folder, tmp_path, selection):
    peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **selection).save_pretrained(tmp_path)
    spec = AdapterSpec.from_peft(tmp_path, load_model_config(folder))
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in spec.shapes().items()}
    save_adapter(tmp_path / "ours", spec, tensors, str(folder))
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning):  # of missing and unexpected tensors, and patterns that match none
            warnings.simplefilter("error", kind)
        layers = lora_layers(peft.PeftModel.from_pretrained(base(folder), tmp_path / "ours"))
    assert {path: (layer.r["default"], layer.scaling["default"]) for path, layer in layers.items()} == {
        path: (m.rank, m.scale) for path, m in spec.modules.items()
    }
    for path, module in spec.modules.items():
        np.testing.assert_array_equal(layers[path].lora_A["default"].weight.detach().numpy(), tensors[module.a_name])
        np.testing.assert_array_equal(layers[path].lora_B["default"].weight.detach().numpy(), tensors[module.b_name])


@pytest.mark.parametrize(("kind", "init"), [("kaiming", True), ("gaussian", "gaussian")])
def test_a_starts_with_the_spread_that_peft_gives_it(folder, tmp_path, kind, init):
    config = peft.LoraConfig(r=16, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=init)
    layers = lora_layers(peft.get_peft_model(base(folder), config))
    config.save_pretrained(tmp_path)
    spec = AdapterSpec.from_peft(tmp_path, load_model_config(folder))
    ours = init_adapter(spec, seed=0, kind=kind)
    theirs = {m.a_name: layers[path].lora_A["default"].weight.detach().numpy() for path, m in spec.modules.items()}
    for width in {shape[1] for name, shape in spec.shapes().items() if name in theirs}:
        pairs = [(ours[name].ravel(), theirs[name].ravel()) for name in theirs if theirs[name].shape[1] == width]
        a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
        # the standard error of a deviation is below 1/sqrt(2 n), for each of the two
        assert abs(a.std() / b.std() - 1) < 4 / np.sqrt(a.size)
        assert abs(np.abs(a).max() / np.abs(b).max() - 1) < (0.01 if kind == "kaiming" else 0.5)


@pytest.mark.parametrize("double", [False, True])
def test_checkpoints_quantised_by_bitsandbytes_are_read(folder, tmp_path, double):
    """Codes, scales and values of every projection are those of the model that transformers saved."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    model = transformers.Qwen3ForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path)
    checkpoint, parameters = HFCheckpoint.open(tmp_path), dict(model.named_parameters())
    quantised = [spec.name for spec in checkpoint.config.weights if checkpoint.is_nf4(spec.name)]
    assert len(quantised) == 3 * 7
    for name in quantised:
        weight, parameter = checkpoint.nf4(name), parameters[name]
        assert (weight.double, weight.dtype) == (double, "bfloat16")
        np.testing.assert_array_equal(weight.codes, parameter.data.numpy().ravel())
        values = bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        np.testing.assert_array_equal(checkpoint.f32(name), values.float().numpy())
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(checkpoint.f32(name), parameters[name].detach().float().numpy())


@pytest.mark.parametrize("shard_bytes", [50_000, 1 << 30])
def test_transformers_loads_what_we_write(folder, tmp_path, shard_bytes):
    checkpoint = HFCheckpoint.open(folder)
    sources = [
        TensorSource(spec.name, spec.shape, "F32", lambda name=spec.name: checkpoint.f32(name) + np.float32(1))
        for spec in checkpoint.config.weights
    ]
    assert (len(save_checkpoint(tmp_path, sources, shard_bytes)) > 1) == (shard_bytes == 50_000)
    copy_model_files(folder, tmp_path, "float32")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, values in model.named_parameters():
        assert values.dtype == torch.float32
        np.testing.assert_array_equal(values.detach().numpy(), checkpoint.f32(name) + np.float32(1))
