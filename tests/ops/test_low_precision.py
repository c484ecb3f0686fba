"""Low-precision products: against the same arithmetic in NumPy, against the exact product, and what picks them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from entrenar_gpu import ops
from entrenar_gpu.compiler.autodiff import backward
from entrenar_gpu.compiler.plan import PlanOptions, make_plan
from entrenar_gpu.executors.numpy_executor import run_node
from entrenar_gpu.gpu import autotune
from entrenar_gpu.gpu.replay import Replay
from entrenar_gpu.graph.caps import Caps, Target
from entrenar_gpu.graph.tensor import Graph
from entrenar_gpu.ops.gemm import tiles
from entrenar_gpu.ops.gemm.linear import low_precision_operands, transposed
from entrenar_gpu.ops.gemm.low_precision import quantize_rows
from entrenar_gpu.ops.gemm.tiles import Choice, Tile, TileTable
from entrenar_gpu.ops.quantize import host_parts
from entrenar_gpu.quant import nf4
from entrenar_gpu.train.trainer import Trainer
from tests.helpers.cases import CASES
from tests.helpers.equivalence import fault, needs
from tests.helpers.runs import config_of, gradients, run_micro_batches
from tests.helpers.tiny import make_data, make_model
from tests.ops.test_kernels import check_on

linear_ops = importlib.import_module("entrenar_gpu.ops.gemm.linear")
matmul_ops = importlib.import_module("entrenar_gpu.ops.gemm.matmul")  # `ops.matmul` is the function

# GPU against NumPy: int8's sums are exact and only their scaling rounds; f16 sums 32 products in f16 (docs/gemm.md).
BARS = {"int8": 1e-6, "f16": 1.2e-3}


@dataclass
class Layer:
    """x W^T + 0.3 (x A^T) B^T + bias + residual over an NF4 weight, with gradients of x, A and B."""

    shape: tuple[int, int, int, int]  # tokens, out, in, rank
    precision: Any
    rounded: Any = "bfloat16"
    double: bool = True
    apart: bool = False  # x A^T is made by an op of its own, as behind a dropout
    graph: Graph = field(default_factory=lambda: Graph("layer"))
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (t, n, k, r), rng = self.shape, np.random.default_rng(3)
        self.weight = nf4.Nf4Weight.from_dense(
            rng.standard_normal((n, k)).astype(np.float32), self.double, self.rounded
        )
        frozen = ops.Nf4Tensors.declare(self.graph, "w", (n, k), self.double, self.rounded)
        self.arrays = {p.name: a for p, a in zip(frozen.parts, host_parts(self.weight), strict=True)}
        sizes = {"x": (t, k), "A": (r, k), "B": (n, r), "residual": (t, n), "bias": (n,), "up": (t, n)}
        self.arrays |= {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
        self.x = self.graph.tensor("x", (t, k), requires_grad=True)
        a, b = self.graph.parameter("A", (r, k)), self.graph.parameter("B", (n, r))
        residual, bias = self.graph.tensor("residual", (t, n)), self.graph.tensor("bias", (n,), role="weight")
        low_rank = (ops.matmul(self.x, a, transpose_b=True), b, 0.3) if self.apart else None
        lora = None if self.apart else (a, b, 0.3)
        self.y = ops.linear(self.x, frozen, low_rank, bias, residual, self.precision, lora)
        grads = backward(self.y, [self.x, a, b], self.graph.tensor("up", (t, n)))
        self.results = {"y": self.y, "dx": grads[self.x], "dA": grads[a], "dB": grads[b]}

    def reference(self) -> dict[str, np.ndarray]:
        values = {t.id: self.arrays.get(n, np.zeros(t.shape, np.float32)) for n, t in self.graph.persistents.items()}
        for node in self.graph.nodes:
            run_node(node, values)
        return {name: values[t.id] for name, t in self.results.items()}

    def on_device(
        self, device: Any, kernels: Any, caps: Caps | None = None, measured: TileTable | None = None
    ) -> dict[str, np.ndarray]:
        options = PlanOptions(tiles=measured or {}, keep=True)
        replay = Replay(device, make_plan({"layer": self.graph}, caps or device.caps, options), kernels)
        try:
            for name, values in self.arrays.items():
                replay.write(name, values)
            replay.run("layer")
            return {name: replay.read_temporary(t) for name, t in self.results.items()}
        finally:
            replay.close()

    def exact(self) -> dict[str, np.ndarray]:
        """y and dx in float64."""
        v = {name: a.astype(np.float64) for name, a in self.arrays.items()}
        w = self.weight.dequantize().astype(np.float64)
        y = v["x"] @ w.T + 0.3 * (v["x"] @ v["A"].T) @ v["B"].T + v["bias"] + v["residual"]
        return {"y": y, "dx": v["up"] @ w + 0.3 * (v["up"] @ v["B"]) @ v["A"]}


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def check(layer: Layer, got: dict[str, np.ndarray]) -> None:
    for name, want in layer.reference().items():
        bar = BARS[layer.precision] if name in ("y", "dx") else 1e-6
        assert error(got[name], want) <= bar, f"{name}: {error(got[name], want):.1e}"


@pytest.mark.parametrize("precision", ["f16", "int8"])
@pytest.mark.parametrize("shape", [(1, 64, 64, 4), (65, 128, 192, 3), (70, 192, 64, 16)])
@pytest.mark.parametrize("apart", [False, True])
def test_a_layer_and_its_gradients(precision, shape, apart, device, kernels):
    needs(device, precision)
    layer = Layer(shape, precision, apart=apart)
    check(layer, layer.on_device(device, kernels))


@pytest.mark.parametrize("precision", ["f16", "int8"])
def test_every_tile_split_along_k(precision, device, kernels):
    needs(device, precision)
    layer = Layer((65, 128, 192, 8), precision, "float32", double=False)
    for candidate in tiles.CANDIDATES[precision]:
        choice = Choice(replace(candidate.tile, unroll=1), 2)
        names = (tiles.key(precision, 65, n, k, "nt") for n, k in ((128, 192), (192, 128)))
        measured = dict.fromkeys(names, tiles.to_numbers(choice))
        check(layer, layer.on_device(device, kernels, measured=measured))


@pytest.mark.parametrize(("precision", "low", "high"), [("f16", 1e-4, 4e-4), ("int8", 4e-3, 1.2e-2)])
def test_error_of_the_arithmetic_itself(precision, low, high):
    """Rounding normal deviates costs f16 2^-12 to 2^-11 a product, and int8 two uniform errors of a 1/254 of the
    largest of 64; less would mean that nothing was rounded."""
    layer = Layer((64, 128, 256, 8), precision, "float32")
    layer.arrays["A"][:] = layer.arrays["bias"][:] = layer.arrays["residual"][:] = 0
    reference, exact = layer.reference(), layer.exact()
    for name in ("y", "dx"):
        assert low <= error(reference[name], exact[name]) <= high


LAST_COLUMNS = ["nn-pair-bias-residual-64x64x32", "tt-pair-bias-residual-64x64x32", "residual-stream", "alpha"]


@pytest.mark.parametrize("product", LAST_COLUMNS)
def test_last_columns_split_along_k(product, device, kernels, monkeypatch):
    """Whole tiles and the sum of the tail's slices take their part of B, of the pair, the bias and the residual."""
    tile, tails = Tile(32, 16, 16, 4, 4), {64: 32, 32: 16, 24: 8, 20: 4}
    monkeypatch.setattr(matmul_ops, "choose", lambda _, m, n, *rest: Choice(tile, 2, tails.get(n, 0)))
    check_on(CASES[f"matmul-{product}"], device, kernels)


