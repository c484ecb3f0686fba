"""Models and adapters as GGUF, which llama.cpp and what is built on it (Ollama, LM Studio) read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.adapters import load_adapter
from entrenar_gpu.errors import UserError
from entrenar_gpu.export.gguf_tokenizer import add_tokenizer
from entrenar_gpu.files import cannot_write, new_folder, temporary_path
from entrenar_gpu.model import (
    Attention,
    GgufFamily,
    HFCheckpoint,
    ModelConfig,
    Rope,
    WeightSpec,
    YarnScaling,
    as_pairs,
    family_of,
    heads_of,
    window_of,
    yarn_temperature,
)

Floats = np.ndarray
# What gguf quantises; for what else llama.cpp reads, its own llama-quantize makes one file of another.
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
_BLOCK = 32  # numbers that a quantised block has
_AS_FACTORS = "RopeScaling"  # Llama 3.1's, which llama.cpp takes as a factor for each frequency
_TWO_TABLES = "LongRopeScaling"  # which it takes as two such tables, for short contexts and long


@dataclass(frozen=True)
class _Model:
    """A model to be written: where its weights come from, and what llama.cpp calls it."""

    config: ModelConfig
    family: GgufFamily
    folder: Path
    weight: Callable[[WeightSpec], Floats]


def write_gguf(
    checkpoint: HFCheckpoint, output: Path, dtype: str = "F16", weight: Callable[[WeightSpec], Floats] | None = None
) -> None:
    """Write a model with its tokenizer, chat template and metadata to the file `output`.

    `dtype` is one of TYPES; vectors stay F32, and the embedding and head of a model below 8 bits are Q8_0. `weight`
    gives other values than the checkpoint's, in float32. Memory stays at the largest tensor. Raises UserError where
    llama.cpp has no such model, tokenizer or type.
    """
    dtype = dtype.upper() if dtype.upper() in TYPES else dtype  # llama.cpp's tools have them in small letters
    if dtype not in TYPES:
        hint = "; its own llama-quantize makes those of an F16 file" if "_K" in dtype or dtype.startswith("IQ") else ""
        raise UserError(f"--type: {dtype!r} is not one of {', '.join(TYPES)}{hint}")
    config = checkpoint.config
    source = str(checkpoint.folder / "config.json")
    family = family_of(config, source)
    model = _Model(config, family, checkpoint.folder, weight or (lambda spec: checkpoint.f32(spec.name)))
    with _writer(output, family.architecture) as writer:
        _add_metadata(writer, config, checkpoint.folder, source, dtype)
        add_tokenizer(writer, checkpoint.folder, config.vocab_size)
        tensors = [*_rope_factors(config), *_tensors(model, dtype)]
        for tensor in tensors:
            tensor.declare(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(tensor.produce())


def write_gguf_adapter(checkpoint: HFCheckpoint, adapter: Path, output: Path) -> None:
    """Write a LoRA adapter alone, which llama.cpp adds to a GGUF of the model, whatever type that has."""
    spec, values = load_adapter(adapter, checkpoint.config)
    if spec.tables:
        what = f"{next(iter(spec.tables))}: a GGUF adapter has those of projections alone; merge it into the model"
        raise UserError(f"{adapter}: {what}")
    family = family_of(checkpoint.config, str(checkpoint.folder / "config.json"))
    names = _Names(checkpoint.config, family)
    modules = list(spec.modules.items())
    # llama.cpp scales all modules by alpha / rank, with each one's own rank; what differs goes into B.
    alpha = modules[0][1].scale * modules[0][1].rank
    with _writer(output, family.architecture) as writer:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for path, module in modules:
            a, b = values[module.a_name], values[module.b_name]
            factor = module.scale * module.rank / alpha
            b = names.turned(path, b) * np.float32(1.0 if abs(factor - 1) < 1e-6 else factor)
            name = names.of(f"{path}.weight")
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, np.float32))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


@contextlib.contextmanager
def _writer(output: Path, architecture: str) -> Iterator[Any]:
    """A gguf writer on a file that appears whole or not at all."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the extra: pip install 'entrenar-gpu[gguf]'") from None
    if output.exists():
        raise UserError(f"--output: {output} is there already; choose another file")
    new_folder(output.parent)
    temporary = temporary_path(output)
    writer = gguf.GGUFWriter(temporary, architecture)
    try:
        yield writer
        writer.close()
        os.replace(temporary, output)
    except OSError as error:
        raise cannot_write(output, error) from error
    finally:
        with contextlib.suppress(OSError):
            writer.close()
        temporary.unlink(missing_ok=True)


