"""From a model folder or Hub id to a model that answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrenar_gpu.config import TrainConfig, path_text, whole_number
from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError, naming_arguments
from entrenar_gpu.gpu import KernelCache
from entrenar_gpu.infer.decoder import Decoder
from entrenar_gpu.infer.language_model import LanguageModel
from entrenar_gpu.model import load_model_config, resolve_model
from entrenar_gpu.session import default_base

DEFAULT_CONTEXT = 2048  # tokens, or the model's positions where those are fewer
DEFAULT_SLOTS = 4


@naming_arguments()
def load(
    model: str | Path,
    adapter: str | Path | None = None,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    context: int | None = None,
    slots: int = DEFAULT_SLOTS,
    speculate: bool = True,
    kernels: KernelCache | None = None,
    **options: Any,
) -> LanguageModel:
    """Open a model, which then answers until it is closed.

    model: a folder in Hugging Face layout, or a Hub id.
    adapter: the name of one of `adapters`, or a PEFT folder, then called by its path; it answers to begin with.
    adapters: PEFT folders by name, all held in memory; `model.adapter = name` switches.
    context: longest prompt and answer together, in tokens.
    slots: sequences answered at a time; each takes `context` tokens of the key/value cache.
    speculate: try drafts from the text where that is faster; the answers are the same.
    options: those of TrainConfig that concern a model that only runs: method, double_quant, device, engine,
        memory_budget, cache, cache_dir. Without a method the base is what the adapter was trained on, else as stored.

    Raises UserError for what is wrong with the files or does not fit, before memory is allocated.
    """
    if not isinstance(adapters or {}, Mapping):
        raise UserError(f"--adapters: a {type(adapters).__name__}, not a mapping of names to folders")
    named = {name: path_text(folder, "--adapters") for name, folder in (adapters or {}).items()}
    if adapter is not None:
        adapter = path_text(adapter, "--adapter")
        named.setdefault(adapter, adapter)
    first = named[adapter] if adapter is not None else next(iter(named.values()), None)
    defaults, _ = default_base(model, first, options)
    folder = resolve_model(model)
    shape = load_model_config(folder)
    context = min(DEFAULT_CONTEXT, shape.max_positions) if context is None else whole_number(context, "--context", 2)
    if context > shape.longest_row:
        raise UserError(f"--context: {context} exceeds the model's {shape.longest_row} positions")
    slots = whole_number(slots, "--slots", 1)
    config = TrainConfig.from_mapping({"model": model, **defaults, **options}, "load")
    tokenizer = Tokenizer.load(folder)
    decoder = Decoder.open(config, slots, context, adapters=named, kernels=kernels)
    opened = LanguageModel(decoder, tokenizer, decoder.vocabulary, list(named), speculate)
    opened.adapter = adapter
    return opened
