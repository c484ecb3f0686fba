"""Decoding with a cache: the logits of the whole row, however its tokens came and whoever's stand beside them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entrenar_gpu.adapters.peft_files import save_adapter
from entrenar_gpu.adapters.spec import AdapterSpec
from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.errors import UserError
from entrenar_gpu.infer.decoder import Decoder
from entrenar_gpu.infer.graphs import plan_decoder
from entrenar_gpu.model.registry import load_model_config
from entrenar_gpu.session.graphs import logits_graph
from entrenar_gpu.session.session import Session
from tests.helpers.tiny import make_model
from tests.helpers.whole_row import next_logits

CONTEXT = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("decoder") / "model", hidden_size=128, intermediate_size=192)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(1).integers(0, 320, CONTEXT).tolist()


def config_of(folder: Path, **options: Any) -> TrainConfig:
    return TrainConfig(**({"model": str(folder), "device": "numpy", "seq": CONTEXT, "precision": "f32"} | options))


def opened(folder: Path, kernels: Any = None, slots: int = 3, chunk: int = 24, **options: Any) -> Decoder:
    adapters = options.pop("adapters", None)
    return Decoder.open(config_of(folder, **options), slots, CONTEXT, chunk, adapters, kernels)


def whole_row(folder: Path, ids: list[int], **options: Any) -> np.ndarray:
    """The logits after the last token, by a pass over all of them without a cache."""
    config = config_of(folder, batch=1, **options)
    session = Session.open(config, lambda s, c: {"logits": logits_graph(s, c)}, with_adapter="adapter_init" in options)
    return next_logits(session, ids)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_logits_are_those_of_the_whole_row(folder, ids, method):
    decoder = opened(folder, method=method)
    for stop in (1, 5, 30):
        want = whole_row(folder, ids[:stop], method=method)
        got = decoder.extend({1: ids[decoder.lengths[1] : stop]})[1]
        np.testing.assert_allclose(got, [want], rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_row_is_the_same_alone_in_a_batch_and_in_pieces(folder, ids, kernels, method):
    """Bit for bit on a device; and NumPy's within the bar of whole models."""
    with opened(folder, kernels, method=method) as decoder:
        want = decoder.extend({0: ids}, all_logits=True)[0]
        decoder.extend({1: ids[:7], 2: ids[20:]})
        pieces = decoder.extend({2: ids[3:8], 1: ids[7:40]}, all_logits=True)
        last = [decoder.extend({1: [token]})[1][0] for token in ids[40:]]
        np.testing.assert_array_equal(np.concatenate([pieces[1], last]), want[7:])
    numpy = opened(folder, method=method).extend({0: ids}, all_logits=True)[0]
    np.testing.assert_allclose(want, numpy, rtol=0, atol=1e-5 * np.abs(numpy).max())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["f16", "int8"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_low_precision_reads_prompts_as_training_does(folder, ids, kernels, method, precision):
    """A prompt's tokens in the run's arithmetic, in any pieces; those after it by rows. Near to f32, not equal."""
    if not kernels.device.caps.f16:
        pytest.skip("no f16")
    want = opened(folder, method=method).extend({0: ids})[0]
    with opened(folder, kernels, chunk=40, method=method, precision=precision) as decoder:
        whole = decoder.extend({0: ids[:45]}, prompt=True)[0]
        decoder.extend({1: ids[:3], 2: ids[:33]}, prompt=True)
        pieces = decoder.extend({1: ids[3:45], 2: ids[33:40]}, prompt=True)[1]
        np.testing.assert_array_equal(pieces, whole)
        batched = decoder.extend({1: ids[45:], 0: ids[45:46]}, all_logits=True)[1]
        single = np.concatenate([decoder.extend({0: [token]})[0] for token in ids[46:]])
        np.testing.assert_array_equal(batched[1:], single)
    np.testing.assert_allclose(single[-1:], want, rtol=0, atol=0.05 * np.abs(want).max())
    assert np.abs(single[-1] - want).max() > 0


def greedy(decoder: Decoder, batch: dict[int, list[int]], prompt: bool = False) -> dict[int, list[int]]:
    """What `likeliest` is to tell."""
    return {slot: [int(row.argmax()) for row in rows] for slot, rows in decoder.extend(batch, prompt=prompt).items()}


def likeliest(decoder: Decoder, batch: dict[int, list[int]], prompt: bool = False) -> dict[int, list[int]]:
    return decoder.likeliest(batch, prompt=prompt)


@pytest.mark.gpu
def test_the_likeliest_is_where_logits_are_largest(folder, ids, kernels):
    """Whatever was computed ahead: slots that come and go, that hold another text of the same length, that are full."""

    def told(step: Any, decoder: Decoder) -> list[Any]:
        said = [step(decoder, {0: ids[:12], 1: ids[20:32]}, True)]
        for _ in range(5):
            said.append(step(decoder, said[-1]))
        said.append(step(decoder, {0: said[-1][0]}))  # 1 has ended
        said.append(step(decoder, said[-1]))
        said.append(step(decoder, {**said[-1], 2: ids[5:6]}))
        for _ in range(3):
            said.append(step(decoder, said[-1]))
        decoder.copy(0, 2, decoder.lengths[2])
        said.append(step(decoder, said[-1]))
        while decoder.lengths[0] < CONTEXT:
            said.append(step(decoder, {0: said[-1][0]}))
        return said

    with opened(folder, kernels, method="qlora") as decoder:
        want = told(greedy, decoder)
    with opened(folder, kernels, method="qlora") as decoder:
        assert told(likeliest, decoder) == want
    assert told(likeliest, opened(folder, method="qlora")) == want


@pytest.mark.gpu
def test_what_was_computed_ahead_is_not_another_prompts(folder, ids, kernels):
    if not kernels.device.caps.f16:
        pytest.skip("no f16")

    def told(step: Any, decoder: Decoder) -> list[Any]:
        said = [step(decoder, {0: ids[:35]}, True)]
        for _ in range(3):
            said.append(step(decoder, said[-1]))
        held = decoder.lengths[0]
        decoder.truncate(0, 0)
        step(decoder, {0: ids[CONTEXT - held :]}, True)
        said.append(step(decoder, said[-1]))
        return said

    with opened(folder, kernels, chunk=40, precision="f16") as decoder:
        want = told(greedy, decoder)
    with opened(folder, kernels, chunk=40, precision="f16") as decoder:
        assert told(likeliest, decoder) == want


def test_what_is_dropped_is_forgotten_and_what_is_copied_is_shared(folder, ids):
    decoder = opened(folder)
    want = decoder.extend({0: ids[:12]})[0]
    decoder.truncate(0, 5)
    decoder.extend({0: [1, 2, 3]})
    decoder.truncate(0, 5)
    np.testing.assert_allclose(decoder.extend({0: ids[5:12]})[0], want, rtol=0, atol=1e-5 * np.abs(want).max())
    decoder.copy(0, 2, 9)
    assert decoder.lengths == [12, 0, 9]
    np.testing.assert_allclose(decoder.extend({2: ids[9:12]})[2], want, rtol=0, atol=1e-5 * np.abs(want).max())
    with pytest.raises(ValueError, match="holds 12 tokens, not 13"):
        decoder.truncate(0, 13)
    with pytest.raises(ValueError, match="holds 0 tokens, not 1"):
        decoder.copy(1, 0, 1)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_over_one_base(folder, ids, tmp_path, method):
    """Each as a session that has it alone, and the base beside them as it is; switching back and forth."""
    model = load_model_config(folder)
    rng = np.random.default_rng(5)
    adapters = {"a": tmp_path / "a", "b": tmp_path / "b"}
    for name, target, rank in (("a", "all-linear", 4), ("b", "q_proj,down_proj", 8)):
        spec = AdapterSpec.from_config(TrainConfig(rank=rank, target=target), model)
        values = {n: rng.standard_normal(s, np.float32) / 4 for n, s in spec.shapes().items()}
        save_adapter(adapters[name], spec, values, str(folder))
    decoder = opened(folder, method=method, adapters=adapters)
    seen = []
    for slot, name in enumerate(["b", None, "a"]):
        decoder.set_adapter(name)
        options = {} if name is None else {"adapter_init": str(adapters[name])}
        want = whole_row(folder, ids[:20], method=method, **options)
        decoder.extend({slot: ids[:19]})
        got = decoder.extend({slot: ids[19:20]})[slot]
        np.testing.assert_allclose(got, [want], rtol=0, atol=1e-5 * np.abs(want).max())
        seen.append(want)
    assert min(np.abs(x - y).max() for x, y in itertools.combinations(seen, 2)) > 0.1
    with pytest.raises(KeyError):
        decoder.set_adapter("c")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({3: [1]}, "no slot 3"),
        ({0: []}, "no tokens"),
        ({0: [1], 1: [320]}, "slot 1: token id 320 is outside"),
        ({0: [-1]}, "token id -1"),
        ({0: [1] * 49}, "exceed the context of 48"),
    ],
)
def test_what_cannot_be_appended_is_refused_whole(folder, batch, message):
    decoder = opened(folder)
    with pytest.raises(ValueError, match=message):
        decoder.extend(batch)
    assert decoder.lengths == [0, 0, 0]


