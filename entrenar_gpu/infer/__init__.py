"""Text from a model and its adapter."""

from entrenar_gpu.infer.choices import evaluate_choices, read_questions
from entrenar_gpu.infer.decoder import Decoder
from entrenar_gpu.infer.graphs import CHUNK, decoder_graphs, fit_decoder, plan_decoder
from entrenar_gpu.infer.language_model import Completion, LanguageModel, Score
from entrenar_gpu.infer.load_model import load
from entrenar_gpu.infer.prompts import encode_row, read_prompts
from entrenar_gpu.infer.sampling import SampledToken
from entrenar_gpu.infer.scheduler import Answer, ContextExceeded, Delta, Request, Scheduler
from entrenar_gpu.infer.slots import CachedDecoder
from entrenar_gpu.infer.trained import RunSampler, model_of

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
    "RunSampler",
    "SampledToken",
    "Scheduler",
    "Score",
    "decoder_graphs",
    "encode_row",
    "evaluate_choices",
    "fit_decoder",
    "load",
    "model_of",
    "plan_decoder",
    "read_prompts",
    "read_questions",
]
