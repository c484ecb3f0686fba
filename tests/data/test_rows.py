"""Rows as other tools export them: what is trained of them is what they mean there, or they are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from entrenar_gpu.data.samples import IGNORE
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from tests.data.test_chat import CALL, CALLED, NO_THOUGHT, assistant, model_folder, tool, user
from tests.data.test_data import load, read, trained
from tests.helpers import chat_templates

TRIMS = chat_templates.QWEN25.replace("m.content +", "m.content|trim +")
PRINTS = TRIMS.replace("'<|im_start|>' + m.role + '\\n' + m.content|trim + '<|im_end|>\\n'", "m.content")
ITERATES = r"""
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\n' -}}
  {%- if m.content is string %}{{ m.content }}{% else -%}
    {%- for part in m.content %}{{- '[' + part.text + ']' -}}{% endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' -}}{% endif -%}
"""


def tokenizer_of(tmp_path: Path, template: str | None = chat_templates.QWEN3, ending: str | None = None, **config):
    """A tokenizer with a template; one whose tokenizer.json ends every text with `ending`."""
    folder = model_folder(tmp_path / "model", {"eos_token": "<|im_end|>", "chat_template": template} | config)
    if ending is not None:
        backend = Tokenizer.load(folder).backend
        special = [(token, backend.token_to_id(token)) for token in ("<s>", *ending.split())]
        backend.post_processor = processors.TemplateProcessing(single=f"<s> $A {ending}", special_tokens=special)
        backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def parts(*texts):
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


# --- special tokens of a post-processor


SHAPES = {
    "text": ({"text": "hello"}, "<s>hello</s>", "hello</s>"),
    "text with its end": ({"text": "hello</s>"}, "<s>hello</s>", "hello</s>"),
    "text with its beginning": ({"text": "<s>hello"}, "<s>hello</s>", "hello</s>"),
    "completion": ({"prompt": "a", "completion": " b"}, "<s>a b</s>", " b</s>"),
    "completion with its end": ({"prompt": "a", "completion": " b</s>"}, "<s>a b</s>", " b</s>"),
}


@pytest.mark.parametrize(("row", "whole", "learned"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("eos", ["</s>", None])
def test_what_the_tokenizer_puts_around_texts_is_there_once_and_its_end_is_trained(tmp_path, row, whole, learned, eos):
    tokenizer = tokenizer_of(tmp_path, None, ending="</s>", eos_token=eos, bos_token="<s>")
    samples = load(tmp_path, tokenizer, row)
    assert read(tokenizer, samples[0][0]) == whole
    assert trained(tokenizer, samples) == learned


def test_another_end_than_eos_is_neither_lost_nor_put_in_its_place(tmp_path):
    tokenizer = tokenizer_of(tmp_path, None, ending="<|endoftext|>", eos_token="</s>")
    samples = load(tmp_path, tokenizer, {"prompt": "a", "completion": " b"})
    assert read(tokenizer, samples[0][0]) == "<s>a b<|endoftext|></s>"
    assert trained(tokenizer, samples) == " b<|endoftext|></s>"
    assert tokenizer.backend.token_to_id("<|endoftext|>") in tokenizer.eos_ids


def test_an_end_that_holds_eos_before_something_else_gets_no_second_one(tmp_path):
    tokenizer = tokenizer_of(tmp_path, None, ending="</s> <|endoftext|>", eos_token="</s>")
    samples = load(tmp_path, tokenizer, {"text": "hello"})
    assert read(tokenizer, samples[0][0]) == "<s>hello</s><|endoftext|>"


def test_a_prompt_to_be_continued_has_its_beginning_and_no_end(tmp_path):
    tokenizer = tokenizer_of(tmp_path, None, ending="</s>")
    for prompt in ("a", "<s>a"):
        assert tokenizer.decode(tokenizer.encode_prompt(prompt), skip_special_tokens=False) == "<s>a"


def test_a_rendered_conversation_gets_nothing_put_around_it(tmp_path):
    tokenizer = tokenizer_of(tmp_path, chat_templates.QWEN25, ending="</s>")
    samples = load(tmp_path, tokenizer, {"messages": [user("a"), assistant("b")]})
    assert read(tokenizer, samples[0][0]).endswith("assistant\nb<|im_end|>\n")
    assert "<s>" not in read(tokenizer, samples[0][0])


# --- marks of what is not to be learned


MARKS = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"weight": 1, "train": False}]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("template", ["QWEN3", "GENERATION_TAGS"])
def test_a_marked_turn_is_read_but_not_learned(tmp_path, mark, template):
    tokenizer = tokenizer_of(tmp_path, getattr(chat_templates, template))
    messages = [user("a"), assistant("Lyon", **mark), user("b"), assistant("Paris", weight=1, train=None)]
    samples = load(tmp_path, tokenizer, {"messages": messages})
    assert "Lyon" in read(tokenizer, samples[0][0])
    assert trained(tokenizer, samples) == (NO_THOUGHT if template == "QWEN3" else "") + "Paris<|im_end|>"


def test_marks_count_in_completions_and_with_loss_on_everything(tmp_path):
    tokenizer = tokenizer_of(tmp_path, chat_templates.QWEN25)
    turns = [assistant("Lyon", weight=0), user("b"), assistant("Paris")]
    samples = load(tmp_path, tokenizer, {"prompt": [user("a")], "completion": turns})
    assert trained(tokenizer, samples) == "Paris<|im_end|>"
    samples = load(tmp_path, tokenizer, {"messages": [user("a"), *turns]}, loss_on="all")
    learned = trained(tokenizer, samples)
    assert "Lyon" not in learned
    assert learned.endswith("<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n")


def counted(tokenizer, samples) -> list[tuple[str, float]]:
    """The tokens in the loss, as texts, with their weights: neighbours of one weight together."""
    (ids, targets), found = samples[0], []
    for i, weight in zip(targets[:-1], samples.weights[:-1], strict=True):
        text = "" if i == IGNORE else tokenizer.backend.decode([i], skip_special_tokens=False)
        if found and found[-1][1] == weight:
            found[-1] = (found[-1][0] + text, weight)
        else:
            found.append((text, float(weight)))
    assert len(samples.weights) == len(ids)
    return [pair for pair in found if pair[1]]


def test_a_turn_counts_as_its_weight_says(tmp_path):
    tokenizer = tokenizer_of(tmp_path, chat_templates.QWEN25)
    first, second = assistant("Lyon", weight=0.25), assistant("Paris", weight=3)
    rows = {"messages": [user("a"), first, user("b"), assistant("Rome", weight=0), user("c"), second, user("d"),
                         assistant("Bonn")]}  # fmt: skip
    samples = load(tmp_path, tokenizer, rows)
    assert counted(tokenizer, samples) == [("Lyon<|im_end|>", 0.25), ("Paris<|im_end|>", 3), ("Bonn<|im_end|>", 1)]
    assert trained(tokenizer, samples) == "Lyon<|im_end|>Paris<|im_end|>Bonn<|im_end|>"
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "Lyon", "weight": 0.25}]
    samples = load(tmp_path, tokenizer, {"conversations": turns})
    assert counted(tokenizer, samples) == [("Lyon<|im_end|>", 0.25)]


def test_weights_of_turns_count_in_completions_and_with_loss_on_everything(tmp_path):
    tokenizer = tokenizer_of(tmp_path, chat_templates.QWEN25)
    turns = [assistant("Lyon", weight=0.5), user("b"), assistant("Paris")]
    samples = load(tmp_path, tokenizer, {"prompt": [user("a")], "completion": turns})
    assert counted(tokenizer, samples) == [("Lyon<|im_end|>", 0.5), ("Paris<|im_end|>", 1)]
    samples = load(tmp_path, tokenizer, {"prompt": [user("a"), turns[0]], "completion": turns[1:]}, loss_on="all")
    before, half, after = counted(tokenizer, samples)
    assert before[0].endswith("user\na<|im_end|>\n<|im_start|>assistant\n")
    assert before[1] == 1
    assert half == ("Lyon<|im_end|>", 0.5)
    assert after == ("\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n", 1)


def test_the_end_that_a_template_leaves_out_counts_as_its_turn(tmp_path):
    tokenizer = tokenizer_of(tmp_path, PRINTS, eos_token="</s>")
    row = {"prompt": [user("a")], "completion": [assistant("Lyon", weight=0.5)]}
    assert counted(tokenizer, load(tmp_path, tokenizer, row)) == [("Lyon</s>", 0.5)]
    row["completion"] = [assistant("Lyon"), user("b"), assistant("Paris", weight=0)]
    samples = load(tmp_path, tokenizer, row)
    assert trained(tokenizer, samples) == "Lyon"


def test_a_row_without_a_turn_to_learn_is_skipped(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    rows = [{"messages": [user("a"), assistant("b", train=False)]}, {"messages": [user("a"), assistant("c")]}]
    samples = load(tmp_path, tokenizer, *rows)
    assert (len(samples), samples.skipped) == (1, 1)


BAD_MARKS = {
    "less than nothing": (
        assistant("b", weight=-0.5),
        "message 2: weight must be 0 or a number from 1e-06 to 1e.06, not -0.5",
    ),
    "no number": (assistant("b", weight=float("nan")), "message 2: weight must be 0 or a number from .* not NaN"),
    "half a user": (user("b") | {"weight": 0.5}, "message 2: weight is 0.5, but only turns of the assistant"),
    "a word": (assistant("b", train="no"), "message 2: train must be true or false, not text"),
    "parts of a turn": (assistant("b", train_detail=[{"begin_offset": 0}]), "message 2 has train_detail"),
    "a user to be learned": (user("b") | {"train": True}, "message 2: train is true, but only turns of the assistant"),
}


@pytest.mark.parametrize(("message", "reason"), BAD_MARKS.values(), ids=BAD_MARKS)
def test_marks_that_cannot_be_followed_are_refused(tmp_path, message, reason):
    with pytest.raises(UserError, match=rf"data\.jsonl:1: messages: {reason}"):
        load(tmp_path, tokenizer_of(tmp_path), {"messages": [user("a"), message, assistant("c")]})


# --- contents as lists of parts


@pytest.mark.parametrize(
    "template", [TRIMS, PRINTS, chat_templates.QWEN25, chat_templates.QWEN3, chat_templates.LLAMA3]
)
def test_parts_are_joined_for_a_template_that_prints_contents(tmp_path, template):
    tokenizer = tokenizer_of(tmp_path, template)
    as_parts = [user(parts("Cap", "ital?")), assistant(parts("Paris", "."))]
    as_text = [user("Capital?"), assistant("Paris.")]
    samples = load(tmp_path, tokenizer, {"messages": as_parts}, {"messages": as_text})
    assert samples[0][0].tolist() == samples[1][0].tolist()
    assert samples[0][1].tolist() == samples[1][1].tolist()


def test_parts_reach_a_template_that_reads_them(tmp_path):
    tokenizer = tokenizer_of(tmp_path, ITERATES)
    samples = load(
        tmp_path, tokenizer, {"messages": [user(parts("a", "b")), assistant(parts("c")), user("d"), assistant("e")]}
    )
    text = "<|im_start|>user\n[a][b]<|im_end|>\n<|im_start|>assistant\n[c]<|im_end|>\n"
    assert read(tokenizer, samples[0][0]).startswith(text)
    assert trained(tokenizer, samples) == "[c]<|im_end|>e<|im_end|>"


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "video"])
def test_parts_that_are_no_text_are_refused_by_type(tmp_path, kind):
    content = [{"type": kind, kind: {"url": "x.png"}, "text": None}, *parts("What is this?")]
    with pytest.raises(UserError, match=rf"messages: message 1 holds a part of type '{kind}'; only text"):
        load(tmp_path, tokenizer_of(tmp_path), {"messages": [user(content), assistant("b")]})


# --- tool calls


ENCODES = chat_templates.QWEN3.replace(
    "call.arguments if call.arguments is string else call.arguments|tojson", "call.arguments|tojson"
)
PRINTS_TEXT = chat_templates.QWEN3.replace(
    "call.arguments if call.arguments is string else call.arguments|tojson", "call.arguments"
)


@pytest.mark.parametrize("template", [chat_templates.QWEN3, ENCODES, PRINTS_TEXT, chat_templates.LLAMA3])
@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_of_tool_calls_are_encoded_once(tmp_path, template, as_text):
    function = CALL["function"] | ({"arguments": '{"text": "<é>"}'} if as_text else {})
    messages = [user("a"), assistant("", tool_calls=[CALL | {"function": function}]), tool("1"), assistant("b")]
    tokenizer = tokenizer_of(
        tmp_path, template, eos_token="<|eot_id|>" if template == chat_templates.LLAMA3 else "</s>"
    )
    learned = trained(tokenizer, load(tmp_path, tokenizer, {"messages": messages}))
    wanted = CALLED if "<tool_call>" in template else '{"name": "add", "parameters": {"text": "<é>"}}<|eot_id|>'
    assert learned.startswith(wanted)


def test_arguments_that_are_no_object_are_refused_where_they_would_be_encoded(tmp_path):
    call = {"function": {"name": "add", "arguments": "{'a': 1}"}}
    with pytest.raises(UserError, match=r"data\.jsonl:1: message 2: a tool call's arguments are not a JSON object"):
        load(tmp_path, tokenizer_of(tmp_path, ENCODES), {"messages": [user("a"), assistant("", tool_calls=[call])]})


def test_tools_as_json_text_and_with_the_nulls_of_a_table(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    tools = [{"name": "add", "parameters": {"a": {"type": "integer", "default": None}}}]
    padded = [{"name": "add", "strict": None, "parameters": {"a": {"type": "integer", "enum": None, "default": None}}}]
    messages = [user("a"), assistant("b")]
    texts = [json.dumps(tool) for tool in tools]
    rows = [{"messages": messages, "tools": given} for given in (tools, json.dumps(tools), padded, texts)]
    samples = load(tmp_path, tokenizer, *rows)
    assert len({tuple(samples[i][0].tolist()) for i in range(4)}) == 1


def test_rows_with_tools_take_the_template_named_for_them(tmp_path):
    folder = model_folder(tmp_path / "model", {"eos_token": "<|im_end|>"})
    (folder / "chat_template.jinja").write_text(chat_templates.QWEN25)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text(
        "{{ 'TOOLS ' + tools|tojson }}" + chat_templates.QWEN25
    )
    tokenizer = Tokenizer.load(folder)
    messages = [user("a"), assistant("b")]
    samples = load(tmp_path, tokenizer, {"messages": messages}, {"messages": messages, "tools": [{"name": "add"}]})
    assert not read(tokenizer, samples[0][0]).startswith("TOOLS")
    assert read(tokenizer, samples[1][0]).startswith('TOOLS [{"name": "add"}]')
    assert trained(tokenizer, samples, 1) == "b<|im_end|>"


def test_a_template_that_only_a_processor_has(tmp_path):
    folder = model_folder(tmp_path / "model", {"eos_token": "<|im_end|>"})
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert Tokenizer.load(folder).render([user("a")]) == "json"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert Tokenizer.load(folder).render([user("a")]) == "config"


# --- nulls, thoughts, variables


def test_null_keys_are_no_keys(tmp_path):
    """Llama 3's template takes every message that has a key tool_calls for a call."""
    tokenizer = tokenizer_of(tmp_path, chat_templates.LLAMA3, eos_token="<|eot_id|>")
    nulls = {"tool_calls": None, "reasoning_content": None, "name": None}
    with_nulls = [user("a") | nulls, assistant("b", **nulls), user("c"), assistant("d", tool_calls=[])]
    samples = load(
        tmp_path,
        tokenizer,
        {"messages": with_nulls},
        {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
    )
    assert samples[0][0].tolist() == samples[1][0].tolist()


@pytest.mark.parametrize(
    "template", [chat_templates.QWEN3, PRINTS_TEXT.replace("m.content, ''", "m.content|string, ''")]
)
def test_a_null_content_is_not_the_word_none(tmp_path, template):
    tokenizer = tokenizer_of(tmp_path, template)
    messages = [user("a"), assistant(None, tool_calls=[CALL]), tool("1"), assistant(None, reasoning_content="hm")]
    learned = trained(tokenizer, load(tmp_path, tokenizer, {"messages": messages}))
    assert learned.startswith(CALLED)
    assert "None" not in learned


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read_as", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_has_one_meaning_under_three_names(tmp_path, name, read_as):
    tokenizer = tokenizer_of(tmp_path, chat_templates.QWEN3.replace("reasoning_content", read_as))
    samples = load(tmp_path, tokenizer, {"messages": [user("a"), assistant("b", **{name: "hm"})]})
    assert trained(tokenizer, samples) == "<think>\nhm\n</think>\n\nb<|im_end|>"


def test_two_thoughts_in_one_message_are_refused(tmp_path):
    messages = [user("a"), assistant("b", reasoning="x", thinking="y")]
    with pytest.raises(UserError, match=r"data\.jsonl:1: message 2: reasoning and thinking differ"):
        load(tmp_path, tokenizer_of(tmp_path), {"messages": messages})


def test_variables_of_a_row_reach_its_template(tmp_path):
    asked = "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}{% endif -%}"
    template = chat_templates.QWEN3[: chat_templates.QWEN3.rindex("{% endif -%}")] + asked
    tokenizer = tokenizer_of(tmp_path, template)
    row = {"messages": [user("a"), assistant("b")]}
    off = row | {"chat_template_kwargs": {"enable_thinking": False, "other": None}}
    samples = load(tmp_path, tokenizer, row, off, row | {"chat_template_kwargs": None})
    assert [trained(tokenizer, samples, i) for i in range(3)] == [
        NO_THOUGHT + "b<|im_end|>", "b<|im_end|>", NO_THOUGHT + "b<|im_end|>",
    ]  # fmt: skip


# --- rows with more columns than one shape


def test_columns_that_are_null_do_not_count(tmp_path):
    tokenizer = tokenizer_of(tmp_path, chat_templates.QWEN25)
    empty = dict.fromkeys(["messages", "prompt", "completion", "text", "input_ids", "labels", "tools"])
    rows = [
        empty | {"messages": [user("a"), assistant("b")]},
        empty | {"prompt": "a", "completion": "b"},
        empty | {"text": "b"},
        empty | {"input_ids": [70, 71]},
    ]
    samples = load(tmp_path, tokenizer, *rows)
    assert [trained(tokenizer, samples, i) for i in range(3)] == ["b<|im_end|>"] * 2 + ["<|im_end|>"]
    assert samples[3][0].tolist() == [70, 71]
    with pytest.raises(UserError, match=r"data\.jsonl:1: expected one of messages; .*, all null"):
        load(tmp_path, tokenizer, empty)


def test_which_shape_is_taken_of_several(tmp_path):
    """Tokens before conversations, these before completions, these before texts; half a shape is none."""
    tokenizer = tokenizer_of(tmp_path, chat_templates.QWEN25)
    chat = {"messages": [user("a"), assistant("chat")]}
    pair = {"prompt": "a", "completion": "pair"}
    text = {"text": "text"}
    rows = [
        chat | pair | text | {"input_ids": [70, 71], "attention_mask": [1, 1]},
        chat | pair | text,
        pair | text,
        {"prompt": "a", "prompt_id": "x"} | chat,
        {"completion": "a"} | text,
    ]
    samples = load(tmp_path, tokenizer, *rows)
    assert samples[0][0].tolist() == [70, 71]
    learned = [trained(tokenizer, samples, i) for i in range(1, 5)]
    assert learned == ["chat<|im_end|>", "pair<|im_end|>", "chat<|im_end|>", "ext<|im_end|>"]


def test_masks_beside_tokens(tmp_path):
    ids = {"input_ids": [5, 6, 7, 8, 0]}
    rows = [
        ids | {"attention_mask": [1, 1, 1, 1, 0]},
        ids | {"completion_mask": [0, 0, 1, 1, 0]},
        ids | {"assistant_masks": [0, 0, 1, 1, 0], "attention_mask": [0, 1, 1, 1, 0]},
        ids | {"labels": [5, 6, 7, 8, -100], "weights": [1, 1.0, 0, 1, 1]},
    ]
    samples = load(tmp_path, None, *rows)
    assert [samples[i][0].tolist() for i in range(3)] == [[5, 6, 7, 8], [5, 6, 7, 8, 0], [6, 7, 8]]
    assert samples[0][1].tolist() == [6, 7, 8, IGNORE]
    assert samples[1][1].tolist() == [IGNORE, 7, 8, IGNORE, IGNORE]
    assert samples[2][1].tolist() == [7, 8, IGNORE]
    assert samples[3][1].tolist() == [6, IGNORE, 8, IGNORE, IGNORE]
    wrong = [{"attention_mask": [1, 0, 1, 1, 1]}, {"completion_mask": [1]}, {"completion_mask": [2] * 5}]
    wrong += [{"weights": [1, -0.5, 1, 1, 1]}, {"weights": [1]}, {"weights": "11111"}, {"weights": [True] * 5}]
    wrong += [
        {"weights": [1, float("nan"), 1, 1, 1]},
        {"weights": [1, 1e-30, 1, 1, 1]},
        {"weights": [1, None, 1, 1, 1]},
    ]
    for bad in wrong:
        with pytest.raises(UserError, match=rf"data\.jsonl:1: {next(iter(bad))}"):
            load(tmp_path, None, ids | bad)


def test_weights_stand_at_their_tokens(tmp_path):
    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7, 8], "weights": [9, 0.5, 0, 2]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [0, 6, 7, 8], "weights": [1, 1, 0.25, 3], "attention_mask": [0, 1, 1, 1]},
    ]
    samples = load(tmp_path, None, *rows)
    assert samples.weights is not None
    assert samples.targets.tolist() == [6, IGNORE, 8, IGNORE, IGNORE, 7, IGNORE, 7, 8, IGNORE]
    assert samples.weights.tolist() == [0.5, 0, 2, 0, 0, 1, 0, 0.25, 3, 0]
    assert load(tmp_path, None, rows[1]).weights is None
    assert samples.fingerprint != load(
        tmp_path, None, *[row | {"weights": [1] * len(row["input_ids"])} for row in rows]
    )