FAULTS = [
    ("matmul_int8", "12582912.0", "12582911.0", "int8"),
    ("matmul_int8", "a_scale[step * 65u", "a_scale[step * 64u", "int8"),
    ("matmul_int8", "r < 8u", "r < 7u", "int8"),
    ("matmul_f16", "k / 4u", "k / 8u", "f16"),
    ("matmul_f16", "to_k; k0 += 32u", "to_k - 32u; k0 += 32u", "f16"),
    ("matmul_f16", "+= bias[", "-= bias[", "f16"),
    ("low_precision_rows", "thread & 252u", "thread & 254u", "int8"),
    ("low_precision_rows", "vec4<f16>(x[i])", "vec4<f16>(x[i] * 1.01)", "f16"),
    ("low_precision_rows", "workgroup - 17u", "workgroup - 18u", "f16"),
    ("low_precision_rows", "at < 65u", "at < 64u", "int8"),
    ("nf4_low_precision", "bytes[(bits[0] >> 4u) & 15u]", "bytes[(bits[0] >> 5u) & 15u]", "int8"),
    ("nf4_low_precision", "block = at / 16u", "block = at / 32u", "f16"),
    ("nf4_low_precision_transposed", "first + 7u", "first + 6u", "int8"),
    ("nf4_low_precision_transposed", "word0 >> 28u", "word0 >> 24u", "f16"),
]


