"""Rows in every format and shape: the same rows, the same samples; a file that is damaged, one line that names it."""

import csv
import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu.data import json_array
from entrenar_gpu.data.batches import TrainBatches
from entrenar_gpu.data.load import load_samples, read_samples
from entrenar_gpu.data.order import mixed_order, parse_mix
from entrenar_gpu.data.records import Reading
from entrenar_gpu.data.rows import JsonFile, RowsInMemory
from entrenar_gpu.data.samples import Samples
from entrenar_gpu.data.shapes import parse_columns
from entrenar_gpu.data.sources import find_sources
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from tests.data.test_chat import CALLED, NO_THOUGHT, assistant, model_folder, tool, user
from tests.data.test_data import VOCAB, load, read, trained
from tests.helpers import chat_templates

PAIRS = [{"prompt": f"ask, {i}\n", "completion": f'"say" {i} é'} for i in range(5)]


@pytest.fixture
def chat(tmp_path) -> Tokenizer:
    config = {"eos_token": "<|im_end|>", "chat_template": chat_templates.QWEN3}
    return Tokenizer.load(model_folder(tmp_path / "chat", config))


@pytest.fixture
def base(tmp_path) -> Tokenizer:
    return Tokenizer.load(model_folder(tmp_path / "base", {"bos_token": "<s>", "eos_token": "</s>"}, bos=True))


def equal(a: Samples, b: Samples) -> bool:
    return a.fingerprint == b.fingerprint


def of_rows(rows, tokenizer, **how) -> Samples:
    """The samples of rows in memory."""
    return read_samples([[RowsInMemory(rows, "data")]], tokenizer, Reading(VOCAB, **how), 512)


