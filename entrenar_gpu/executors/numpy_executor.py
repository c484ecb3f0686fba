"""The NumPy executor: runs a graph through the ops' reference functions. Slow, exact in meaning, needs no GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from entrenar_gpu.compiler import PAGED_ROLES, page_layout, page_sizes
from entrenar_gpu.dtypes import NUMPY_TYPES
from entrenar_gpu.graph import Graph, Node, Tensor, grouped
from entrenar_gpu.ops.registry import OPS


def run_node(node: Node, values: dict[int, np.ndarray]) -> None:
    """Compute one node from `values` (by tensor id) into `values`, persistent updates included."""
    inputs = grouped({name: values[t.id] for name, t in node.inputs.items()})
    arrays = OPS[node.op].reference(node, **inputs)
    for tensor, array in zip(node.outputs, arrays, strict=True):
        if array.shape != tensor.shape:
            raise AssertionError(f"{node.label()}: reference gave {array.shape} for {tensor!r}")
        values[tensor.id] = array
        if tensor.updates is not None:
            values[tensor.updates.id] = array


class Report:
    """A small tensor handed to the host (the interface of replay.Report)."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.done_ns = time.monotonic_ns()

    def result(self) -> np.ndarray:
        return self._values

    def ticks(self, graph: str, repeat: int) -> None:
        """The host's own work is not timed node by node."""


class NumpyExecutor:
    """Holds the persistent tensors of several graphs by name and runs the graphs (the interface of replay.Replay)."""

    def __init__(self, graphs: Mapping[str, Graph], keep: Sequence[Tensor] = ()) -> None:
        """`keep` lists temporaries that stay readable after a run."""
        self._graphs = dict(graphs)
        self._kept: dict[int, np.ndarray | None] = {t.id: None for t in keep}
        self._store: dict[str, np.ndarray] = {}
        self.tensors: dict[str, Tensor] = {}
        for graph in self._graphs.values():
            self.tensors.update(graph.persistents)
        for role in PAGED_ROLES:
            paged = [t for t in self.tensors.values() if t.role == role]
            layout = page_layout(paged, role)
            for page, nbytes in page_sizes(layout).items():
                self._store[page] = np.zeros(nbytes // 4, np.float32)
            for tensor, place in zip(paged, layout, strict=True):
                words = slice(place.offset // 4, (place.offset + place.nbytes) // 4)
                self._store[tensor.name] = self._store[place.buffer][words].reshape(tensor.shape)
        for name, tensor in self.tensors.items():
            self._store.setdefault(name, np.zeros(tensor.shape, NUMPY_TYPES[tensor.dtype]))

    def write(self, name: str, array: np.ndarray) -> None:
        tensor = self.tensors[name]
        self._store[name][...] = np.asarray(array, NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape)

    def write_part(self, name: str, first: int, values: np.ndarray) -> None:
        """Write consecutive elements of a persistent tensor, from the `first` on, in its own dtype."""
        self._store[name].reshape(-1)[first : first + values.size] = values

    def copy_rows(self, name: str, source: int, target: int, count: int) -> None:
        """Copy rows of a persistent tensor to others of it, which may not overlap: [.., W] as rows of W."""
        rows = self._store[name].reshape(-1, self.tensors[name].columns)
        rows[target : target + count] = rows[source : source + count]

    def read(self, name: str) -> np.ndarray:
        return self._store[name].copy()

    def run(self, name: str, repeat: int = 0) -> Report | None:
        graph = self._graphs[name]
        values = {t.id: self._store[key] for key, t in graph.persistents.items()}
        readers: dict[int, int] = {}
        for node in graph.nodes:
            for tensor in node.inputs.values():
                readers[tensor.id] = readers.get(tensor.id, 0) + 1
        for node in graph.nodes:
            run_node(node, values)
            for tensor in node.inputs.values():  # let go of what no later node reads
                readers[tensor.id] -= 1
                if readers[tensor.id] == 0 and not tensor.persistent and tensor.id not in self._kept:
                    values.pop(tensor.id, None)
        self._kept = {key: values.get(key, old) for key, old in self._kept.items()}
        for key, tensor in graph.persistents.items():  # into the pages, which other tensors are views of
            if values[tensor.id] is not self._store[key]:
                self._store[key][...] = values[tensor.id]
        return Report(self.read(graph.report)) if graph.report is not None else None

    def read_temporary(self, tensor: Tensor) -> np.ndarray:
        """A tensor named in `keep`, as the last run left it."""
        value = self._kept[tensor.id]
        assert value is not None
        return value

    def read_clock(self) -> None:
        """There is no second clock."""

    def wait(self) -> None:
        """Everything has run already."""

    def close(self) -> None:
        self._store.clear()