@pytest.mark.parametrize(("shader", "old", "new", "precision"), FAULTS)
def test_a_planted_fault_is_caught(shader, old, new, precision, device, kernels):
    needs(device, precision)
    layer = Layer((65, 128, 192, 8), precision)
    caps = replace(device.caps, software=True, matrices=())  # whose tiles leave loops as loops
    with fault(shader, old, new), pytest.raises(AssertionError, match=r"^(y|dx): "):
        check(layer, layer.on_device(device, kernels, caps))


@pytest.mark.parametrize("value", [2.0**118, np.inf, np.nan])
def test_what_is_not_finite_is_not_lost(value, device, kernels):
    """Loss scaling relies on an overflow showing up in what it touches: by the product itself, without an adapter."""
    graph, rng = Graph("g"), np.random.default_rng(0)
    x, weight = graph.tensor("x", (65, 128)), ops.Nf4Tensors.declare(graph, "w", (64, 128), False, "float32")
    ops.keep(ops.linear(x, weight, precision="int8"), "y")
    values = rng.standard_normal((65, 128), np.float32)
    values[7, 70] = value
    replay = Replay(device, make_plan({"g": graph}, device.caps), kernels)
    try:
        replay.write("x", values)
        replay.write("w.codes", rng.integers(0, 256, 64 * 64, dtype=np.uint8))
        replay.write("w.absmax", np.ones(128, np.float32))
        replay.run("g")
        y = replay.read("y")
    finally:
        replay.close()
    assert not np.isfinite(y[7]).any()
    assert np.isfinite(np.delete(y, 7, axis=0)).all()


@pytest.mark.parametrize("turn", [False, True])
def test_codes_and_scales_have_the_references_bits(turn, device, kernels):
    """A code that rounds to the other side would weigh more than int8's bar allows."""
    rng, graph = np.random.default_rng(1), Graph("codes")
    weight = nf4.Nf4Weight.from_dense(rng.standard_normal((1024, 64)).astype(np.float32), True)
    frozen = ops.Nf4Tensors.declare(graph, "w", (1024, 64), True, "float32")
    x = graph.tensor("x", (64, 1024 if turn else 64))
    values = rng.standard_normal(x.shape) * 2.0 ** rng.integers(-118, 110, (64, 1))
    node = (transposed(x, frozen, "int8") if turn else ops.linear(x, frozen, precision="int8")).node
    assert node is not None
    plan = make_plan({"codes": graph}, device.caps)
    operands = low_precision_operands(node, next(s.workspace for s in plan.steps["codes"] if s.node is node))
    replay = Replay(device, plan, kernels)
    try:
        replay.write("x", values.astype(np.float32))
        for part, array in zip(frozen.parts, host_parts(weight), strict=True):
            replay.write(part.name, array)
        replay.run("codes")
        a, a_scale, b, b_scale = (replay.read_temporary(t) for pair in operands for t in pair)
    finally:
        replay.close()
    narrowed = [(a, a_scale, values.astype(np.float32)), *([(b, b_scale, weight.dequantize().T)] if turn else [])]
    for codes, scales, source in narrowed:
        want_codes, want_scales = quantize_rows(source)
        assert codes.view(np.int8).tobytes() == want_codes.tobytes()
        assert scales.T.tobytes() == want_scales.tobytes()


