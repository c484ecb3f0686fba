"""LoRA (arXiv 2106.09685): y = W x + scale * B (A x), with A [R, in] and B [out, R].

scale = alpha/R, or alpha/sqrt(R) with rank-stabilised LoRA (arXiv 2312.03732).
"""

from entrenar_gpu.adapters.lora.init import fresh_values
from entrenar_gpu.adapters.lora.module import LoraModule
from entrenar_gpu.adapters.lora.peft_config import LoraConfig, peft_config, read_peft_config
from entrenar_gpu.adapters.lora.tables import LoraEmbedding, LoraHead

__all__ = ["LoraConfig", "LoraEmbedding", "LoraHead", "LoraModule", "fresh_values", "peft_config", "read_peft_config"]
