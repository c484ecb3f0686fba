"""Every operation, by family. Importing this package fills the table in registry.py."""

import entrenar_gpu.ops.attention_grad
import entrenar_gpu.ops.cache_heads
import entrenar_gpu.ops.operators  # noqa: F401  what Tensor's operators do
from entrenar_gpu.ops.activations import geglu, geglu_tanh, gelu, gelu_tanh, relu, relu_squared, swiglu, swish
from entrenar_gpu.ops.argmax import NOT_FINITE, argmax
from entrenar_gpu.ops.attention import LONGEST_HEAD, attention
from entrenar_gpu.ops.cached_attention import cache_write, cached_attention
from entrenar_gpu.ops.dropout import dropout, uniform_noise
from entrenar_gpu.ops.elementwise import add, div, fill, mul, ones, scale, softcapped, sub, zeros
from entrenar_gpu.ops.embedding import embedding
from entrenar_gpu.ops.gemm.gemv import gemv
from entrenar_gpu.ops.gemm.linear import linear
from entrenar_gpu.ops.gemm.matmul import matmul
from entrenar_gpu.ops.loss import IGNORE, cross_entropy, project
from entrenar_gpu.ops.norm import layer_norm, rms_norm
from entrenar_gpu.ops.norm_rope import norm_rope
from entrenar_gpu.ops.optimizer import adam, decide, sgd, sum_of_squares
from entrenar_gpu.ops.quantize import Nf4Tensors, nf4_quantize, nf4_quantize_scales
from entrenar_gpu.ops.reduce import mean, softmax, sum, sum_columns, sum_rows
from entrenar_gpu.ops.registry import in_place, keep
from entrenar_gpu.ops.rope import rope, rope_table
from entrenar_gpu.ops.views import broadcast, part, reshape, sum_to, transpose

__all__ = [
    "IGNORE",
    "LONGEST_HEAD",
    "NOT_FINITE",
    "Nf4Tensors",
    "adam",
    "add",
    "argmax",
    "attention",
    "broadcast",
    "cache_write",
    "cached_attention",
    "cross_entropy",
    "decide",
    "div",
    "dropout",
    "embedding",
    "fill",
    "geglu",
    "geglu_tanh",
    "gelu",
    "gelu_tanh",
    "gemv",
    "in_place",
    "keep",
    "layer_norm",
    "linear",
    "matmul",
    "mean",
    "mul",
    "nf4_quantize",
    "nf4_quantize_scales",
    "norm_rope",
    "ones",
    "part",
    "project",
    "relu",
    "relu_squared",
    "reshape",
    "rms_norm",
    "rope",
    "rope_table",
    "scale",
    "sgd",
    "softcapped",
    "softmax",
    "sub",
    "sum",
    "sum_columns",
    "sum_of_squares",
    "sum_rows",
    "sum_to",
    "swiglu",
    "swish",
    "transpose",
    "uniform_noise",
    "zeros",
]
