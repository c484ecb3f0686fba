"""Every reader of the project, each with a valid file of its kind that it reads.

A reader may return or raise the error that becomes one line (UserError, TraceError); anything else is a fault.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from entrenar_gpu.adapters import load_adapter
from entrenar_gpu.cli.options import make_config
from entrenar_gpu.data import Tokenizer, load_samples
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.export import export_model
from entrenar_gpu.files import SafetensorsFile, save_safetensors
from entrenar_gpu.gpu.autotune import read_cache
from entrenar_gpu.model import HFCheckpoint, load_model_config, resolve_model
from entrenar_gpu.quant.nf4 import CODEBOOK, Nf4Weight
from entrenar_gpu.train.metrics_file import MetricsFile
from entrenar_gpu.train.run_checkpoint import load_run, read_state
from entrenar_gpu.train.trainer import Trainer
from observability.detect import analyse
from observability.errors import TraceError
from tests.fuzz.mutations import changed_header, changed_json, damaged
from tests.helpers import chat_templates, made_traces
from tests.helpers.runs import config_of, train
from tests.helpers.tiny import make_data, make_model, projections

SECONDS = 20.0
MEMORY_BYTES = 2 << 30
TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 96, "num_hidden_layers": 1}
VOCAB = 300
CHAT = [
    {"role": "system", "content": "Short."},
    {"role": "user", "content": "What is a reef?"},
    {"role": "assistant", "content": "A ridge beneath the sea."},
]
ROWS: list[dict[str, Any]] = [
    {"messages": CHAT, "tools": None},
    {"messages": [*CHAT[1:], {"role": "user", "content": [{"type": "text", "text": "More?"}]}, CHAT[2]]},
    {"prompt": "Name a reef.", "completion": " The Great Barrier Reef"},
    {"text": "Corals are animals; a reef is what they leave."},
    {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]},
]
TEXTS = ["Reefs, and what lives there. " * 40, "a" * 2000, "héllo\u00a0wörld 🪸 " * 20]


@dataclass(frozen=True)
class Kind:
    """A kind of file: `path` is one, `read` takes that path, `change` makes damaged ones beside changes of bytes."""

    path: Path
    read: Callable[[Path], object]
    change: Callable[[bytes, random.Random], bytes] | None = None

    def mutated(self, content: bytes, rng: random.Random) -> bytes:
        return (damaged if self.change is None or rng.random() < 0.5 else self.change)(content, rng)


def corpus(folder: Path) -> dict[str, Kind]:
    """The kinds of files by name. Files that are there already, made by an earlier call, are taken."""
    if not (folder / "made").exists():
        _make_files(folder)
        (folder / "made").touch()
    return _model_kinds(folder) | _run_kinds(folder) | _text_kinds(folder)


def outcome(kind: Kind, data: bytes) -> str:
    """What is wrong with how an input is read; empty where nothing is."""
    kind.path.write_bytes(data)
    begin, used = time.monotonic(), time.process_time()
    try:
        kind.read(kind.path)
    except (UserError, TraceError):
        pass
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in a library is no Exception
        return traceback.format_exc()
    seconds, used = time.monotonic() - begin, time.process_time() - used
    busy_machine = used < SECONDS / 2 and seconds < 10 * SECONDS
    return f"took {seconds:.1f} s" if seconds > SECONDS and not busy_machine else ""


def _make_files(folder: Path) -> None:
    make_model(folder / "model", **TINY)
    make_data(folder / "train.jsonl", vocab=96, samples=8)
    train(folder, device="numpy", steps=1)
    checkpoint = folder / "run/checkpoint-000001"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["checksum"], state["checksums"]  # else they alone would be read
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (folder / "run.yaml").write_text("steps: 3\nrank: 4\nlr: 1e-3\ntarget: q,v\nseed: 7\n")
    (folder / "tiles.json").write_text(json.dumps({"version": 1, "tiles": {"f32 1x1x1": [64, 64, 16, 4, 4]}}))
    _make_indexed(folder / "model", folder / "indexed")
    _make_quantised(folder / "model", folder / "nf4")
    for name, backend in tokenizer_backends().items():
        (folder / name).mkdir()
        backend.save(str(folder / name / "tokenizer.json"))
        _make_beside(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    table = "".join(f'"Name, reef {n}"," The ""Great"" one, {n}"\n' for n in range(5))
    (folder / "rows.csv").write_text(f"prompt,completion\n{table}")
    if importlib.util.find_spec("gguf"):
        _make_gguf(folder)
    made_traces.write(folder / "trace.jsonl", made_traces.plain_steps(12))


def _make_gguf(folder: Path) -> None:
    """The model, with a tokenizer, as llama.cpp has it."""
    shutil.copytree(folder / "model", folder / "whole")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / "bpe" / name, folder / "whole" / name)
    config = json.loads((folder / "whole/config.json").read_text()) | {"vocab_size": VOCAB}
    make_model(folder / "whole", **config)
    export_model(str(folder / "whole"), folder / "model.gguf", dtype="F32")


def _make_indexed(model: Path, folder: Path) -> None:
    folder.mkdir()
    for source, name in (("config.json", "config.json"), ("model.safetensors", "a.safetensors")):
        (folder / name).write_bytes((model / source).read_bytes())
    names = list(SafetensorsFile(folder / "a.safetensors").tensors)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))


def _make_quantised(model: Path, folder: Path) -> None:
    """The model as bitsandbytes would store it, with double quantisation."""
    folder.mkdir()
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    file, tensors = SafetensorsFile(model / "model.safetensors"), {}
    for name in file.tensors:
        if name not in projections(load_model_config(model)):
            tensors[name] = np.array(file[name])
            continue
        weight = Nf4Weight.from_dense(file[name], double=True)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": weight.offset}
        assert weight.absmax_codes is not None
        assert weight.nested_absmax is not None
        assert weight.nested_code is not None
        parts: dict[str, np.ndarray] = {
            "": weight.codes[:, None],
            ".absmax": weight.absmax_codes,
            ".quant_map": CODEBOOK,
            ".nested_absmax": weight.nested_absmax,
            ".nested_quant_map": weight.nested_code,
            ".quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
        }
        tensors |= {f"{name}{suffix}": part for suffix, part in parts.items()}
    save_safetensors(folder / "model.safetensors", tensors)


def tokenizer_backends() -> dict[str, tokenizers.Tokenizer]:
    """One tokenizer of each common make, by the name of its folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, "ab"])}, [("a", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    pieces = [
        ("<unk>", 0.0),
        *((piece, -2.0 - i / 100) for i, piece in enumerate(["▁", *"abcdefghilnorstuvwh.,", "▁a"])),
    ]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    unigram.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    unigram.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
    words = {word: i for i, word in enumerate(["[UNK]", "reef", "##s", "a", "and", "what", "##a", ".", ","])}
    wordpiece = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer()
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    made = {"bpe": bpe, "unigram": unigram, "wordpiece": wordpiece}
    for backend in made.values():
        backend.add_special_tokens(list(chat_templates.SPECIAL_TOKENS))
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return made


def _make_beside(folder: Path) -> None:
    """What stands beside a tokenizer.json."""
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "model_max_length": 10**30}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "temperature": 0.7}))
    (folder / "chat_template.jinja").write_text(chat_templates.QWEN3.strip())


