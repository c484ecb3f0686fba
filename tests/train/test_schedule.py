"""The learning rate of every step, by formula."""

from __future__ import annotations

import math

import pytest

from entrenar_gpu.config.train_config import TrainConfig
from entrenar_gpu.train.schedule import learning_rate, warmup_steps


def rates(total: int, **options) -> list[float]:
    config = TrainConfig(**({"lr": 1.0} | options))
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


def test_constant():
    assert rates(3, schedule="constant") == [1, 1, 1]


def test_warm_up_rises_linearly_to_the_peak():
    assert rates(6, schedule="constant", warmup=4) == [0.25, 0.5, 0.75, 1, 1, 1]
    # the decay begins at the peak, and counts the steps that are left
    assert rates(6, schedule="linear", warmup=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_linear():
    assert rates(4, schedule="linear") == [1, 0.75, 0.5, 0.25]


def test_cosine():
    assert rates(4, schedule="cosine") == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_warmup_cosine_warms_up_for_three_percent():
    assert warmup_steps(TrainConfig(), 1000) == 30
    assert warmup_steps(TrainConfig(), 10) == 1
    assert warmup_steps(TrainConfig(warmup=0), 1000) == 0
    assert warmup_steps(TrainConfig(schedule="cosine"), 1000) == 0
    assert rates(5, schedule="warmup-cosine") == pytest.approx([1, *rates(4, schedule="cosine")])


def test_step():
    assert rates(6, schedule="step", step_size=2, gamma=0.5) == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rates(6, schedule="step") == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])  # thirds, a tenth each


def test_exponential():
    assert rates(3, schedule="exponential", gamma=0.5) == [1, 0.5, 0.25]
    assert rates(3, schedule="exponential") == pytest.approx([1, 0.999, 0.999**2])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step", "exponential"])
def test_no_schedule_falls_below_its_floor(schedule):
    values = rates(8, schedule=schedule, gamma=0.1, min_lr=0.3)
    assert min(values) == 0.3
    assert values[0] == 1
