"""Greedy text of a decoder with a cache, token for token what transformers makes of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from entrenar_gpu.config.train_config import TrainConfig  # noqa: E402
from entrenar_gpu.infer.decoder import Decoder  # noqa: E402
from tests.parity import reference  # noqa: E402

pytestmark = pytest.mark.parity

LOGITS_BAR = 1e-5  # relative; of whole models, as in test_model_parity.py
PROMPTS = {0: [5, 17, 200, 3, 90, 91, 92, 150, 8], 2: [7, 7, 31, 12, 4]}
TOKENS = 64
CONTEXT = 80
# LongRoPE has two sets of factors. transformers takes those for long rows as soon as a row is longer than the model was
# trained for first, a decoder if its context is: 64 here.
SHORT_CONTEXTS = {"phi4-mini": 64}


def follow(decoder: Decoder, model: Any, tokens: int = TOKENS) -> int:
    """Both make tokens greedily for all PROMPTS at once; returns how many were chosen. Where the two best logits of
    transformers are nearer than the bar either counts, and both go on from its token."""
    ids = {slot: list(prompt) for slot, prompt in PROMPTS.items()}
    ours = decoder.extend(ids)
    for _ in range(tokens):
        for slot, held in ids.items():
            with torch.no_grad():
                theirs = model(input_ids=torch.tensor([held])).logits[0, -1].float().numpy()
            bar = LOGITS_BAR * float(np.linalg.norm(theirs))
            assert np.linalg.norm(ours[slot][-1] - theirs) <= bar, f"slot {slot}, token {len(held)}"
            best = int(theirs.argmax())
            chosen = int(ours[slot][-1].argmax())
            assert chosen == best or theirs[best] - theirs[chosen] <= bar
            held.append(best)
        ours = decoder.extend({slot: held[-1:] for slot, held in ids.items()})
    return sum(len(held) - len(PROMPTS[slot]) for slot, held in ids.items())


def check(
    folder: Path, model: Any, method: str, kernels: Any = None, adapter: Path | None = None, context: int = CONTEXT
) -> None:
    config = TrainConfig(model=str(folder), method=method, device="numpy" if kernels is None else None)
    adapters = {} if adapter is None else {"trained": adapter}
    with Decoder.open(config, 3, context, chunk=5, adapters=adapters, kernels=kernels) as decoder:
        decoder.set_adapter(None if adapter is None else "trained")
        tokens = min(TOKENS, context - max(map(len, PROMPTS.values())))
        assert follow(decoder, model, tokens) == tokens * len(PROMPTS)


@pytest.mark.parametrize("family", [*reference.ARCHITECTURES, *reference.FAMILIES])
def test_nf4_with_an_adapter(tmp_path, family):
    """Over the dequantised weights; products, norms, rotations and windows as each family has them."""
    folder = reference.save_model(tmp_path / "model", family)
    base = reference.load_model(folder, quantised=True)
    model = reference.random_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    context = SHORT_CONTEXTS.get(family, CONTEXT)
    check(folder, model, "qlora", adapter=tmp_path / "adapter", context=context)


@pytest.mark.parametrize("family", reference.ARCHITECTURES)
def test_weights_as_stored(tmp_path, family):
    folder = reference.save_model(tmp_path / "model", family)
    check(folder, reference.load_model(folder), "lora")


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "method"), [("qwen3-tied", "qlora"), ("llama31", "lora"), ("gemma2", "qlora")])
def test_on_a_device(tmp_path, kernels, family, method):
    folder = reference.save_model(tmp_path / "model", family)
    base = reference.load_model(folder, quantised=True if method == "qlora" else None)
    model = reference.random_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    check(folder, model, method, kernels, tmp_path / "adapter")


def test_a_token_that_is_not_the_likeliest_is_seen(tmp_path, monkeypatch):
    """The comparison itself: one logit raised in one step of one slot is found."""
    folder = reference.save_model(tmp_path / "model", "qwen3-tied")
    extend = Decoder.extend

    def raised(self: Decoder, batch: Any, *args: Any, **named: Any) -> Any:
        logits = extend(self, batch, *args, **named)
        if self.lengths[2] == 20:
            logits[2][-1, 5] += 9.0
        return logits

    monkeypatch.setattr(Decoder, "extend", raised)
    with pytest.raises(AssertionError, match="slot 2, token 20"):
        check(folder, reference.load_model(folder), "lora")