@pytest.mark.gpu
def test_planned_is_allocated_and_too_long_a_context_is_refused(folder, kernels):
    before = kernels.device.allocated_bytes
    with opened(folder, kernels) as decoder:
        planned = decoder.executor.plan.peak_bytes
        assert kernels.device.allocated_bytes - before == planned
    report = plan_decoder(config_of(folder, batch=3), kernels.device.caps, 1 << 40, CONTEXT, chunk=24)
    assert report.plan.peak_bytes == planned
    assert report.to_mapping()["cache_bytes"] == 2 * 2 * 3 * CONTEXT * 2 * 24 * 4  # layers, k and v, slots, heads, f32
    small = config_of(folder, memory_budget=0.01)  # GiB: 40 slots of 480 tokens take more
    with pytest.raises(
        UserError, match=r"--context 480: needs .* over the budget of 0.01 GiB; --context \d+ fits"
    ) as told:
        Decoder.open(small, 40, 480, 24, None, kernels)
    longest = int(str(told.value).split("--context ")[2].split()[0])
    assert 100 < longest < 480
    Decoder.open(small, 40, longest, 24, None, kernels).close()
    with pytest.raises(UserError, match=f"--context {longest + 1}: needs"):
        Decoder.open(small, 40, longest + 1, 24, None, kernels)
    assert kernels.device.allocated_bytes == before
