"""Which steps of a long run go to a backend: one trace there has a bounded number of spans.

The run's file has every step. Backends keep a trace in one piece, and their pages open one of some ten thousand spans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext

from observability import schema
from observability.write.tracing import copied, finite

MOST_SPANS: Final = 50_000  # of a run, about, where nobody says how many steps apart
KERNEL_STEPS: Final = 1000  # steps of a run that have kernels, about, where nobody says


class StepSample:
    """Picks every Nth step, and those that somebody will ask for: with an anomaly, a checkpoint or an evaluation.

    `every` None: so that some MOST_SPANS spans of `total_steps` steps are sent, judged by the first of them.
    """

    def __init__(self, every: int | None, total_steps: int, train: SpanContext) -> None:
        self.left_out = 0  # spans
        self._every = every
        self._total = total_steps
        self._train = train
        self._first: int | None = None
        self._odd: set[int] = set()
        self._unsent: set[int] = set()  # span ids of steps that were not sent, the newest few

    def expect(self, first_step: int, last_step: int) -> None:
        """An anomaly was told of these steps: those still to come are sent."""
        if last_step - first_step < 100:
            self._odd.update(range(first_step, last_step + 1))

    def of_step(self, step: int, spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
        """The spans of a step as they are sent, the step's first; none where it is left out."""
        if self._first is None:
            self._first = step
            self._every = self._every or max(1, math.ceil(self._total * len(spans) / MOST_SPANS))
        every = self._every or 1
        wanted = (step - self._first) % every == 0 or step in self._odd
        self._odd.discard(step)
        if not wanted and not any(span.name in (schema.CHECKPOINT, schema.EVAL, schema.SAMPLE) for span in spans):
            self.left_out += len(spans)
            self._remember(spans[0])
            return []
        sent = self.others(spans)
        if every > 1:
            sent[0] = copied(sent[0], {**finite(sent[0].attributes or {}), schema.STEP_SAMPLE: every})
        return sent

    def others(self, spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
        """Spans beside a step as they are sent; below the run where their step was left out."""
        return [
            copied(span, finite(span.attributes or {}), self._train)
            if span.parent is not None and span.parent.span_id in self._unsent
            else exported(span)
            for span in spans
        ]

    def _remember(self, step: ReadableSpan) -> None:
        if len(self._unsent) > 1000:
            self._unsent.clear()
        self._unsent.add(step.context.span_id)


def exported(span: ReadableSpan) -> ReadableSpan:
    """`span` as backends get it: without NaN and infinities, see `finite`."""
    attributes = span.attributes or {}
    if all(math.isfinite(value) for value in attributes.values() if isinstance(value, float)):
        return span
    return copied(span, finite(attributes))


def kernels_every(every: int | None, total_steps: int) -> int:
    """Steps from one whose kernels are kept to the next."""
    return every or max(1, math.ceil(total_steps / KERNEL_STEPS))