def _model_kinds(folder: Path) -> dict[str, Kind]:
    model = load_model_config(folder / "model")

    def weights(path: Path) -> None:
        checkpoint = HFCheckpoint.open(path.parent)
        for spec in checkpoint.config.weights:
            checkpoint.f32(spec.name)

    def adapter(path: Path) -> object:
        return load_adapter(path.parent, model)

    def unpacked(path: Path) -> None:
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder / "cache")):
            try:
                made = resolve_model(str(path))
                HFCheckpoint.open(made)
                Tokenizer.load(made).encode("reef")
            finally:
                shutil.rmtree(folder / "cache", ignore_errors=True)

    ggufs = {"gguf": Kind(folder / "model.gguf", unpacked)} if (folder / "model.gguf").exists() else {}
    adapter_files = folder / "run/checkpoint-000001"
    return ggufs | {
        "safetensors": Kind(folder / "model/model.safetensors", weights, changed_header),
        "nf4": Kind(folder / "nf4/model.safetensors", weights, changed_header),
        "config": Kind(folder / "model/config.json", lambda path: load_model_config(path.parent), changed_json),
        "index": Kind(folder / "indexed/model.safetensors.index.json", weights, changed_json),
        "adapter weights": Kind(adapter_files / "adapter_model.safetensors", adapter, changed_header),
        "adapter config": Kind(adapter_files / "adapter_config.json", adapter, changed_json),
    }


def _run_kinds(folder: Path) -> dict[str, Kind]:
    checkpoint = folder / "run/checkpoint-000001"
    session = Trainer(config_of(folder, "again", device="numpy", steps=1)).session
    assert isinstance(session.executor, NumpyExecutor)

    def resume(path: Path) -> None:
        load_run(session, read_state(path.parent))

    return {
        "state": Kind(checkpoint / "trainer_state.json", resume, changed_json),
        "optimizer": Kind(checkpoint / "optimizer.safetensors", resume, changed_header),
        "metrics": Kind(folder / "run/metrics.jsonl", lambda path: MetricsFile(path.parent).truncate(1), changed_json),
        "options": Kind(folder / "run.yaml", lambda path: make_config({}, str(path))),
        "tiles": Kind(folder / "tiles.json", read_cache, changed_json),
        "trace": Kind(folder / "trace.jsonl", lambda path: analyse(path).to_json(), changed_json),
    }


def _text_kinds(folder: Path) -> dict[str, Kind]:
    tokenizer = Tokenizer.load(folder / "bpe")

    def ids(path: Path) -> object:
        return load_samples(path, None, vocab_size=96, seq=32, loss_on="completions")

    def rows(path: Path) -> object:
        return load_samples(path, tokenizer, vocab_size=VOCAB, seq=64)

    def encode(path: Path) -> None:
        used = Tokenizer.load(path.parent, datetime(2024, 2, 29))
        for text in TEXTS:
            used.decode(used.encode(text))
        used.begin(TEXTS, 64, [True] * len(TEXTS))
        if used.has_chat_template:
            used.render_turns(CHAT)
            used.render(CHAT[:2], add_generation_prompt=True)

    kinds = {
        "ids": Kind(folder / "train.jsonl", ids, changed_json),
        "rows": Kind(folder / "rows.jsonl", rows, changed_json),
        "array": Kind(folder / "rows.json", rows, changed_json),
        "table": Kind(folder / "rows.csv", rows),
        "template": Kind(folder / "bpe/chat_template.jinja", encode),
    }
    for name in ("bpe", "unigram", "wordpiece"):
        kinds[f"{name} tokenizer"] = Kind(folder / name / "tokenizer.json", encode, changed_json)
    for name in ("tokenizer_config", "special_tokens_map", "generation_config"):
        kinds[name.replace("_", " ")] = Kind(folder / "bpe" / f"{name}.json", encode, changed_json)
    return kinds
