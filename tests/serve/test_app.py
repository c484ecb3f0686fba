"""The HTTP interface over a decoder of known answers: what it replies, refuses and frees."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.errors import DeviceLost
from entrenar_gpu.infer import LanguageModel
from entrenar_gpu.serve import Served, make_app
from tests.helpers.fake_decoder import FakeDecoder
from tests.helpers.word_tokenizer import END, text, word_tokenizer
from tests.infer.test_scheduler import alone

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Gate(FakeDecoder):
    """Waits before each step until it is let through."""

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.open = threading.Event()
        self.open.set()

    def extend(self, batch, all_logits=False, prompt=None):
        assert self.open.wait(20)
        return super().extend(batch, all_logits, prompt)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("words"))


@pytest.fixture
def decoder() -> Gate:
    return Gate(slots=2, context=64, vocabulary=32, adapters=["german"])


@pytest.fixture
def records() -> list[Any]:
    return []


@pytest.fixture
def client(decoder, tokenizer, records) -> Iterator[TestClient]:
    model = LanguageModel(decoder, tokenizer, 32, ["german"])
    app = make_app(Served(model, "tiny"), queue_limit=3, observers=[records.append])
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def wanted(prompt: str, most: int, adapter: str | None = None) -> tuple[str, str]:
    ids = [int(word[1:]) if word != "<end>" else END for word in prompt.split()]
    said, finish = alone(ids, SamplingOptions(max_tokens=most), adapter)
    return text(said), finish


def ask(client: TestClient, **body: Any) -> Any:
    response = client.post(TEXT, json={"model": "base", "temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(response: Any) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_is_the_greedy_text(client):
    said, finish = wanted("w4 w5 w6", 12)
    reply = ask(client, prompt="w4 w5 w6", max_tokens=12)
    assert reply["object"] == "text_completion"
    assert reply["choices"] == [{"index": 0, "text": said, "logprobs": None, "finish_reason": finish}]
    assert reply["usage"]["prompt_tokens"] == 3
    assert ask(client, prompt=[4, 5, 6], max_tokens=12)["choices"] == reply["choices"]


def test_a_chat_is_rendered_and_answered_up_to_its_end(client):
    body = {"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "w7 w8"}]}
    reply = client.post(CHAT, json=body).json()
    said, finish = wanted("w2 w7 w8 <end> w3", 64)
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": said}
    assert reply["choices"][0]["finish_reason"] == finish
    parts = [{"type": "text", "text": "w7 "}, {"type": "text", "text": "w8"}]
    again = client.post(CHAT, json={**body, "messages": [{"role": "user", "content": parts}]}).json()
    assert again["choices"] == reply["choices"]


def test_a_stream_joins_to_the_whole(client):
    body = {"temperature": 0, "messages": [{"role": "user", "content": "w9"}], "max_tokens": 9}
    reply = client.post(CHAT, json=body).json()
    whole = reply["choices"][0]
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    response = client.post(CHAT, json=asked)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == whole["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == [
        whole["finish_reason"]
    ]
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == reply["usage"]["total_tokens"]


def test_several_prompts_and_answers_are_numbered(client):
    reply = ask(client, prompt=["w4 w5", "w6 w7"], n=2, temperature=1, seed=5, max_tokens=6)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    options = SamplingOptions(max_tokens=6, temperature=1, seed=5)
    want = [text(alone(p, options, stream=i)[0]) for p in ([4, 5], [6, 7]) for i in (0, 1)]
    assert [choice["text"] for choice in reply["choices"]] == want
    assert reply["usage"]["prompt_tokens"] == 4


def test_without_a_seed_texts_differ(client):
    texts = {ask(client, prompt="w4", temperature=2, max_tokens=12)["choices"][0]["text"] for _ in range(3)}
    assert len(texts) == 3


def test_adapters_go_by_the_model_field(client):
    for model, adapter in (("base", None), ("tiny", None), ("german", "german")):
        assert (
            ask(client, model=model, prompt="w4 w5", max_tokens=8)["choices"][0]["text"]
            == wanted("w4 w5", 8, adapter)[0]
        )
    assert wanted("w4 w5", 8)[0] != wanted("w4 w5", 8, "german")[0]
    listed = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["base", "tiny", "german"]
    assert client.get("/v1/models/german").json()["parent"] == "base"
    missing = client.get("/v1/models/french")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_logprobs_are_those_of_the_tokens(client, decoder):
    reply = ask(client, prompt="w4 w5", max_tokens=4, logprobs=2)["choices"][0]
    logprobs = reply["logprobs"]
    assert " ".join(logprobs["tokens"]) == reply["text"]
    logits = decoder.logits([(4, None), (5, None)]).astype(np.float64)
    want = logits.max() - np.log(np.exp(logits).sum())
    assert logprobs["token_logprobs"][0] == pytest.approx(want)
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    body = {"temperature": 0, "messages": [{"role": "user", "content": "w9"}], "max_tokens": 3}
    body["logit_bias"] = {str(END): -100}
    chat = client.post(CHAT, json={**body, "logprobs": True, "top_logprobs": 3}).json()["choices"][0]["logprobs"]
    assert len(chat["content"]) == 3
    first = chat["content"][0]
    assert bytes(first["bytes"]).decode() == first["token"] == first["top_logprobs"][0]["token"]
    assert len(first["top_logprobs"]) == 3
    assert math.exp(first["logprob"]) <= 1


def test_a_stop_string_ends_the_text(client):
    whole = ask(client, prompt="w4 w5", max_tokens=12)["choices"][0]["text"].split()
    reply = ask(client, prompt="w4 w5", max_tokens=12, stop=f" {whole[3]}")["choices"][0]
    assert reply["text"].split() == whole[: whole.index(whole[3])]
    assert reply["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [32]}, "prompt"),
        ({"prompt": "w1 " * 64}, "prompt"),
        ({"prompt": "w1", "temperature": "hot"}, "temperature"),
        ({"prompt": "w1", "temperature": True}, "temperature"),
        ({"prompt": "w1", "temperature": -1}, "temperature"),
        ({"prompt": "w1", "temperature": 1e999}, None),
        ({"prompt": "w1", "top_p": 2}, "top_p"),
        ({"prompt": "w1", "top_k": 1.5}, "top_k"),
        ({"prompt": "w1", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "w1", "max_tokens": "5"}, "max_tokens"),
        ({"prompt": "w1", "n": 0}, "n"),
        ({"prompt": "w1", "n": 10**9}, "n"),
        ({"prompt": ["w1"] * 100, "n": 2}, "n"),
        ({"prompt": "w1", "seed": -1}, "seed"),
        ({"prompt": "w1", "logprobs": 21}, "logprobs"),
        ({"prompt": "w1", "stop": [1]}, "stop"),
        ({"prompt": "w1", "stop": ["a"] * 99}, "stop"),
        ({"prompt": "w1", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "w1", "logit_bias": {"40": 1}}, "logit_bias"),
        ({"prompt": "w1", "stream": "yes"}, "stream"),
        ({"prompt": "w1", "stream_options": 3}, "stream_options"),
        ({"prompt": "w1", "model": 5}, "model"),
        ({"prompt": "w1", "echo": True}, "echo"),
        ({"prompt": "w1", "tempreature": 1}, "tempreature"),
        ({"prompt": "half a pair \ud800"}, None),
    ],
)
def test_what_is_wrong_is_named(client, body, param):
    content = json.dumps(body).encode()
    response = client.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert ask(client, prompt="w4", max_tokens=2)["choices"][0]["text"] == wanted("w4", 2)[0]


def test_a_prompt_that_is_too_long_has_openais_code(client):
    reply = client.post(CHAT, json={"messages": [{"role": "user", "content": "w1 " * 80}]})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "messages",
    [None, [], "w1", [3], [{"role": "user"}], [{"role": "boss", "content": "w1"}], [{"role": "user", "content": 1}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [{"content": "w1"}]],
)  # fmt: skip
def test_messages_that_are_none_are_refused(client, messages):
    response = client.post(CHAT, json={"messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": NaN}', 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": ' + b"1" * 5000 + b"}", 400),
        (b" " * (5 << 20), 413),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(client, content, status):
    response = client.post(TEXT, content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_other_types_of_content_routes_and_methods_are_refused(client):
    assert client.post(TEXT, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get("/v2").json()["error"]["type"] == "not_found_error"
    assert client.get(TEXT).status_code == 405


def test_a_key_is_asked_for(decoder, tokenizer):
    model = LanguageModel(decoder, tokenizer, 32)
    with TestClient(make_app(Served(model, "tiny"), api_key="geheimé")) as client:
        assert client.get("/health").json() == {"status": "ok"}
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer geheime"}):
            assert client.get("/v1/models", headers=headers).status_code == 401
            assert client.post(TEXT, json={"prompt": "w1"}, headers=headers).status_code == 401
            assert client.get("/metrics", headers=headers).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer geheimé".encode()}).status_code == 200


def test_what_a_client_calls_a_model_is_kept_short(client, records):
    assert client.post(TEXT, json={"prompt": "w1", "model": "x" * 100_000}).status_code == 404
    assert len(records[0].model) == 200


def in_thread(call) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def test_beyond_the_queue_there_is_429_and_those_within_are_answered(client, decoder):
    decoder.open.clear()
    replies: list[Any] = []
    threads = [
        in_thread(lambda i=i: replies.append((i, client.post(TEXT, json={"prompt": f"w{i}", "temperature": 0}))))
        for i in range(1, 6)
    ]
    until(lambda: _reserved(client) == 5)
    refused = client.post(TEXT, json={"prompt": "w9"})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    decoder.open.set()
    for thread in threads:
        thread.join(20)
    for i, reply in replies:
        assert reply.json()["choices"][0]["text"] == wanted(f"w{i}", 16)[0]
    assert client.post(TEXT, json={"prompt": "w9"}).status_code == 200


def _reserved(client: TestClient) -> int:
    text = client.get("/metrics").text
    held = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if not line.startswith("#")}
    return int(held["entrenar_requests_reserved"])


def test_metrics_and_records_tell_what_was_done(client, records):
    ask(client, prompt="w4 w5 w6", max_tokens=5)
    client.post(TEXT, json={"prompt": "w1 " * 99})
    lines = client.get("/metrics").text.splitlines()
    assert 'entrenar_requests_total{status="200"} 1.0' in lines
    assert 'entrenar_requests_total{status="400"} 1.0' in lines
    assert "entrenar_prompt_tokens_total 3.0" in lines
    assert "entrenar_generation_tokens_total 5.0" in lines
    good, bad = records
    assert (good.route, good.model, good.status, good.finish) == (TEXT, "base", 200, "length")
    assert (good.prompt_tokens, good.completion_tokens, bad.status) == (3, 5, 400)
    assert good.start_ns <= good.first_token_ns <= good.end_ns


def test_a_device_that_is_lost_is_told_and_ends_service(client, decoder):
    def lost(batch, all_logits=False, prompt=None):
        raise DeviceLost("the GPU went away")

    decoder.extend = lost
    reply = client.post(TEXT, json={"prompt": "w1"})
    assert reply.status_code == 500
    assert "went away" in reply.json()["error"]["message"]
    assert client.get("/health").status_code == 503
    assert client.post(TEXT, json={"prompt": "w1"}).status_code == 503
