"""Text from a model and its adapter."""

from entrenar_gpu.infer.decoder import CHUNK, Decoder
from entrenar_gpu.infer.graphs import decoder_graphs, fit_decoder
from entrenar_gpu.infer.language_model import Completion, LanguageModel, Score
from entrenar_gpu.infer.load_model import load
from entrenar_gpu.infer.sampling import SampledToken
from entrenar_gpu.infer.scheduler import Answer, ContextExceeded, Delta, Request, Scheduler
from entrenar_gpu.infer.slots import CachedDecoder

__all__ = [
    "CHUNK",
    "Answer",
    "CachedDecoder",
    "Completion",
    "ContextExceeded",
    "Decoder",
    "Delta",
    "LanguageModel",
    "Request",
    "SampledToken",
    "Scheduler",
    "Score",
    "decoder_graphs",
    "fit_decoder",
    "load",
]
