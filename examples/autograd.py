"""The graph by hand: tensors with gradients, computed on the GPU where there is one. python examples/autograd.py"""

import numpy as np

from entrenar_gpu import ops, tensor

rng = np.random.default_rng(0)
x = tensor(rng.standard_normal((8, 16), dtype=np.float32))
w = tensor(rng.standard_normal((16, 4), dtype=np.float32), requires_grad=True)

loss = ops.gelu(x @ w).mean()
loss.backward()
print("loss", loss.numpy())
print("d loss / d w", w.grad.numpy()[0])
