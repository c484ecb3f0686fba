"""OLMo 2 (arXiv 2501.00656): norms after each block alone, and over all queries and keys of a token together."""

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, NormNames, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("Olmo2ForCausalLM",)
NORMS = NormNames(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)


def read(file: ConfigFile) -> ModelConfig:
    return ModelConfig.read(file, [olmo_layer(file)] * file.num_layers)


def olmo_layer(file: ConfigFile) -> Layer:
    """A layer of OLMo 2 or 3."""
    file, bias = file.completed(rms_norm_eps=1e-5), file.flag("attention_bias")
    attention = Attention.read(file, bias, bias, qk_norm="width")
    return Layer(attention, FeedForward.read(file), RmsNorm.read(file), NORMS)
