"""QLoRA's promises as properties, over shapes and seeds.

What quantising saves, what it leaves alone, and how far off it is; what an adapter adds, and that merging it changes
nothing but the form.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar_gpu import ops
from entrenar_gpu.adapters.lora import LoraModule, fresh_values
from entrenar_gpu.config.presets import SHAPES
from entrenar_gpu.executors import NumpyExecutor
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.model import Storage, WeightSpec, declared_weights, parse_model_config
from entrenar_gpu.model.projection import ProjectionCall
from entrenar_gpu.ops import Nf4Tensors
from entrenar_gpu.ops.quantize import host_parts, nf4_part_names
from entrenar_gpu.quant.nf4 import Nf4Weight, quantize

LAYER = "model.layers.0."
shapes = st.tuples(st.integers(1, 12).map(lambda n: 16 * n), st.integers(1, 6).map(lambda n: 32 * n))
seeds = st.integers(0, 2**32 - 1)


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def adapter_of(shape: tuple[int, int], rank: int = 4, alpha: float = 8.0) -> LoraModule:
    return LoraModule("model.layers.0.self_attn.q_proj", shape[1], shape[0], rank, alpha)


def values_of(module: LoraModule, seed: int) -> dict[str, np.ndarray]:
    """Fresh values, and a B that is not zero."""
    values = fresh_values(module, seed, "kaiming")
    return values | {module.b_name: 0.1 * drawn(values[module.b_name].shape, seed)}


def forward(x: np.ndarray, weight: np.ndarray | Nf4Weight, module: LoraModule | None, values: dict) -> np.ndarray:
    """What a projection gives through the graph that models record."""
    graph = Graph("projection")
    taken = graph.tensor("x", x.shape)
    if isinstance(weight, Nf4Weight):
        held = Nf4Tensors.declare(graph, "w", (weight.shape[0], weight.shape[1]), weight.double, "float32")
        stored = dict(zip(nf4_part_names("w", weight.double), host_parts(weight), strict=True))
    else:
        held, stored = graph.tensor("w", weight.shape, "f32", "weight"), {"w": weight}
    call = ProjectionCall(graph, taken, held, None, None, "f32", None)
    ops.keep(call.record() if module is None else module.apply(call), "y")
    executor = NumpyExecutor({"projection": graph})
    for name, array in {"x": x, **stored, **values}.items():
        executor.write(name, array)
    executor.run("projection")
    return executor.read("y")


@given(shapes, seeds, st.booleans())
def test_quantising_saves_about_seven_eighths(shape, seed, double):
    """4 bits a value, and for 64 of them a scale: 4 bytes, or one and a share of the nested ones."""
    dense, weight = drawn(shape, seed), Nf4Weight.from_dense(drawn(shape, seed), double)
    blocks = -(-dense.size // 64)
    scales = blocks + 4 * -(-blocks // 256) + 4 * 256 if double else 4 * blocks
    assert weight.nbytes == (dense.size + 1) // 2 + scales
    assert (weight.nbytes - 4 * 256 * double) / dense.nbytes < 0.15


@given(shapes, seeds, st.sampled_from([1, 2, 8]))
def test_adapters_are_what_they_were_whatever_the_base_is_kept_as(shape, seed, rank):
    """Names, shapes and numbers of trained parameters; and B starts at zero, so that nothing changes at first."""
    module = adapter_of(shape, rank)
    assert module.shapes() == {module.a_name: (rank, shape[1]), module.b_name: (shape[0], rank)}
    assert sum(np.prod(s) for s in module.shapes().values()) == rank * (shape[0] + shape[1])
    values, x = fresh_values(module, seed, "kaiming"), drawn((3, shape[1]), seed)
    assert not values[module.b_name].any()
    assert values[module.a_name].any()
    for weight in (drawn(shape, seed), Nf4Weight.from_dense(drawn(shape, seed), double=True)):
        np.testing.assert_array_equal(forward(x, weight, module, values), forward(x, weight, None, {}))


@given(shapes, seeds, st.booleans())
def test_the_error_of_quantising_is_bounded_and_finite(shape, seed, double):
    dense = drawn(shape, seed)
    made = Nf4Weight.from_dense(dense, double).dequantize()
    _, absmax = quantize(dense)
    assert np.isfinite(made).all()
    assert (made != 0).mean() > 0.5  # not trivially small: most values are not those nearest to zero
    assert np.abs(made - dense).max() <= (0.152 + (1 / 64 if double else 0)) * absmax.max() * (1 + 1e-5)
    assert np.linalg.norm(made - dense) < 0.15 * np.linalg.norm(dense)


@given(shapes, seeds, st.integers(1, 5))
def test_a_forward_pass_has_the_weights_rows(shape, seed, rows):
    module, x = adapter_of(shape), drawn((rows, shape[1]), seed)
    weight = Nf4Weight.from_dense(drawn(shape, seed), double=False)
    y = forward(x, weight, module, values_of(module, seed))
    assert y.shape == (rows, shape[0])
    assert np.isfinite(y).all()


@given(shapes, seeds)
def test_double_quantisation_moves_a_result_by_little_and_saves_more(shape, seed):
    dense, x = drawn(shape, seed), drawn((3, shape[1]), seed + 1)
    single, double = (Nf4Weight.from_dense(dense, each) for each in (False, True))
    assert (single.double, double.double) == (False, True)
    np.testing.assert_array_equal(single.codes, double.codes)
    assert double.nbytes - double.nested_code.nbytes < single.nbytes
    between = np.linalg.norm(forward(x, single, None, {}) - forward(x, double, None, {}))
    assert between < 0.02 * np.linalg.norm(forward(x, single, None, {}))


@given(shapes, seeds, st.booleans(), st.sampled_from([1.0, 8.0, 33.0]))
def test_a_merged_weight_does_what_the_adapter_did(shape, seed, double, alpha):
    module, x = adapter_of(shape, alpha=alpha), drawn((3, shape[1]), seed)
    values, base = values_of(module, seed), Nf4Weight.from_dense(drawn(shape, seed), double)
    merged = base.dequantize()
    module.merge(merged, values)
    assert merged.shape == shape
    assert not np.array_equal(merged, base.dequantize())
    adapted, plain = forward(x, base, module, values), forward(x, merged, None, {})
    assert np.linalg.norm(adapted - plain) < 1e-6 * np.sqrt(shape[1]) * np.linalg.norm(adapted)


def test_what_a_weight_tells_of_itself():
    """The accessors of both forms; a weight is not changed, another is made of it."""
    dense = drawn((32, 64), 0)
    single, double = (Nf4Weight.from_dense(dense, each) for each in (False, True))
    assert single.shape == double.shape == (32, 64)
    assert single.size == 32 * 64
    assert single.codes.nbytes == 32 * 32
    assert single.absmax is not None
    np.testing.assert_array_equal(single.scales(), single.absmax)
    assert double.absmax is None
    assert double.scales().shape == single.scales().shape
    rounded = dataclasses.replace(single, dtype="bfloat16")
    assert (single.dtype, rounded.dtype) == ("float32", "bfloat16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        single.offset = 1.0  # type: ignore[misc]


# Qwen3-4B's own sizes, as a plan declares them.


def layer_projections() -> list[WeightSpec]:
    weights = parse_model_config(SHAPES["qwen3-4b"]).weights
    return [spec for spec in weights if spec.name.startswith(LAYER) and spec.kind == "projection"]


def layer_bytes(double: bool) -> dict[str, int]:
    """Bytes of each of a layer's projections on the device."""
    declared = declared_weights(layer_projections(), Storage("qlora", double_quant=double), Caps())
    return {w.spec.name.removeprefix(LAYER).removesuffix(".weight"): sum(t.nbytes for t in w.tensors) for w in declared}


@pytest.mark.parametrize(("double", "mebibytes"), [(False, 60), (True, 55)])
def test_a_layer_of_qwen3_4b_takes_less_than_its_bound(double, mebibytes):
    total = sum(layer_bytes(double).values())
    assert total < mebibytes << 20 < 100 << 20
    assert total > 48 << 20  # 101 M parameters in 4 bits


def test_the_projections_of_qwen3_4b_have_their_sizes():
    shapes = {spec.name.removeprefix(LAYER).removesuffix(".weight"): spec.shape for spec in layer_projections()}
    assert shapes == {
        **{"self_attn.q_proj": (4096, 2560), "self_attn.k_proj": (1024, 2560), "self_attn.v_proj": (1024, 2560)},
        **{"self_attn.o_proj": (2560, 4096), "mlp.gate_proj": (9728, 2560), "mlp.up_proj": (9728, 2560)},
        "mlp.down_proj": (2560, 9728),
    }
    assert layer_bytes(double=False) == {name: n * k // 2 + n * k // 64 * 4 for name, (n, k) in shapes.items()}
    assert list(adapter_of((4096, 2560), 16).shapes().values()) == [(16, 2560), (4096, 16)]
