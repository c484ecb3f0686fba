"""The graph by hand: tensors with gradients, computed on the GPU where there is one. python examples/autograd.py"""

import numpy as np

from entrenar_gpu import ops, tensor

rng = np.random.default_rng(0)
x = tensor(rng.standard_normal((8, 16)))
targets = tensor(rng.standard_normal((8, 4)))
w = tensor(np.zeros((16, 4)), requires_grad=True)

for step in range(20):
    difference = ops.gelu(x @ w + 1.0) - targets
    loss = (difference * difference).mean()
    loss.backward()
    w = tensor((w - 0.5 * w.grad).numpy(), requires_grad=True)
    if step % 5 == 4:
        print(f"step {step + 1}: loss {float(loss):.4f}")
