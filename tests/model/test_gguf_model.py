"""A GGUF file as a base model: the weights, the configuration and the tokenizer that went into it."""

import numpy as np
import pytest

from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.export import export_model
from entrenar_gpu.model import HFCheckpoint, resolve_model
from tests.export.test_gguf import CONFIGS, make, tensors

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_went_into_a_file_comes_out(tmp_path, name):
    before = make(tmp_path, name)
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf", dtype="F32")
    folder = resolve_model(str(tmp_path / "model.gguf"))
    after = HFCheckpoint.open(folder)
    assert after.config.layers == before.config.layers
    assert after.config.weights == before.config.weights
    for spec in before.config.weights:
        np.testing.assert_allclose(after.f32(spec.name), before.f32(spec.name), rtol=0, atol=1e-6)
    ours, theirs = Tokenizer.load(tmp_path / "model"), Tokenizer.load(folder)
    for text in ("ab cab  a1 23é\n", "<s>a</s> b<|im_end|>"):
        assert ours.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": "a"}]
    assert ours.render(messages, add_generation_prompt=True) == theirs.render(messages, add_generation_prompt=True)
    assert set(theirs.eos_ids) == set(ours.eos_ids) - {0}  # which config.json alone names
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(str(tmp_path / "model.gguf")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_weights_are_what_the_type_stands_for(tmp_path, dtype):
    make(tmp_path, "qwen3")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf", dtype=dtype)
    checkpoint = HFCheckpoint.open(resolve_model(str(tmp_path / "model.gguf")))
    name = "model.layers.1.mlp.down_proj.weight"
    assert checkpoint.info(name).dtype == (dtype if dtype in ("F16", "BF16") else "F32")
    np.testing.assert_array_equal(checkpoint.f32(name), tensors(tmp_path / "model.gguf")["blk.1.ffn_down.weight"])


def test_pieces_with_scores_join_as_they_did(tmp_path):
    """Byte fallback and spaces as SentencePiece has them."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    make(tmp_path, "qwen3")
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *bytes_, "▁a", "ab", "▁ab", "bb", "▁", "a", "b", "c"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "ab"), ("b", "b")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "model/tokenizer.json"))
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    read = Tokenizer.load(resolve_model(str(tmp_path / "model.gguf")))
    for text in ("ab abb cab é a", "bba b", "c</s>"):
        assert read.encode(text, add_special_tokens=False) == backend.encode(text, add_special_tokens=False).ids
    assert read.decode(read.encode("ab é")) == "ab é"


def change(folder, **fields):
    """A GGUF file with these fields."""
    writer = gguf.GGUFWriter(folder / "odd.gguf", fields.pop("architecture", "qwen3"))
    for key, value in fields.items():
        writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_is_no_file_of_ours_is_one_line(tmp_path):
    path = tmp_path / "odd.gguf"
    for content in (
        b"",
        b"GGUF",
        b"GGUF" + bytes(100),
        b"no gguf at all, but long enough to be read",
        b"GGUF\x03\0\0\0" + b"\xff" * 64,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"odd\.gguf: not a GGUF file that can be read") as error:
            resolve_model(str(path))
        assert "\n" not in str(error.value)
        path.unlink()
    change(tmp_path, architecture="gptj")
    with pytest.raises(UserError, match=r"odd\.gguf: 'gptj' is not read as GGUF; read are llama, qwen2"):
        resolve_model(str(path))
    path.unlink()
    change(tmp_path)
    with pytest.raises(UserError, match=r"odd\.gguf: qwen3\.embedding_length is missing"):
        resolve_model(str(path))


def test_a_cut_file_leaves_no_folder_that_is_taken_for_whole(tmp_path):
    make(tmp_path, "qwen3")
    export_model(str(tmp_path / "model"), tmp_path / "model.gguf")
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model\.gguf: not a GGUF file"):
        resolve_model(str(tmp_path / "model.gguf"))
    assert not list((tmp_path / "cache").rglob("config.json"))
