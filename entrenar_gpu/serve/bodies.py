"""Bodies of requests, checked field by field: nothing in them is trusted before it has passed here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from entrenar_gpu.chat import Conversation
from entrenar_gpu.config import MOST, SamplingOptions
from entrenar_gpu.data import read_messages, read_tools, read_variables
from entrenar_gpu.errors import UserError
from entrenar_gpu.serve.problems import Problem, bad_request

MOST_ANSWERS = 128  # to one request: prompts times n
COMPLETION_TOKENS = 16  # OpenAI's default where /v1/completions is not told; a chat has the whole context

Prompt = str | list[int] | Conversation

# Fields that say something to OpenAI's own service and nothing to a model.
_WITHOUT_EFFECT = frozenset({"user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier"})
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are taken only where they ask for nothing
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
}
_NUMBERS = {f.name: f.type for f in fields(SamplingOptions) if f.metadata and f.name not in ("max_tokens", "logprobs")}


@dataclass(frozen=True)
class Asked:
    """What a request asks for: `n` answers to each of `prompts`."""

    model: str | None
    prompts: tuple[Prompt, ...]
    options: SamplingOptions
    n: int
    stream: bool
    include_usage: bool
    is_chat: bool


def decode(body: bytes) -> dict[str, Any]:
    """The JSON object of a body, without its nulls. Raises Problem for whatever else it is, NaN and halves of
    surrogate pairs included."""
    try:
        value = json.loads(body.decode("utf-8"))
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeError:
        raise Problem(400, "the body is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise Problem(400, "the body must be a JSON object")
    return {key: inner for key, inner in value.items() if inner is not None}


def read_chat(body: Mapping[str, Any]) -> Asked:
    """The body of /v1/chat/completions. Raises Problem naming the field."""
    own = {"messages", "tools", "chat_template_kwargs", "max_completion_tokens", "top_logprobs"}
    _refuse_others(body, own)
    if "messages" not in body:
        raise Problem(400, "messages: missing", "messages")
    try:
        messages = read_messages(body["messages"], "messages")
        tools = read_tools(body.get("tools"))
        variables = read_variables(body.get("chat_template_kwargs"))
        conversation = Conversation(messages, None if body.get("tool_choice") == "none" else tools, variables)
    except UserError as error:
        raise Problem(400, str(error), "messages") from None
    sampling: dict[str, Any] = {"max_tokens": MOST}
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            sampling["max_tokens"] = _whole(body, name)
    if _flag(body, "logprobs"):
        sampling["logprobs"] = _whole(body, "top_logprobs") if "top_logprobs" in body else 0
    elif "top_logprobs" in body:
        raise Problem(400, "top_logprobs: needs logprobs to be true", "top_logprobs")
    return _asked(body, (conversation,), sampling, is_chat=True)


def read_completion(body: Mapping[str, Any]) -> Asked:
    """The body of /v1/completions. Raises Problem naming the field."""
    _refuse_others(body, {"prompt"})
    if "prompt" not in body:
        raise Problem(400, "prompt: missing", "prompt")
    sampling = {"max_tokens": _whole(body, "max_tokens") if "max_tokens" in body else COMPLETION_TOKENS}
    if "logprobs" in body:
        sampling["logprobs"] = _whole(body, "logprobs")
    return _asked(body, _prompts(body["prompt"]), sampling, is_chat=False)


def _asked(body: Mapping[str, Any], prompts: tuple[Prompt, ...], sampling: dict[str, Any], is_chat: bool) -> Asked:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise Problem(400, "model: must be text", "model")
    n = _whole(body, "n") if "n" in body else 1
    if not 1 <= n <= MOST_ANSWERS or n * len(prompts) > MOST_ANSWERS:
        raise Problem(400, f"n: from 1 to {MOST_ANSWERS} answers to a request", "n")
    streams = body.get("stream_options", {})
    if not isinstance(streams, dict):
        raise Problem(400, "stream_options: must be an object", "stream_options")
    return Asked(
        model,
        prompts,
        _sampling(body, sampling),
        n,
        _flag(body, "stream"),
        _flag(streams, "include_usage"),
        is_chat,
    )


def _sampling(body: Mapping[str, Any], values: dict[str, Any]) -> SamplingOptions:
    """The options of sampling; OpenAI's defaults are temperature 1 and another text each time."""
    values |= {"temperature": 1.0, "seed": None}
    for name, kind in _NUMBERS.items():
        if name in body:
            values[name] = _whole(body, name) if str(kind).startswith("int") else _number(body, name)
    for name in ("stop", "logit_bias"):
        if name in body:
            values[name] = body[name]
    try:
        return SamplingOptions(**values)
    except UserError as error:
        raise bad_request(error) from None


def _prompts(value: Any) -> tuple[Prompt, ...]:
    """One prompt or several, each a text or token ids."""
    if isinstance(value, str):
        return (value,)
    if _are_ids(value):
        return (value,)
    if isinstance(value, list) and value and all(isinstance(each, str) or _are_ids(each) for each in value):
        return tuple(value)
    raise Problem(400, "prompt: must be a text, token ids, or a list of these", "prompt")


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _refuse_others(body: Mapping[str, Any], own: set[str]) -> None:
    common = {"model", "n", "stream", "stream_options", "max_tokens", "logprobs", "stop", "logit_bias"}
    for name, value in body.items():
        if name in own | common | _NUMBERS.keys() | _WITHOUT_EFFECT:
            continue
        if name not in _NEUTRAL:
            raise Problem(400, f"{name[:80]}: unknown field", name[:80])
        if value not in _NEUTRAL[name]:
            raise Problem(400, f"{name}: not supported", name)


def _whole(body: Mapping[str, Any], name: str) -> int:
    if type(body[name]) is not int:
        raise Problem(400, f"{name}: must be a whole number", name)
    return int(body[name])


def _number(body: Mapping[str, Any], name: str) -> float:
    if type(body[name]) not in (int, float):
        raise Problem(400, f"{name}: must be a number", name)
    return body[name]


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Problem(400, f"{name}: must be true or false", name)
    return value
