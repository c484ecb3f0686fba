"""Adapters of the embedding and the output head against PEFT: losses, gradients, files both ways, merging, decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from entrenar_gpu.adapters import load_adapter, save_adapter  # noqa: E402
from entrenar_gpu.export.merge import merge_adapter  # noqa: E402
from entrenar_gpu.infer.decoder import Decoder  # noqa: E402
from entrenar_gpu.model import HFCheckpoint, load_model_config  # noqa: E402
from entrenar_gpu.train.trainer import Trainer  # noqa: E402
from tests.helpers.runs import config_of, gradients, run_micro_batches  # noqa: E402
from tests.helpers.tiny import make_data  # noqa: E402
from tests.parity import reference  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.gpu]

LOSS_BAR, GRADIENT_BAR, LOGITS_BAR = 1e-6, 2e-5, 1e-5  # as in test_model_parity
IDS = [3, 5, 140, 9, 3, 200, 61, 7]

# What PEFT is asked for beside projections. Tokens: in no order, one that the data has and one that it may not have.
KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["up_proj", "lm_head"], "use_rslora": True},
    "both": {"target_modules": ["v_proj", "embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 3}},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 210]},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [5]},
    },
    "tokens, saved head": {
        **{"target_modules": ["q_proj"], "trainable_token_indices": [9, 3]},
        "modules_to_save": ["lm_head"],
    },
}
REFUSED_BY_PEFT = [("tokens, saved head", "tied")]  # the head's wrapper is of a layer that the tokens' does not know
CASES = [(k, m) for k in KINDS for m in ("tied", "untied") if (k, m) not in REFUSED_BY_PEFT]
MODELS = {"tied": "gemma2", "untied": "llama2"}  # of the first, embeddings are multiplied and logits bent


def adapter_of(folder: Path, base: Any, **options: Any) -> Any:
    """A model with a PEFT adapter in which nothing is as it starts."""
    wrapped = reference.random_adapter(folder, base, init_lora_weights=False, **options)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                changes = "modules_to_save" in name or "trainable_tokens" in name
                parameter.copy_((parameter if changes else 0) + 0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return wrapped


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0].numpy()


def our_logits(model: Path, adapter: Path, **options: Any) -> np.ndarray:
    """Every token's, a prompt's piece at first and then token by token."""
    config = config_of(model.parent, **options)
    with Decoder.open(config, 2, 16, chunk=4, adapters={"a": adapter}) as decoder:
        decoder.set_adapter("a")
        return np.concatenate([decoder.extend({1: part}, all_logits=True)[1] for part in (IDS[:5], IDS[5:6], IDS[6:])])


def check_near(got: np.ndarray, want: np.ndarray) -> None:
    assert np.linalg.norm(got - want) <= LOGITS_BAR * np.linalg.norm(want)


def our_names(model: Any) -> dict[str, np.ndarray]:
    return {n.replace(".original_module", ""): g for n, g in reference.gradients(model).items()}


@pytest.mark.parametrize("executor", ["gpu", "numpy"])
@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_losses_gradients_and_logits(tmp_path, request, kind, tied, executor):
    """NF4 projections; PEFT's adapter is read, trained one step, merged and decoded with."""
    kernels = request.getfixturevalue("kernels") if executor == "gpu" else None
    model = reference.save_model(tmp_path / "model", MODELS[tied])
    make_data(tmp_path / "train.jsonl", vocab=reference.SMALL["vocab_size"])
    base = reference.load_model(model, quantised=True)
    theirs = adapter_of(tmp_path / "adapter", base, **KINDS[kind])
    options = {
        "method": "qlora",
        "adapter_init": str(tmp_path / "adapter"),
        "device": "numpy" if kernels is None else None,
    }
    trainer = Trainer(config_of(tmp_path, **options), kernels=kernels)
    try:
        step = next(trainer.batches)
        loss = reference.loss_of(theirs, step.micro_batches)
        loss.backward()
        run_micro_batches(trainer, step)
        assert abs(trainer.executor.read("loss")[0] / loss.item() - 1) <= LOSS_BAR
        ours = joined(gradients(trainer))
    finally:
        trainer.session.close()
    want = our_names(theirs)
    assert ours.keys() == want.keys()
    for name, gradient in want.items():
        error = np.linalg.norm(ours[name] - gradient) / np.linalg.norm(gradient)
        assert error <= GRADIENT_BAR, f"{name}: gradient is {error:.1e} off"
    if kernels is None:
        check_near(our_logits(model, tmp_path / "adapter", method="qlora", device="numpy"), logits_of(theirs))


def joined(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tables whole again."""
    found: dict[str, list[np.ndarray]] = {}
    for name, values in tensors.items():
        found.setdefault(name.partition(".shard")[0], []).append(values)
    return {name: np.concatenate(parts) for name, parts in found.items()}


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_files_go_both_ways(tmp_path, kind, tied):
    """PEFT's file is read and written again, to the bit; what PEFT then reads, and what is merged, gives its logits."""
    model = reference.save_model(tmp_path / "model", MODELS[tied])
    theirs = adapter_of(tmp_path / "adapter", reference.load_model(model), **KINDS[kind])
    want = logits_of(theirs)
    spec, values = load_adapter(tmp_path / "adapter", load_model_config(model))
    save_adapter(tmp_path / "ours", spec, values, str(model))
    again, same = load_adapter(tmp_path / "ours", load_model_config(model))
    assert again.tables == spec.tables
    assert all(np.array_equal(values[n], same[n]) for n in values)
    loaded = peft.PeftModel.from_pretrained(reference.load_model(model), tmp_path / "ours")
    np.testing.assert_array_equal(logits_of(loaded), want)
    merge_adapter(HFCheckpoint.open(model), tmp_path / "adapter", tmp_path / "merged")
    check_near(logits_of(reference.load_model(tmp_path / "merged")), want)