def test_rows_of_zeros_and_the_largest_code():
    codes, scales = quantize_rows(np.array([[0.0] * 64, [2.0] * 63 + [-1.0]]))
    assert not codes[0].any()
    assert scales[0, 0] == 0
    assert codes[1, 0] == 127
    assert codes[1, 63] == -64  # -63.5 rounds to even


def test_weights_that_do_not_fit_blocks_stay_f32():
    graph = Graph()
    x = graph.tensor("x", (5, 96))
    weight = ops.Nf4Tensors.declare(graph, "w", (64, 96), False, "float32")
    assert ops.linear(x, weight, precision="int8").node.op == "matmul"


@pytest.mark.parametrize("precision", ["f16", "int8"])
def test_a_model_has_the_same_gradients_with_adapters_apart(precision, tmp_path, monkeypatch):
    """Every projection of a block, whose input gradients are summed inside the products that make them."""
    make_model(tmp_path / "model", intermediate_size=192, head_dim=32)
    make_data(tmp_path / "train.jsonl")

    def run() -> dict[str, np.ndarray]:
        trainer = Trainer(config_of(tmp_path, precision=precision, device="numpy"))
        rng = np.random.default_rng(0)
        for name, shape in trainer.session.trainable().items():  # B too, which begins at zero
            trainer.executor.write(name, 0.1 * rng.standard_normal(shape).astype(np.float32))
        run_micro_batches(trainer, next(trainer.batches))
        nodes = trainer.session.graphs["micro"].nodes
        kinds.append([sum(n.op == op for n in nodes) for op in ("linear", "matmul", "add")])
        return gradients(trainer)

    kinds: list[list[int]] = []
    together = run()
    monkeypatch.setattr(linear_ops, "RANKS", ())
    apart = run()
    assert kinds[0][0] == kinds[1][0]
    assert kinds[0][1] == kinds[1][1] - 2 * 14 + 3  # nobody wants the gradient of what the first three read
    assert kinds[0][2] == kinds[1][2]  # no sum that was none before
    for name, gradient in together.items():
        assert error(gradient, apart[name]) <= 1e-5, name


@pytest.mark.parametrize("precision", ["f16", "int8"])
def test_the_adapter_rides_along_both_ways(precision):
    """Forward and input gradient are one product each: no pass of its own makes or adds the low-rank part."""
    layer = Layer((64, 128, 192, 8), precision)
    plan = make_plan({"layer": layer.graph}, Caps(f16=True))
    shaders = [launch.shader for step in plan.steps["layer"] for launch in step.launches]
    assert shaders.count("low_rank") == 2  # the gradients of A and B
    assert shaders.count("low_precision_rows") == 2
    linears = [node for node in layer.graph.nodes if node.op == "linear"]
    assert all("lora_a" in node.inputs for node in linears)
    assert [node.attrs["low_rank_transposed"] for node in linears] == [True, False]
    assert len(linears) == 2
    assert layer.results["dx"] is linears[1].output


LARGE = Caps("large", max_workgroup_bytes=48 << 10, max_invocations=1024, flops_per_second=2e12)


@pytest.mark.parametrize("arithmetic", ["f32", "f16", "int8"])
@pytest.mark.parametrize("caps", [Caps(), LARGE, Caps(software=True)], ids=["portable", "large", "software"])
def test_choices_fit_their_device(arithmetic, caps):
    for m, n, k in [(1, 64, 64), (16, 2560, 512), (512, 9728, 2560), (512, 1024, 2560), (8192, 64, 9728)]:
        choice = tiles.choose(arithmetic, m, n, k, "nt", caps)
        assert choice.tile.workgroup_bytes(arithmetic) <= caps.max_workgroup_bytes
        assert choice.tile.threads <= caps.max_invocations
        assert choice.slices * m * (choice.tail or n) * 4 <= caps.max_binding_bytes
        assert choice == tiles.choose(arithmetic, m, n, k, "nt", caps)


