"""Traces made up for tests: plain steps of known times, written as the run folder's trace file has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from observability import schema

MS = 1_000_000
START_NS = 1_700_000_000 * 10**9
LAYERS = 3


@dataclass
class Step:
    """One step: milliseconds by phase, or by "layer N" of one pass ("forward 1"); attributes by name."""

    number: int
    phases: dict[str, float]
    layers: dict[str, float]
    attributes: dict[str, Any] = field(default_factory=dict)
    kernels: int = 0
    checkpoint_beside: float = 0.0


def plain_steps(count: int, seed: int = 0, step_ms: float = 100.0, noise: float = 0.02) -> list[Step]:
    """A healthy run: data 5%, forward 30%, backward 60%, optimizer 5%, each with relative `noise`."""
    rng = np.random.default_rng(seed)
    steps = []
    for number in range(1, count + 1):
        layers = {
            f"{phase} {layer}": step_ms * share / LAYERS * float(rng.normal(1, noise))
            for phase, share in (("forward", 0.3), ("backward", 0.6))
            for layer in range(LAYERS)
        }
        phases = {"data": step_ms * 0.05 * float(rng.normal(1, noise))}
        for phase in ("forward", "backward"):
            phases[phase] = sum(ms for name, ms in layers.items() if name.startswith(phase))
        phases["optimizer"] = step_ms * 0.05 * float(rng.normal(1, noise))
        attributes = {
            schema.LOSS: 2.0 * float(np.exp(-number / 300)) + 1 + 0.05 * float(rng.normal()),
            schema.GRAD_NORM: float(rng.lognormal(0, 0.1)),
            schema.LEARNING_RATE: 2e-4,
            schema.TOKENS: 1900,
            schema.ROW_TOKENS: 2048,
            schema.ALLOCATED_BYTES: 3 << 30,
        }
        steps.append(Step(number, phases, layers, attributes))
    return steps


def wandering(rng: np.random.Generator, steps: int, memory: float, spread: float) -> np.ndarray:
    """A level [steps] that wanders by itself, from 0 on: each keeps so much of the one before."""
    level = np.zeros(steps)
    for step in range(1, steps):
        level[step] = memory * level[step - 1] + spread * rng.standard_normal()
    return level


def slow_layer(step: Step, name: str, extra_ms: float) -> None:
    step.layers[name] += extra_ms
    step.phases[name.split()[0]] += extra_ms


def write(path: Path, steps: list[Step], run: str = "run-1", tail: str = "") -> Path:
    """Writes the steps as one trace, one line a step, and `tail` after the last line."""
    with path.open("w", encoding="utf-8") as stream:
        for line in lines(steps, run):
            stream.write(json.dumps(line) + "\n")
        stream.write(tail)
    return path


def lines(
    steps: list[Step],
    run: str,
    resumes: str = "",
    start: int = START_NS,
    of_run: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[dict[str, Any]]:
    """One request a step, of a run that begins at `start` and may go on from the run `resumes`; `of_run`: its facts."""
    now = start
    ids = iter(range(2, 10**9))
    resource = {schema.RUN_ID: run, schema.RUN_FIRST_STEP: steps[0].number, **of_run} if steps else {}
    if resumes:
        resource[schema.RUN_RESUMES] = resumes
    for step in steps:
        spans, now = _spans(step, now, ids, run)
        yield request(spans, resource)


def request(spans: list[dict[str, Any]], of_run: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    resource = {
        schema.SERVICE_NAME: "entrenar-gpu",
        schema.RUN_MODEL: "tiny-qwen3",
        schema.RUN_METHOD: "qlora",
        schema.GPU_ADAPTER: "llvmpipe",
        schema.RUN_PLANNED_BYTES: 4 << 30,
        **of_run,
    }
    return {"resourceSpans": [{"resource": {"attributes": pairs(resource)}, "scopeSpans": [{"spans": spans}]}]}


def pairs(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value if np.isfinite(value) else {"nan": "NaN", "inf": "Infinity"}[str(value)]}
    return {"stringValue": value}


def span(
    name: str, start: float, end: float, identity: int, parent: int, run: str, **attributes: Any
) -> dict[str, Any]:
    """One OTLP span; times in nanoseconds, `attributes` by the constants' names in the schema.

    As in a real trace, spans below a step have the run's id from their resource alone.
    """
    named = {getattr(schema, key): value for key, value in attributes.items()}
    if name in (schema.TRAIN, schema.STEP):
        named[schema.RUN_ID] = run
    result = {
        "traceId": f"{sum(map(ord, run)):032x}",
        "spanId": f"{identity:016x}",
        "name": name,
        "kind": 1,
        "startTimeUnixNano": str(round(start)),
        "endTimeUnixNano": str(round(end)),
        "attributes": pairs(named),
    }
    return result | ({"parentSpanId": f"{parent:016x}"} if parent else {})


def _spans(step: Step, start: int, ids: Iterator[int], run: str) -> tuple[list[dict[str, Any]], int]:
    whole = next(ids)
    now: float = start
    spans = []
    for phase, ms in step.phases.items():
        begin, identity = now, next(ids)
        common = {"STEP_NUMBER": step.number}
        spans.append(
            span(phase, begin, begin + ms * MS, identity, whole, run, SPAN_LEVEL="phase", CLOCK="host", **common)
        )
        for name, layer_ms in step.layers.items():
            if name.startswith(phase + " "):
                layer = next(ids)
                end = now + layer_ms * MS
                label = schema.LAYER_PREFIX + name.split()[1]
                spans.append(span(label, now, end, layer, identity, run, SPAN_LEVEL="layer", CLOCK="gpu", **common))
                for k in range(step.kernels):
                    each = layer_ms * MS / step.kernels
                    kernel = {"SPAN_LEVEL": "kernel", "KERNEL_SHAPE": "512x64x64", "CLOCK": "gpu", **common}
                    spans.append(
                        span(f"matmul {k}", now + k * each, now + (k + 1) * each, next(ids), layer, run, **kernel)
                    )
                now = end
        now = begin + ms * MS
    head = span(schema.STEP, start, now, whole, 1, run, SPAN_LEVEL="step", STEP_NUMBER=step.number)
    head["attributes"] += pairs(step.attributes)
    if step.checkpoint_beside:
        end = now + step.checkpoint_beside * MS
        extra = {"SPAN_LEVEL": "phase", "STEP_NUMBER": step.number, "CHECKPOINT_BYTES": 1 << 20}
        spans.append(span(schema.CHECKPOINT, now, end, next(ids), 1, run, **extra))
        now = end
    return [head, *spans], round(now)