def _add_metadata(writer: Any, config: ModelConfig, folder: Path, source: str, dtype: str) -> None:
    """The sizes and numbers that llama.cpp computes with."""
    import gguf

    layer = config.layers[0]
    attention = layer.attention
    writer.add_type("model")
    writer.add_name(folder.name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}"])
    if dtype.startswith("Q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(config.layers))
    writer.add_feed_forward_length(layer.mlp.intermediate_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(attention.num_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(config.norm.eps)
    windows = [window for each in config.layers if (window := window_of(each.attention, config))]
    if windows:
        writer.add_sliding_window(windows[0])
    if attention.softcap is not None:
        writer.add_attn_logit_softcapping(attention.softcap)
    if config.softcap is not None:
        writer.add_final_logit_softcapping(config.softcap)
    if config.architecture == "granite":
        writer.add_attention_scale(attention.scale)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(layer.residual_multiplier)
        writer.add_logit_scale(1 / config.logits_multiplier)
    _add_rope(writer, config, source)


def _add_rope(writer: Any, config: ModelConfig, source: str) -> None:
    """The rotation of the layers that see everything; llama.cpp knows what those with a window have."""
    import gguf

    rope = _rope_of(config)
    if rope is None:
        return
    writer.add_rope_dimension_count(rope.rotary_dim)
    writer.add_rope_freq_base(rope.theta)
    kind = type(rope.scaling).__name__
    if kind == "LinearScaling":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(vars(rope.scaling)["factor"])
    elif kind == _TWO_TABLES:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(vars(rope.scaling)["original"])
        writer.add_rope_scaling_attn_factors(vars(rope.scaling)["attention_factor"])
    elif isinstance(rope.scaling, YarnScaling):
        yarn = rope.scaling
        if (yarn.beta_fast, yarn.beta_slow, yarn.whole) != (32, 1, True):
            raise UserError(
                f"{source}: llama.cpp has beta_fast 32, beta_slow 1 and truncate for yarn in these families"
            )
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original)
        # llama.cpp has the paper's temperature, and multiplies it by this.
        writer.add_rope_scaling_attn_factors(yarn.attention_factor / yarn_temperature(yarn.factor))
    elif rope.scaling is not None and kind != _AS_FACTORS:
        raise UserError(f"{source}: rope scaling {kind} cannot be written as GGUF; linear, llama3, longrope, yarn can")


def _rope_of(config: ModelConfig) -> Rope | None:
    seeing = [each.attention for each in config.layers if each.attention.window is None] or [config.layers[0].attention]
    return next((attention.rope for attention in seeing if attention.rope is not None), None)


def _rope_factors(config: ModelConfig) -> list[_Tensor]:
    """What llama.cpp divides the frequencies by, where these are scaled as Llama 3.1's or Phi 4 mini's are."""
    rope = _rope_of(config)
    if rope is not None and type(rope.scaling).__name__ == _TWO_TABLES:
        tables = {name: np.array(vars(rope.scaling)[name], np.float32) for name in ("long", "short")}
        return [
            _Tensor(f"rope_factors_{name}.weight", table.shape, "F32", lambda table=table: table)  # type: ignore[misc]
            for name, table in tables.items()
        ]
    if rope is None or type(rope.scaling).__name__ != _AS_FACTORS:
        return []
    factors = np.array(rope.base()) / np.array(rope.frequencies(config.max_positions))
    return [_Tensor("rope_freqs.weight", factors.shape, "F32", lambda: factors)]


class _Names:
    """What llama.cpp calls tensors, and the order in which it wants the rows of queries and keys."""

    def __init__(self, config: ModelConfig, family: GgufFamily) -> None:
        import gguf

        self.config, self.family = config, family
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
        self._map = gguf.get_tensor_name_map(arch, len(config.layers))

    def of(self, name: str) -> str:
        plain = name.replace(self.config.prefix, "model.", 1) if name.startswith(self.config.prefix) else name
        found = self._map.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(f"{name}: llama.cpp's {self.family.architecture} has no such tensor")
        return str(found)

    def turned(self, module: str, rows: Floats) -> Floats:
        heads = heads_of(module, self._attention(module)) if self.family.pairs else None
        return rows if heads is None else as_pairs(rows, heads)

    def _attention(self, module: str) -> Attention:
        index = module.removeprefix(f"{self.config.prefix}layers.").partition(".")[0]
        return self.config.layers[int(index) if index.isdecimal() else 0].attention


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written, made when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], Floats]

    def declare(self, writer: Any) -> None:
        import gguf

        kind = gguf.GGMLQuantizationType[self.dtype]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        size = int(np.prod(self.shape)) // block * nbytes
        shape = self.shape if self.dtype in ("F32", "F16") else (*self.shape[:-1], self.shape[-1] // block * nbytes)
        stored = {"F32": np.float32, "F16": np.float16}.get(self.dtype, np.uint8)
        writer.add_tensor_info(self.name, shape, np.dtype(stored), size, kind)

    def produce(self) -> np.ndarray:
        import gguf

        values = np.ascontiguousarray(self.values(), np.float32)
        with np.errstate(over="ignore"):
            made = gguf.quantize(values, gguf.GGMLQuantizationType[self.dtype])
        if not np.isfinite(made if self.dtype in ("F32", "F16") else values).all():
            raise UserError(f"tensor {self.name!r} holds numbers that are not finite in {self.dtype}")
        return made


def _tensors(model: _Model, dtype: str) -> Iterator[_Tensor]:
    names = _Names(model.config, model.family)
    for spec in model.config.weights:
        kind = dtype if len(spec.shape) == 2 else "F32"
        if spec.is_table and kind.startswith("Q"):
            kind = "Q8_0"
        if kind.startswith("Q") and spec.shape[-1] % _BLOCK:
            kind = "F16"

        def values(spec: WeightSpec = spec) -> Floats:
            found = names.turned(spec.module, model.weight(spec))
            # what multiplies by 1 + w is written as that
            return found + np.float32(model.config.norm.offset) if spec.kind == "norm" else found

        yield _Tensor(names.of(spec.name), spec.shape, kind, values)
