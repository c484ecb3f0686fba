"""From JSONL to batches: what is trained, what is refused, how rows are filled, and where a resumed run goes on."""

import gc
import json
import math
import threading
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu.data.batches import TrainBatches, collate, eval_batches, pack_rows
from entrenar_gpu.data.load import _ahead, load_samples
from entrenar_gpu.data.samples import IGNORE, SampleBuilder, Samples
from entrenar_gpu.data.sources import find_sources
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from tests.data.test_chat import NO_THOUGHT, model_folder
from tests.helpers import chat_templates

VOCAB = 300


@pytest.fixture
def base(tmp_path) -> Tokenizer:
    """A base model's tokenizer: BOS in front, EOS known, no chat template."""
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer.load(model_folder(tmp_path / "base", config, bos=True))


@pytest.fixture
def chat(tmp_path) -> Tokenizer:
    """A chat model's tokenizer, with Qwen3's template."""
    config = {"eos_token": "<|im_end|>", "chat_template": chat_templates.QWEN3}
    return Tokenizer.load(model_folder(tmp_path / "chat", config))


def load(
    tmp_path: Path,
    tokenizer: Tokenizer | None,
    *records: object,
    seq: int = 512,
    loss_on="completions",
    completions="chat",
) -> Samples:
    path = tmp_path / "data.jsonl"
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return load_samples(path, tokenizer, vocab_size=VOCAB, seq=seq, loss_on=loss_on, completions=completions)


def read(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def trained(tokenizer: Tokenizer, samples: Samples, i: int = 0) -> str:
    """What the model is asked to predict in a sample, as text; checks that each target is the token that follows."""
    tokens, targets = samples[i]
    at = np.flatnonzero(targets != IGNORE)
    assert at.size == 0 or at[-1] + 1 < len(tokens)
    np.testing.assert_array_equal(targets[at], tokens[at + 1])
    return read(tokenizer, targets[at])


# --- what a line means


def test_text_is_trained_whole_and_ends(tmp_path, base):
    samples = load(tmp_path, base, {"text": "hello"}, {"text": "hello</s>"})
    for i in (0, 1):
        assert read(base, samples[i][0]) == "<s>hello</s>"
        assert trained(base, samples, i) == "hello</s>"


def test_prompt_and_completion_are_joined_as_they_are(tmp_path, base):
    samples = load(tmp_path, base, {"prompt": "Q: x A:", "completion": " y"})
    assert read(base, samples[0][0]) == "<s>Q: x A: y</s>"
    assert trained(base, samples) == " y</s>"


def test_a_token_across_the_prompts_end_belongs_to_the_completion(tmp_path, base):
    samples = load(tmp_path, base, {"prompt": "xa", "completion": "b"})
    assert len(samples[0][0]) == 4  # <s> x ab </s>
    assert trained(base, samples) == "ab</s>"


def test_prompt_and_completion_go_through_the_chat_template(tmp_path, chat):
    samples = load(tmp_path, chat, {"prompt": "same", "completion": "same"})
    text = "<|im_start|>user\nsame<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nsame<|im_end|>\n"
    assert read(chat, samples[0][0]) == text
    assert trained(chat, samples) == "<think>\n\n</think>\n\nsame<|im_end|>"


def test_raw_completions_stay_as_they_are_where_there_is_a_template(tmp_path, chat):
    texts = {"prompt": "Q: x A:", "completion": " y"}
    messages = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    samples = load(tmp_path, chat, texts, messages, completions="raw")
    assert read(chat, samples[0][0]) == "Q: x A: y<|im_end|>"
    assert trained(chat, samples) == " y<|im_end|>"
    assert trained(chat, samples, 1) == NO_THOUGHT + "b<|im_end|>"  # conversations need the template


def test_what_became_of_completions_is_noted(tmp_path, chat, base):
    texts = {"prompt": "a", "completion": "b"}
    assert load(tmp_path, chat, texts).notes == ("completions in the chat template (--completions raw: as they are)",)
    assert load(tmp_path, chat, texts, completions="raw").notes == ("completions as they are",)
    assert load(tmp_path, base, texts).notes == ("completions as they are: the model has no chat template",)
    assert load(tmp_path, chat, {"text": "a"}).notes == ()


def test_a_completion_that_its_template_leaves_open_ends_with_eos(tmp_path):
    config = {"eos_token": "</s>", "chat_template": chat_templates.SCRIPT}
    tokenizer = Tokenizer.load(model_folder(tmp_path / "script", config))
    record = {"prompt": "a", "completion": "b"}
    for loss_on, expected in (("completions", "b\n</s>"), ("all", "ser: a\nassistant: b\n</s>")):
        assert trained(tokenizer, load(tmp_path, tokenizer, record, loss_on=loss_on)) == expected
    assert read(tokenizer, load(tmp_path, tokenizer, record)[0][0]) == "user: a\nassistant: b\n</s>"


def test_every_turn_of_the_assistant_is_trained(tmp_path, chat):
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"{i}é"} for i, role in enumerate(roles)]
    samples = load(tmp_path, chat, {"messages": messages})
    assert trained(chat, samples) == "2é<|im_end|><think>\n\n</think>\n\n4é<|im_end|>"


