"""The optimizers against torch.optim, and clipping against torch.nn.utils.clip_grad_norm_, over 20 steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from entrenar_gpu.compiler.plan import make_plan
from entrenar_gpu.gpu.replay import Replay
from tests.ops.test_optimizer import BETAS, EPS, KINDS, LR, SIZES, Optimizer

pytestmark = [pytest.mark.parity, pytest.mark.gpu]


def torch_optimizer(optimizer: Optimizer, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    if optimizer.kind == "sgd":
        return torch.optim.SGD(parameters, LR, momentum=optimizer.momentum, weight_decay=optimizer.decay)
    kind = torch.optim.AdamW if optimizer.kind == "adamw" else torch.optim.Adam
    return kind(parameters, LR, BETAS, EPS, optimizer.decay)


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_equal_torch(kind, device, kernels, rng):
    """In float32 on both sides, so each may be a few roundings a step away from the other."""
    optimizer = KINDS[kind]
    executor = Replay(device, make_plan({"update": optimizer.graph()}, device.caps), kernels)
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SIZES.items()}
    parameters = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in start.items()}
    peer = torch_optimizer(optimizer, list(parameters.values()))
    for name, p in start.items():
        executor.write(f"{name}.p", p)
    executor.write("lr", np.array([LR]))
    for step in range(20):
        for name, parameter in parameters.items():
            gradient = (rng.standard_normal(SIZES[name]) * 10.0 ** (step % 3 - 2)).astype(np.float32)
            executor.write(f"{name}.g", gradient)
            parameter.grad = torch.from_numpy(gradient)
        if optimizer.clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), optimizer.clip)
        executor.run("update")
        peer.step()
    for name, parameter in parameters.items():
        want = parameter.detach().numpy().astype(np.float64).reshape(-1)
        moved = np.linalg.norm(want - start[name].reshape(-1))
        error = np.linalg.norm(executor.read(f"{name}.p") - want)
        assert error <= 1e-6 * np.linalg.norm(want), name
        assert error <= 1e-5 * moved, name
    executor.close()
