"""When each temporary of a program is alive, and which of them take over the storage of another."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from entrenar_gpu.graph import Node, Tensor
from entrenar_gpu.ops.registry import OPS


@dataclass
class Life:
    """A temporary's life, in nodes counted over all graphs; both ends included."""

    tensor: Tensor
    first: int
    last: int


class Lifetimes:
    """Of the temporaries of graphs that run one after the other, in the order in which they are added.

    Tensors that update a persistent one are left out: they lie where it does.
    """

    def __init__(self, keep: bool = False) -> None:
        """`keep` makes every output live to the end, in storage of its own."""
        self._keep = keep
        self._nodes = 0
        self._lives: dict[int, Life] = {}
        self._owners: dict[int, int] = {}  # of a tensor that took over storage, by their ids

    def lives(self) -> list[Life]:
        """The lives that need storage: of tensors that took none over, as long as all that took over from them."""
        return list(self._lives.values())

    def taken_over(self) -> dict[int, int]:
        """By the id of a tensor that lies in storage which it took over, the id of the tensor that owns it."""
        return self._owners

    def add(self, program: Sequence[tuple[Node, Sequence[Tensor]]]) -> None:
        """One more graph: its nodes, each with the scratch that lives only while it runs, or while those do that share
        it."""
        last_reads = {t.id: at for at, (node, _) in enumerate(program, self._nodes) for t in node.inputs.values()}
        for now, (node, workspace) in enumerate(program, self._nodes):
            sources = {} if self._keep else self._sources(node, last_reads, now)
            for index, tensor in enumerate(node.outputs):
                if tensor.updates is not None:
                    continue
                last = sys.maxsize if self._keep else last_reads.get(tensor.id, now)
                if index in sources:
                    owner = self._owners[tensor.id] = self._owner(sources[index])
                    self._lives[owner].last = last
                else:
                    self._lives[tensor.id] = Life(tensor, now, last)
            for tensor in workspace:  # of several nodes it lives from the first to the last
                self._lives.setdefault(tensor.id, Life(tensor, now, now)).last = now
        self._nodes += len(program)

    def _owner(self, tensor: Tensor) -> int:
        return self._owners.get(tensor.id, tensor.id)

    def _sources(self, node: Node, last_reads: dict[int, int], now: int) -> dict[int, Tensor]:
        """By index of an output the input that it may overwrite: a temporary as large that nobody reads afterwards."""
        times_read, found = Counter(t.id for t in node.inputs.values()), dict[int, Tensor]()
        for index, name in OPS[node.op].inplace(node):
            output, source = node.outputs[index], node.inputs[name]
            life, last_read = self._lives.get(self._owner(source)), last_reads[source.id]
            free = life is not None and life.last <= now and last_read == now and times_read[source.id] == 1
            alike = source.updates is None and output.updates is None and source.nbytes == output.nbytes
            taken = any(self._owner(other) == self._owner(source) for other in found.values())
            if free and alike and not taken:
                found[index] = source
        return found
