"""Damaged files for every reader of the run: `python -m tests.fuzz.readers [--minutes N] [--seed S]`.

Each input is a valid file with a few changes: bytes flipped, cut, doubled or put elsewhere, numbers and words replaced
by what no writer writes. A reader may return or raise UserError; anything else is a fault, as is a read that takes more
than SECONDS. What was found is kept in `found/`, and read again by every test run.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from entrenar_gpu.adapters import load_adapter
from entrenar_gpu.cli.options import make_config
from entrenar_gpu.data import load_samples
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import SafetensorsFile, read_json_object
from entrenar_gpu.model import HFCheckpoint, load_model_config
from entrenar_gpu.train.run_checkpoint import read_state
from tests.helpers.runs import train
from tests.helpers.tiny import make_data, make_model

SECONDS = 20.0
FOUND = Path(__file__).parent / "found"
TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
ODD = [
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"9" * 400,
    b"[]",
    b"{}",
    b'""',
    b"[" * 3000,
    b"\x00",
    b"\xff\xfe",
    b"NaN",
]

Reader = Callable[[Path], object]


def corpus(folder: Path) -> dict[str, tuple[Path, Reader]]:
    """By kind: a valid file, and what reads it (or the folder that it is in)."""
    make_model(folder / "model", **TINY)
    make_data(folder / "train.jsonl", vocab=96, samples=8)
    train(folder, device="numpy", steps=1)
    model = load_model_config(folder / "model")
    (folder / "run.yaml").write_text("steps: 3\nrank: 4\nlr: 1e-3\ntarget: [q, v]\nseed: 7\n")
    checkpoint = folder / "run/checkpoint-000001"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["checksum"]  # else it alone would be read
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    names = list(SafetensorsFile(folder / "model/model.safetensors").tensors)
    (folder / "indexed").mkdir()
    (folder / "indexed/config.json").write_bytes((folder / "model/config.json").read_bytes())
    (folder / "indexed/a.safetensors").write_bytes((folder / "model/model.safetensors").read_bytes())
    index = folder / "indexed/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    return {
        "safetensors": (folder / "model/model.safetensors", lambda path: HFCheckpoint.open(path.parent)),
        "config": (folder / "model/config.json", lambda path: load_model_config(path.parent)),
        "index": (index, lambda path: HFCheckpoint.open(path.parent)),
        "adapter weights": (checkpoint / "adapter_model.safetensors", lambda path: load_adapter(path.parent, model)),
        "adapter config": (checkpoint / "adapter_config.json", lambda path: load_adapter(path.parent, model)),
        "state": (checkpoint / "trainer_state.json", lambda path: read_state(path.parent)),
        "options": (folder / "run.yaml", lambda path: make_config({}, str(path))),
        "rows": (
            folder / "train.jsonl",
            lambda path: load_samples(path, None, vocab_size=96, seq=32, loss_on="completion"),
        ),
        "json": (folder / "run/run.json", read_json_object),
    }


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few changes; the first kilobyte gets most, where formats have their headers."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(data), 1024) if rng.random() < 0.7 else len(data)) if data else 0
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice((1, 2, 8, 200))]
        elif kind == 2:
            data[at:at] = data[at : at + rng.choice((1, 8, 100))]
        elif kind == 3:
            data[at : at + rng.choice((0, 1, 4))] = rng.choice(ODD)
        elif kind == 4:
            del data[at:]
        else:
            data[at : at + 8] = rng.randbytes(8)
    return bytes(data)


def faults(
    minutes: float | None = None, inputs: int | None = None, seed: int = 0
) -> Iterator[tuple[int, str, bytes, str]]:
    """(inputs tried, kind, input, what happened) of every fault; a last one without a kind says how many were tried."""
    rng, begin, tried = random.Random(seed), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as temporary:
        kinds = corpus(Path(temporary))
        contents = {kind: path.read_bytes() for kind, (path, _) in kinds.items()}
        while (inputs is None or tried < inputs) and (minutes is None or time.monotonic() - begin < 60 * minutes):
            kind = rng.choice(list(kinds))
            data = mutated(contents[kind], rng)
            what = outcome(*kinds[kind], data)
            tried += 1
            if what:
                yield tried, kind, data, what
            kinds[kind][0].write_bytes(contents[kind])
    yield tried, "", b"", ""


def outcome(path: Path, read: Reader, data: bytes) -> str:
    """What is wrong with how an input is read; empty where nothing is."""
    path.write_bytes(data)
    begin = time.monotonic()
    try:
        read(path)
    except UserError:
        pass
    except Exception:
        return traceback.format_exc()
    seconds = time.monotonic() - begin
    return f"took {seconds:.1f} s" if seconds > SECONDS else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    count = tried = 0
    for tried, kind, data, what in faults(args.minutes, seed=args.seed):
        if kind:
            count += 1
            FOUND.mkdir(exist_ok=True)
            (FOUND / f"{kind.replace(' ', '_')}-{args.seed}-{tried}").write_bytes(data)
            print(f"{kind}: {what}", flush=True)
    print(f"{tried:,} inputs, {count} faults, seed {args.seed}")
    raise SystemExit(1 if count else 0)


if __name__ == "__main__":
    main()
