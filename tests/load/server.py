"""A server under many clients, some of them rude: `python -m tests.load.server [--requests N] [--clients N]`.

Of the requests a part is broken off, malformed or too long. Every other one has to be answered, with the text that the
model gives the prompt alone, greedily, without batches and drafts; and the server's memory has to stay flat. Prints
what was seen as JSON, and exits with status 1 where anything of that is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from entrenar_gpu import load
from entrenar_gpu.cli.demo import MODEL

TOKENS = 24
CONTEXT = 256
QUESTIONS = [
    f"What does {name} do?"
    for name in (
        "os.path.exists(path)", "os.getcwd()", "json.dumps(obj)", "math.sqrt(x)", "random.random()", "time.sleep(secs)",
        "str.upper()", "list.append(object)", "dict.get(key)", "re.match(pattern, string)", "sys.exit()",
        "shutil.copy(src, dst)", "pathlib.Path.exists()", "decimal.Decimal.sqrt()", "threading.Lock()",
        "queue.Queue.put(item)", "socket.create_connection(address)", "copy.deepcopy(x)", "abs(x)", "heapq.heappop(h)",
    )
]  # fmt: skip
MALFORMED: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b'{"prompt": NaN}', 400),
    (b'{"prompt": 7}', 400),
    (b'{"prompt": "a", "temperature": "hot"}', 400),
    (b'{"prompt": "a", "n": 1000000}', 400),
    (b'{"prompt": "\\ud800"}', 400),
    (b"[" * 50_000, 400),
    (b" " * (5 << 20), 413),
    (b'{"prompt": "a", "model": "another"}', 404),
]


@dataclass
class Seen:
    """What came of the requests, counted by kind; and what was wrong."""

    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--device")
    parser.add_argument("--model", default=str(MODEL))
    given = parser.parse_args()
    device = [] if given.device is None else ["--device", given.device]
    expected = single_answers(given.model, given.device)
    command = [sys.executable, "-m", "entrenar_gpu.cli", "serve", "--model", given.model, "--port", "0", *device]
    command += ["--context", str(CONTEXT), "--slots", "8", "--queue", str(4 * given.clients)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().rsplit(" ", 1)[1].strip()
        report = storm(url, psutil.Process(process.pid), expected, given.requests, given.clients)
    finally:
        process.terminate()
        process.wait(30)
    print(json.dumps(report, indent=2))
    return 1 if report["wrong"] or report["grown_mib"] > 0.1 * report["resident_mib"] else 0


def single_answers(model: str, device: str | None) -> dict[str, str]:
    """What each question is answered alone."""
    with load(model, context=CONTEXT, slots=1, speculate=False, device=device) as alone:
        return {question: alone.chat(question, max_tokens=TOKENS) for question in QUESTIONS}


def storm(url: str, server: psutil.Process, expected: dict[str, str], requests: int, clients: int) -> dict[str, Any]:
    seen, lock = Seen(), threading.Lock()
    resident: list[float] = []

    def one(number: int) -> None:
        rng = random.Random(number)
        kind = rng.choices(["chat", "stream", "several", "broken", "malformed", "long"], [4, 3, 1, 1, 1, 1])[0]
        began = time.monotonic()
        try:
            problem = ASKERS[kind](client, rng, expected)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        with lock:
            seen.kinds[kind] += 1
            seen.seconds.append(time.monotonic() - began)
            if problem:
                seen.wrong.append(f"{number} {kind}: {problem}"[:300])
            if sum(seen.kinds.values()) % max(requests // 10, 1) == 0:
                resident.append(server.memory_info().rss / 2**20)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    began = time.monotonic()
    with httpx.Client(base_url=url, timeout=300, limits=limits) as client, ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
        seconds = time.monotonic() - began
        time.sleep(0.5)
        metrics = client.get(url.removesuffix("/v1") + "/metrics").text
    gauges = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    idle = ("entrenar_requests_running", "entrenar_requests_waiting", "entrenar_requests_reserved")
    seen.wrong += [f"{name} is {gauges[name]} when all have gone" for name in idle if float(gauges[name])]
    ordered = sorted(seen.seconds)
    return {
        "requests": dict(sorted(seen.kinds.items())),
        "seconds": round(seconds, 1),
        "requests_per_second": round(requests / seconds, 1),
        "median_seconds": round(ordered[len(ordered) // 2], 3),
        "slowest_seconds": round(ordered[-1], 3),
        "generated_tokens": int(float(gauges["entrenar_generation_tokens_total"])),
        "draft_tokens": int(float(gauges["entrenar_draft_tokens"])),
        "draft_tokens_accepted": int(float(gauges["entrenar_draft_tokens_accepted"])),
        "resident_mib": round(resident[-1], 1),
        "resident_mib_by_tenths": [round(each, 1) for each in resident],
        "grown_mib": round(resident[-1] - resident[len(resident) // 5], 1),  # since a fifth of the requests
        "wrong": seen.wrong,
    }


def chat(client: httpx.Client, rng: random.Random, expected: dict[str, str]) -> str | None:
    question = rng.choice(QUESTIONS)
    reply = client.post("/chat/completions", json=body_of(question))
    if reply.status_code != 200:
        return f"status {reply.status_code}: {reply.text}"
    return differs(reply.json()["choices"][0]["message"]["content"], question, expected)


def stream(client: httpx.Client, rng: random.Random, expected: dict[str, str]) -> str | None:
    question, text = rng.choice(QUESTIONS), ""
    with client.stream("POST", "/chat/completions", json=body_of(question, stream=True)) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
    return differs(text, question, expected)


def several(client: httpx.Client, rng: random.Random, expected: dict[str, str]) -> str | None:
    question = rng.choice(QUESTIONS)
    choices = client.post("/chat/completions", json=body_of(question, n=2)).json()["choices"]
    return next((p for c in choices if (p := differs(c["message"]["content"], question, expected))), None)


def broken(client: httpx.Client, rng: random.Random, expected: dict[str, str]) -> str | None:
    """Hangs up after a few events, or before the reply begins."""
    if rng.random() < 0.5:
        with client.stream("POST", "/chat/completions", json=body_of(rng.choice(QUESTIONS), stream=True)) as reply:
            for _ in zip(reply.iter_lines(), range(rng.randrange(1, 12)), strict=False):
                pass
        return None
    with contextlib.suppress(httpx.TimeoutException):
        client.post("/chat/completions", json=body_of(rng.choice(QUESTIONS)), timeout=rng.uniform(0.01, 0.2))
    return None


def malformed(client: httpx.Client, rng: random.Random, expected: dict[str, str]) -> str | None:
    content, status = rng.choice(MALFORMED)
    reply = client.post("/completions", content=content, headers={"content-type": "application/json"})
    if reply.status_code != status or not reply.json()["error"]["message"]:
        return f"status {reply.status_code} for {content[:40]!r}"
    return None


def long(client: httpx.Client, rng: random.Random, expected: dict[str, str]) -> str | None:
    reply = client.post("/chat/completions", json=body_of("word " * rng.randrange(400, 4000)))
    return None if reply.status_code == 400 else f"status {reply.status_code}"


def body_of(question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "base", "messages": messages, "temperature": 0, "max_tokens": TOKENS, **more}


def differs(text: str, question: str, expected: dict[str, str]) -> str | None:
    return None if text == expected[question] else f"{question!r}: {text!r} and not {expected[question]!r}"


ASKERS = {"chat": chat, "stream": stream, "several": several, "broken": broken, "malformed": malformed, "long": long}

if __name__ == "__main__":
    raise SystemExit(main())