def test_bos_of_a_template_is_not_doubled(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_templates.LLAMA2}
    tokenizer = Tokenizer.load(model_folder(tmp_path / "llama", config, bos=True))
    samples = load(tmp_path, tokenizer, {"prompt": "a", "completion": "b"})
    assert read(tokenizer, samples[0][0]) == "<s>[INST] a [/INST] b </s>"


def test_a_template_without_bos_gets_none(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": chat_templates.GENERATION_TAGS}
    tokenizer = Tokenizer.load(model_folder(tmp_path / "chatml", config, bos=True))
    samples = load(tmp_path, tokenizer, {"prompt": "a", "completion": "b"})
    assert read(tokenizer, samples[0][0]).startswith("<|im_start|>user")


def test_lists_of_messages_train_the_completions_turns_only(tmp_path, chat):
    def said(role, content):
        return {"role": role, "content": content}

    prompt = [said("user", "a"), said("assistant", "b"), said("user", "c")]
    samples = load(tmp_path, chat, {"prompt": prompt, "completion": [said("assistant", "d")]})
    assert trained(chat, samples) == "<think>\n\n</think>\n\nd<|im_end|>"


@pytest.mark.parametrize("loss_on", ["completions", "all"])
def test_tools_reach_the_template(tmp_path, chat, loss_on):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    samples = load(tmp_path, chat, {"messages": messages, "tools": [{"name": "add"}]}, loss_on=loss_on)
    assert '<tools>\n{"name": "add"}\n</tools>' in read(chat, samples[0][0])


def test_labels_stand_at_their_own_token(tmp_path):
    samples = load(tmp_path, None, {"input_ids": [5, 6, 7, 8], "labels": [5, IGNORE, 7, 8]}, {"input_ids": [5, 6, 7]})
    assert samples[0][1].tolist() == [IGNORE, 7, 8, IGNORE]
    assert samples[1][1].tolist() == [6, 7, IGNORE]


def test_loss_on_all(tmp_path, chat):
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b"},
        {"input_ids": [5, 6, 7], "labels": [IGNORE, IGNORE, 7]},
    ]
    samples = load(tmp_path, chat, *records, loss_on="all")
    for i in (0, 1):
        assert np.count_nonzero(samples[i][1] != IGNORE) == len(samples[i][0]) - 1
    assert samples[2][1].tolist() == [IGNORE, 7, IGNORE]


