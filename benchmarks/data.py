"""Speed and memory of reading JSONL, against `tokenizers` alone: python benchmarks/data.py [MEGABYTES [KIND]]

Rows are made of the standard library's docstrings, for the demo model's tokenizer and template; nothing is downloaded.
Prints, for each kind of row, MB of JSONL per second with and without everything around the tokenizer, their ratio, and
the memory taken above the packed tokens; for conversations also what the process costs in which their templates run, as
a share of the time that reading takes without it. Each is run in a process of its own, alternately; medians of three.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from entrenar_gpu.chat.process import TEMPLATES
from entrenar_gpu.chat.worker import Service
from entrenar_gpu.cli import docstrings
from entrenar_gpu.cli.demo import MODEL
from entrenar_gpu.data import Tokenizer, load_samples

SEQ = 2048
REPEATS = 3
KINDS = ("text", "long text", "chat")


def rows(kind: str) -> Iterator[dict[str, object]]:
    """Rows of about 1 to 3 KB, without end."""
    pairs = docstrings.collect().train
    at = 0
    while True:
        some = [pairs[(at + i) % len(pairs)] for i in range(6)]
        at += 5
        if kind == "text":
            yield {"text": "\n\n".join(f"{pair.prompt}\n{pair.completion}" for pair in some)}
        elif kind == "long text":
            yield {"text": "\n\n".join(f"{pair.prompt}\n{pair.completion}" for pair in some * 40)}
        else:
            turns = [(("user", pair.prompt), ("assistant", pair.completion)) for pair in some]
            yield {"messages": [{"role": role, "content": said} for turn in turns for role, said in turn]}


def write(path: Path, kind: str, megabytes: float) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        for row in rows(kind):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            if stream.tell() > megabytes * 1e6:
                return


def measure(what: str, path: Path) -> None:
    """In a process of its own: seconds, and MiB of memory above the start's and the tokens'."""
    tokenizer = Tokenizer.load(MODEL)
    texts = []
    if what == "tokenizers":
        texts = [_whole_text(json.loads(line), tokenizer) for line in path.read_text(encoding="utf-8").splitlines()]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if what == "tokenizers":
        for at in range(0, len(texts), 1024):
            tokenizer.backend.encode_batch_fast(texts[at : at + 1024], add_special_tokens=False)
        packed = 0
    else:
        if what == "templates here":
            TEMPLATES._here = Service()
        samples = load_samples(path, tokenizer, vocab_size=tokenizer.vocab_size, seq=SEQ)
        packed = samples.tokens.nbytes + samples.targets.nbytes + samples.starts.nbytes
    seconds = time.perf_counter() - start
    above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - packed / 2**20
    print(json.dumps({"seconds": seconds, "above": above}))


def _whole_text(row: dict[str, object], tokenizer: Tokenizer) -> str:
    if "text" in row:
        return str(row["text"])
    messages = row["messages"]
    assert isinstance(messages, list)
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def main(megabytes: float = 50, *kinds: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds or KINDS:
            path = Path(folder) / "data.jsonl"
            write(path, kind, megabytes)
            whats = ["tokenizers", "load_samples", *(["templates here"] if kind == "chat" else [])]
            found: dict[str, list[dict[str, float]]] = {what: [] for what in whats}
            for _ in range(REPEATS):
                for what, results in found.items():
                    command = [sys.executable, __file__, "--measure", what, str(path)]
                    results.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            alone, ours, *here = (statistics.median(r["seconds"] for r in found[what]) for what in found)
            above = max(r["above"] for r in found["load_samples"])
            size = path.stat().st_size / 1e6
            print(
                f"{kind:10} {size:6.0f} MB  tokenizers {size / alone:6.2f} MB/s  load_samples {size / ours:6.2f} MB/s"
                f"  ratio {alone / ours:4.0%}  {above:5.0f} MiB above the packed tokens"
                + (f"  templates in a process of their own: {ours / here[0] - 1:+.0%}" if here else "")
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], Path(sys.argv[3]))
    else:
        main(*map(float, sys.argv[1:2]), *sys.argv[2:])
