"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783): the plain layer; from 3.1 on, rotary frequencies are scaled."""

from entrenar_gpu.model.blocks import Attention, Layer, RmsNorm, SwiGlu
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("LlamaForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    file.refuse("attention_bias")
    layer = Layer(Attention.read(file), SwiGlu.read(file), RmsNorm.read(file))
    return ModelConfig.read(file, [layer] * file.num_layers)
