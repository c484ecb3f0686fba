"""The official `openai` client against a server on loopback, and clients that hang up."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import openai
import pytest

from entrenar_gpu.config import SamplingOptions
from entrenar_gpu.errors import UserError
from entrenar_gpu.infer import LanguageModel
from entrenar_gpu.serve import HttpServer, Served, make_app
from tests.helpers.fake_decoder import FakeDecoder
from tests.helpers.http_servers import serving
from tests.helpers.word_tokenizer import END, text, word_tokenizer
from tests.infer.test_scheduler import alone

QUESTION = [{"role": "user", "content": "w7 w8"}]
ENDLESS = {str(END): -100}


class Slow(FakeDecoder):
    """A step takes a few milliseconds, as a device's does."""

    def extend(self, batch, all_logits=False, prompt=None):
        time.sleep(0.005)
        return super().extend(batch, all_logits, prompt)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    tokenizer = word_tokenizer(tmp_path_factory.mktemp("words"))
    return LanguageModel(Slow(slots=2, context=2000, vocabulary=32, adapters=["german"]), tokenizer, 32, ["german"])


@pytest.fixture(scope="module")
def url(model) -> Iterator[str]:
    with serving(make_app(Served(model, "tiny"), queue_limit=0, api_key="key")) as url:
        yield url


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="key", max_retries=0, timeout=30) as client:
        yield client


def greedy(ids: list[int], most: int, adapter: str | None = None, **options) -> str:
    return text(alone(ids, SamplingOptions(max_tokens=most, **options), adapter, context=2000)[0])


CHAT_IDS = [2, 7, 8, END, 3]


def test_the_client_understands_every_reply(client):
    assert [model.id for model in client.models.list()] == ["base", "tiny", "german"]
    asked = {"messages": QUESTION, "temperature": 0, "max_tokens": 12}
    for name, adapter in (("base", None), ("german", "german")):
        said = client.chat.completions.create(model=name, **asked).choices[0].message.content
        assert said == greedy(CHAT_IDS, 12, adapter)
    stream = client.chat.completions.create(
        model="base", stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=2, **asked
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == greedy(CHAT_IDS, 12)
    told = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [entry.token for entry in told] == greedy(CHAT_IDS, 12).split()
    assert last.usage.prompt_tokens == len(CHAT_IDS)
    completion = client.completions.create(model="base", prompt="w4 w5", max_tokens=7, temperature=0, logprobs=1)
    assert completion.choices[0].text == greedy([4, 5], 7)
    assert completion.usage.completion_tokens == len(completion.choices[0].logprobs.tokens)
    both = client.completions.create(model="base", prompt="w4", n=2, seed=3, max_tokens=5)
    assert len({choice.text for choice in both.choices}) == 2


def test_the_client_raises_what_it_raises_for_openai(client, url):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError) as told:
        client.completions.create(model="base", prompt="w1 " * 3000)
    assert told.value.code == "context_length_exceeded"
    asked = {"model": "base", "prompt": "w1", "logit_bias": ENDLESS, "max_tokens": 1900}
    with client.completions.create(n=2, stream=True, **asked), pytest.raises(openai.RateLimitError):
        client.completions.create(**asked)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="other", max_retries=0).models.list()


def until_free(model: LanguageModel) -> None:
    for _ in range(400):
        if model.scheduler.slots.free == 2 and not model.scheduler.waiting:
            return
        time.sleep(0.01)
    raise AssertionError("the slots are still taken")


def test_who_stops_listening_to_a_stream_frees_its_slot(client, model):
    for _ in range(4):
        stream = client.chat.completions.create(
            model="base", messages=QUESTION, stream=True, logit_bias=ENDLESS, max_tokens=1900
        )
        next(iter(stream))
        stream.close()
    until_free(model)
    assert client.completions.create(model="base", prompt="w4", max_tokens=3, temperature=0).choices[0].text == greedy(
        [4], 3
    )


def test_who_hangs_up_frees_its_slot(client, model, url):
    parts = urlsplit(url)
    body = b'{"prompt": "w4", "max_tokens": 1900, "logit_bias": {"0": -100}}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key\r\nContent-Length: {len(body)}\r\n"
    for cut in (20, len(head) + 2 + len(body) // 2, None):
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.sendall((head.encode() + b"Content-Type: application/json\r\n\r\n" + body)[:cut])
            time.sleep(0.05)
    until_free(model)
    assert client.completions.create(model="base", prompt="w4", max_tokens=3).choices[0].text


def test_an_address_that_is_taken_is_told(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: 127.0.0.1:{port} cannot be had"):
            HttpServer(make_app(Served(model, "tiny")), port=port)
