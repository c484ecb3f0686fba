"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), SmolLM2, and what is distilled into them: the plain layer; from 3.1 on,
rotary frequencies are scaled."""

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("LlamaForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    bias = file.flag("attention_bias")
    layer = Layer(Attention.read(file, qkv_bias=bias, out_bias=bias), FeedForward.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [layer] * file.num_layers)