def test_mixed_shapes_keep_file_order(tmp_path, chat):
    kinds = [{"text": "0"}, {"prompt": "a", "completion": "1"}, {"input_ids": [50, 50]}, {"text": "3"},
             {"input_ids": [52, 52]}, {"prompt": "a", "completion": "5"}]  # fmt: skip
    samples = load(tmp_path, chat, b"", *kinds, b"  ")
    digits = [next(t for t in read(chat, samples[i][0]) if t.isdigit()) for i in (0, 1, 3, 5)]
    assert digits == ["0", "1", "3", "5"]
    assert samples[2][0].tolist() == [50, 50]
    assert samples[4][0].tolist() == [52, 52]


def test_samples_are_skipped_and_cut_and_both_counted(tmp_path):
    records = [
        {"input_ids": [1, 2, 3, 4, 5]},  # cut
        {"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORE] * 4 + [5]},  # nothing left after the cut
        {"input_ids": [1, 2], "labels": [1, IGNORE]},  # nothing predicts a first token
        {"input_ids": []},
        {"input_ids": [1, 2, 3, 4]},
    ]
    samples = load(tmp_path, None, *records, seq=4)
    assert (len(samples), samples.skipped, samples.cut) == (2, 3, 1)
    assert samples[0][0].tolist() == [1, 2, 3, 4]
    assert samples[0][1].tolist() == [2, 3, 4, IGNORE]
    assert samples.trained_tokens == 6


def test_data_without_any_token_to_train(tmp_path, chat):
    with pytest.raises(UserError, match=r"data\.jsonl: holds no token to train \(2 samples without any\)"):
        load(tmp_path, chat, {"messages": [{"role": "user", "content": "a"}]}, {"input_ids": [1]})


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    samples = load(tmp_path, None, b'\xef\xbb\xbf{"input_ids": [1, 2]}\r', b'{"input_ids": [3, 4]}\r')
    assert samples.tokens.tolist() == [1, 2, 3, 4]


# --- what a line must not be

USER = {"role": "user", "content": "a"}
BAD_LINES = {
    "not JSON": (b"{'text': 1}", r"not valid JSON: .*column 2"),
    "half a line": (b'{"text": "a', "not valid JSON"),
    "nested too deep": (b"[" * 100_000, "not valid JSON"),
    "not UTF-8": (b'{"text": "\xff"}', r"not UTF-8 text \(byte 11"),
    "not an object": ([1], "expected a JSON object, not a list"),
    "unknown shape": ({"question": "a"}, "expected one of messages; .*found keys 'question'"),
    "empty object": ({}, "found keys none"),
    "two shapes": ({"text": "a", "messages": []}, "messages must be a list of messages, not an empty list"),
    "prompt alone": ({"prompt": "a"}, "'completion' is missing"),
    "completion alone": ({"completion": "a"}, "'prompt' is missing"),
    "text is a number": ({"text": 3}, "text must be text, not a number"),
    "completion is null": ({"prompt": "a", "completion": None}, "completion must be text, not null"),
    "prompt is a list": ({"prompt": [USER], "completion": "b"}, "completion must be a list of messages, not text"),
    "messages are text": ({"messages": "a"}, "messages must be a list of messages, not text"),
    "no messages": ({"messages": []}, "messages must be a list of messages, not an empty list"),
    "message is text": ({"messages": [USER, "a"]}, "message 2 must be an object with a role"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 must be an object with a role"),
    "unknown role": ({"messages": [{"role": "asistant", "content": "a"}]}, "message 1 has role 'asistant'; known: "),
    "no content": ({"messages": [{"role": "user"}]}, "message 1 must have a content that is text, not null"),
    "tools are text": ({"messages": [USER], "tools": "a"}, "tools must be a list, not text"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "half a surrogate pair"),
    "half a surrogate pair in a message": (b'{"prompt": "\\udfff", "completion": "a"}', "half a surrogate pair"),
    "ids are text": ({"input_ids": ["1"]}, "input_ids must be a list of whole numbers"),
    "ids are truths": ({"input_ids": [True, False]}, "input_ids must be a list of whole numbers"),
    "negative id": ({"input_ids": [1, -1]}, "token id -1 is outside the model's vocabulary of 300"),
    "id beyond the vocabulary": ({"input_ids": [1, 300]}, "token id 300 is outside the model's vocabulary of 300"),
    "labels too short": ({"input_ids": [1, 2], "labels": [1]}, "labels: 1 of them for 2 input_ids"),
    "label neither ignored nor a token": ({"input_ids": [1, 2], "labels": [1, -1]}, "labels: -1 is neither -100 nor"),
    "label beyond the vocabulary": ({"input_ids": [1, 2], "labels": [1, 300]}, "labels: 300 is neither -100 nor"),
    "labels alone": ({"labels": [1]}, "expected one of"),
    "a part that is a number": ({"messages": [{"role": "user", "content": [1]}]}, "message 1 holds a part that is"),
    "refused by the template": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "a"}]}]},
        "chat template: ",
    ),
    "a call that is a number": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [1]}]},
        "message 2: tool_calls holds a number without the name of a function",
    ),
    "a call without a name": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": 3}}]}]},
        "message 2: tool_calls holds an object without the name of a function",
    ),
    "calls that are true": (
        {"messages": [USER, {"role": "assistant", "content": "a", "tool_calls": True}]},
        "message 2: tool_calls must be a list, not true or false",
    ),
    "a call in OpenAI's older form": (
        {"messages": [USER, {"role": "assistant", "content": "", "function_call": {"name": "a", "arguments": "{}"}}]},
        "message 2 has function_call and no content",
    ),
    "an answer that is none": (
        {"messages": [USER, {"role": "assistant", "content": None, "refusal": "I cannot."}]},
        "message 2 has refusal and no content",
    ),
    "a thought that is a list": (
        {"messages": [USER, {"role": "assistant", "content": "a", "reasoning": ["b"]}]},
        "message 2: reasoning must be text, not a list",
    ),
    "tools that are words": ({"messages": [USER], "tools": ["add"]}, "tools must be a list of objects, not of text"),
    "a name the template is called with": (
        {"messages": [USER], "chat_template_kwargs": {"tools": 1}},
        "chat_template_kwargs: tools cannot be set",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path, chat, name):
    line, message = BAD_LINES[name]
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, chat, {"text": "fine"}, b"", line)
    assert str(error.value).startswith(f"{tmp_path}/data.jsonl:3: ")
    assert "\n" not in str(error.value)


