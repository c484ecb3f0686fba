"""Whatever JSON a client sends is answered or refused; none of it is a fault of the server or keeps a slot."""

from __future__ import annotations

import json
import random
from typing import Any

from starlette.testclient import TestClient

from entrenar_gpu.infer import LanguageModel
from entrenar_gpu.serve import Served, make_app
from entrenar_gpu.serve.bodies import _NEUTRAL, _NUMBERS, _WITHOUT_EFFECT
from tests.helpers.fake_decoder import FakeDecoder
from tests.helpers.word_tokenizer import word_tokenizer

OWN = ("model", "messages", "prompt", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "stop")
MORE = ("logprobs", "top_logprobs", "logit_bias", "tools", "chat_template_kwargs")
FIELDS = sorted({*OWN, *MORE, *_NUMBERS, *_WITHOUT_EFFECT, *_NEUTRAL})
NUMBERS = (0, 1, -1, 3, 2**63, 10**25, 0.5, 1e308, -1e-300, 1e-320)
TEXTS = ("", "w1", "w4 w5", "base", "a", "text", "\0", "\ufdd0", "\u202e", "none", "1", "system")
KEYS = ("role", "content", "type", "text", "include_usage", "1", "name", "tool_calls", "messages", "bos_token")
GOOD = {"prompt": "w4 w5", "messages": [{"role": "user", "content": "w7"}], "max_tokens": 4, "temperature": 0.5}


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 5:
        message = {"role": rng.choice(["user", "assistant", "system", "tool"]), "content": "w1 w2"}
        return (None, rng.choice(NUMBERS), rng.random() < 0.5, rng.choice(TEXTS), message)[kind]
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(KEYS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def test_no_body_is_a_fault(tmp_path):
    model = LanguageModel(FakeDecoder(slots=3, context=48, vocabulary=32), word_tokenizer(tmp_path), 32)
    statuses: set[int] = set()
    with TestClient(make_app(Served(model, "tiny")), raise_server_exceptions=False) as client:
        for seed in range(200):
            rng = random.Random(seed)
            path, other = rng.choice([("chat/completions", "prompt"), ("completions", "messages")])
            body = {key: good for key, good in GOOD.items() if key != other}
            body |= {name: value(rng) for name in rng.sample(FIELDS, rng.randrange(4))}
            content, headers = json.dumps(body).encode(), {"content-type": "application/json"}
            response = client.post(f"/v1/{path}", content=content, headers=headers)
            assert response.status_code in (200, 400, 404), (body, response.text)
            statuses.add(response.status_code)
    assert statuses >= {200, 400}
    assert model.scheduler.slots.free == 3