# --- what ends a turn


CLOSINGS = {
    "QWEN3": "<|im_end|>",
    "LLAMA3": "<|eot_id|>",
    "LLAMA2": "</s>",
    "GENERATION_TAGS": "<|im_end|>",
    "CLOSED": "<|im_end|>",
}


@pytest.mark.parametrize("name", CLOSINGS)
def test_what_closes_a_turn_stops_generation(tmp_path, name):
    """Base models: EOS ends documents, and the template closes turns with another token."""
    config = {"eos_token": "</s>" if name == "LLAMA2" else "<|endoftext|>"}
    tokenizer = tokenizer_of(tmp_path, getattr(chat_templates, name), **config)
    ids = {tokenizer.backend.token_to_id(token) for token in (config["eos_token"], CLOSINGS[name])}
    assert tokenizer.eos_ids == ids
    assert tokenizer.stop_texts == ()


def test_words_may_close_a_turn(tmp_path):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' END\\n' }}{% endfor %}"
    tokenizer = tokenizer_of(tmp_path, template, eos_token="</s>")
    assert tokenizer.stop_texts == ("END",)
    assert tokenizer_of(tmp_path, chat_templates.SCRIPT, eos_token="</s>").stop_texts == ()


def test_a_turn_that_only_the_next_one_closes(tmp_path):
    """Nothing stands behind the last turn; between two there is the header of the next, which ends this one."""
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content }}{% endfor %}"
    tokenizer = tokenizer_of(tmp_path, template, eos_token="</s>")
    assert tokenizer.backend.token_to_id("<|im_start|>") in tokenizer.eos_ids