def test_conversations_need_a_template_and_texts_a_tokenizer(tmp_path, base):
    with pytest.raises(UserError, match=r"data\.jsonl:1: .*no chat template"):
        load(tmp_path, base, {"messages": [USER]})
    with pytest.raises(UserError, match=r"data\.jsonl:1: needs the model's tokenizer\.json"):
        load(tmp_path, None, {"messages": [USER]})


def test_texts_need_an_end(tmp_path):
    tokenizer = Tokenizer.load(model_folder(tmp_path / "model"))
    with pytest.raises(UserError, match=r"no eos_token in tokenizer_config\.json"):
        load(tmp_path, tokenizer, {"text": "a"})


def test_a_tokenizer_larger_than_the_model_is_caught(tmp_path, chat):
    path = tmp_path / "data.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.jsonl:2: the tokenizer gives token id \d+, outside the model's"):
        load_samples(path, chat, vocab_size=250, seq=8)


def test_which_files(tmp_path):
    def names(*arguments, **more):
        return [Path(source.name).name for source in find_sources(*arguments, **more)]

    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match=r"--data: .*train\.jsonl not found"):
        find_sources(folder)
    for name in ("train-00001-of-00002.jsonl", "train-00000-of-00002.jsonl", "validation.csv"):
        (folder / name).touch()
    assert names(folder) == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert names(folder, "valid") == ["validation.csv"]
    (folder / "train.jsonl").touch()
    (folder / "valid.jsonl").touch()
    assert (names(folder), names(folder, "valid")) == (["train.jsonl"], ["valid.jsonl"])
    assert names(folder / "train.jsonl") == ["train.jsonl"]
    with pytest.raises(UserError, match=r"--eval-data: .*nothing not found"):
        find_sources(tmp_path / "nothing", flag="--eval-data")


