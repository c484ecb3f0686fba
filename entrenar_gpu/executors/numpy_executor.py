"""The NumPy executor: runs a graph through the ops' reference functions. Slow, exact in meaning, needs no GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from entrenar_gpu.compiler import PAGED_ROLES, TraceGroup, page_layout, page_sizes
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


Ticks = dict[tuple[str, int], np.ndarray]  # by graph and repeat


class Report:
    """A small tensor handed to the host, and when groups of nodes ran (the interface of replay.Report)."""

    on_gpu = False

    def __init__(self, values: np.ndarray, ticks: Ticks) -> None:
        self._values = values
        self._ticks = ticks
        self.done_ns = time.monotonic_ns()

    def result(self) -> np.ndarray:
        return self._values

    def ticks(self, graph: str, repeat: int) -> np.ndarray | None:
        """Host nanoseconds [groups, 2] of one run of a graph; None where nothing was timed."""
        return self._ticks.get((graph, repeat))


class NumpyExecutor:
    """Holds the persistent tensors of several graphs by name and runs the graphs (the interface of replay.Replay)."""

    def __init__(
        self,
        graphs: Mapping[str, Graph],
        keep: Sequence[Tensor] = (),
        groups: Mapping[str, Sequence[TraceGroup]] = MappingProxyType({}),
    ) -> None:
        """`keep` lists temporaries that stay readable after a run, `groups` what is timed, by graph."""
        self._graphs = dict(graphs)
        self._groups = groups
        self._ticks: Ticks = {}  # of the runs since the last report
        self._kept: dict[int, np.ndarray | None] = {t.id: None for t in keep}
        self._store: dict[str, np.ndarray] = {}
        self.tensors: dict[str, Tensor] = {}
        for graph in self._graphs.values():
            for name, tensor in graph.persistents.items():
                self.tensors.setdefault(name, tensor)
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

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # as on a device: whoever reads a result checks it
    def run(self, name: str, repeat: int = 0) -> Report | None:
        graph = self._graphs[name]
        values = {t.id: self._store[key] for key, t in graph.persistents.items()}
        readers: dict[int, int] = {}
        for node in graph.nodes:
            for tensor in node.inputs.values():
                readers[tensor.id] = readers.get(tensor.id, 0) + 1
        begins = np.zeros(len(graph.nodes) + 1, np.int64)  # monotonic nanoseconds; the end of a node is the next one's
        for index, node in enumerate(graph.nodes):
            begins[index] = time.monotonic_ns()
            run_node(node, values)
            for tensor in node.inputs.values():  # let go of what no later node reads
                readers[tensor.id] -= 1
                if readers[tensor.id] == 0 and not tensor.persistent and tensor.id not in self._kept:
                    values.pop(tensor.id, None)
        begins[-1] = time.monotonic_ns()
        if self._groups.get(name):
            self._ticks[name, repeat] = np.array([[begins[g.first], begins[g.last + 1]] for g in self._groups[name]])
        self._kept = {key: values.get(key, old) for key, old in self._kept.items()}
        for key, tensor in graph.persistents.items():  # into the pages, which other tensors are views of
            if values[tensor.id] is not self._store[key]:
                self._store[key][...] = values[tensor.id]
        if graph.report is None:
            return None
        report, self._ticks = Report(self.read(graph.report), self._ticks), {}
        return report

    def read_temporary(self, tensor: Tensor) -> np.ndarray:
        """A tensor named in `keep`, as the last run left it."""
        value = self._kept[tensor.id]
        assert value is not None
        return value

    def read_clock(self) -> tuple[int, int, int]:
        """The clock of what is timed, which is the host's own, between two readings of the host's."""
        now = time.monotonic_ns()
        return now, now, now

    def prepare(self, name: str) -> None:
        """There is nothing to record."""

    def wait(self) -> None:
        """Everything has run already."""

    def close(self) -> None:
        self._store.clear()
