"""Fifty steps of training against torch's AdamW over transformers and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from transformers.integrations.neftune import neftune_post_forward_hook  # noqa: E402

from entrenar_gpu.data.tokenizer import Tokenizer  # noqa: E402
from entrenar_gpu.model.decoder import NOISE_KEY  # noqa: E402
from entrenar_gpu.ops.dropout import philox  # noqa: E402
from entrenar_gpu.train.evaluate import evaluate_data  # noqa: E402
from entrenar_gpu.train.trainer import Trainer  # noqa: E402
from tests.data.test_chat import assistant, model_folder, user  # noqa: E402
from tests.helpers.chat_templates import QWEN25  # noqa: E402
from tests.helpers.runs import config_of  # noqa: E402
from tests.helpers.tiny import make_data  # noqa: E402
from tests.parity import reference  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.gpu]

STEPS, LOSS_BAR = 50, 5e-5  # DESIGN's bar for 50 AdamW steps
OPTIONS = {"steps": STEPS, "lr": 1e-3, "weight_decay": 0.1, "schedule": "constant", "clip": 0.5}


def make_run(folder: Path, architecture: str) -> Path:
    reference.save_model(folder / "model", architecture)
    make_data(folder / "train.jsonl", vocab=reference.SMALL["vocab_size"])
    return folder


def train_reference(trainer: Trainer, model: Any, groups: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of torch over the batches that `trainer` is going to take."""
    optimizer = torch.optim.AdamW(groups, lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    trained = [p for group in groups for p in group["params"]]
    losses, norms = [], []
    for _ in range(STEPS):
        loss = reference.loss_of(model, next(trainer.batches).micro_batches)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, OPTIONS["clip"])))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def check(trainer: Trainer, model: Any, groups: list[dict[str, Any]]) -> None:
    start = trainer.batches.state()
    losses, norms = train_reference(trainer, model, groups)
    trainer.batches.restore(start)
    records = list(trainer.steps())
    assert sum(norm > OPTIONS["clip"] for norm in norms) > STEPS / 2  # clipping is at work
    np.testing.assert_allclose([r.loss for r in records], losses, rtol=0, atol=LOSS_BAR)
    np.testing.assert_allclose([r.grad_norm for r in records], norms, rtol=1e-3)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize("architecture", ["qwen3-tied", "qwen2", "llama31"])
def test_fifty_steps_of_qlora(tmp_path, kernels, architecture):
    """From one adapter over one batch order, packed, two micro-batches a step."""
    folder = make_run(tmp_path, architecture)
    base = reference.load_model(folder / "model", quantised=True)
    model = reference.random_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    adapter = str(tmp_path / "adapter")
    trainer = Trainer(config_of(folder, adapter_init=adapter, accumulate=2, **OPTIONS), kernels=kernels)
    try:
        check(trainer, model, [{"params": [p for p in model.parameters() if p.requires_grad]}])
    finally:
        trainer.session.close()


def test_turns_count_as_their_messages_say(tmp_path):
    """Σ w·l / Σ w over the tokens of a conversation's turns."""
    folder = reference.save_model(tmp_path / "model", "qwen3-tied", vocab_size=320)
    tokenizer = Tokenizer.load(model_folder(folder, {"eos_token": "<|im_end|>", "chat_template": QWEN25}))
    said = {"Lyon": 0.25, "Paris": 3.0, "Rome": 1.0}
    turns = [m for text, w in said.items() for m in (user("a"), assistant(text) | {"weight": w})]
    messages = [{"role": "system", "content": "b"}, *turns]
    rendered = tokenizer.render_turns(messages)
    encoding = tokenizer.backend.encode(rendered.text, add_special_tokens=False)
    with torch.no_grad():
        logits = reference.load_model(folder)(torch.tensor([encoding.ids])).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(encoding.ids[1:]), reduction="none").numpy()
    weights = np.zeros(len(encoding.ids))
    for (start, end), weight in zip(rendered.spans, said.values(), strict=True):
        weights[[start <= a < end for a, _ in encoding.offsets]] = weight
    config = config_of(tmp_path, method="lora", seq=128, device="numpy")
    found = evaluate_data(config, False, [{"messages": messages}])
    np.testing.assert_allclose(found["loss"], np.average(losses, weights=weights[1:]), rtol=1e-6)


