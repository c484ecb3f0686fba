"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from entrenar_gpu.config import TrainConfig


def warmup_steps(config: TrainConfig, total: int) -> int:
    if config.warmup is not None:
        return config.warmup
    return math.ceil(0.03 * total) if config.schedule == "warmup-cosine" else 0


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of `step` (1 .. total).

    After w warm-up steps, in which the rate rises linearly to lr (lr * step / w), with s = step - w - 1 steps behind
    and n = total - w in all:
    constant lr; linear lr (1 - s/n); cosine and warmup-cosine lr (1 + cos(pi s/n)) / 2; step lr gamma^(s // size);
    exponential lr gamma^s. None falls below min_lr.
    """
    warmup = warmup_steps(config, total)
    if step <= warmup:
        return config.lr * step / warmup
    behind, span = step - warmup - 1, max(total - warmup, 1)
    if config.schedule == "constant":
        factor = 1.0
    elif config.schedule == "linear":
        factor = max(0.0, 1 - behind / span)
    elif config.schedule == "step":
        size = config.step_size or max(span // 3, 1)
        factor = (0.1 if config.gamma is None else config.gamma) ** (behind // size)
    elif config.schedule == "exponential":
        factor = (0.999 if config.gamma is None else config.gamma) ** behind
    else:
        factor = (1 + math.cos(math.pi * min(behind / span, 1.0))) / 2
    return max(config.min_lr, config.lr * factor)
