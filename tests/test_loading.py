"""Checkpoints on the device: exact as stored, quantised there as on the host, with little host memory on the way."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from entrenar_gpu import loader
from entrenar_gpu.nf4 import Nf4Weight
from entrenar_gpu.ops.quantize import host_parts, nf4_part_names
from entrenar_gpu.programs import fit_training
from entrenar_gpu.safetensors_file import save_safetensors
from entrenar_gpu.session import Session
from entrenar_gpu.weights import Checkpoint
from tests.runs import config_of
from tests.test_weights import nf4_tensors
from tests.tiny import make_model

pytestmark = pytest.mark.gpu

# 36 x 52 is no multiple of a block: the last one is short.
TINY = {"hidden_size": 36, "intermediate_size": 52, "head_dim": 10, "vocab_size": 97, "num_hidden_layers": 1}


def open_session(folder: Path, kernels: Any, **options: Any) -> Session:
    config = config_of(folder, **({"batch": 1, "seq": 8, "rank": 1, "target": "q"} | options))
    return Session.open(config, lambda shape, caps, budget: fit_training(shape, caps, budget, False), kernels=kernels)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_dense_weights_are_the_stored_ones(tmp_path, kernels, dtype, method):
    checkpoint = Checkpoint.open(make_model(tmp_path / "model", dtype=dtype, **TINY))
    session = open_session(tmp_path, kernels, method=method)
    kept = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for name, shape in checkpoint.config.parameter_shapes().items():
        page = f"{name}.page0" if "embed" in name else name
        values = session.executor.read(page)
        assert values.dtype == (np.float32 if method == "full" or len(shape) == 1 else kept)
        np.testing.assert_array_equal(values.astype(np.float32), checkpoint.f32(name), err_msg=name)
    session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double", [False, True])
def test_weights_are_quantised_as_on_the_host(tmp_path, kernels, monkeypatch, double, dtype):
    """Byte for byte, also in pieces: here of four blocks, so that a weight takes several and a short one."""
    monkeypatch.setattr(loader, "CHUNK_BYTES", 4 * 64 * 4)
    checkpoint = Checkpoint.open(make_model(tmp_path / "model", dtype=dtype, **TINY))
    session = open_session(tmp_path, kernels, double_quant=double)
    for name in filter(loader.is_projection, checkpoint.config.parameter_shapes()):
        weight = Nf4Weight.from_dense(checkpoint.raw(name), double)
        for part, values in zip(nf4_part_names(name, double), host_parts(weight), strict=True):
            got = session.executor.read(part)
            np.testing.assert_array_equal(got.reshape(-1), np.asarray(values).reshape(-1), err_msg=part)
    session.close()


@pytest.mark.parametrize("double", [False, True])
def test_stored_codes_are_used_as_they_are(tmp_path, kernels, double):
    """Those of bitsandbytes go to the device without being made again: shifted here, they stay shifted."""
    folder = make_model(tmp_path / "model", **TINY)
    dense = Checkpoint.open(folder)
    tensors: dict[str, np.ndarray] = {}
    for name in dense.config.parameter_shapes():
        stored = nf4_tensors(name, dense.f32(name), double) if loader.is_projection(name) else {name: dense.raw(name)}
        tensors |= {key: np.array(values) for key, values in stored.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] ^= np.uint8(0x31)
    save_safetensors(folder / "model.safetensors", tensors)
    checkpoint = Checkpoint.open(folder)
    session = open_session(tmp_path, kernels)
    weight = checkpoint.nf4(name)
    assert weight.double == double
    for part, values in zip(nf4_part_names(name, double), host_parts(weight), strict=True):
        np.testing.assert_array_equal(session.executor.read(part).reshape(-1), np.asarray(values).reshape(-1))
    session.close()


class PeakMemory:
    """The largest anonymous memory of this process while the block runs, less the buffers of a software adapter."""

    def __init__(self, device: Any) -> None:
        self._device, self._done = device, threading.Event()
        self.nbytes = 0

    def _now(self) -> int:
        text = Path("/proc/self/status").read_text()
        return (int(text.split("RssAnon:")[1].split()[0]) << 10) - self._device.allocated_bytes

    def _watch(self) -> None:
        while not self._done.is_set():
            self.nbytes = max(self.nbytes, self._now() - self._start)
            time.sleep(0.002)

    def __enter__(self) -> PeakMemory:
        self._start = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()


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
    with PeakMemory(kernels.device) as peak:
        session = open_session(large, kernels, method=method)
    session.close()
    assert peak.nbytes < largest + (256 << 20), f"{peak.nbytes >> 20} MiB"
