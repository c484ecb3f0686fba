"""Checkpoints: what is read, what is refused and in which words, and what is written."""

from __future__ import annotations

import errno
import json
import os
import sys
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from entrenar_gpu.errors import UserError
from entrenar_gpu.export.hf_writer import copy_model_files, save_checkpoint
from entrenar_gpu.files.atomic import new_file
from entrenar_gpu.files.safetensors_file import SafetensorsFile
from entrenar_gpu.files.tensor_source import TensorSource, save_safetensors
from entrenar_gpu.model import hub
from entrenar_gpu.model.hf_checkpoint import HFCheckpoint
from entrenar_gpu.model.registry import parse_model_config
from entrenar_gpu.quant.nf4 import CODEBOOK, Nf4Weight

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
FORMAT = {"format": "pt"}


def model_tensors(**changes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weights = parse_model_config(CONFIG | changes).weights
    return {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in weights}


def write_model(folder: Path, tensors: dict[str, np.ndarray], **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, folder / "model.safetensors", metadata=FORMAT)
    return folder


def write_shards(folder: Path, tensors: dict[str, np.ndarray], **placed: str) -> Path:
    """Two shards, tensors taking turns, with an index; `placed` overrides where the index says that a tensor is."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shards = {f"model-{i + 1:05}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard, metadata=FORMAT)
    weight_map = {name: shard for shard, names in shards.items() for name in names} | placed
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


# Reading


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_reads_what_safetensors_writes(tmp_path, dtype):
    tensors = {name: values.astype(dtype) for name, values in model_tensors().items()}
    checkpoint = HFCheckpoint.open(write_model(tmp_path, tensors))
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, values in tensors.items():
        raw = checkpoint.raw(name)
        assert (raw.dtype, raw.shape, raw.tobytes()) == (values.dtype, values.shape, values.tobytes())
        np.testing.assert_array_equal(checkpoint.f32(name), values.astype(np.float32))
        assert checkpoint.nf4(name) is None


def test_reads_shards_through_their_index(tmp_path):
    tensors = model_tensors()
    checkpoint = HFCheckpoint.open(write_shards(tmp_path, tensors))
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.f32(name), values)


def test_reads_links_as_in_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    tensors = model_tensors()
    for file in write_shards(blobs, tensors).iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert HFCheckpoint.open(snapshot).f32(Q_PROJ).tobytes() == tensors[Q_PROJ].tobytes()


def test_tensors_the_model_does_not_need_are_ignored(tmp_path):
    extra = {
        "lm_head.weight": np.ones((3, 3), np.float32),  # tied, so never read
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "unsupported": np.ones(3, np.int64),
        "empty": np.ones((0, 4), np.float32),
    }
    checkpoint = HFCheckpoint.open(write_model(tmp_path, model_tensors() | extra))
    assert checkpoint.f32(Q_PROJ).shape == (64, 32)
    assert checkpoint.raw("empty").shape == (0, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_rows_touches_only_their_pages(tmp_path):
    rows, width = 1 << 18, 256  # 256 MiB, a hole in the file system
    header = {"w": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, rows * width * 4]}}
    path = raw_file(tmp_path / "big.safetensors", header)
    os.truncate(path, path.stat().st_size + rows * width * 4)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    tensor = SafetensorsFile(path).stored("w")
    assert not tensor[1000:2000].read().any()
    assert resident() - before < 16 << 20
    whole = tensor.read()
    assert not whole.any()
    assert resident() - before > 200 << 20  # so that the measurement can tell


def test_a_file_that_shrinks_while_it_is_read_is_one_line(tmp_path):
    """A map of it would end the process with SIGBUS."""
    checkpoint = HFCheckpoint.open(write_model(tmp_path, model_tensors()))
    first = next(iter(checkpoint.names()))
    os.truncate(tmp_path / "model.safetensors", checkpoint.info(first).start + 3)
    for read in (checkpoint.raw, checkpoint.f32, lambda name: checkpoint.stored(name)[1:2].read()):
        with pytest.raises(UserError, match=rf"model\.safetensors: cut off while it was read, within tensor '{first}'"):
            read(first)


def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: it is no file"):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_stored_rows_are_those_of_the_whole(tmp_path):
    checkpoint = HFCheckpoint.open(write_model(tmp_path, model_tensors()))
    whole, stored = checkpoint.raw(Q_PROJ), checkpoint.stored(Q_PROJ)
    for rows in (slice(0, 5), slice(7, 64), slice(60, 99), slice(64, 64)):
        np.testing.assert_array_equal(stored[rows], whole[rows])
    flat = stored.reshape(-1)
    np.testing.assert_array_equal(flat[33:97], whole.reshape(-1)[33:97])
    np.testing.assert_array_equal(flat.view(np.uint8)[5:99], whole.reshape(-1).view(np.uint8)[5:99])


def test_tensors_are_read_only(tmp_path):
    checkpoint = HFCheckpoint.open(write_model(tmp_path, model_tensors()))
    with pytest.raises(ValueError, match="read-only"):
        checkpoint.raw(Q_PROJ)[0] = 1


# What is refused


@pytest.mark.parametrize(
    ("changes", "replaced", "message"),
    [
        ({}, {Q_PROJ: np.ones((32, 64), np.float32)}, r"model.safetensors: .*q_proj.weight' has shape \[32, 64\]"),
        ({}, {Q_PROJ: np.ones((64, 32), np.int32)}, "model.safetensors: .*q_proj.weight' has dtype I32"),
        ({}, {Q_PROJ: np.ones((64, 32), np.float64)}, "q_proj.weight' has dtype F64"),
        ({}, {Q_PROJ: None}, "model.safetensors: tensor .*q_proj.weight' is missing"),
        ({"tie_word_embeddings": False}, {}, "tensor 'lm_head.weight' is missing"),
        ({"architectures": ["GPT2LMHeadModel"]}, {}, "config.json: architecture .*GPT2LMHeadModel"),
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "config.json: quantization_config: gptq"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            {},
            "bitsandbytes in 8 bits",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path, changes, replaced, message):
    tensors = {name: values for name, values in (model_tensors() | replaced).items() if values is not None}
    with pytest.raises(UserError, match=message):
        HFCheckpoint.open(write_model(tmp_path, tensors, **changes))


def test_folders_without_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"holds neither model.safetensors nor"):
        HFCheckpoint.open(tmp_path)


@pytest.mark.parametrize(
    "place", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "a\0b", 7, None]
)
def test_an_index_must_name_files_of_its_folder(tmp_path, place):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({Q_PROJ: np.ones((64, 32), np.float32)}, tmp_path / "other.safetensors")
    write_shards(folder, model_tensors(), **{Q_PROJ: place})
    with pytest.raises(UserError, match=r"index.json: tensor '.*q_proj.weight': .* not the name of a file"):
        HFCheckpoint.open(folder)


def test_missing_and_truncated_shards_are_named(tmp_path):
    second = write_shards(tmp_path, model_tensors()) / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors: cut off: tensor 'model"):
        HFCheckpoint.open(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match=r"00002-of-00002.safetensors: missing; model.safetensors.index.json names it"):
        HFCheckpoint.open(tmp_path)


def test_a_tensor_missing_from_its_shard_is_named(tmp_path):
    write_shards(tmp_path, model_tensors(), extra="model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"00001-of-00002.safetensors: tensor 'extra' is missing"):
        HFCheckpoint.open(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[" * 100_000])
def test_malformed_indices_are_refused(tmp_path, index):
    write_shards(tmp_path, model_tensors())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"index.json: (not valid JSON|expected a JSON object|holds no weight_map)"):
        HFCheckpoint.open(tmp_path)


def entry(start: int, end: int, shape: object = None, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "'b' overlaps"),
        ({"a": entry(4, 8)}, 8, "'a' overlaps another or leaves a gap"),
        ({"a": entry(0, 8)}, 4, "cut off: tensor 'a'"),
        ({"a": entry(0, 8)}, 9, "1 bytes follow"),
        ({"a": entry(0, 8, [3])}, 8, r"8 bytes do not hold F32 of shape \[3\]"),
        ({"a": entry(0, 8, [-2])}, 8, "malformed"),
        ({"a": entry(0, 8, [2.0])}, 8, "malformed"),
        ({"a": entry(0, 8, [True, 2])}, 8, "malformed"),
        ({"a": entry(0, 8, [2] + [1] * 64)}, 8, "malformed"),
        ({"a": entry(8, 0, [0])}, 8, "malformed"),
        ({"a": entry(0, 2**63, [2**61])}, 8, "malformed"),
        ({"a": entry(0, 8, dtype=3)}, 8, "malformed"),
        ({"a": [1]}, 0, "malformed"),
        ([], 0, "not a JSON object"),
        (b'{"a": 1, "a": 2}', 0, "not valid JSON"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
    ],
)
def test_malformed_headers_are_refused(tmp_path, header, size, message):
    path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(UserError, match=f"x.safetensors: .*{message}"):
        SafetensorsFile(path)


@pytest.mark.parametrize("filling", [b"[],", b"{},", b'{"":[]},'])
def test_a_header_of_lists_and_objects_is_refused_before_they_are_made(tmp_path, filling):
    """99 MB of these would be 2.3 GiB of Python objects."""
    header = b'{"a":[' + filling * (2 << 20) + b"0]}"
    with pytest.raises(UserError, match=r"x\.safetensors: .* its header holds more than descriptions of tensors"):
        SafetensorsFile(raw_file(tmp_path / "x.safetensors", header))


def test_a_header_of_many_small_tensors_is_none_of_those(tmp_path):
    entry = {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}
    names = [f"{n:x}" for n in range(25_000)]
    text = json.dumps({n: entry | {"shape": [0]} for n in names}, separators=(",", ":")).encode()
    assert len(text) > 1 << 20
    assert len(SafetensorsFile(raw_file(tmp_path / "x.safetensors", text)).tensors) == len(names)


@pytest.mark.parametrize("content", [b"", b"\1", (2**63).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little")])
def test_header_lengths_beyond_the_file_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x.safetensors: .* cut off within its header"):
        SafetensorsFile(tmp_path / "x.safetensors")


@given(st.data())
def test_damaged_files_are_refused_or_read(tmp_path_factory, data):
    """Whatever bytes of the header change, the answer is a UserError or a view within the file."""
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(5, np.float16)}, path, metadata=FORMAT)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'\0\xff"{}[]:,0129-eF '))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    refusal, size = f"{path}", 0
    try:
        file = SafetensorsFile(path)
        size = sum(len(file[name].tobytes()) for name in file.tensors)
    except UserError as error:
        refusal = str(error)
    assert size < len(content)
    assert refusal.startswith(f"{path}")
    assert "\n" not in refusal


# Checkpoints quantised by bitsandbytes


def nf4_tensors(name: str, values: np.ndarray, double: bool, **changed) -> dict[str, np.ndarray]:
    """A weight in the layout of bitsandbytes; `changed` overrides entries of its JSON state."""
    weight = Nf4Weight.from_dense(values, double)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(values.shape)}
    parts = {"": weight.codes[:, None], ".absmax": weight.absmax, ".quant_map": CODEBOOK}
    if double:
        parts |= {".absmax": weight.absmax_codes, ".nested_absmax": weight.nested_absmax}
        parts |= {".nested_quant_map": weight.nested_code}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": weight.offset}
    text = json.dumps(state | changed).encode()
    parts[".quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
    return {name + suffix: array for suffix, array in parts.items()}


@pytest.mark.parametrize("double", [False, True])
def test_reads_nf4_as_stored(tmp_path, double):
    values = model_tensors()[Q_PROJ]
    folder = write_model(tmp_path, model_tensors() | nf4_tensors(Q_PROJ, values, double))
    checkpoint, wanted = HFCheckpoint.open(folder), Nf4Weight.from_dense(values, double, dtype="bfloat16")
    weight = checkpoint.nf4(Q_PROJ)
    assert checkpoint.is_nf4(Q_PROJ)
    assert (weight.shape, weight.double, weight.dtype) == ((64, 32), double, "bfloat16")
    np.testing.assert_array_equal(weight.codes, wanted.codes)
    np.testing.assert_array_equal(weight.scales(), wanted.scales())
    np.testing.assert_array_equal(checkpoint.f32(Q_PROJ), wanted.dequantize())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type 'fp4' is not supported"),
        ({"blocksize": 128}, "blocksize 128 is not supported"),
        ({"nested_blocksize": 512}, "nested_blocksize 512"),
        ({"nested_offset": "x"}, "nested_offset must be"),
        ({"nested_offset": float("nan")}, "nested_offset must be"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"shape": [32, 64]}, r"has shape \[32, 64\], config.json needs \[64, 32\]"),
        ({"shape": [64, 64]}, "bytes do not hold the NF4 codes"),
        ({"shape": [64, -32]}, "holds no shape"),
    ],
)
def test_other_quantisations_are_refused(tmp_path, changed, message):
    quantised = nf4_tensors(Q_PROJ, model_tensors()[Q_PROJ], True, **changed)
    with pytest.raises(UserError, match=rf"model.safetensors: tensor '.*q_proj.weight.*{message}"):
        HFCheckpoint.open(write_model(tmp_path, model_tensors() | quantised))


@pytest.mark.parametrize(
    ("suffix", "replacement", "message"),
    [
        (".quant_map", CODEBOOK * np.float32(0.5), "quant_map is not the NF4 codebook"),
        (".nested_quant_map", np.ones(255, np.float32), r"nested_quant_map' is F32 \[255\], must be F32 \[256\]"),
        (".absmax", np.ones(32, np.float32), r"absmax' is F32 \[32\], must be U8 \[32\]"),
        (".nested_absmax", None, "nested_absmax' is missing"),
        (".quant_state.bitsandbytes__nf4", np.frombuffer(b"{", np.uint8), "does not hold JSON"),
        (".quant_state.bitsandbytes__nf4", np.frombuffer(b"[]", np.uint8), "holds no shape"),
    ],
)
def test_incomplete_quantisation_states_are_refused(tmp_path, suffix, replacement, message):
    tensors = model_tensors() | nf4_tensors(Q_PROJ, model_tensors()[Q_PROJ], True)
    tensors[Q_PROJ + suffix] = replacement
    tensors = {name: values for name, values in tensors.items() if values is not None}
    with pytest.raises(UserError, match=message):
        HFCheckpoint.open(write_model(tmp_path, tensors))


@pytest.mark.parametrize(
    ("double", "part", "value"),
    [
        (False, ".absmax", np.inf),
        (False, ".absmax", 1e6),  # fits float32, not the float16 that its values are rounded to
        (True, ".nested_absmax", 1e30),
        (True, ".nested_quant_map", -np.inf),
    ],
)
def test_scales_of_no_finite_values_are_refused_while_opening(tmp_path, double, part, value):
    tensors = model_tensors() | nf4_tensors(Q_PROJ, model_tensors()[Q_PROJ], double, dtype="float16")
    tensors[Q_PROJ + part] = np.full_like(tensors[Q_PROJ + part], value)
    with pytest.raises(UserError, match=rf"model.safetensors: tensor '{Q_PROJ}' holds numbers that are not finite$"):
        HFCheckpoint.open(write_model(tmp_path, tensors))


def test_an_offset_of_scales_beyond_float32_is_refused(tmp_path):
    tensors = model_tensors() | nf4_tensors(Q_PROJ, model_tensors()[Q_PROJ], True, nested_offset=1e39)
    with pytest.raises(UserError, match=rf"model.safetensors: tensor '{Q_PROJ}' holds numbers that are not finite$"):
        HFCheckpoint.open(write_model(tmp_path, tensors))


def test_fp4_and_quantised_embeddings_are_refused(tmp_path):
    state = np.frombuffer(b"{}", np.uint8)
    with pytest.raises(UserError, match=r"q_proj.weight': quantised by bitsandbytes to fp4"):
        HFCheckpoint.open(write_model(tmp_path, model_tensors() | {f"{Q_PROJ}.quant_state.bitsandbytes__fp4": state}))
    name = "model.embed_tokens.weight"
    with pytest.raises(UserError, match=r"embed_tokens.weight': quantised by bitsandbytes; only projections"):
        HFCheckpoint.open(write_model(tmp_path, model_tensors() | nf4_tensors(name, model_tensors()[name], False)))


# Writing


@pytest.mark.parametrize("step", ["7", "17", "117", "1117"])  # the header's length, modulo 4
def test_safetensors_reads_what_we_write(tmp_path, step):
    tensors = {
        "odd": np.arange(3, dtype=np.float16),  # would leave what follows unaligned
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
        "u8": np.arange(7, dtype=np.uint8),
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 2), np.float32),
    }
    path = tmp_path / "x.safetensors"
    save_safetensors(path, tensors, {"format": "pt", "step": step})
    read, ours = load_file(path), SafetensorsFile(path)
    assert ours.metadata == {"format": "pt", "step": step}
    for name, values in tensors.items():
        assert (read[name].dtype, read[name].shape) == (values.dtype, values.shape)
        assert read[name].tobytes() == values.tobytes() == ours[name].tobytes()
        assert ours.tensors[name].start % values.dtype.itemsize == 0


def sources(tensors: dict[str, np.ndarray], dtype: str = "F32") -> list[TensorSource]:
    return [TensorSource(n, v.shape, dtype, lambda v=v: v) for n, v in tensors.items()]


@pytest.mark.parametrize("limit", [1, 20_000, 1 << 30])
def test_written_checkpoints_are_read_back(tmp_path, limit):
    tensors = model_tensors()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    written = save_checkpoint(tmp_path, sources(tensors), limit)
    assert sorted(path.name for path in written) == sorted(p.name for p in tmp_path.iterdir() if p.name[:5] == "model")
    assert len(written) == {1: len(tensors) + 1, 20_000: 8, 1 << 30: 1}[limit]
    checkpoint = HFCheckpoint.open(tmp_path)
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.f32(name), values)


def test_tensors_are_produced_one_at_a_time(tmp_path):
    alive: list[weakref.ref] = []

    def produce() -> np.ndarray:
        assert all(reference() is None for reference in alive[:-1])  # the last may still be a local of the writer
        values = np.ones((10, 10), np.float32)
        alive.append(weakref.ref(values))
        return values

    save_checkpoint(tmp_path, [TensorSource(f"t{i}", (10, 10), "BF16", produce) for i in range(5)])
    assert len(alive) == 5


def test_a_layout_that_would_hide_the_new_weights_is_refused(tmp_path):
    save_checkpoint(tmp_path, sources(model_tensors()))
    with pytest.raises(UserError, match=r"model.safetensors: is in the way"):
        save_checkpoint(tmp_path, sources(model_tensors()), shard_bytes=20_000)


def test_a_full_disk_leaves_what_was_there(tmp_path):
    old = model_tensors()
    save_checkpoint(tmp_path, sources(old), 20_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full() -> np.ndarray:
        raise OSError(errno.ENOSPC, "No space left on device")

    broken = [*sources({name: values + 1 for name, values in old.items()}), TensorSource("z", (1,), "F32", full)]
    with pytest.raises(UserError, match=r"model-00007-of-00007.safetensors: the disk is full; nothing was written"):
        save_checkpoint(tmp_path, broken, 20_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), ValueError("x")])
def test_a_failed_write_leaves_no_temporary_file(tmp_path, fault):
    (tmp_path / "x").write_text("old")

    def write_half() -> None:
        with new_file(tmp_path / "x") as stream:
            stream.write(b"half")
            raise fault

    with pytest.raises((UserError, KeyboardInterrupt, ValueError)):
        write_half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


def test_folders_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written"):
        save_checkpoint(tmp_path / "file", sources(model_tensors()))
    with pytest.raises(UserError, match=r"missing/x.safetensors: cannot be written"):
        save_safetensors(tmp_path / "missing" / "x.safetensors", {})


def test_model_files_are_copied_with_the_new_dtype(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    quantised = {"quantization_config": {"quant_method": "bitsandbytes"}, "dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(CONFIG | quantised))
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "notes.txt").write_text("stays")
    copy_model_files(source, target, "float32")
    assert sorted(path.name for path in target.iterdir()) == ["chat_template.jinja", "config.json", "tokenizer.json"]
    assert json.loads((target / "config.json").read_text()) == CONFIG | {"dtype": "float32"}


# Model names


def test_existing_folders_win_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert hub.resolve_model("org/model") == Path("org/model")


@pytest.mark.parametrize("name", ["", "no-such-folder", "./org/model", "/no/such", "a/b/c", "../up"])
def test_names_that_are_neither_folder_nor_repository(name):
    with pytest.raises(UserError, match="--model: "):
        hub.resolve_model(name)


def test_an_unreachable_hub_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(name, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"^--model: org/model: no such folder, and not .* Hub: no route$"):
        hub.resolve_model("org/model")


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_of_the_hub_only_models_that_can_be_trained_are_downloaded(monkeypatch, tmp_path, architecture):
    """Neither pickles nor code."""
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"architectures": [architecture]}))
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    if architecture != "Qwen3ForCausalLM":
        with pytest.raises(UserError, match="architecture 'Qwen3MoeForCausalLM' is not supported"):
            hub.resolve_model("org/model")
        assert asked == ["config.json"]
        return
    assert hub.resolve_model("org/model") == tmp_path
    assert "model*.safetensors" in asked
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked if "." in pattern[-4:])
