"""Phi-3, Phi-4 and Phi-4-mini (arXiv 2404.14219, 2412.08905, 2503.01743): fused projections, LongRoPE, heads rotated in
part."""

from entrenar_gpu.model.blocks import Attention, FeedForward, Layer, RmsNorm
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile

ARCHITECTURES = ("Phi3ForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    file.refuse("resid_pdrop", "embd_pdrop")
    file = file.completed(rms_norm_eps=1e-5)
    mlp = FeedForward.read(file, gate_up_path="mlp.gate_up_proj")
    layer = Layer(Attention.read(file, fused=True, share=1.0), mlp, RmsNorm.read(file))
    return ModelConfig.read(file, [layer.windowed(file.window(None))] * file.num_layers)
