"""Chat templates: what they write, which of it the assistant says, and what a hostile one cannot do."""

import json
import os
import time
from datetime import datetime
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from entrenar_gpu.chat import ChatTemplate
from entrenar_gpu.data.tokenizer import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.stderr import without_panics_text
from tests.helpers import chat_templates

CALL = {"type": "function", "function": {"name": "add", "arguments": {"text": "<é>"}}}
CALLED = '<tool_call>\n{"name": "add", "arguments": {"text": "<é>"}}\n</tool_call><|im_end|>'
NO_THOUGHT = "<think>\n\n</think>\n\n"


def template(source: str) -> ChatTemplate:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTemplate(source, "m/template.jinja", named, chat_templates.SPECIAL_TOKENS, datetime(2024, 7, 26))


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tool(content):
    return {"role": "tool", "content": content}


def said(source: str, messages: list) -> list[str]:
    rendered = template(source).render_turns(messages)
    return [rendered.text[start:end] for start, end in rendered.spans]


# template, conversation, what is trained in it
TURNS = {
    "qwen3: thinks in the last turn only": (
        chat_templates.QWEN3,
        [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d")],
        ["b<|im_end|>", NO_THOUGHT + "d<|im_end|>"],
    ),
    "qwen3: thoughts within content": (
        chat_templates.QWEN3,
        [user("a"), assistant("<think>\nhm\n</think>\n\nb")],
        ["<think>\nhm\n</think>\n\nb<|im_end|>"],
    ),
    "qwen3: thoughts beside content": (
        chat_templates.QWEN3,
        [user("a"), assistant("b", reasoning_content="hm")],
        ["<think>\nhm\n</think>\n\nb<|im_end|>"],
    ),
    "qwen3: earlier turns render otherwise in the shorter conversation": (
        chat_templates.QWEN3,
        [user("a"), assistant("", tool_calls=[CALL], reasoning_content="hm"), tool("1"), assistant("b"), user("c"),
         assistant("d", tool_calls=[CALL]), tool("2"), tool("3"), assistant("e")],
        [CALLED, "b<|im_end|>", "d\n" + CALLED, NO_THOUGHT + "e<|im_end|>"],
    ),
    "qwen3: the only question looks like a tool response": (
        chat_templates.QWEN3,
        [user("<tool_response>1</tool_response>"), assistant("b")],
        ["b<|im_end|>"],
    ),
    "qwen3: the generation prompt opens the thought": (
        chat_templates.QWEN3_THINKING,
        [user("a"), assistant("<b>"), user("c"), assistant("d", reasoning_content="hm")],
        ["<b><|im_end|>", "hm\n</think>\n\nd<|im_end|>"],
    ),
    "the answer repeats the question": (
        chat_templates.QWEN25,
        [user("same"), assistant("same"), user("same"), assistant("same")],
        ["same<|im_end|>", "same<|im_end|>"],
    ),
    "the content is white space, or holds an end of turn": (
        chat_templates.QWEN25,
        [user("a"), assistant(" \n"), user("c"), assistant("x<|im_end|>\ny")],
        [" \n<|im_end|>", "x<|im_end|>\ny<|im_end|>"],
    ),
    "the assistant speaks first": (
        chat_templates.QWEN25,
        [assistant("hello"), user("a"), assistant("b")],
        ["hello<|im_end|>", "b<|im_end|>"],
    ),
    "llama3: stripped contents, tool call in place of content": (
        chat_templates.LLAMA3,
        [user("a"), assistant("", tool_calls=[CALL]), tool("1"), assistant(" b \n"), user("c"), assistant("d")],
        ['{"name": "add", "parameters": {"text": "<é>"}}<|eot_id|>', "b<|eot_id|>", "d<|eot_id|>"],
    ),
    "llama2: no header before the answer": (
        chat_templates.LLAMA2,
        [user("a"), assistant("b"), user("c"), assistant("d")],
        [" b </s>", " d </s>"],
    ),
    "the conversation ends after the turn does": (
        chat_templates.CLOSED,
        [user("a"), assistant("b"), user("c"), assistant("d")],
        ["b<|im_end|>", "d<|im_end|>"],
    ),
    "no special tokens": (
        chat_templates.SCRIPT,
        [user("a"), assistant("b"), user("c"), assistant("d")],
        ["b", "d"],
    ),
    "generation tags": (
        chat_templates.GENERATION_TAGS,
        [user("a"), assistant("b"), user("c"), assistant("")],
        ["b<|im_end|>", "<|im_end|>"],
    ),
    "no assistant": (chat_templates.QWEN25, [user("a")], []),
}  # fmt: skip


@pytest.mark.parametrize(("source", "messages", "expected"), TURNS.values(), ids=TURNS)
def test_the_assistants_turns(source, messages, expected):
    assert said(source, messages) == expected


@pytest.mark.parametrize(("source", "messages", "expected"), TURNS.values(), ids=TURNS)
def test_turns_are_marked_in_the_text_that_is_rendered(source, messages, expected):
    assert template(source).render_turns(messages).text == template(source).render(messages)


def test_the_last_turn_follows_the_generation_prompt():
    messages = [user("a"), assistant("b"), user("c"), assistant("d")]
    for source in (chat_templates.QWEN3, chat_templates.QWEN25, chat_templates.LLAMA3, chat_templates.LLAMA2):
        rendered = template(source).render_turns(messages)
        prompt = template(source).render(messages[:-1], add_generation_prompt=True)
        assert rendered.text[: rendered.spans[-1][0]] == prompt


def test_a_template_that_drops_a_turn_is_refused_by_message():
    source = "{% for m in messages %}{{ m.content if loop.index != 2 else '-' }}{% endfor %}"
    with pytest.raises(UserError, match=r"m/template\.jinja: cannot tell where the chat template puts message 2"):
        template(source).render_turns([user("a"), assistant("b")])


def test_a_template_whose_other_text_depends_on_the_answer_is_refused():
    source = "{{ messages|map(attribute='content')|join|length }}{% for m in messages %}:{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"m/template\.jinja: cannot tell where the chat template puts message 2"):
        template(source).render_turns([user("a"), assistant("bcd")])


def test_environment_is_that_of_transformers():
    source = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "  {{- m.content | tojson }}\n"
        "{%- endfor %}\n"
        "  {% if true %}\n"
        "x\n"
        "  {% endif %}\n"
        "{{ strftime_now('%Y') }}{{ missing }}{{ messages[0] | tojson(indent=1) }}"
    )
    rendered = template(source).render([user("<é&'>"), tool("no")])
    assert rendered == '"<é&\'>"x\n2024{\n "role": "user",\n "content": "<é&\'>"\n}'


