"""A model in training, to talk to: between the steps of its run, and when they are done."""

from __future__ import annotations

import functools
from dataclasses import replace

from entrenar_gpu.adapters import adapted
from entrenar_gpu.config import SamplingOptions, TrainConfig
from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.gpu import Replay
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.infer.decoder import Decoder
from entrenar_gpu.infer.graphs import CHUNK, adapter_prefix, decoder_graphs, fit_decoder
from entrenar_gpu.infer.language_model import LanguageModel
from entrenar_gpu.infer.prompts import encode_row, read_prompts
from entrenar_gpu.model import resolve_model
from entrenar_gpu.session import RunShape, Session, adapter_tensors

MOST_SLOTS = 4
TRAINED = "trained"  # what the adapter of a run is called


class RunSampler:
    """Answers the sample prompts of a run on its own executor: its weights as they stand, nothing loaded or copied."""

    def __init__(self, config: TrainConfig) -> None:
        """Raises UserError naming the file and line of a prompt that cannot be answered within --seq."""
        assert config.sample_prompts is not None
        self.rows = read_prompts(config.sample_prompts, "--sample-prompts")
        self._tokenizer = Tokenizer.load(resolve_model(config.model))
        chat = False if config.completions == "raw" else None
        self._prompts = [encode_row(self._tokenizer, row, chat) for row in self.rows]
        for number, prompt in enumerate(self._prompts, 1):
            if not 0 < len(prompt) < config.seq:
                where = f"--sample-prompts: {config.sample_prompts}: prompt {number}"
                raise UserError(f"{where}: {len(prompt)} tokens leave no room for an answer within --seq {config.seq}")
        self._options = SamplingOptions(max_tokens=config.sample_tokens)
        self._chunk = min(CHUNK, config.seq)

    def graphs(self, shape: RunShape, caps: Caps) -> dict[str, Graph]:
        """What is planned together with the run's own graphs, over the same weights."""
        return decoder_graphs(self._chunk, {}, self._shape(shape), caps)

    def answers(self, session: Session) -> list[str]:
        """What the model says now, greedily."""
        caps, shape = session.fitted.plan.caps, self._shape(session.shape)
        decoder = Decoder(session.executor, shape, caps, self._chunk, own=session.adapters)
        model = LanguageModel(decoder, self._tokenizer, decoder.vocabulary)
        requests = [model.request(prompt, self._options) for prompt in self._prompts]
        return [completion.text for (completion,) in model.answer(requests)]

    def _shape(self, shape: RunShape) -> RunShape:
        return replace(shape, train=replace(shape.train, batch=min(len(self.rows), MOST_SLOTS)))


def model_of(session: Session, context: int, slots: int = MOST_SLOTS) -> LanguageModel:
    """The model of a run as it stands, on tensors of its own: copied on the device, read from no file.

    Its adapter is called "trained" and answers to begin with. Raises UserError where there is no room for it beside the
    run, or its folder has no tokenizer.
    """
    tokenizer = Tokenizer.load(resolve_model(session.config.model))
    spec, chunk, caps = session.adapters, min(CHUNK, context), session.fitted.plan.caps
    adapters = {} if spec is None else {TRAINED: spec}
    storage = adapted(session.shape.storage, None)
    shape = replace(session.shape, storage=storage, train=replace(session.config, batch=slots, seq=context))
    budget = None if session.budget is None else max(session.budget.nbytes - session.allocated_bytes, 0)
    trace = functools.partial(decoder_graphs, chunk, adapters)
    fitted = fit_decoder(trace, shape, caps, shape.plan_options(caps, budget))
    ours = session.executor
    executor: Replay | NumpyExecutor
    if isinstance(ours, Replay):
        executor = Replay(ours.device, fitted.plan, ours.kernels)
    else:
        executor = NumpyExecutor(fitted.graphs)
    _copy(session, executor, adapter_prefix(TRAINED))
    for name, rope in shape.model.rope_tables.items():
        executor.write(name, rope.table(context))
    model = LanguageModel(
        Decoder(executor, shape, caps, chunk, adapters), tokenizer, shape.model.vocab_size, [*adapters]
    )
    model.adapter = TRAINED if adapters else None
    return model


def _copy(session: Session, executor: Replay | NumpyExecutor, prefix: str) -> None:
    """Weights and adapter of a run onto a decoder's executor, where the names of adapter tensors have a prefix."""
    ropes, spec = session.shape.model.rope_tables, session.adapters
    names = [n for n, t in session.executor.tensors.items() if t.role in ("weight", "param") and n not in ropes]
    own: set[str] = set()
    if spec is not None:
        own = {t.name for name in spec.shapes() for t in adapter_tensors(session.executor, name)} | {*spec.constants()}
    pairs = [(name, prefix + name if name in own else name) for name in names]
    pairs = [(source, target) for source, target in pairs if target in executor.tensors]
    if isinstance(executor, Replay) and isinstance(session.executor, Replay):
        executor.copy_from(session.executor, [(source, target, 0) for source, target in pairs])
        return
    for source, target in pairs:
        executor.write(target, session.executor.read(source))