def test_a_wave_that_would_be_half_empty_is_split_along_k():
    """608 tiles for 132 units: 528 make four waves, and ten columns of eight are left. Of whole waves nothing is."""
    choice = tiles.choose("f32", 2048, 9728, 2560, "nn", LARGE)
    assert (choice.tail, choice.tile.BN) == (1280, 128)
    assert choice.slices > 1
    assert tiles.choose("f32", 2048, 8192, 2560, "nn", LARGE).tail == 0
    assert tiles.choose("f32", 2048, 9728, 2560, "nn", LARGE, tail=False).tail == 0
    name = tiles.key("f32", 2048, 9728, 2560, "nn")
    assert tiles.is_choice(name, tiles.to_numbers(choice))
    # One slice, whole tiles that do not fit, nothing whole, another arithmetic, K cut too short.
    for wrong in (replace(choice, slices=1), replace(choice, tail=1284), replace(choice, tail=9728)):
        assert not tiles.is_choice(name, tiles.to_numbers(wrong))
        caps = Target.of(LARGE, {name: tiles.to_numbers(wrong)})
        assert tiles.choose("f32", 2048, 9728, 2560, "nn", caps) == choice
    assert not tiles.is_choice(name.replace("f32", "int8"), tiles.to_numbers(choice))
    assert not tiles.is_choice(name.replace("2560", "128"), tiles.to_numbers(choice))


def test_a_tile_of_another_arithmetic_is_no_choice():
    """In int8 a slice shorter than a block would leave out the product without a word."""
    f16 = Choice(tiles.CANDIDATES["f16"][1].tile, 2)
    name = tiles.key("int8", 128, 192, 64, "nt")
    assert not tiles.is_choice(name, tiles.to_numbers(f16))
    assert tiles.is_choice(name, tiles.to_numbers(Choice(tiles.CANDIDATES["int8"][0].tile)))
    with pytest.raises(ValueError, match="unpack"):
        tiles.is_choice("int8", tiles.to_numbers(f16))


def test_measured_choices_win_and_survive_json(tmp_path):
    choice = Choice(Tile(32, 32, 16, 4, 4, unroll=8, buffers=2), 3)
    name = tiles.key("f32", 100, 200, 300, "nt")
    path = tmp_path / "tiles.json"
    autotune.write_cache(path, {name: tiles.to_numbers(choice)})
    caps = Target.of(LARGE, autotune.read_cache(path))
    assert tiles.choose("f32", 100, 200, 300, "nt", caps) == choice
    assert tiles.choose("f32", 100, 200, 300, "nt", caps, split=False) == Choice(choice.tile)
    assert tiles.choose("f32", 100, 200, 300, "nn", caps) == tiles.choose("f32", 100, 200, 300, "nn", LARGE)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 0, "tiles": {}}', '{"version": VERSION, "tiles": {"a": "b"}}'])
def test_a_damaged_cache_is_measured_again(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text.replace("VERSION", str(autotune.VERSION)))
    assert autotune.read_cache(path) == {}


@pytest.mark.parametrize("caps", [LARGE, replace(LARGE, software=True)], ids=["gpu", "software"])
@pytest.mark.parametrize("arithmetic", ["f32", "f16", "int8"])
def test_what_is_chosen_unmeasured_is_measured_with_the_rest(arithmetic, caps):
    measured = tiles.plausible(arithmetic, 512, 1024, 2560, "nt", caps)
    assert measured[0] == tiles.choose(arithmetic, 512, 1024, 2560, "nt", caps)
    assert 1 < len(measured) == len(set(measured))