# --- rows and batches


def made_of(lengths: list[int]) -> Samples:
    """Samples of these lengths, every token of them different from all others, all trained."""
    builder = SampleBuilder(seq=max(lengths))
    first = 1
    for length in lengths:
        ids = list(range(first, first + length))
        builder.add(ids, ids)
        first += length
    return builder.samples()


def segments(batch: dict) -> list[list[int]]:
    """The samples in a batch, read back from its arrays as the graph sees them."""
    found = []
    for row, targets, positions, starts in zip(
        batch["input_ids"], batch["targets"], batch["positions"], batch["segment_start"], strict=True
    ):
        here = np.arange(len(row))
        np.testing.assert_array_equal(positions, here - starts)
        for start in np.unique(starts):
            at = here[starts == start]
            np.testing.assert_array_equal(at, np.arange(start, start + len(at)))
            if row[start] == 0:  # padding
                assert len(at) == 1
                assert targets[start] == IGNORE
            else:
                np.testing.assert_array_equal(targets[at], [*row[at[1:]], IGNORE])
                found.append(row[at].tolist())
    return found


def sample_lists(samples: Samples) -> list[list[int]]:
    return [samples[i][0].tolist() for i in range(len(samples))]


LENGTHS = st.lists(st.integers(2, 16), min_size=1, max_size=40)


@given(LENGTHS, st.booleans())
def test_packing_keeps_every_sample_whole_and_once(lengths, keep_order):
    rows = pack_rows(lengths, range(len(lengths)), 16, keep_order)
    assert all(sum(lengths[i] for i in row) <= 16 for row in rows)
    placed = [i for row in rows for i in row]
    assert sorted(placed) == list(range(len(lengths)))
    if keep_order:
        assert placed == list(range(len(lengths)))


@given(LENGTHS, st.booleans(), st.booleans(), st.integers(0, 3))
def test_an_epoch_is_every_sample_once(lengths, shuffle, pack, seed):
    samples = made_of(lengths)
    batches = TrainBatches(samples, batch=1, seq=16, seed=seed, shuffle=shuffle, pack=pack)
    for epoch in (1, 2):
        found = []
        step = None
        while step is None or step.epoch < epoch:
            step = next(batches)
            (batch,) = step.micro_batches
            found += segments(batch)
            assert step.tokens == np.count_nonzero(batch["targets"] != IGNORE) > 0
        assert step.epoch == epoch
        assert sorted(found) == sample_lists(samples)
        if not shuffle:
            assert found == sample_lists(samples)


@given(LENGTHS, st.booleans())
def test_evaluation_sees_every_sample_once(lengths, pack):
    samples = made_of(lengths)
    batches = list(eval_batches(samples, batch=3, seq=16, pack=pack))
    assert all(batch["input_ids"].shape == (3, 16) for batch in batches)
    assert sorted(found for batch in batches for found in segments(batch)) == sample_lists(samples)


def test_arrays_of_a_row_of_two_samples_and_padding():
    batch = collate(made_of([3, 2]), [[1, 0]], batch=2, seq=6)
    expected = {
        "input_ids": [[4, 5, 1, 2, 3, 0], [0] * 6],
        "targets": [[5, IGNORE, 2, 3, IGNORE, IGNORE], [IGNORE] * 6],
        "positions": [[0, 1, 0, 1, 2, 0], [0] * 6],
        "segment_start": [[0, 0, 2, 2, 2, 5], [0, 1, 2, 3, 4, 5]],
    }
    assert {name: values.tolist() for name, values in batch.items()} == expected
    dtypes = {name: values.dtype for name, values in batch.items()}
    assert dtypes == {"input_ids": np.uint32, "targets": np.int32, "positions": np.uint32, "segment_start": np.uint32}


