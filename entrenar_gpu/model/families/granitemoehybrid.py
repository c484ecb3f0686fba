"""Granite 4, the dense models: Granite 3 with gate and up fused; with a layer of Mamba or experts it is refused."""

from dataclasses import replace

from entrenar_gpu.model.blocks import FeedForward
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.config_file import ConfigFile, shown
from entrenar_gpu.model.families.granite import granite_layer, granite_model

ARCHITECTURES = ("GraniteMoeHybridForCausalLM",)


def read(file: ConfigFile) -> ModelConfig:
    mlp = replace(
        FeedForward.read(file, gate_up_path="shared_mlp.input_linear"),
        intermediate_size=file.count("shared_intermediate_size", 1024),
        down_path="shared_mlp.output_linear",
        bias=False,
    )
    layer = granite_layer(file, mlp)
    placed = file.raw.get("position_embedding_type")
    if placed not in ("rope", "nope", None):
        raise file.error(f"position_embedding_type {shown(placed)} is not supported (rope and nope are)")
    if placed != "rope":
        layer = replace(layer, attention=replace(layer.attention, rope=None))
    return granite_model(file, [layer] * file.num_layers)
