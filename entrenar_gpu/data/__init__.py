"""From rows to packed batches."""

from entrenar_gpu.data.batches import (
    Step,
    TrainBatches,
    count_targets,
    eval_batches,
    pack_rows,
    segment_lengths,
    weight_of,
)
from entrenar_gpu.data.given import Stream, given_sources, paths_of
from entrenar_gpu.data.inspect import Inspection, inspect_samples
from entrenar_gpu.data.load import load_samples, read_samples
from entrenar_gpu.data.messages import read_messages, read_tools, read_variables
from entrenar_gpu.data.order import parse_mix
from entrenar_gpu.data.records import Reading
from entrenar_gpu.data.rows import RowSource
from entrenar_gpu.data.samples import Samples
from entrenar_gpu.data.shapes import parse_columns
from entrenar_gpu.data.sources import files_of, find_sources
from entrenar_gpu.data.stream import StreamBatches
from entrenar_gpu.data.tokenizer import Tokenizer

__all__ = [
    "Inspection",
    "Reading",
    "RowSource",
    "Samples",
    "Step",
    "Stream",
    "StreamBatches",
    "Tokenizer",
    "TrainBatches",
    "count_targets",
    "eval_batches",
    "files_of",
    "find_sources",
    "given_sources",
    "inspect_samples",
    "load_samples",
    "pack_rows",
    "parse_columns",
    "parse_mix",
    "paths_of",
    "read_messages",
    "read_samples",
    "read_tools",
    "read_variables",
    "segment_lengths",
    "weight_of",
]