def test_no_packing_is_one_sample_a_row():
    batches = TrainBatches(made_of([3, 2, 4]), batch=3, seq=8, shuffle=False, pack=False)
    (batch,) = next(batches).micro_batches
    assert batch["input_ids"][:, :4].tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 8, 9]]


def test_a_sample_goes_where_it_leaves_the_least_room():
    assert pack_rows([4, 7, 3, 6], range(4), 10) == [[0, 3], [1, 2]]


def test_packing_fills_rows(rng):
    """Lengths as instruction data have them: log-normal around 120 tokens, cut at 512."""
    lengths = np.clip(rng.lognormal(np.log(120), 0.8, 4000), 8, 512).astype(int).tolist()
    rows = pack_rows(lengths, rng.permutation(4000).tolist(), 512)
    assert sum(lengths) / (len(rows) * 512) > 0.97


def test_packing_many_long_samples_keeps_few_rows_open(monkeypatch):
    monkeypatch.setattr("entrenar_gpu.data.batches.OPEN_ROWS", 2)
    # the row of the 7 is the fullest when a third would open, and is closed: the 3 cannot join it any more
    assert pack_rows([7, 6, 5, 3, 4, 5], range(6), 10) == [[0], [1, 3], [2, 4], [5]]


def test_a_sample_longer_than_a_row_is_not_packed():
    with pytest.raises(ValueError, match="9 tokens does not fit rows of 8"):
        TrainBatches(made_of([9]), batch=1, seq=8)


# --- order, steps and resuming


def drawn(batches: TrainBatches, steps: int) -> list:
    return [[m["input_ids"].tolist() for m in next(batches).micro_batches] for _ in range(steps)]


def iterator(samples: Samples | None = None, **changes) -> TrainBatches:
    options = {"batch": 2, "seq": 16, "accumulate": 2, "seed": 3} | changes
    return TrainBatches(made_of([3, 9, 5, 12, 7, 2, 16, 8, 6]) if samples is None else samples, **options)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("at", range(5))
def test_a_resumed_run_goes_on_where_it_stopped(at, pack, shuffle):
    whole = iterator(pack=pack, shuffle=shuffle)
    expected = drawn(whole, 8)
    first = iterator(pack=pack, shuffle=shuffle)
    drawn(first, at)
    state = json.loads(json.dumps(first.state()))
    resumed = iterator(pack=pack, shuffle=shuffle)
    resumed.restore(state)
    assert drawn(resumed, 8 - at) == expected[at:]
    assert resumed.state() == whole.state()


def test_a_state_of_other_data_or_order_is_refused():
    state = iterator().state()
    for other in (
        iterator(made_of([3, 9, 5])),
        iterator(seed=4),
        iterator(seq=17),
        iterator(pack=False),
        iterator(shuffle=False),
    ):
        with pytest.raises(UserError, match="--resume: the checkpoint was made with other data"):
            other.restore(state)


@pytest.mark.parametrize(
    "place",
    [
        {"epoch": -1},
        {"epoch": "x"},
        {"epoch": math.inf},
        {"epoch": 10**400},
        {"row": -3},
        {"row": 10**6},
        {"row": None},
    ],
)
def test_a_place_that_the_data_do_not_have_is_refused(place):
    batches = iterator()
    with pytest.raises(UserError, match="--resume: the checkpoint's place in the data"):
        batches.restore(batches.state() | place)


