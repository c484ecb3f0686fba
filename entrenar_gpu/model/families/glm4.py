"""GLM-4 9B and 32B as of 2025 (GLM-4-0414): GLM-4's layer with norms around each block."""

from dataclasses import replace

from entrenar_gpu.model.blocks import NormNames
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile
from entrenar_gpu.model.families.glm import DEFAULTS, glm_layer

ARCHITECTURES = ("Glm4ForCausalLM",)
NORMS = NormNames(
    before_attention="input_layernorm",
    after_attention="post_self_attn_layernorm",
    before_mlp="post_attention_layernorm",
    after_mlp="post_mlp_layernorm",
)


def read(file: ConfigFile) -> ModelConfig:
    file = file.completed(**DEFAULTS)
    return ModelConfig.read(file, [replace(glm_layer(file), norms=NORMS)] * file.num_layers)
