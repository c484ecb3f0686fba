"""Flat pages: where trainable tensors, their gradients and moments lie, at the same offsets of pages of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from entrenar_gpu.graph import OFFSET_ALIGNMENT, Graph, Tensor
from entrenar_gpu.integers import round_up

# A trainable tensor is a slice of a page, and is bound by its offset there.
ALIGNMENT = OFFSET_ALIGNMENT
PAGE_BYTES = 128 << 20
PAGED_ROLES = ("param", "grad")


@dataclass(frozen=True)
class Slice:
    """Where a tensor lives: a whole buffer, or `nbytes` at `offset` of a page shared with others."""

    buffer: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ParameterPage:
    """What one launch of an update reads and overwrites: flat tensors of one length, by the same offsets.

    `decays` is False for vectors (norms, biases): weight decay leaves them out where they are trained. `group` is that
    of its tensors.
    """

    param: Tensor
    grad: Tensor
    moments: tuple[Tensor, ...]
    decays: bool
    group: str = ""


def parameter_pages(graph: Graph, parameters: Sequence[Tensor], moments: int) -> list[ParameterPage]:
    """The pages that `parameters` are slices of, declared in `graph`, with so many moments of each."""
    sizes: dict[_Page, int] = {}
    for tensor, (page, offset) in _places(parameters, PAGE_BYTES).items():
        sizes[page] = max(sizes.get(page, 0), offset + tensor.nbytes)
    pages = []
    for page, nbytes in sizes.items():
        shape = (nbytes // 4,)
        param, grad = (graph.tensor(page.name(role), shape, role="page") for role in PAGED_ROLES)
        names = [page.name(f"moment{number}") for number in range(1, moments + 1)]
        held = tuple(graph.tensor(name, shape, role="moment") for name in names)
        pages.append(ParameterPage(param, grad, held, decays=page.matrices, group=page.group))
    return pages


def page_layout(tensors: Sequence[Tensor], role: str, page_bytes: int = PAGE_BYTES) -> list[Slice]:
    """Slices of pages of at most `page_bytes`, in the order given; tensors of one name share a slice.

    A parameter, its gradient and its moments get the same offsets in pages of their own, so that one launch over a
    page updates many tensors. Vectors (norms, biases) have pages apart: weight decay leaves them out; so
    has each `Tensor.group`.
    """
    places = {t.name: (page, offset) for t, (page, offset) in _places(tensors, page_bytes).items()}
    return [Slice(places[t.name][0].name(role), places[t.name][1], t.nbytes) for t in tensors]


@dataclass(frozen=True)
class _Page:
    matrices: bool
    number: int
    group: str = ""

    def name(self, role: str) -> str:
        return f"{role}.{'matrix' if self.matrices else 'vector'}{self.group}.{self.number}"


def _places(tensors: Sequence[Tensor], page_bytes: int) -> dict[Tensor, tuple[_Page, int]]:
    """The page and the offset of each tensor, of several with one name the first."""
    placed: dict[Tensor, tuple[_Page, int]] = {}
    seen: set[str] = set()
    ends: dict[tuple[bool, str], tuple[int, int]] = {}  # of the last page of a kind: its number, and where it ends
    for tensor in tensors:
        if tensor.name in seen:
            continue
        seen.add(tensor.name)
        kind = (len(tensor.shape) > 1, tensor.group)
        number, offset = ends.get(kind, (0, 0))
        if offset and offset + tensor.nbytes > page_bytes:
            number, offset = number + 1, 0
        placed[tensor] = (_Page(kind[0], number, kind[1]), offset)
        ends[kind] = (number, offset + round_up(tensor.nbytes, ALIGNMENT))
    return placed


def page_sizes(slices: Sequence[Slice]) -> dict[str, int]:
    """Bytes of each page that slices lie in."""
    sizes: dict[str, int] = {}
    for s in slices:
        sizes[s.buffer] = max(sizes.get(s.buffer, 0), s.offset + s.nbytes)
    return sizes
