"""From JSON lines to packed batches."""

from entrenar_gpu.data.batches import Step, TrainBatches, eval_batches
from entrenar_gpu.data.jsonl import data_files, load_samples
from entrenar_gpu.data.samples import Samples
from entrenar_gpu.data.tokenizer import Tokenizer

__all__ = [
    "Samples",
    "Step",
    "Tokenizer",
    "TrainBatches",
    "data_files",
    "eval_batches",
    "load_samples",
]