def test_fifty_steps_over_weighted_tokens(tmp_path, kernels, rng):
    """Each token counts as its row says, packed and over two micro-batches."""
    folder = make_run(tmp_path, "qwen3-tied")
    path = folder / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    weighted = [row | {"weights": rng.uniform(0.1, 3, len(row["input_ids"])).tolist()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in weighted))
    model = reference.random_adapter(tmp_path / "adapter", reference.load_model(folder / "model", quantised=True))
    adapter = str(tmp_path / "adapter")
    trainer = Trainer(config_of(folder, adapter_init=adapter, accumulate=2, **OPTIONS), kernels=kernels)
    try:
        check(trainer, model, [{"params": [p for p in model.parameters() if p.requires_grad]}])
    finally:
        trainer.session.close()


def test_fifty_steps_with_a_faster_b(tmp_path, kernels):
    """LoRA+ as PEFT builds its optimizer."""
    folder = make_run(tmp_path, "qwen3-tied")
    base = reference.load_model(folder / "model", quantised=True)
    model = reference.random_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    options = {"optimizer_cls": torch.optim.AdamW, "lr": OPTIONS["lr"], "loraplus_lr_ratio": 8.0}
    made = create_loraplus_optimizer(model, weight_decay=OPTIONS["weight_decay"], **options)
    groups = [{"params": group["params"], "lr": group["lr"]} for group in made.param_groups]
    assert {group["lr"] for group in groups if group["params"]} == {OPTIONS["lr"], 8 * OPTIONS["lr"]}
    adapter = str(tmp_path / "adapter")
    trainer = Trainer(config_of(folder, adapter_init=adapter, lr_ratio_b=8.0, **OPTIONS), kernels=kernels)
    try:
        check(trainer, model, groups)
    finally:
        trainer.session.close()


def test_noise_is_that_of_transformers(tmp_path, kernels, monkeypatch):
    """The loss under the hook that transformers and TRL put onto the embeddings, which draws what we draw."""
    folder = make_run(tmp_path, "qwen3-tied")
    model = reference.random_adapter(tmp_path / "adapter", reference.load_model(folder / "model", quantised=True))
    options = OPTIONS | {"steps": 1, "pack": False, "batch": 1, "neftune": 5.0, "seed": 3}
    trainer = Trainer(config_of(folder, adapter_init=str(tmp_path / "adapter"), **options), kernels=kernels)
    with trainer:
        start = trainer.batches.state()
        (batch,) = next(trainer.batches).micro_batches
        plain = reference.loss_of(model, [batch]).item()
        trainer.batches.restore(start)
        (record,) = trainer.steps()

    def drawn(tensor: Any, low: float, high: float) -> Any:
        words = philox([np.arange(tensor.numel()), NOISE_KEY, 1, 0], (3, 0))[0]
        unit = torch.from_numpy((words >> np.uint32(8)) * 2.0**-24).reshape(tensor.shape)
        return low + (high - low) * unit.to(tensor.dtype)

    monkeypatch.setattr(torch.Tensor, "uniform_", drawn)
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    embedding.train()
    want = reference.loss_of(model, [batch]).item()
    assert record.loss == pytest.approx(want, abs=1e-6)
    assert abs(want - plain) > 1e-4


def test_fifty_steps_of_full_training(tmp_path, kernels):
    """Weight decay leaves norms and biases alone, as transformers' own trainer does."""
    folder = make_run(tmp_path, "qwen2")
    model = reference.load_model(folder / "model")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    trainer = Trainer(config_of(folder, method="full", **OPTIONS), kernels=kernels)
    try:
        check(trainer, model, [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    finally:
        trainer.session.close()
