"""A model that goes on from what it has read: tokens in, logits out, keys and values kept on the device."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

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
    """One token on its way through the model: what it is, where it stands, and whether what follows it is asked for."""

    slot: int
    position: int
    token: int
    wanted: bool

    def followed_by(self, token: int) -> _Row:
        return replace(self, position=self.position + 1, token=token)


class _Report(Protocol):
    """What a run leaves, on its way to the host."""

    def result(self) -> np.ndarray: ...


@dataclass(frozen=True)
class _Next:
    """A pass that is likely the next: of these rows, with this adapter. `report` is its own where it runs already."""

    made: Pass
    adapter: str | None
    rows: Sequence[_Row]
    report: _Report | None = None


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
        self._next: _Next | None = None
        # A pass tells tokens by their ids; an adapter with tokens of its own looks up others.
        ids = np.arange(self.vocabulary, dtype=np.uint32)
        self._goes_ahead = {
            name: isinstance(executor, Replay) and (spec is None or bool((spec.looked_up(ids) == ids).all()))
            for name, spec in self._specs.items()
        }
        self._slots_of: dict[str, Sequence[int]] = {}  # as last written, by the name of the input
        if self._passes.prompt is not self._passes.few:
            executor.prepare(self._passes.prompt[-1].name(None))

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
        return {slot: np.stack(rows) for slot, rows in self._extend(batch, all_logits, prompt, logits=True).items()}

    def likeliest(
        self, batch: Mapping[int, Sequence[int]], every: bool = False, prompt: bool | None = None
    ) -> dict[int, list[int]]:
        """The same, but only where the logits are largest: the token that greedy decoding goes on with, the first of
        equal ones, or NOT_FINITE. Little is brought to the host.

        Where each slot is extended by the token that was told of it, the next such call is computed ahead.
        """
        found = self._extend(batch, every, prompt, logits=False)
        return {slot: [int(token) for token in tokens] for slot, tokens in found.items()}

    def _extend(
        self, batch: Mapping[int, Sequence[int]], every: bool, prompt: bool | None, logits: bool
    ) -> dict[int, list[Any]]:
        """What follows the last token of each slot, or `every` one: its logits [V], or where they are largest."""
        rows = {slot: self._rows(slot, tokens, every) for slot, tokens in batch.items()}
        found: dict[int, list[Any]] = {slot: [] for slot in batch}
        for passes, of_prompt in ((self._passes.prompt, True), (self._passes.few, False)):
            chosen = [r for own in rows.values() for r in own if of_prompt == _of_prompt(own, prompt)]
            most = passes[-1].tokens
            for start in range(0, len(chosen), most):
                part = chosen[start : start + most]
                made = next(made for made in passes if made.tokens >= len(part))
                run = self._run_long if made.has_head else self._run_few
                for row, value in run(made, part, logits):
                    found[row.slot].append(value)
        for slot, tokens in batch.items():
            self.lengths[slot] += len(tokens)
        return found

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
        self._expect_nothing_of(target)

    def close(self) -> None:
        self.executor.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _rows(self, slot: int, tokens: Sequence[int], every: bool) -> list[_Row]:
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
        return [_Row(slot, first + i, int(token), every or i == last) for i, token in enumerate(tokens)]

    def _run_few(self, made: Pass, rows: Sequence[_Row], logits: bool) -> list[tuple[_Row, Any]]:
        """A pass over a few tokens, and what follows those that are asked for."""
        expected = self._next
        follows = expected is not None and (expected.made, expected.adapter) == (made, self._adapter)
        follows = follows and expected is not None and expected.rows == rows
        if expected is not None and follows and expected.report is not None:
            report = expected.report
        else:
            self._write(made, rows)
            report = self._submit(made.name(self._adapter))
        ahead = self._go_on(made, rows) if follows and not logits else None
        self.executor.prepare(made.name(self._adapter))  # likely the next one too: sequences grow token by token
        if logits:
            values = self._submit(made.logits).result()
            self._next = None
        else:
            values = report.result()
            tokens = [row.followed_by(int(token)) for row, token in zip(rows, values, strict=False)]
            self._next = _Next(made, self._adapter, tokens, ahead)
        return [(row, value) for row, value in zip(rows, values, strict=False) if row.wanted]

    def _go_on(self, made: Pass, rows: Sequence[_Row]) -> _Report | None:
        """Run the pass that goes on from what one over these rows, on its way, finds likeliest: a pass leaves that
        where it reads its tokens. What of the cache turns out not to be wanted, later passes write over.
        """
        if not self._goes_ahead[self._adapter] or len({row.slot for row in rows}) < len(rows):
            return None
        if max(row.position for row in rows) + 1 >= self.context:
            return None
        self._write(made, [row.followed_by(0) for row in rows], tokens=False)
        return self._submit(made.name(self._adapter))

    def _run_long(self, made: Pass, rows: Sequence[_Row], logits: bool) -> list[tuple[_Row, Any]]:
        """A pass over a prompt's piece, then its head, for as many tokens at a time as that takes."""
        self._expect_nothing_of(*(row.slot for row in rows))
        self._write(made, rows)
        self.executor.run(made.name(self._adapter))
        wanted = [place for place, row in enumerate(rows) if row.wanted]
        found: list[tuple[_Row, Any]] = []
        spec = self._specs[self._adapter]
        head = made.head(self._adapter if spec is not None and spec.changes_head(self._model) else None)
        for start in range(0, len(wanted), HEAD_ROWS):
            places = wanted[start : start + HEAD_ROWS]
            self.executor.write(made.logits_at, np.resize(np.array(places, np.uint32), HEAD_ROWS))
            report = self._submit(head)
            if start == 0:
                self.executor.prepare(made.name(self._adapter))
            values = (self._submit(made.logits) if logits else report).result()
            found += [(rows[place], value) for place, value in zip(places, values, strict=False)]
        return found

    def _expect_nothing_of(self, *slots: int) -> None:
        """These hold something else now than what the next pass was expected to go on from, if maybe as much of it."""
        if self._next is not None and any(row.slot in slots for row in self._next.rows):
            self._next = None

    def _write(self, made: Pass, rows: Sequence[_Row], tokens: bool = True) -> None:
        """The inputs of a pass. Rows that are left over belong to no slot."""
        padding = made.tokens - len(rows)
        slots = [row.slot for row in rows] + [self.slots] * padding
        positions = [row.position for row in rows] + [0] * padding
        name = made.input("slots")
        if self._slots_of.get(name) != slots:
            self.executor.write(name, np.array(slots, np.uint32))
            self._slots_of[name] = slots
        self.executor.write(made.input("positions"), np.array(positions, np.uint32))
        if tokens:
            ids, spec = np.array([row.token for row in rows] + [0] * padding, np.uint32), self._specs[self._adapter]
            self.executor.write(made.input("input_ids"), ids if spec is None else spec.looked_up(ids))

    def _submit(self, graph: str) -> _Report:
        report = self.executor.run(graph)
        assert report is not None
        return report


def _of_prompt(rows: Sequence[_Row], told: bool | None) -> bool:
    return len(rows) > HEAD_ROWS if told is None else told
