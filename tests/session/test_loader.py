"""Checkpoints on the device: exact as stored, quantised there as on the host, with little host memory on the way."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from benchmarks import loading
from benchmarks.random_checkpoint import make_checkpoint
from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.errors import UserError
from entrenar_gpu.files.tensor_source import save_safetensors
from entrenar_gpu.gpu import upload
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from entrenar_gpu.ops.quantize import host_parts, nf4_part_names
from entrenar_gpu.quant.nf4 import Nf4Weight
from entrenar_gpu.session import loader, weight_cache
from entrenar_gpu.session.graphs import training_graphs
from entrenar_gpu.session.session import Session
from tests.helpers.runs import config_of
from tests.helpers.tiny import QWEN3, make_model, projections
from tests.model.test_hf_checkpoint import nf4_tensors

pytestmark = pytest.mark.gpu

# 36 x 52 is no multiple of a block: the last one is short.
TINY = {"hidden_size": 36, "intermediate_size": 52, "head_dim": 10, "vocab_size": 97, "num_hidden_layers": 1}


def open_session(folder: Path, kernels: Any, **options: Any) -> Session:
    config = config_of(folder, **({"batch": 1, "seq": 8, "rank": 1, "target": "q"} | options))
    return Session.open(config, functools.partial(training_graphs, evaluates=False), kernels=kernels)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_dense_weights_are_the_stored_ones(tmp_path, kernels, dtype, method):
    checkpoint = HFCheckpoint.open(make_model(tmp_path / "model", dtype=dtype, **TINY))
    session = open_session(tmp_path, kernels, method=method)
    kept = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for name, shape in ((spec.name, spec.shape) for spec in checkpoint.config.weights):
        page = f"{name}.shard0" if "embed" in name else name
        values = session.executor.read(page)
        assert values.dtype == (np.float32 if method == "full" or len(shape) == 1 else kept)
        np.testing.assert_array_equal(values.astype(np.float32), checkpoint.f32(name), err_msg=name)
    session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double", [False, True])
def test_weights_are_quantised_as_on_the_host(tmp_path, kernels, monkeypatch, double, dtype):
    """Byte for byte, also in pieces: here of four blocks, so that a weight takes several and a short one."""
    monkeypatch.setattr(loader, "CHUNK_BYTES", 4 * 64 * 4)
    checkpoint = HFCheckpoint.open(make_model(tmp_path / "model", dtype=dtype, **TINY))
    session = open_session(tmp_path, kernels, double_quant=double)
    for name in projections(checkpoint.config):
        weight = Nf4Weight.from_dense(checkpoint.raw(name), double)
        for part, values in zip(nf4_part_names(name, double), host_parts(weight), strict=True):
            got = session.executor.read(part)
            np.testing.assert_array_equal(got.reshape(-1), np.asarray(values).reshape(-1), err_msg=part)
    session.close()


@pytest.mark.parametrize("double", [False, True])
def test_stored_codes_are_used_as_they_are(tmp_path, kernels, double):
    """Those of bitsandbytes go to the device without being made again: shifted here, they stay shifted."""
    folder = make_model(tmp_path / "model", **TINY)
    dense = HFCheckpoint.open(folder)
    tensors: dict[str, np.ndarray] = {}
    for name in [spec.name for spec in dense.config.weights]:
        stored = (
            nf4_tensors(name, dense.f32(name), double) if name in projections(dense.config) else {name: dense.raw(name)}
        )
        tensors |= {key: np.array(values) for key, values in stored.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] ^= np.uint8(0x31)
    save_safetensors(folder / "model.safetensors", tensors)
    checkpoint = HFCheckpoint.open(folder)
    session = open_session(tmp_path, kernels)
    weight = checkpoint.nf4(name)
    assert weight.double == double
    for part, values in zip(nf4_part_names(name, double), host_parts(weight), strict=True):
        np.testing.assert_array_equal(session.executor.read(part).reshape(-1), np.asarray(values).reshape(-1))
    session.close()


def weights_of(session: Session) -> dict[str, bytes]:
    """Every base weight on the device."""
    held = session.executor.tensors.values()
    return {t.name: session.executor.read(t.name).tobytes() for t in held if t.role == "weight"}


def start(tmp_path: Path, kernels: Any, **options: Any) -> tuple[dict[str, bytes], str]:
    """(weights, where they came from) of a run that keeps them."""
    session = open_session(tmp_path, kernels, cache=True, cache_dir=str(tmp_path / "kept"), **options)
    try:
        return weights_of(session), session.weights_from
    finally:
        session.close()


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kept").iterdir())


@pytest.mark.parametrize("double", [False, True])
def test_kept_weights_are_those_quantised(tmp_path, kernels, monkeypatch, double):
    make_model(tmp_path / "model", dtype="bfloat16", **TINY)
    session = open_session(tmp_path, kernels, double_quant=double)
    fresh = weights_of(session)
    session.close()
    first, made = start(tmp_path, kernels, double_quant=double)
    (path,) = cache_files(tmp_path)
    assert made.startswith("checkpoint")
    monkeypatch.setattr(loader.DeviceTarget, "quantize", None)  # the second start has no use for it
    second, read = start(tmp_path, kernels, double_quant=double)
    assert read == str(path)
    assert first == second == fresh


def test_kept_weights_serve_the_numpy_executor(tmp_path, kernels):
    make_model(tmp_path / "model", dtype="bfloat16", **TINY)
    held, _ = start(tmp_path, kernels)
    again, source = start(tmp_path, None, device="numpy")
    assert source == str(cache_files(tmp_path)[0])
    assert again == held


@pytest.mark.parametrize("change", ["touched", "rewritten", "version"])
def test_weights_kept_of_other_files_are_made_again(tmp_path, kernels, monkeypatch, change):
    model = make_model(tmp_path / "model", **TINY) / "model.safetensors"
    start(tmp_path, kernels)
    if change == "touched":
        os.utime(model, ns=(0, 12345))
    elif change == "rewritten":
        make_model(tmp_path / "model", seed=1, **TINY)
    else:
        monkeypatch.setattr("entrenar_gpu.session.weight_cache.__version__", "0.0.1")
    session = open_session(tmp_path, kernels)
    want = weights_of(session)
    session.close()
    assert start(tmp_path, kernels) == (want, f"checkpoint; quantised weights kept in {cache_files(tmp_path)[0]}")
    assert len(cache_files(tmp_path)) == 1
    assert start(tmp_path, kernels) == (want, str(cache_files(tmp_path)[0]))


@pytest.mark.parametrize("at", [4, 200, -30, -2000, None])
def test_damaged_kept_weights_are_made_again(tmp_path, kernels, at):
    """A flipped bit in the header, the checksums, or the codes; a file cut short."""
    make_model(tmp_path / "model", **TINY)
    held, _ = start(tmp_path, kernels)
    (path,) = cache_files(tmp_path)
    content = bytearray(path.read_bytes())
    if at is None:
        del content[len(content) // 2 :]
    else:
        content[at] ^= 1
    path.write_bytes(content)
    again, source = start(tmp_path, kernels)
    assert again == held
    assert source.startswith("checkpoint")


def test_kept_weights_stay_within_their_bounds(tmp_path, kernels, monkeypatch):
    """What was used longest ago goes, and so does what a crash left behind a day ago; files of others stay."""
    kept = tmp_path / "kept"
    kept.mkdir()
    old, newer = (f"nf4-{digit * 24}.safetensors" for digit in "12")
    for name, age in [(old, 3), (newer, 2), (f".{old}.77.tmp", 1), ("model.safetensors", 9)]:
        (kept / name).write_bytes(bytes(50_000))
        os.utime(kept / name, (time.time() - age * 86401,) * 2)
    make_model(tmp_path / "model", **TINY)
    monkeypatch.setattr(weight_cache, "LARGEST_BYTES", 70_000)
    _, source = start(tmp_path, kernels)
    assert {path.name for path in cache_files(tmp_path)} == {Path(source).name, newer, "model.safetensors"}
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, 1))
    with pytest.raises(UserError, match=r"--cache: .*kept needs 0\.00 GiB and its disk has 0\.00 left"):
        start(tmp_path, kernels)


def test_two_starts_may_make_room_at_once(tmp_path, kernels, monkeypatch):
    """What one of them wants to remove, the other has."""

    def gone(path: Path, missing_ok: bool = False) -> None:
        raise FileNotFoundError(2, "No such file", str(path))

    make_model(tmp_path / "model", **TINY)
    monkeypatch.setattr(Path, "unlink", gone)
    assert start(tmp_path, kernels)[1].startswith("checkpoint; quantised weights kept in")


@pytest.mark.parametrize("size", [1, 31, 32, 33, 1001])
def test_arrays_larger_than_the_ring_arrive_whole(device, kernels, monkeypatch, size):
    """Slots of 64 bytes, filled by threads in shares of 8, are used again many times; what surrounds them stays."""
    monkeypatch.setattr(upload, "SLOT_BYTES", 64)
    monkeypatch.setattr(upload, "SHARE_BYTES", 8)
    graph = Graph("g")
    graph.tensor("x", (size + 4,), "bf16", "weight")
    replay = Replay(device, make_plan({"g": graph}, device.caps), kernels)
    replay.write("x", np.full(size + 4, 7.0))
    values = np.arange(size).astype(ml_dtypes.bfloat16)
    held = device.allocated_bytes
    uploader = upload.Uploader(device)
    uploader.write_part(replay, "x", 2, values)
    uploader.close()
    assert device.allocated_bytes == held
    got = replay.read("x")
    replay.close()
    np.testing.assert_array_equal(got[2 : 2 + size], values)
    assert (got[:2] == 7).all()
    assert (got[-1] == 7).all()


def test_an_interrupt_while_loading_is_raised(tmp_path, kernels, monkeypatch):
    """It leaves a buffer of the ring mapped, which must not hide it behind an error of its own, and no memory taken."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    make_model(tmp_path / "model", **TINY)
    monkeypatch.setattr(upload.Uploader, "_fill", interrupted)
    held = kernels.device.allocated_bytes
    with pytest.raises(KeyboardInterrupt):
        open_session(tmp_path, kernels)
    assert kernels.device.allocated_bytes == held


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """270 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("large")
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "num_attention_heads": 16}
    make_model(folder / "model", dtype="bfloat16", **shape, vocab_size=16384, num_hidden_layers=8)
    return folder


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_loading_takes_little_host_memory(large, kernels, method):
    """The promise is the largest tensor in f32 and 1 GiB, which a model this small keeps in any case.

    Chunks of 32 MiB, eight of them under way at once, keep well below: held to that, the test sees a copy of the model,
    which takes 540 MB in f32.
    """
    largest = 16384 * 1024 * 4
    with loading.PeakMemory(kernels.device) as peak:
        session = open_session(large, kernels, method=method)
    session.close()
    assert peak.nbytes < largest + (256 << 20), f"{peak.nbytes >> 20} MiB"


def test_the_benchmark_loads_what_the_generator_writes(tmp_path, device, capsys):
    """In shards, small enough that there are several; kept weights are found by the next start."""
    files = make_checkpoint(QWEN3, tmp_path / "model", shard_bytes=100_000)
    assert len(files) > 3
    loading.run_all(tmp_path / "model", None)
    lines = capsys.readouterr().out.splitlines()
    labels = [line.split()[0] for line in lines[1:-4]]
    assert labels == ["read", "read", "load", "load", "with", "with", "the", "next", "next"]
    sources = [line.split("from ")[1] for line in lines if "from " in line]
    assert sources[:4] == ["checkpoint"] * 4
    assert sources[5] == sources[6] == sources[4].split("kept in ")[1]
    assert lines[-4].startswith("cold: loading takes")
    assert lines[-3].startswith("cold: checksums cost")


NAMES = {"projection": "model.layers.0.mlp.up_proj.weight", "embedding": "model.embed_tokens.weight"}
NAMES |= {"norm": "model.layers.0.post_attention_layernorm.weight"}


@pytest.mark.parametrize("where", ["numpy", "gpu"])
@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize(
    ("kind", "dtype", "value"),
    [("projection", "bfloat16", np.nan), ("embedding", "float16", np.inf), ("norm", "float32", -np.inf)],
)
def test_weights_that_are_not_finite_are_refused(tmp_path, kernels, where, method, kind, dtype, value):
    """On every path by the same line, and nothing keeps memory."""
    path = make_model(tmp_path / "model", dtype=dtype, **TINY) / "model.safetensors"
    checkpoint = HFCheckpoint.open(path.parent)
    tensors = {name: np.array(checkpoint.raw(name)) for name in checkpoint.names()}
    tensors[NAMES[kind]].reshape(-1)[-1] = value
    save_safetensors(path, tensors)
    held = kernels.device.allocated_bytes
    options = {"device": "numpy"} if where == "numpy" else {}
    with pytest.raises(UserError, match=rf"^{path}: tensor '{NAMES[kind]}' holds numbers that are not finite$"):
        open_session(tmp_path, None if where == "numpy" else kernels, method=method, **options)
    assert kernels.device.allocated_bytes == held


@pytest.mark.parametrize("where", ["numpy", "gpu"])
def test_stored_scales_that_are_not_finite_are_refused(tmp_path, kernels, where):
    folder = make_model(tmp_path / "model", **TINY)
    dense, name = HFCheckpoint.open(folder), NAMES["projection"]
    tensors = {n: np.array(dense.raw(n)) for n in dense.names() if n != name}
    tensors |= {key: np.array(values) for key, values in nf4_tensors(name, dense.f32(name), True).items()}
    tensors[f"{name}.nested_absmax"][0] = np.nan
    save_safetensors(folder / "model.safetensors", tensors)
    options = {"device": "numpy"} if where == "numpy" else {}
    with pytest.raises(UserError, match=rf"model.safetensors: tensor '{name}' holds numbers that are not finite$"):
        open_session(tmp_path, None if where == "numpy" else kernels, **options)
