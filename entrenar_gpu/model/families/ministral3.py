"""Ministral 3: YaRN, and queries that grow with their position."""

from dataclasses import replace

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile
from entrenar_gpu.model.rope import Rope

ARCHITECTURES = ("Ministral3ForCausalLM",)
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}


def read(file: ConfigFile) -> ModelConfig:
    file = file.completed(head_dim=128, rms_norm_eps=1e-5, rope_parameters=YARN)
    attention = Attention.read(file)
    attention = replace(attention, query_rope=Rope.of_queries(file, attention.rope))
    layer = Layer(attention, FeedForward.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [layer.windowed(file.window(None))] * file.num_layers)