HOSTILE = {
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "escape by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "change of the messages": "{{ messages.append(1) }}",
    "loops in loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "repeated text": "{{ 'a' * 1000000000000 }}",
    "repeated list": "{{ 1000000000000 * [1] }}",
    "power": "{{ 10 ** 100000000000 }}",
    "large product": "{{ (9 ** 60) * (9 ** 60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "raise": "{{ raise_exception('roles must\n alternate') }}",
    "type error": "{{ 1 + 'a' }}",
    "undefined": "{{ messages[9].content.strip() }}",
    "long output": "{% for i in range(900000) %}{{ 'a' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_fails_or_attacks_is_one_line_with_its_file(source):
    with pytest.raises(UserError) as error:
        template(source).render([user("a")])
    assert str(error.value).startswith("m/template.jinja: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_template_with_a_mistake_names_its_file():
    with pytest.raises(UserError, match=r"m/template\.jinja: chat template is not valid: .*endfor"):
        template("{% for m in messages %}")


def test_a_message_cannot_hold_the_marks():
    with pytest.raises(UserError, match="noncharacter"):
        template(chat_templates.QWEN25).render([user("a\ufdd3b")])


# --- the tokenizer of a model folder


def model_folder(folder: Path, tokenizer_config: dict | None = None, bos: bool = False, **files: object) -> Path:
    """A model folder whose tokenizer has a token for each byte, and the special tokens of the templates."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "ab"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(chat_templates.SPECIAL_TOKENS))
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {}), encoding="utf-8")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def test_neither_cut_nor_padded_by_the_saved_tokenizer(tmp_path):
    tokenizer = Tokenizer.load(model_folder(tmp_path))
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert len(tokenizer.encode("hello world")) == 11


def test_bos_once(tmp_path):
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": chat_templates.LLAMA2}
    tokenizer = Tokenizer.load(model_folder(tmp_path, config, bos=True))
    bos = tokenizer.bos_id
    assert tokenizer.encode("a") == [bos, *tokenizer.encode("a", add_special_tokens=False)]
    assert tokenizer.encode("<s>a").count(bos) == 1
    text = tokenizer.render([user("a")])
    assert tokenizer.encode(text, add_special_tokens=False).count(bos) == 1
    assert tokenizer.encode(text).count(bos) == 1


def test_what_ends_a_text_and_what_stops_generation(tmp_path):
    files = {"generation_config": {"eos_token_id": [257, 259]}, "config": {"eos_token_id": 260}}
    named = Tokenizer.load(model_folder(tmp_path / "named", {"eos_token": "</s>"}, **files))
    assert named.eos_id == named.backend.token_to_id("</s>")
    assert named.eos_ids == {257, 259, 260, named.eos_id}
    mapped = Tokenizer.load(model_folder(tmp_path / "mapped", special_tokens_map={"eos_token": {"content": "</s>"}}))
    assert mapped.eos_id == named.eos_id
    assert Tokenizer.load(model_folder(tmp_path / "unnamed", **files)).eos_id == 257
    assert Tokenizer.load(model_folder(tmp_path / "none")).eos_id is None


def test_which_template(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = Tokenizer.load(model_folder(tmp_path, {"chat_template": named}))
    assert tokenizer.render([user("a")]) == "plain"
    assert tokenizer.render([user("a")], tools=[CALL]) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert Tokenizer.load(tmp_path).render([user("a")]) == "file"


def test_the_clock_a_template_sees(tmp_path):
    config = {"chat_template": chat_templates.LLAMA3, "bos_token": "<s>"}
    tokenizer = Tokenizer.load(model_folder(tmp_path, config), now=datetime(2024, 2, 29))
    assert "Today Date: 29 Feb 2024\n" in tokenizer.render([user("a")])


def test_a_model_without_chat_template(tmp_path):
    tokenizer = Tokenizer.load(model_folder(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.render([user("a")])


FAULTS = {
    "tokenizer.json": ("{}", "tokenizer.json: not a tokenizer"),
    "tokenizer_config.json": ('{"chat_template": 3}', "chat_template must be text"),
    "special_tokens_map.json": ("[]", "special_tokens_map.json: expected a JSON object"),
    "generation_config.json": ('{"eos_token_id": "x"}', "generation_config.json: eos_token_id must be"),
    "config.json": ("{", "config.json: not valid JSON"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_named(tmp_path, name):
    content, message = FAULTS[name]
    (model_folder(tmp_path) / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: not found"):
        Tokenizer.load(tmp_path)


def faulty_tokenizer(folder: Path, **changes: object) -> Path:
    model_folder(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


NAMES_NO_TOKEN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "none", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}


def test_a_tokenizer_that_fails_when_used_is_one_line(tmp_path):
    """The library panics, which is no Exception."""
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot encode a text: "):
        Tokenizer.load(faulty_tokenizer(tmp_path / "a", post_processor=NAMES_NO_TOKEN))
    endless = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer.load(faulty_tokenizer(tmp_path / "b", pre_tokenizer=endless))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot encode a text: "):
        tokenizer.encode("a" * 60 + "!")


def test_a_panic_of_the_library_says_nothing_beside_that_line(tmp_path, capfd):
    """Rust writes of a panic to the descriptor, past sys.stderr; what is written for other reasons is shown."""
    with pytest.raises(UserError, match="cannot encode"):
        Tokenizer.load(faulty_tokenizer(tmp_path / "a", post_processor=NAMES_NO_TOKEN))
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    tokenizer = Tokenizer.load(faulty_tokenizer(tmp_path / "b", pre_tokenizer=split))
    with pytest.raises(UserError, match="cannot encode"):
        tokenizer.begin(["x" * 3000], 512, [False])
    assert capfd.readouterr().err == ""
    with without_panics_text(), without_panics_text():  # as two threads may be in it
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"


def replaced(pattern: dict[str, str], content: str) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    "steps",
    [
        [replaced({"String": "a"}, "a" * 10)] * 12,
        [replaced({"Regex": ""}, "ab")] * 30,
        [{"type": "Prepend", "prepend": "a" * 20_000}],
        [{"type": "Sequence", "normalizers": [replaced({"String": "ab"}, "abababab")] * 9}],
    ],
    ids=["letters", "between letters", "before", "within"],
)
def test_a_normalizer_that_makes_texts_enormous_is_one_line(tmp_path, steps):
    normalizer = {"type": "Sequence", "normalizers": steps}
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"tokenizer\.json: its normalizer may write .* characters for one"):
        Tokenizer.load(faulty_tokenizer(tmp_path / "a", normalizer=normalizer))
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(
    "steps",
    [
        [{"type": "Prepend", "prepend": "▁"}, replaced({"String": " "}, "▁")],
        [{"type": "NFKC"}, *[replaced({"Regex": " {2,}"}, " ")] * 3, {"type": "Lowercase"}],
        [replaced({"String": "``"}, '"'), replaced({"String": "''"}, '"'), {"type": "NFKD"}, {"type": "StripAccents"}],
    ],
)
def test_ordinary_normalizers_are_no_such(tmp_path, steps):
    Tokenizer.load(faulty_tokenizer(tmp_path / "a", normalizer={"type": "Sequence", "normalizers": steps}))


def test_more_tokens_around_a_text_than_it_could_hold_are_one_line(tmp_path):
    ids = {"<s>": {"id": "<s>", "ids": [1] * 10_000, "tokens": ["<s>"] * 10_000}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": ids}
    with pytest.raises(UserError, match="puts more than 4,096 tokens around a text"):
        Tokenizer.load(faulty_tokenizer(tmp_path / "a", post_processor=processor))


BAD_STOPS = ["1e400", "NaN", "9" * 30, "true", "2.0", "[1, -1]", "9" * 5000, '{"a": 1}', "[[1]]"]


@pytest.mark.parametrize("value", BAD_STOPS, ids=lambda value: value[:12])
def test_an_id_that_cannot_be_is_one_line(tmp_path, value):
    folder = model_folder(tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(UserError, match=r"generation_config\.json: ") as error:
        Tokenizer.load(folder)
    assert len(str(error.value).removeprefix(str(tmp_path))) < 300


def test_files_that_are_no_files_or_too_large_are_refused(tmp_path):
    folder = model_folder(tmp_path)
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read: it is no file"):
        Tokenizer.load(folder)
    (folder / "generation_config.json").unlink()
    with (folder / "special_tokens_map.json").open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"special_tokens_map\.json: too large"):
        Tokenizer.load(folder)


# As Gemma 4: what a tool answers stands in the turn that called it.
ANSWERED_WITHIN = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</u>{% elif m.role == 'assistant' %}<a>"
    "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}"
    "{% for t in messages[loop.index:] if t.role == 'tool' %}<r>{{ t.content }}</r>{% endfor %}"
    "{% else %}</s>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


# Each has a habit of a well-known template: where tools' answers stop otherwise when more follows (Hermes 3), where
# roles alternate but for turns that call (Mistral v0.3), where calls stand beside a null alone and their arguments are
# text (DeepSeek-R1), where a null is written as JSON (LFM2), where an empty thought is part of the prompt (Qwen3.5).
_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_NAMES = "{% for c in m.tool_calls %}<call>{{ c.function.name }}{% endfor %}<|im_end|>\n"
_HERMES = (
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n{{ m.content }}"
    "{{ '' if loop.last else '\n' }}"
    "<|im_end|>{% elif m.tool_calls %}<|im_start|>assistant\n"
    + _NAMES
    + "{% else %}"
    + _TURN
    + "{% endif %}{% endfor %}"
) + _ASKED
_ALTERNATING = (
    "{% set n = namespace(i=0) %}{% for m in messages %}{% if m.role == 'tool' %}<r>{{ m.content }}</r>"
    "{% elif m.tool_calls %}<call>{{ m.tool_calls[0].function | tojson }}</s>{% else %}"
    "{% if (m.role == 'user') != (n.i % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% set n.i = n.i + 1 %}"
    "{% if m.role == 'user' %}<u>{{ m.content }}</u>{% else %} {{ m.content }}</s>{% endif %}{% endif %}{% endfor %}"
)
_BESIDE_NULL = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}<|im_start|>assistant\n"
    "{% for c in m.tool_calls %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}<|im_end|>\n"
    "{% else %}" + _TURN + "{% endif %}{% endfor %}"
) + _ASKED
_NULL_AS_JSON = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content | tojson }}{% endif %}" + _NAMES + "{% endfor %}"
) + _ASKED
_EMPTY_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
_CALLING = [user("a"), assistant("", tool_calls=[CALL]), tool("1"), assistant("b"), user("c"), assistant("d")]
HABITS = {
    "the last answer of a tool stops otherwise": (
        _HERMES,
        _CALLING,
        ["<call>add<|im_end|>", "b<|im_end|>", "d<|im_end|>"],
    ),
    "roles alternate, turns that call excepted": (
        _ALTERNATING,
        _CALLING,
        ['<call>{"name": "add", "arguments": {"text": "<é>"}}</s>', " b</s>", " d</s>"],
    ),
    "calls beside a null alone": (
        _BESIDE_NULL,
        _CALLING,
        ['add {"text": "<é>"}<|im_end|>', "b<|im_end|>", "d<|im_end|>"],
    ),
    "a null as JSON": (
        _NULL_AS_JSON,
        [user("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        ["<call>add<|im_end|>"],
    ),
    "an empty thought in the prompt": (
        _EMPTY_THOUGHT,
        [user("a"), assistant("b", reasoning_content="hm"), user("c"), assistant("d", reasoning_content="")],
        ["hm\n</think>\n\nb<|im_end|>", "d<|im_end|>"],
    ),
}


@pytest.mark.parametrize(("source", "messages", "expected"), HABITS.values(), ids=HABITS)
def test_turns_of_templates_with_habits(source, messages, expected):
    assert said(source, messages) == expected


@pytest.mark.parametrize("turn", [_TURN, "{% generation %}" + _TURN + "{% endgeneration %}"], ids=["plain", "tagged"])
def test_calls_that_a_template_does_not_write_are_refused(turn):
    """Else the model would learn to answer nothing where it is to call."""
    with pytest.raises(UserError, match="message 2: the chat template writes no tool calls"):
        said("{% for m in messages %}" + turn + "{% endfor %}" + _ASKED, _CALLING)


def test_what_a_tool_answers_within_a_turn_is_not_taken_for_the_assistants_words():
    messages = [user("add"), assistant("", tool_calls=[CALL]), tool("three"), assistant("It is 3.")]
    with pytest.raises(UserError, match=r"m/template\.jinja: cannot tell where the chat template puts message 2"):
        template(ANSWERED_WITHIN).render_turns(messages)
    assert said(ANSWERED_WITHIN, [user("a"), assistant("b")]) == ["b</s>"]