def test_the_fingerprint_sees_tokens_targets_and_bounds():
    def fingerprint(ids, labels):
        builder = SampleBuilder(8)
        for one, other in zip(ids, labels, strict=True):
            builder.add(one, other)
        return builder.samples().fingerprint

    same = fingerprint([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    assert same == fingerprint([[1, 2], [3, 4]], [[IGNORE, 2], [IGNORE, 4]])  # first labels are never targets
    others = [
        fingerprint([[1, 2], [3, 5]], [[1, 2], [3, 4]]),
        fingerprint([[1, 2], [3, 4]], [[1, 2], [3, 5]]),
        fingerprint([[1, 2, 3, 4]], [[1, 2, IGNORE, 4]]),
    ]
    assert same not in others


def test_seeds_and_epochs_differ_and_runs_do_not():
    samples = made_of([4] * 64)
    one = iterator(samples, batch=16, accumulate=1)
    first, second = drawn(one, 2)
    assert first != second
    assert drawn(iterator(samples, batch=16, accumulate=1), 2) == [first, second]
    assert drawn(iterator(samples, batch=16, accumulate=1, seed=4), 1) != [first]


def test_the_shuffled_order_is_the_one_recorded():
    """A checkpoint's position counts in this order: if it changed, every resumed run would silently go astray."""
    batches = TrainBatches(made_of([2] * 10), batch=10, seq=2, seed=7)
    (rows,) = drawn(batches, 1)[0]
    assert [row[0] // 2 for row in rows] == RECORDED_ORDER


RECORDED_ORDER = [1, 6, 3, 2, 5, 4, 7, 9, 8, 0]


def test_steps_of_an_epoch():
    samples = made_of([16] * 10)
    assert iterator(samples).steps(1) == 3  # 10 rows, 4 a step
    assert iterator(samples).steps(2) == 5
    assert iterator(samples).steps(0.5) == 2
    assert iterator(made_of([16])).steps(1) == 1


def test_epochs_run_on_into_each_other():
    batches = iterator(made_of([16] * 3))
    steps = [next(batches) for _ in range(3)]
    assert [step.epoch for step in steps] == [pytest.approx(4 / 3), pytest.approx(8 / 3), 4.0]
    assert all(step.tokens == 4 * 15 for step in steps)


def test_training_data_smaller_than_one_step_repeat():
    step = next(iterator(made_of([5])))
    assert step.tokens == 4 * 4
    assert all(row[0] == 1 for m in step.micro_batches for row in m["input_ids"])


@given(
    st.integers(0, 12),
    st.lists(st.tuples(st.integers(0, 13), st.integers(0, 13)), max_size=4),
    st.integers(1, 14),
)
def test_spans_and_labels_make_the_same_samples(length, spans, seq):
    ids = array("i", range(100, 100 + length))
    trained = {i for first, last in spans for i in range(first, last)}
    by_spans, by_labels = SampleBuilder(seq), SampleBuilder(seq)
    by_spans.add_spans(ids, spans)
    by_labels.add(ids, [token if i in trained else IGNORE for i, token in enumerate(ids)])
    found, wanted = by_spans.samples(), by_labels.samples()
    assert found.fingerprint == wanted.fingerprint
    assert (found.skipped, found.cut) == (wanted.skipped, wanted.cut)


def test_nothing_more_is_read_once_nobody_asks():
    made, go_on = [], threading.Event()

    def items():
        for i in range(9):
            if i:
                go_on.wait(10)
            made.append(i)
            yield i

    coming = _ahead(items())
    assert next(coming) == 0
    threading.Timer(0.1, go_on.set).start()
    coming.close()
    assert made == [0, 1]  # the second had begun


@pytest.mark.parametrize("record", [{"text": "a b"}, {"text": 1}])
def test_reading_leaves_the_garbage_collector_as_it_was(tmp_path, base, record):
    before = gc.get_threshold()
    gc.set_threshold(701, 11, 12)
    try:
        load(tmp_path, base, record)
    except UserError:
        assert record["text"] == 1
    finally:
        found = gc.get_threshold()
        gc.set_threshold(*before)
    assert found == (701, 11, 12)
