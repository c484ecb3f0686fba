"""Flat pages: where trainable tensors, their gradients and moments lie, at the same offsets of pages of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entrenar_gpu.graph import OFFSET_ALIGNMENT, Tensor

# A trainable tensor is a slice of a page, and is bound by its offset there.
ALIGNMENT = OFFSET_ALIGNMENT
PAGED_ROLES = ("param", "grad")


@dataclass(frozen=True)
class Slice:
    """Where a tensor lives: a whole buffer, or `nbytes` at `offset` of a page shared with others."""

    buffer: str
    offset: int
    nbytes: int


def page_layout(tensors: Sequence[Tensor], role: str, page_bytes: int = 128 << 20) -> list[Slice]:
    """Slices of pages of at most `page_bytes`, in the order given; tensors of one name share a slice.

    A parameter, its gradient and its moments get the same offsets in pages of their own, so that one launch over a
    page updates many tensors. Vectors (norms, biases) have pages apart: weight decay leaves them out.
    """
    seen: dict[str, Slice] = {}
    cursors = {"matrix": (0, 0), "vector": (0, 0)}
    for tensor in tensors:
        if tensor.name in seen:
            continue
        kind = "matrix" if len(tensor.shape) > 1 else "vector"
        page, offset = cursors[kind]
        if offset and offset + tensor.nbytes > page_bytes:
            page, offset = page + 1, 0
        seen[tensor.name] = Slice(f"{role}.{kind}.{page}", offset, tensor.nbytes)
        cursors[kind] = (page, offset + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    return [seen[t.name] for t in tensors]


def page_sizes(slices: Sequence[Slice]) -> dict[str, int]:
    """Bytes of each page that slices lie in."""
    sizes: dict[str, int] = {}
    for s in slices:
        sizes[s.buffer] = max(sizes.get(s.buffer, 0), s.offset + s.nbytes)
    return sizes
