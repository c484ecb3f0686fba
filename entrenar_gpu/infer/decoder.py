"""A model that goes on from what it has read: tokens in, logits out, keys and values kept on the device."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from entrenar_gpu.adapters import AdapterSpec, load_adapter
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.gpu import KernelCache, Replay
from entrenar_gpu.graph import Caps
from entrenar_gpu.infer.graphs import (
    CHUNK,
    HEAD_ROWS,
    Pass,
    Passes,
    adapter_prefix,
    decoder_graphs,
    fit_decoder,
)
from entrenar_gpu.model import cache_names, load_model_config, resolve_model
from entrenar_gpu.session import RunShape, Session, write_adapter


@dataclass(frozen=True)
class _Row:
    """One token on its way through the model: what it is, where it stands, and whether its logits are asked for."""

    slot: int
    position: int
    token: int
    wanted: bool


class Decoder:
    """Sequences that grow, side by side: slot b holds the first `lengths[b]` tokens of one, up to `context`."""

    def __init__(
        self,
        executor: Replay | NumpyExecutor,
        shape: RunShape,
        caps: Caps,
        chunk: int,
        adapters: Mapping[str, AdapterSpec] | None = None,
        own: AdapterSpec | None = None,
    ) -> None:
        """On an executor of the graphs that `decoder_graphs` makes for this shape, chunk and adapters, its weights
        loaded; `open` makes one. `own` is the adapter in the shape's storage, where there is one."""
        self.executor, self.chunk, self.adapters = executor, chunk, tuple(adapters or ())
        self._specs: dict[str | None, AdapterSpec | None] = {None: own}
        self._specs.update(adapters or {})
        self._model = shape.model
        self.context = shape.train.seq  # tokens that a slot has room for
        self.lengths = [0] * shape.train.batch
        self.vocabulary = shape.model.vocab_size
        self._passes = Passes.of(chunk, shape.precision(caps))
        self._adapter: str | None = None

    @classmethod
    def open(
        cls,
        config: TrainConfig,
        slots: int,
        context: int,
        chunk: int = CHUNK,
        adapters: Mapping[str, str | Path] | None = None,
        kernels: KernelCache | None = None,
    ) -> Decoder:
        """The model of `config` for `slots` sequences of up to `context` tokens, prompts read `chunk` tokens at a time.

        `adapters` are folders by the names that `set_adapter` knows them by; without it, the base model alone answers.
        `kernels` as for a Session. Raises UserError for files that do not fit, and where such a context does not fit,
        naming the longest that does.
        """
        model = load_model_config(resolve_model(config.model))
        loaded = {name: load_adapter(Path(folder), model) for name, folder in (adapters or {}).items()}
        chunk = min(chunk, context)
        config = replace(config, batch=slots, seq=context)
        trace = functools.partial(decoder_graphs, chunk, {name: spec for name, (spec, _) in loaded.items()})
        session = Session.open(config, trace, with_adapter=False, kernels=kernels, fit=fit_decoder)
        for name, (spec, values) in loaded.items():
            write_adapter(session.executor, spec, values, adapter_prefix(name))
        specs = {name: spec for name, (spec, _) in loaded.items()}
        return cls(session.executor, session.shape, session.fitted.plan.caps, chunk, specs)

    def set_adapter(self, name: str | None) -> None:
        """The adapter that the next tokens are read with, None for the base model alone. Nothing is loaded.

        What slots hold stays as it was read. Raises KeyError for a name that `open` was not given.
        """
        if name is not None and name not in self.adapters:
            raise KeyError(name)
        self._adapter = name

    @property
    def slots(self) -> int:
        return len(self.lengths)

    def extend(
        self, batch: Mapping[int, Sequence[int]], all_logits: bool = False, prompt: bool | None = None
    ) -> dict[int, np.ndarray]:
        """Append tokens to slots. Returns, for each, the logits after its last token, f32 [1, V], or after every one of
        those given, [n, V].

        A slot's logits are bit for bit the same whatever other slots are extended with it, and however its tokens are
        spread over calls; but for one thing. In f16 and int8 a prompt's tokens are computed in that arithmetic, others
        are not. `prompt` says which these are; without it, more than HEAD_ROWS of a slot are taken for a prompt's.

        Raises ValueError for tokens, slots or lengths that there are none of; nothing is appended then.
        """
        rows = {slot: self._rows(slot, tokens, all_logits) for slot, tokens in batch.items()}
        found: dict[int, list[np.ndarray]] = {slot: [] for slot in batch}
        for passes, of_prompt in ((self._passes.prompt, True), (self._passes.few, False)):
            chosen = [r for own in rows.values() for r in own if of_prompt == _of_prompt(own, prompt)]
            most = passes[-1].tokens
            for start in range(0, len(chosen), most):
                part = chosen[start : start + most]
                self._run(next(made for made in passes if made.tokens >= len(part)), part, found)
        for slot, tokens in batch.items():
            self.lengths[slot] += len(tokens)
        return {slot: np.stack(logits) for slot, logits in found.items()}

    def truncate(self, slot: int, length: int) -> None:
        """Forget all but the first `length` tokens of a slot: what was proposed and rejected, or, for 0, everything."""
        if not 0 <= length <= self.lengths[slot]:
            raise ValueError(f"slot {slot} holds {self.lengths[slot]} tokens, not {length}")
        self.lengths[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` tokens of a slot all that another holds, without reading them again."""
        if not 0 <= length <= self.lengths[source]:
            raise ValueError(f"slot {source} holds {self.lengths[source]} tokens, not {length}")
        if source != target and length:
            executor = self.executor
            for name in cache_names(executor.tensors):
                executor.copy_rows(name, source * self.context, target * self.context, length)
        self.lengths[target] = length

    def close(self) -> None:
        self.executor.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _rows(self, slot: int, tokens: Sequence[int], all_logits: bool) -> list[_Row]:
        """The tokens to append to a slot, each with its place."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot} of {self.slots}")
        if not len(tokens):
            raise ValueError(f"slot {slot}: no tokens to append")
        if outside := [token for token in tokens if not 0 <= token < self.vocabulary]:
            raise ValueError(f"slot {slot}: token id {outside[0]} is outside the vocabulary of {self.vocabulary}")
        first = self.lengths[slot]
        if first + len(tokens) > self.context:
            raise ValueError(f"slot {slot}: {first} + {len(tokens)} tokens exceed the context of {self.context}")
        last = len(tokens) - 1
        return [_Row(slot, first + i, int(token), all_logits or i == last) for i, token in enumerate(tokens)]

    def _run(self, made: Pass, rows: Sequence[_Row], found: Mapping[int, list[np.ndarray]]) -> None:
        """One pass. Appends the logits asked for to those of their slots."""
        executor, spec = self.executor, self._specs[self._adapter]
        fields = {"input_ids": (0, "token"), "positions": (0, "position"), "slots": (self.slots, "slot")}
        for name, (padding, field) in fields.items():
            values = np.full(made.tokens, padding, np.uint32)
            values[: len(rows)] = [getattr(row, field) for row in rows]
            if name == "input_ids" and spec is not None:
                values = spec.looked_up(values)
            executor.write(made.input(name), values)
        report = executor.run(made.name(self._adapter))
        if not made.has_head:
            executor.prepare(made.name(self._adapter))  # likely the next one too: sequences grow token by token
        wanted = [place for place, row in enumerate(rows) if row.wanted]
        if not made.has_head:
            if report is not None and wanted:
                logits = report.result()
                for place in wanted:
                    found[rows[place].slot].append(logits[place])
            return
        head = made.head(self._adapter if spec is not None and spec.changes_head(self._model) else None)
        for start in range(0, len(wanted), HEAD_ROWS):
            places = wanted[start : start + HEAD_ROWS]
            executor.write(made.logits_at, np.resize(np.array(places, np.uint32), HEAD_ROWS))
            report = executor.run(head)
            assert report is not None
            for place, logits in zip(places, report.result(), strict=False):
                found[rows[place].slot].append(logits)


def _of_prompt(rows: Sequence[_Row], told: bool | None) -> bool:
    return len(rows) > HEAD_ROWS if told is None else told
