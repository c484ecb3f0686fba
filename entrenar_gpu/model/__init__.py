"""A model's configuration, weights and traced decoder; where its folder lies and how its files are read."""

from entrenar_gpu.model.blocks import Attention
from entrenar_gpu.model.config import ModelConfig
from entrenar_gpu.model.decoder import Transformer
from entrenar_gpu.model.gguf_families import FAMILIES, GgufFamily, as_pairs, family_of, heads_of, window_of
from entrenar_gpu.model.gguf_tokenizer import LLAMA3_WORDS, QWEN2_WORDS
from entrenar_gpu.model.hf_checkpoint import INDEX_FILE, SINGLE_FILE, HFCheckpoint
from entrenar_gpu.model.hub import resolve_model
from entrenar_gpu.model.kv_cache import CachedPass, cache_names
from entrenar_gpu.model.parameters import Storage, WeightTensors, declared_weights
from entrenar_gpu.model.projection import ModuleAdapter, ProjectionCall
from entrenar_gpu.model.registry import load_model_config, model_shape, parse_model_config
from entrenar_gpu.model.rope import Rope, YarnScaling, yarn_temperature
from entrenar_gpu.model.tables import EmbeddingAdapter, Head, HeadAdapter, TableCall
from entrenar_gpu.model.weight_spec import WeightSpec

__all__ = [
    "FAMILIES",
    "INDEX_FILE",
    "LLAMA3_WORDS",
    "QWEN2_WORDS",
    "SINGLE_FILE",
    "Attention",
    "CachedPass",
    "EmbeddingAdapter",
    "GgufFamily",
    "HFCheckpoint",
    "Head",
    "HeadAdapter",
    "ModelConfig",
    "ModuleAdapter",
    "ProjectionCall",
    "Rope",
    "Storage",
    "TableCall",
    "Transformer",
    "WeightSpec",
    "WeightTensors",
    "YarnScaling",
    "as_pairs",
    "cache_names",
    "declared_weights",
    "family_of",
    "heads_of",
    "load_model_config",
    "model_shape",
    "parse_model_config",
    "resolve_model",
    "window_of",
    "yarn_temperature",
]
