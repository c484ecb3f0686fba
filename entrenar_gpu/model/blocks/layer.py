"""A layer: attention and feed-forward block, each with its norms, added to what flows past them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from entrenar_gpu import ops
from entrenar_gpu.graph import Tensor
from entrenar_gpu.model.blocks.attention import Attention
from entrenar_gpu.model.blocks.feed_forward import FeedForward
from entrenar_gpu.model.blocks.modules import RmsNorm, Trace
from entrenar_gpu.model.weight_spec import WeightSpec


@dataclass(frozen=True)
class NormNames:
    """Where a layer has norms, by what they are called: before and after each block. None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


PRE_NORMS = NormNames()


@dataclass(frozen=True)
class Layer:
    """x + m after(attention(before(x))), then the same with the feed-forward block; m is the `residual_multiplier`.

    `norm` is what all norms of the layer have in common, `norms` says where they are.
    """

    attention: Attention
    mlp: FeedForward
    norm: RmsNorm
    norms: NormNames = PRE_NORMS
    residual_multiplier: float = 1.0

    def windowed(self, window: int | None) -> Layer:
        """The same layer with attention to the last `window` positions alone."""
        return replace(self, attention=replace(self.attention, window=window))

    def weights(self, prefix: str) -> Iterator[WeightSpec]:
        names = self.norms
        yield from self._norm_weight(prefix, names.before_attention)
        yield from self.attention.weights(prefix)
        yield from self._norm_weight(prefix, names.after_attention)
        yield from self._norm_weight(prefix, names.before_mlp)
        yield from self.mlp.weights(prefix)
        yield from self._norm_weight(prefix, names.after_mlp)

    def _norm_weight(self, prefix: str, name: str | None) -> Iterator[WeightSpec]:
        if name is not None:
            yield self.norm.weight(f"{prefix}.{name}.weight")

    def trace(self, trace: Trace, x: Tensor, prefix: str) -> Tensor:
        names = self.norms
        with trace.graph.within("self_attn"):
            h = self._normed(trace, x, prefix, names.before_attention)
            x = self._added(trace, x, h, prefix, self.attention, names.after_attention)
        with trace.graph.within("mlp"):
            h = self._normed(trace, x, prefix, names.before_mlp)
            return self._added(trace, x, h, prefix, self.mlp, names.after_mlp)

    def _normed(self, trace: Trace, x: Tensor, prefix: str, name: str | None) -> Tensor:
        return x if name is None else self.norm.trace(trace, x, f"{prefix}.{name}.weight")

    def _added(
        self, trace: Trace, x: Tensor, h: Tensor, prefix: str, block: Attention | FeedForward, after: str | None
    ) -> Tensor:
        """x and what a block makes of h; the sum is part of the block's last product where nothing comes between."""
        if after is None and self.residual_multiplier == 1:
            return block.trace(trace, h, prefix, residual=x)
        h = self._normed(trace, block.trace(trace, h, prefix, residual=None), prefix, after)
        return ops.add(x, h if self.residual_multiplier == 1 else ops.scale(h, self.residual_multiplier))