def test_autotune_measures_each_product_once(monkeypatch, tmp_path):
    """And takes the fastest of the plausible ones."""
    asked: list[tuple[int, ...]] = []

    def measure(device: Any, kernels: Any, product: Any, tiles: TileTable, check: bool, alone: bool) -> dict[str, Any]:
        (numbers,) = tiles.values()
        asked.append(numbers)
        return {"seconds": 1.0 if numbers[-2] == 1 else 0.5}

    monkeypatch.setattr(autotune, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Stub:
        caps = LARGE
        info: dict[str, str] = {"description": "driver 1"}  # noqa: RUF012

    layer = Layer((512, 128, 1024, 8), "int8")
    wanted = autotune.matmuls_of([layer.graph])
    assert len(wanted) == len({repr(p) for p in wanted}) == 2  # the adapters' have a kernel without tiles
    device: Any = Stub()
    first = autotune.autotune(device, wanted, device)
    count = len(asked)
    assert count > len(wanted)
    assert autotune.autotune(device, wanted, device) == first
    assert len(asked) == count
    split = [numbers for numbers in first.values() if numbers[-2] > 1]
    assert split, "no product was found faster in slices"


def test_the_last_columns_apart_take_their_bias_and_residual_along(device, kernels):
    """The sum of their slices is written from a column on: what it adds must begin there too."""
    rng = np.random.default_rng(0)
    tile = tiles.Tile(32, 32, 16, 4, 4)
    choice = {tiles.key("f32", 40, 128, 48, "nt"): tiles.to_numbers(tiles.Choice(tile, 2, 64))}
    graph = Graph("g")
    a, b = graph.tensor("a", (40, 48)), graph.tensor("b", (128, 48))
    residual, bias = graph.tensor("residual", (40, 128)), graph.tensor("bias", (128,))
    out = ops.matmul(a, b, transpose_b=True, residual=residual, bias=bias)
    plan = make_plan({"g": graph}, replace(device.caps, software=False), PlanOptions(tiles=choice, keep=True))
    assert len(plan.steps["g"][0].launches) == 2
    replay = Replay(device, plan, kernels)
    values = {name: rng.standard_normal(t.shape).astype(np.float32) for name, t in replay.tensors.items()}
    for name, value in values.items():
        replay.write(name, value)
    replay.run("g")
    want = values["a"].astype(np.float64) @ values["b"].T + values["residual"] + values["bias"]
    got = replay.read_temporary(out)
    replay.close()
    assert np.linalg.norm(got - want) <= (5e-8 * np.sqrt(48) + 1e-7) * np.linalg.norm(want)


def three_products(apart: int, precision: Any) -> Graph:
    """Of the same x, with adapters: two side by side, and one more so many nodes further."""
    graph, (t, n, k, r) = Graph("g"), (70, 128, 64, 8)
    x = graph.tensor("x", (t, k))
    for i in range(3):
        weight = ops.Nf4Tensors.declare(graph, f"w{i}", (n, k), False, "float32")
        a, b = graph.tensor(f"a{i}", (r, k)), graph.tensor(f"b{i}", (n, r))
        ops.keep(ops.linear(x, weight, precision=precision, lora=(a, b, 0.5)), f"y{i}")
        for j in range(apart if i == 1 else 0):
            ops.keep(ops.scale(x, 2.0), f"between{j}")
    return graph


@pytest.mark.parametrize("precision", ["f16", "int8"])
def test_products_of_one_x_beside_each_other_share_its_copy(precision, device, kernels):
    """To the bit what each makes of its own; those too far away do not, as the copy would have to wait for them."""
    needs(device, precision)
    found = {}
    for apart in (0, 8):
        graph = three_products(apart, precision)
        plan = make_plan({"g": graph}, device.caps)
        steps = [step for step in plan.steps["g"] if step.node.op == "linear"]
        narrowing = [sum(launch.shader == "low_precision_rows" for launch in step.launches) for step in steps]
        assert narrowing == ([1, 0, 0] if apart == 0 else [1, 0, 1])
        assert steps[0].workspace[0] is steps[1].workspace[0]
        rng, replay = np.random.default_rng(1), Replay(device, plan, kernels)
        try:
            for name, tensor in graph.persistents.items():
                if tensor.dtype == "u8":
                    replay.write(name, rng.integers(0, 256, tensor.shape, dtype=np.uint8))
                elif tensor.role in ("input", "weight"):
                    replay.write(name, rng.uniform(-1, 1, tensor.shape).astype(np.float32))
            replay.run("g")
            found[apart] = [replay.read(f"y{i}") for i in range(3)]
        finally:
            replay.close()
    assert all(np.array_equal(one, other) for one, other in zip(found[0], found[8], strict=True))
    assert not np.array_equal(found[0][0], found[0][1])
