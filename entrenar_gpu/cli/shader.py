"""`entrenar-gpu shader`: the WGSL of an op at a shape, and how it is launched; needs no GPU."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from entrenar_gpu.cli.op_programs import PROGRAMS, OpProgram, with_gradient
from entrenar_gpu.compiler import make_plan
from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu import render
from entrenar_gpu.graph import Caps, Graph, Launch, Node

_BYTES = {"f32": 4, "u32": 4, "i32": 4, "f16": 2}
_LONGEST_SIDE = 2**31


@dataclass(frozen=True)
class Dispatch:
    """A launch of a node with its text; `gradient` where the node belongs to the backward pass."""

    node: Node
    launch: Launch
    text: str
    gradient: bool


def dispatches(op: str, shape: str | None, precision: str, caps: Caps) -> list[Dispatch]:
    """What an op and its gradient launch on a device. Raises UserError where the op or its shape is wrong."""
    program = PROGRAMS.get(op)
    if program is None:
        raise UserError(f"shader: {op!r} is not one of {', '.join(sorted(PROGRAMS))}")
    if precision not in program.precisions:
        raise UserError(f"--precision: {precision!r} is not one of {', '.join(program.precisions)}, which {op} has")
    if precision == "f16" and not caps.f16:
        raise UserError(f"--precision f16: {caps.name} has no f16 arithmetic; --profile large has")
    sizes, graph = _sizes(op, program, shape), Graph(op)
    try:
        out = program.record(graph, precision, *sizes)
        forward = len(graph.nodes)
        if out is not None and any(t.requires_grad for t in graph.persistents.values()):
            with_gradient(out)
        backward = {id(node) for node in graph.nodes[forward:]}
        (steps,) = make_plan({op: graph}, caps).steps.values()
    except ValueError as error:
        raise UserError(f"--shape: {op} at {shape}: {error}") from None
    return [Dispatch(s.node, x, render(x), id(s.node) in backward) for s in steps for x in s.launches]


def usage(op: str) -> str:
    """An op with the sizes that --shape tells, and an example of them."""
    program = PROGRAMS[op]
    return f"{op} --shape {' x '.join(program.sizes)}, as in {'x'.join(map(str, program.example))}"


def _sizes(op: str, program: OpProgram, shape: str | None) -> list[int]:
    if shape is None:
        raise UserError(f"--shape: missing; {usage(op)}")
    words = shape.split("x")
    if not program.required <= len(words) <= len(program.sizes) or not all(
        re.fullmatch("[0-9]{1,10}", w) for w in words
    ):
        raise UserError(f"--shape: {shape[:80]!r} does not fit; {usage(op)}")
    sizes = [int(word) for word in words]
    if min(sizes) < 1 or math.prod(sizes) >= _LONGEST_SIDE**2 or max(sizes) >= _LONGEST_SIDE:
        raise UserError(f"--shape: {shape[:80]!r} has a size that no device takes")
    return sizes


def print_shaders(found: list[Dispatch], gradient: bool) -> None:
    """Each text once, behind a comment that says what launches it; the gradient's too if asked for."""
    printed: set[str] = set()
    for dispatch in found:
        if dispatch.text not in printed and (gradient or not dispatch.gradient):
            printed.add(dispatch.text)
            print(f"// {'; '.join(_facts(dispatch))}\n{dispatch.text}")


def print_launches(found: list[Dispatch]) -> None:
    """A paragraph per launch: shader, grid, workgroup, its memory, bindings."""
    for dispatch in found:
        print("\n  ".join(_facts(dispatch)))
        for binding in dispatch.launch.bindings:
            shape = "x".join(map(str, binding.tensor.shape))
            use = "read_write" if binding.write else "read"
            offset = f", from byte {binding.offset}" if binding.offset else ""
            print(f"    {binding.name:14} {use:10} {binding.tensor.dtype} {shape}, by {binding.vector}{offset}")


def _facts(dispatch: Dispatch) -> Iterator[str]:
    launch, text = dispatch.launch, dispatch.text
    (invocations,) = re.findall(r"@workgroup_size\(([\d, ]+)\)", text)
    yield f"{launch.shader}, for {dispatch.node.op}" + (" (gradient)" if dispatch.gradient else "")
    yield f"grid {' x '.join(map(str, launch.grid))} workgroups of {invocations}"
    yield f"{workgroup_bytes(text):,} bytes of workgroup memory"
    yield "without bounds checks" if launch.trusted else "with bounds checks"


def workgroup_bytes(text: str) -> int:
    """Bytes of all `var<workgroup>` of a WGSL text."""
    total = 0
    for declared in re.findall(r"var<workgroup> \w+: ([^;]+);", text):
        array = re.fullmatch(r"array<(.+), (\d+)>", declared.strip())
        element, count = (array[1], int(array[2])) if array else (declared.strip(), 1)
        vector = re.fullmatch(r"vec([24])<(\w+)>", element)
        total += count * (int(vector[1]) * _BYTES[vector[2]] if vector else _BYTES[element])
    return total
