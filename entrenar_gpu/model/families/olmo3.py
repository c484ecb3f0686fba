"""OLMo 3: OLMo 2's layer, three with a window to one without, and scaled frequencies in the latter."""

from dataclasses import replace

from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import FULL, SLIDING, ConfigFile
from entrenar_gpu.model.families.olmo2 import olmo_layer
from entrenar_gpu.model.rope import Rope

ARCHITECTURES = ("Olmo3ForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    file = file.completed(sliding_window=4096, rms_norm_eps=1e-5)
    kinds = file.layer_kinds([SLIDING if (index + 1) % 4 else FULL for index in range(file.num_layers)])
    layer, layers = olmo_layer(file), []
    for kind, window in zip(kinds, file.windows(kinds), strict=True):
        rope = Rope.read(file, layer.attention.head_dim, kind, theta=5e5)
        if kind == SLIDING and "rope_parameters" not in file.raw:  # the old layout's scaling is for the others
            rope = replace(rope, scaling=None)
        layers.append(replace(layer, attention=replace(layer.attention, rope=rope, window=window)))
    return ModelConfig.read(file, layers)
