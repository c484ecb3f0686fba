"""Ops from outside: the page's example as it stands, on the device and in NumPy, and what `check` finds wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest

from entrenar_gpu import CustomOp, eager, tensor
from entrenar_gpu.errors import UserError
from tests import ROOT

SCALED = """
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) at: vec3<u32>) {
  if (at.x < {{ size }}u) { out[at.x] = {{ factor }} * x[at.x]{{ " + 1.0" if raised else "" }}; }
}
"""
X = np.linspace(-2, 2, 300)


@pytest.fixture(params=["gpu", "numpy"])
def device(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(eager, "_device", lambda: None)
    elif eager._device() is None:
        pytest.skip("no GPU adapter")
    return request.param


def scaled(**changes) -> CustomOp:
    rules = {
        "wgsl": SCALED,
        "reference": lambda x, factor, raised: factor * x + raised,
        "gradient": lambda call: {"x": call.factor * call.dout},
    }
    return CustomOp("scaled", **(rules | changes))


def test_the_pages_example_runs_and_learns(device):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/custom-ops.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code.replace("loss.backward()", "loss.backward(); losses.append(float(loss))").replace(
        "for step in", "losses = []\nfor step in"), names)  # fmt: skip
    assert len(names["losses"]) == 20
    assert names["losses"][-1] < names["losses"][0]


def test_attributes_are_constants_of_the_shader(device):
    op = scaled()
    op.check(x=X, factor=0.1, raised=True)
    np.testing.assert_array_equal(op(x=tensor(X), factor=2.0, raised=False).numpy(), 2 * X.astype(np.float32))


def test_outputs_may_have_shapes_of_their_own(device):
    rows = CustomOp(
        "rows",
        wgsl="""
@compute @workgroup_size(1)
fn main(@builtin(workgroup_id) at: vec3<u32>) {
  var total = 0.0;
  for (var i = 0u; i < {{ x_shape[1] }}u; i++) { total += x[at.x * {{ x_shape[1] }}u + i]; }
  totals[at.x] = total;
  counts[at.x] = {{ x_shape[1] }}.0 + f32(ids[at.x]);
}
""",
        reference=lambda x, ids: (x.sum(1), np.full(len(x), float(x.shape[1])) + ids),
        outputs=["totals", "counts"],
        shapes=lambda call: [call.x.shape[:1]] * 2,
        workgroups=lambda call: call.x.shape[0],
        gradient=lambda call: {"x": call.dtotals[:, None] * ones_like(call.x)} if call.dtotals is not None else {},
    )
    rows.check(x=np.random.default_rng(0).standard_normal((7, 5)), ids=np.arange(7))


def ones_like(t):
    return 0.0 * t + 1.0


WRONG = {
    "the shader": ({"wgsl": SCALED.replace("* x", "* 1.001 * x")}, "scaled: out on the device: .* apart"),
    "the rule": (
        {"gradient": lambda call: {"x": 1.001 * call.factor * call.dout}},
        "scaled: the gradient of x: .* apart",
    ),
    "a rule without upstream": ({"gradient": lambda call: {"x": 0.0 * call.x + call.factor}}, "the gradient of x"),
    "the reference's shape": ({"reference": lambda x, factor, raised: factor * x[None]}, "shape"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_check_finds_what_is_wrong(fault):
    changes, message = WRONG[fault]
    if fault == "the shader" and eager._device() is None:
        pytest.skip("no GPU adapter")
    with pytest.raises(AssertionError, match=message):
        scaled(**changes).check(x=X, factor=0.5, raised=False)


def test_a_definition_that_is_run_again_is_another_op(device):
    values = [scaled(wgsl=SCALED.replace("+ 1.0", f"+ {n}.0"), reference=lambda x, factor, raised, n=n: factor * x + n)(
        x=tensor(X), factor=1.0, raised=True).numpy()[0] for n in (1, 5)]  # fmt: skip
    assert values == [-1.0, 3.0]


def test_what_is_no_use_of_it_is_said():
    op = scaled()
    with pytest.raises(TypeError, match="scaled: takes tensors of one graph by name"):
        op(x=X, factor=1.0, raised=False)
    with pytest.raises(TypeError, match="scaled: factor is a list"):
        op(x=tensor(X), factor=[1.0], raised=False)
    with pytest.raises(UserError, match="name: 'a b' is not an identifier"):
        CustomOp("a b", wgsl="", reference=lambda x: x)
    loose = scaled(gradient=lambda call: {"y": call.dout})
    with pytest.raises(ValueError, match="scaled: a gradient of 'y', which is no input"):
        loose(x=tensor(X, requires_grad=True), factor=1.0, raised=False).sum().backward()
    missing = scaled(gradient=lambda call: {"x": call.slope * call.dout})
    with pytest.raises(AttributeError, match="this op has no 'slope'; it has x, factor, raised, out, dout"):
        missing(x=tensor(X, requires_grad=True), factor=1.0, raised=False).sum().backward()
