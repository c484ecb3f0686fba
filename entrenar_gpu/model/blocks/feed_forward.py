"""The feed-forward block of a layer: gated or not, its two first projections fused or apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from entrenar_gpu import ops
from entrenar_gpu.graph import Tensor
from entrenar_gpu.model.blocks.modules import Linear, Trace, columns
from entrenar_gpu.model.config_file import ConfigFile, shown
from entrenar_gpu.model.weight_spec import WeightSpec

# By `hidden_act` of config.json: activation(gate) * up, and activation(up) where there is no gate.
GATED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": ops.swiglu,
    "swish": ops.swiglu,
    "gelu": ops.geglu,
    "gelu_pytorch_tanh": ops.geglu_tanh,
    "gelu_new": ops.geglu_tanh,
}
UNGATED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu2": ops.relu_squared,
    "relu": ops.relu,
    "silu": ops.swish,
    "swish": ops.swish,
    "gelu": ops.gelu,
    "gelu_pytorch_tanh": ops.gelu_tanh,
    "gelu_new": ops.gelu_tanh,
}


@dataclass(frozen=True)
class FeedForward:
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202), or down(activation(up(x))) if not `gated`.

    Paths are the modules' within the layer. With a `gate_up_path` gate and up are one projection of that name, the
    gate's rows first.
    """

    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    gate_path: str = "mlp.gate_proj"
    up_path: str = "mlp.up_proj"
    down_path: str = "mlp.down_proj"
    gate_up_path: str | None = None

    @classmethod
    def read(
        cls, file: ConfigFile, key: str = "hidden_act", gated: bool = True, gate_up_path: str | None = None
    ) -> FeedForward:
        """Sizes and biases, and the activation that `key` names."""
        activation, known = file.raw.get(key, "silu"), GATED if gated else UNGATED
        if not isinstance(activation, str) or activation not in known:
            raise file.error(f"{key} {shown(activation)} is not supported; supported: {', '.join(known)}")
        sizes = file.count("hidden_size"), file.count("intermediate_size")
        return cls(*sizes, activation, gated, file.flag("mlp_bias"), gate_up_path=gate_up_path)

    @property
    def gate(self) -> Linear:
        return Linear(self.gate_path, self.intermediate_size, self.hidden_size, self.bias)

    @property
    def up(self) -> Linear:
        return Linear(self.up_path, self.intermediate_size, self.hidden_size, self.bias)

    @property
    def down(self) -> Linear:
        return Linear(self.down_path, self.hidden_size, self.intermediate_size, self.bias)

    @property
    def before(self) -> tuple[Linear, ...]:
        """The projections before the activation."""
        if not self.gated:
            return (self.up,)
        if self.gate_up_path is None:
            return self.gate, self.up
        return (Linear(self.gate_up_path, 2 * self.intermediate_size, self.hidden_size, self.bias),)

    def weights(self, prefix: str) -> Iterator[WeightSpec]:
        for linear in (*self.before, self.down):
            yield from linear.weights(prefix)

    def trace(self, trace: Trace, x: Tensor, prefix: str, residual: Tensor | None) -> Tensor:
        projected = [linear.trace(trace, x, prefix) for linear in self.before]
        if not self.gated:
            return self.down.trace(trace, UNGATED[self.activation](*projected), prefix, residual)
        gate, up = projected if len(projected) == 2 else columns(projected[0], *[self.intermediate_size] * 2)
        return self.down.trace(trace, GATED[self.activation](gate, up), prefix, residual)
