"""What a chat template cannot do: take more time or memory than a conversation is worth, or end the run."""

import os
import resource
import time
from datetime import datetime

import pytest

from entrenar_gpu.chat import ChatTemplate, FailedRow, process
from entrenar_gpu.chat.template import Conversation
from entrenar_gpu.errors import UserError
from tests.helpers import chat_templates

USER = [{"role": "user", "content": "a"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, "m/template.jinja", {}, chat_templates.SPECIAL_TOKENS, datetime(2024, 7, 26))


HOSTILE = {
    "doubles a text": "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "doubles a list": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "pads": "{{ ('a'|center(9999999999))|length }}",
    "formats": "{{ '%9999999999d'|format(1)|length }}",
    "indents": "{{ ('a\n'*60000)|indent(999999)|length }}",
    "replaces": "{{ ('a'*9999999).replace('a', 'b'*999999)|length }}",
    "joins": "{{ (range(999999)|list|join('x'*99999))|length }}",
    "loops over a text": "{% set a = 'x'*9999 %}{% for b in a %}{% for c in a %}{% for d in a %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "sums": "{% for i in range(9999) %}{% if range(400)|list|batch(1)|list|sum(start=[]) %}{% endif %}{% endfor %}",
    "calls itself": "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}",
    "large numbers": "{% set ns = namespace(n=2**62) %}{% for i in range(9999) %}{% set ns.n = ns.n + ns.n %}"
    "{% endfor %}{{ ns.n|string|length }}",
    "while compiling": "{{ 'a'|center(9999999999)|center(9999999999) }}",
    "searches": "{{ ('a' * 30000 ~ '<')|striptags|urlize|wordwrap(1)|length }}{{ ('x '*999999)|wordwrap(1)|length }}",
}  # fmt: skip


@pytest.fixture
def hurried(monkeypatch):
    """A process that is given a tenth of the time."""
    made = process.TemplateProcess(cpu_seconds=0.2)
    monkeypatch.setattr("entrenar_gpu.chat.template.TEMPLATES", made)
    yield made
    made.stop()


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_no_template_takes_the_machine(source, hurried):
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        said = template(source).render(USER)
    except UserError as error:
        said = str(error)
    assert len(said) < 300
    assert "\n" not in said
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # 256 MiB, in KiB


def test_time_and_memory_are_what_ends_it(hurried):
    with pytest.raises(UserError, match=r"^m/template\.jinja: chat template: takes too long$"):
        template(HOSTILE["loops over a text"])
    with pytest.raises(UserError, match=r"^m/template\.jinja: chat template: needs too much memory"):
        template("{% set a = 'x'|center(2**31 * (messages|length)) %}" + chat_templates.QWEN25).render(USER)


def test_a_template_is_bounded_over_all_conversations(hurried):
    """Each takes a quarter of what one may; ordinary ones go on for ever."""
    slow = template("{% for a in 'x' * 1000000 %}{% endfor %}" + chat_templates.QWEN25)
    with pytest.raises(FailedRow, match="takes too long") as error:
        slow.render_all([Conversation(USER)] * 500, "text")
    assert 3 < error.value.row < 100
    ordinary = template(chat_templates.QWEN3)
    answered = Conversation([*USER, {"role": "assistant", "content": "b"}, {"role": "assistant", "content": ""}])
    assert len(ordinary.render_all([answered] * 1000, "turns")) == 1000


def test_what_is_written_is_bounded_by_what_is_there():
    with pytest.raises(UserError, match="the template writes more than"):
        template("{% for i in range(1000) %}{{ 'x' * 10000 }}{% endfor %}").render(USER)
    long = [{"role": "user", "content": "x" * 3_000_000}]
    assert template(chat_templates.QWEN25).render(long).count("x") == 3_000_000


def test_one_process_renders_for_all_and_another_follows_one_that_ended():
    first = template(chat_templates.QWEN25)
    first.render(USER)
    running = process.TEMPLATES._process
    assert running is not None
    assert running.pid != os.getpid()
    template(chat_templates.CLOSED).render(USER)
    assert process.TEMPLATES._process is running
    process.TEMPLATES.stop()
    assert "user\na<|im_end|>" in first.render(USER)
    assert process.TEMPLATES._process is not running


def test_an_interrupt_between_question_and_answer_leaves_no_answer_behind(monkeypatch):
    made = template(chat_templates.QWEN25)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(process.TemplateProcess, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.render([{"role": "user", "content": "first"}])
    assert "second" in made.render([{"role": "user", "content": "second"}])


def test_a_key_called_as_a_method_of_dictionaries_does_not_hide_it():
    source = "{% for m in messages %}{% for k, v in m.items() %}{{ k }}{% endfor %}{{ m.extra }}{% endfor %}"
    assert template(source).render([{**USER[0], "items": 1, "extra": 2}]) == "rolecontentitemsextra2"


def test_the_row_that_fails_is_told_by_its_place():
    source = "{% for m in messages %}{{ raise_exception('no') if m.content == 'bad' else m.content }}{% endfor %}"
    rows = [Conversation([{"role": "user", "content": content}]) for content in ("a", "b", "bad", "c")]
    with pytest.raises(FailedRow, match=r"m/template\.jinja: chat template: no") as error:
        template(source).render_all(rows, "text")
    assert error.value.row == 2


def test_without_limits_of_the_platform_templates_run_here(monkeypatch):
    made = template(chat_templates.QWEN3)
    turns = [*USER, {"role": "assistant", "content": "b"}]
    there = made.render_turns(turns)
    here = process.TemplateProcess()
    here._here = process.Service()
    monkeypatch.setattr("entrenar_gpu.chat.template.TEMPLATES", here)
    assert made.render_turns(turns) == there
    assert here._process is None
    with pytest.raises(UserError, match="repeats a value too often"):
        template("{{ 'a' * 1000000000000 }}").render(USER)
