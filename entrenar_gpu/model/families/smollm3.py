"""SmolLM3: no rotation in every fourth layer (arXiv 2501.18795)."""

from dataclasses import replace

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import FULL, SLIDING, ConfigFile, shown

ARCHITECTURES = ("SmolLM3ForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    file = file.completed(tie_word_embeddings=True)
    bias = file.flag("attention_bias")
    layer = Layer(Attention.read(file, bias, bias), FeedForward.read(file), RmsNorm.read(file))
    plain = replace(layer, attention=replace(layer.attention, rope=None))
    rotated = _rotated(file)
    slides = file.flag("use_sliding_window") and file.raw.get("sliding_window") is not None
    kinds = [SLIDING if slides and not turns else FULL for turns in rotated]
    windows = file.windows(kinds) if slides else [None] * len(kinds)
    made = [(layer if turns else plain).windowed(window) for turns, window in zip(rotated, windows, strict=True)]
    return ModelConfig.read(file, made)


def _rotated(file: ConfigFile) -> list[bool]:
    """Whether each layer rotates: `no_rope_layers` says 1 where it does."""
    given, interval = file.raw.get("no_rope_layers"), file.count("no_rope_layer_interval", 4)
    if given is None:
        return [bool((index + 1) % interval) for index in range(file.num_layers)]
    if not isinstance(given, list) or len(given) < file.num_layers or any(turns not in (0, 1) for turns in given):
        raise file.error(f"no_rope_layers must be {file.num_layers} of 0 and 1, not {shown(given)}")
    return [bool(turns) for turns in given[: file.num_layers]]