def objects(*values: object) -> np.ndarray:
    """An array of them, as pandas has lists of Parquet."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


# --- formats


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def packed(path: Path, rows: list[dict]) -> None:
    plain = path.with_suffix("")
    FORMATS[plain.name](plain, rows)
    path.write_bytes(gzip.compress(plain.read_bytes()))


def write_saved(path: Path, rows: list[dict]) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


FORMATS = {
    "lines.jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\r\n" for row in rows)),
    "lines.json": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "array.json": lambda path, rows: path.write_text(
        "\ufeff " + json.dumps(rows, indent=2, ensure_ascii=False), "utf-8"
    ),
    "array.jsonl": lambda path, rows: path.write_text(json.dumps(rows)),
    "table.csv": write_csv,
    "table.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "table.parquet": write_parquet,
    "lines.jsonl.gz": packed,
    "array.json.gz": packed,
    "table.csv.gz": packed,
    "table.tsv.gz": packed,
    "saved": write_saved,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_samples(tmp_path, chat, name):
    FORMATS[name](tmp_path / name, PAIRS)
    samples = read_samples([find_sources(tmp_path / name)], chat, Reading(VOCAB), 512)
    assert len(samples) == len(PAIRS)
    assert equal(samples, load(tmp_path, chat, *PAIRS))


def test_lists_in_cells_are_their_json(tmp_path, chat):
    rows = [{"messages": [user("a"), assistant("b")], "tools": None}]
    write_csv(tmp_path / "rows.csv", [{"messages": json.dumps(rows[0]["messages"]), "tools": ""}])
    write_parquet(tmp_path / "rows.parquet", rows)
    for name in ("rows.csv", "rows.parquet"):
        assert equal(load_samples(tmp_path / name, chat, vocab_size=VOCAB, seq=512), of_rows(rows, chat))


def test_dates_beyond_python_s_are_no_matter(tmp_path, chat):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["a"], "when": pyarrow.array([10**18], pyarrow.timestamp("us"))})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "rows.parquet")
    samples = load_samples(tmp_path / "rows.parquet", chat, vocab_size=VOCAB, seq=512)
    assert equal(samples, of_rows([{"text": "a"}], chat))


def test_missing_cells_are_null(tmp_path, chat):
    rows = [{"text": "a", "prompt": "", "completion": ""}, {"text": "", "prompt": "b", "completion": "c"}]
    write_csv(tmp_path / "rows.csv", rows)
    given = [{"text": "a", "prompt": float("nan")}, {"prompt": "b", "completion": "c", "text": None}]
    assert equal(load_samples(tmp_path / "rows.csv", chat, vocab_size=VOCAB, seq=512), of_rows(given, chat))


LINE = b'{"text": "a"}\n'
BROKEN = {
    "cut.jsonl.gz": (gzip.compress(LINE * 9)[:-9], "not a whole gzip file: Compressed file ended"),
    "none.jsonl.gz": (LINE, "not a whole gzip file: Not a gzipped file"),
    "damaged.csv.gz": (gzip.compress(b"text\n" + b"a b\n" * 99)[:-6] + b"abcdef", "not a whole gzip file: CRC check"),
    "second row.jsonl.gz": (gzip.compress(LINE + b"{"), "jsonl.gz:2: not valid JSON"),
    "rows.jsonl.zst": (LINE, "packed; of packed files .jsonl.gz, .json.gz, .csv.gz, .tsv.gz are read, unpack it"),
    "rows.parquet.gz": (LINE, "packed; of packed files .jsonl.gz"),
    "another separator.csv": (
        b"prompt;completion\na;b\n",
        "one column, 'prompt;completion'; .csv has ',' between .* ';'",
    ),
    "cut.json": (b'[{"text": "a"}, {"text": "b"', "row 2: the file ends within the array"),
    "cut in a string.json": (b'[{"text": "a"}, {"text": "b', "row 2: the file ends within the array"),
    "no object.json": (b'[{"text": "a"}, 3]', "row 2: expected a JSON object, not a number"),
    "no comma.json": (b'[{"text": "a"} {"text": "b"}]', "row 1: not valid JSON: Extra data"),
    "two commas.json": (b'[{"text": "a"},, {"text": "b"}]', "row 2: nothing stands between two commas"),
    "more behind.json": (b'[{"text": "a"}] {}', "row 1: there is more behind the end"),
    "deep.json": (b'[{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]", "row 1: not valid JSON"),
    "unclosed.json": (b'[{"text": ' + b"[" * 100_000, "row 1: the file ends within the array"),
    "huge number.json": (b'[{"input_ids": [1' + b"0" * 9000 + b"]}]", "row 1: not valid JSON"),
    "NaN.json": (b'[{"input_ids": [NaN, 1]}]', "row 1: input_ids must be a list of whole numbers"),
    "empty array.json": (b"[ ]", "holds no token to train"),
    "empty.json": (b"", "holds no token to train"),
    "empty.csv": (b"", "empty; the first line names the columns"),
    "only names.csv": (b"text\n", "holds no token to train"),
    "ragged.csv": (b"prompt,completion\na,b\na\n", "row 2: 1 cells, but 2 columns are named"),
    "same names.csv": (b"text,text\na,b\n", "two columns are named 'text'"),
    "open quote.csv": (b'text\n"a\n', "row 1: not valid CSV: unexpected end of data"),
    "latin.csv": (b"text\nf\xfcr\n", "row 1: not UTF-8 text"),
    "no list.csv": (b'messages\n"[1"\n', "row 1: messages must be a list of messages, not text"),
    "no table.parquet": (b"PAR1 no PAR1", "not valid Parquet"),
    "empty.parquet": (b"", "not valid Parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_names_the_row(tmp_path, base, name):
    content, message = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_samples(path, base, vocab_size=VOCAB, seq=64)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_an_earlier_row_is_complained_of_first(tmp_path, chat):
    path = tmp_path / "rows.json"
    unanswered = {"messages": [user("a"), assistant("", tool_calls=[{"name": "a"}])]}
    path.write_text(json.dumps([unanswered])[:-1] + ', {"text": "b"')
    with pytest.raises(UserError, match=r"row 1: .*chat template"):
        load_samples(path, chat, vocab_size=VOCAB, seq=64)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(st.text(max_size=3), JSON, max_size=4), max_size=5), st.integers(1, 9), st.booleans())
def test_an_array_has_the_rows_that_json_reads(tmp_path_factory, rows, piece, ascii_only):
    path = tmp_path_factory.mktemp("array") / "rows.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=ascii_only), "utf-8")
    before, json_array.PIECE = json_array.PIECE, piece
    try:
        assert [json.loads(row.content) for row in JsonFile(path)] == rows
    finally:
        json_array.PIECE = before


def test_an_array_of_long_texts_takes_a_few_megabytes(tmp_path, base):
    path = tmp_path / "rows.json"
    with open(path, "w") as stream:
        stream.write('[{"text": "' + "x \\n" * (10 << 20) + '"}')
        stream.writelines(',{"text": "' + "y" * 1000 + '"}' for _ in range(20_000))
        stream.write("]")
    tracemalloc.start()
    rows = sum(1 for _ in JsonFile(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 20_001
    assert peak < 36 << 20


# --- shapes


def turn(speaker, value, **more):
    return {"from": speaker, "value": value, **more}


CALLING = json.dumps({"name": "add", "arguments": {"text": "<é>"}})
SAME = {
    "sharegpt": (
        {"conversations": [turn("system", "s"), turn("human", "a"), turn("gpt", "b")]},
        {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")]},
    ),
    "sharegpt's marks": (
        {"conversations": [turn("human", "a"), turn("gpt", "b", weight=0), turn("human", "c"), turn("gpt", "d")]},
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d")]},
    ),
    "sharegpt with a system column and nulls": (
        {"conversations": [turn("human", "a", loss=None), turn("gpt", "b")], "system": "s", "tools": None},
        {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")]},
    ),
    "arrays as pandas reads them": (
        {"messages": objects(user("a"), assistant("b", train=np.bool_(True))), "tools": objects({"name": "add"})},
        {"messages": [user("a"), assistant("b")], "tools": [{"name": "add"}]},
    ),
    "contents and calls in arrays and tuples": (
        {"messages": (user(objects({"type": "text", "text": "a"})),
                      assistant(None, tool_calls=objects(json.loads(CALLING))))},
        {"messages": [user("a"), assistant(None, tool_calls=[json.loads(CALLING)])]},
    ),
    "ids of numpy": ({"input_ids": [np.int64(5), np.int32(6)]}, {"input_ids": [5, 6]}),
    "turns of both kinds with the nulls of a table": (
        {"conversations": [turn("human", "a", role=None, content=None), assistant("b") | turn(None, None)]},
        {"messages": [user("a"), assistant("b")]},
    ),
    "calls as JSON text": (
        {"messages": [user("a"), assistant(None, tool_calls=f'[{{"function": {CALLING}, "id": null}}]'), tool("1")]},
        {"messages": [user("a"), assistant(None, tool_calls=[{"function": json.loads(CALLING)}]), tool("1")]},
    ),
    "conversations that are messages": (
        {"conversations": [user("a"), assistant("b")]},
        {"messages": [user("a"), assistant("b")]},
    ),
    "sharegpt's calls": (
        {"conversations": [turn("human", "a"), turn("function_call", CALLING), turn("observation", "1"),
                           turn("gpt", "b")],
         "tools": json.dumps([{"name": "add"}])},
        {"messages": [user("a"), assistant(None, tool_calls=[{"type": "function", "function": json.loads(CALLING)}]),
                      tool("1"), assistant("b")], "tools": [{"name": "add"}]},
    ),
    "alpaca": ({"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "completion": "b"}),
    "alpaca with an input": (
        {"instruction": "a", "input": "x", "output": "b", "system": "s"},
        {"messages": [{"role": "system", "content": "s"}, user("a\n\nx"), assistant("b")]},
    ),
    "a system beside texts": (
        {"prompt": "a", "completion": "b", "system": "s"},
        {"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b")]},
    ),
    "a system beside messages that have one": (
        {"messages": [{"role": "system", "content": "own"}, user("a"), assistant("b")], "system": "s"},
        {"messages": [{"role": "system", "content": "own"}, user("a"), assistant("b")]},
    ),
    "messages before conversations": (
        {"messages": [user("a"), assistant("b")], "conversations": [turn("human", "x"), turn("gpt", "y")]},
        {"messages": [user("a"), assistant("b")]},
    ),
    "conversations before completions before alpaca before text": (
        {"conversations": [turn("human", "a"), turn("gpt", "b")], "prompt": "x", "completion": "y", "text": "z",
         "instruction": "i", "output": "o"},
        {"messages": [user("a"), assistant("b")]},
    ),
    "a null conversation gives way": (
        {"conversations": None, "instruction": "a", "output": "b", "text": "z"},
        {"prompt": "a", "completion": "b"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "meaning"), SAME.values(), ids=SAME)
def test_a_shape_means_what_its_messages_say(chat, row, meaning):
    assert equal(of_rows([row], chat), of_rows([meaning], chat))


def test_calls_of_sharegpt_are_trained(chat):
    assert trained(chat, of_rows([SAME["sharegpt's calls"][0]], chat)) == CALLED + NO_THOUGHT + "b<|im_end|>"


@pytest.mark.parametrize("given", ["", "x"])
def test_alpaca_without_a_template_has_its_own_prompt(base, given):
    samples = of_rows([{"instruction": "a", "input": given, "output": "b"}], base)
    text = read(base, samples[0][0])
    assert text.startswith("<s>Below is an instruction that describes a task")
    assert text.endswith(
        ("### Input:\nx\n\n" if given else "completes the request.\n\n### Instruction:\na\n\n") + "### Response:\nb</s>"
    )
    assert trained(base, samples) == "b</s>"


def test_a_system_stands_before_a_completion_without_a_template(base):
    assert read(base, of_rows([{"prompt": "a", "completion": "b", "system": "s"}], base)[0][0]) == "<s>s\n\nab</s>"


def test_columns_by_other_names(chat):
    rows = [{"question": "a", "answer": "b", "completion": "x", "prompt": None}]
    columns = parse_columns("prompt=question, completion=answer")
    assert equal(of_rows(rows, chat, columns=columns), of_rows([{"prompt": "a", "completion": "b"}], chat))


BAD_MAPS = {
    "prompt": "--map: 'prompt' is not NAME=COLUMN",
    "promt=a": "--map: 'promt' is nothing that a row is read by; did you mean 'prompt'",
    "prompt=a,prompt=b": "--map: 'prompt=b' names a column a second time",
    "prompt=a,completion=a": "--map: 'completion=a' names a column a second time",
}


@pytest.mark.parametrize("text", BAD_MAPS)
def test_a_bad_map_is_named(text):
    with pytest.raises(UserError, match=BAD_MAPS[text]):
        parse_columns(text)


def test_a_column_that_no_row_has_is_named(chat):
    with pytest.raises(UserError, match="--map: no row of data has a column 'solution'"):
        of_rows([{"prompt": "a", "completion": "b"}], chat, columns=parse_columns("completion=solution") | {})


BAD_ROWS = {
    "unknown speaker": ({"conversations": [turn("alien", "a")]}, "turn 1 is from 'alien'; known: human"),
    "speaker is a number": ({"conversations": [turn(3, "a")]}, "turn 1 is from a number"),
    "value is missing": ({"conversations": [{"from": "gpt"}]}, "message 1 must have a content that is text, not null"),
    "conversations are text": ({"conversations": "a"}, "conversations must be a list of turns, not text"),
    "no conversations": ({"conversations": []}, "conversations must be a list of turns, not an empty list"),
    "a call without a name": ({"conversations": [turn("function_call", "{}")]}, "turn 1: a function_call holds JSON"),
    "output alone": ({"output": "a"}, "'instruction' is missing"),
    "output is null": ({"instruction": "a", "output": None}, "output must be text, not null"),
    "output is a number": ({"instruction": "a", "output": 3}, "output must be text, not a number"),
    "input is a list": ({"instruction": "a", "input": ["x"], "output": "b"}, "input must be text, not a list"),
    "history": ({"instruction": "a", "output": "b", "history": [["x", "y"]]}, "history: earlier turns"),
    "system is a list": ({"prompt": "a", "completion": "b", "system": ["s"]}, "system must be text, not a list"),
    "bytes": ({"text": b"a"}, "text must be text, not a bytes"),
    "a deep list": ({"tools": [__import__("functools").reduce(lambda a, _: [a], range(10**5), [])],
                     "messages": [user("a"), assistant("b")]}, "nested too deeply"),
    "a set": ({1, 2}, "expected a JSON object, not a set"),
    "ids of floats": (np.array([1.0, 2.0]), "input_ids must be a list of whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_in_memory_is_named_by_its_index(chat, name):
    row, message = BAD_ROWS[name]
    with pytest.raises(UserError, match=message) as error:
        of_rows([{"text": "fine"}, row], chat)
    assert str(error.value).startswith("data[1]: ")


# --- several sources


def test_without_shares_every_sample_of_every_source_comes_once(chat):
    groups = [[RowsInMemory([{"text": f"{name}{i}"} for i in range(3)], name)] for name in "ab"]
    samples = read_samples(groups, chat, Reading(VOCAB), 32)
    assert samples.groups == (3, 3)
    assert sorted(read(chat, samples[i][0])[:2] for i in range(6)) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_a_source_without_anything_to_train_is_named(chat):
    groups = [[RowsInMemory([{"text": "a"}], "a")], [RowsInMemory([{"input_ids": [1]}], "b")]]
    with pytest.raises(UserError, match=r"^b: holds no token to train \(1 samples"):
        read_samples(groups, chat, Reading(VOCAB), 32)


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_source_has_its_share_of_every_pass_and_all_its_samples_come_in_turn(shuffle):
    groups, mix = (10, 30), (0.7, 0.3)
    seen: list[int] = []
    for epoch in range(5):
        order = mixed_order(groups, mix, epoch, seed=3, shuffle=shuffle)
        assert sum(i < 10 for i in order) == 28
        assert len(order) == 40
        assert order == mixed_order(groups, mix, epoch, seed=3, shuffle=shuffle)
        seen += order
    counts = np.bincount(seen, minlength=40)
    assert set(counts[:10]) == {14}
    assert set(counts[10:]) == {2}
    if not shuffle:
        assert [i for i in seen if i < 10][:12] == [*range(10), 0, 1]
        assert all(3 <= sum(i < 10 for i in seen[a : a + 5]) <= 4 for a in range(0, 40, 5))


@pytest.mark.parametrize("text", ["0.5", "0.5,0.2,0.3", "a,b", "0,1", "nan,1", "-1,2", "inf,1"])
def test_bad_shares_are_named(text):
    with pytest.raises(UserError, match=r"^--mix: "):
        parse_mix(text, 2)


def test_a_mixed_run_goes_on_where_it_stopped(chat):
    groups = [[RowsInMemory([{"text": f"{name}{i}" * (i + 1)} for i in range(5)], name)] for name in "ab"]
    samples = read_samples(groups, chat, Reading(VOCAB), 32)

    def batches(mix=(0.8, 0.2)):
        return TrainBatches(samples, batch=2, seq=32, mix=mix)

    whole, resumed = batches(), batches()
    for _ in range(3):
        next(whole)
    resumed.restore(whole.state())
    np.testing.assert_array_equal(
        next(whole).micro_batches[0]["input_ids"], next(resumed).micro_batches[0]["input_ids"]
    )
    with pytest.raises(UserError, match="--mix"):
        batches((0.7, 0.3)).restore(whole.state())


def test_a_row_without_a_mapped_column_says_so(chat):
    rows = [{"q": "a", "answer": "b"}, {"q": "a"}]
    message = r"'completion' is missing; --map: this row has no column for completion=answer$"
    with pytest.raises(UserError, match=message):
        of_rows(rows, chat, columns=parse_columns("prompt=q,completion=answer") | {})


def test_speakers_of_sharegpt_are_known_in_any_case(chat):
    said = [
        of_rows([{"conversations": [turn(who, "a"), turn(says, "b")]}], chat)[0][0].tolist()
        for who, says in (("Human", "GPT"), ("human", "gpt"))
    ]
    assert said[0] == said[1]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes have no names in folders there")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_pipe_is_refused_in_one_line(tmp_path, name):
    """It cannot be opened twice: the second reader would wait for ever."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: cannot be read: it is no file"):
        load_samples(tmp_path / name, None, vocab_size=9, seq=8)
