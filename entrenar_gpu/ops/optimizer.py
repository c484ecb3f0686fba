"""The update: global gradient norm, clipping, skipping, and AdamW, Adam or SGD over whole pages of parameters.

What must survive from step to step without the host lives in one `state` tensor, f32 [STATE]: see `STATE_FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.graph import Caps, Launch, Node, Tensor, grid_of, literal, reads, writes
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.registry import Op, Placement, in_place, record, register, same_as

# taken: updates applied; skipped: steps whose loss or gradient was not finite; in_a_row: of these, the latest run.
# correction1/2: 1 - beta^taken, kept as a running average of ones, since 1 - beta^t cancels in f32 for small t.
# loss, grad_norm: of the step just finished; apply: 1 or 0; clip: the factor that takes the loss scale off the
# gradients and brings their norm down to the limit. steady: steps since the loss scale last changed.
STATE_FIELDS = (
    "taken",
    "skipped",
    "in_a_row",
    "correction1",
    "correction2",
    "loss",
    "grad_norm",
    "apply",
    "clip",
    "steady",
)
STATE = 16
NORM_CHUNK = 16384  # elements a workgroup squares and sums

# Mixed-precision training's rule (Micikevicius et al., arXiv 1710.03740, section 3.2): a step whose gradients overflow
# is skipped and halves the loss scale; a run of good ones doubles it.
FIRST_SCALE, LARGEST_SCALE, STEPS_TO_DOUBLE = 2.0**12, 2.0**24, 500


def field(state: np.ndarray, name: str) -> float:
    return float(state[STATE_FIELDS.index(name)])


def _index(name: str) -> int:
    return STATE_FIELDS.index(name)


def sum_of_squares(page: Tensor) -> Tensor:
    """Partial sums of squares of a page of gradients, f32 [ceil(n / NORM_CHUNK)]."""
    return record("sum_of_squares", page=page)[0]


def _squares_reference(node: Node, page: np.ndarray) -> Sequence[np.ndarray]:
    padded = np.zeros(node.output.size * NORM_CHUNK, page.dtype)
    padded[: page.size] = page.reshape(-1)
    chunks = padded.reshape(-1, NORM_CHUNK)
    with np.errstate(over="ignore", invalid="ignore"):
        return [(chunks * chunks).sum(axis=1)]


def _squares_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    page, out = node.inputs["page"], node.output
    constants = {"N": page.size, "CHUNK": NORM_CHUNK, "PARTS": out.size, "WIDTH": 256}
    return [Launch("sum_of_squares", (reads("page", page), writes("out", out)), constants, grid_of(out.size, caps))]


register(
    Op(
        "sum_of_squares",
        lambda node: [((ceil_div(node.inputs["page"].size, NORM_CHUNK),), "f32")],
        _squares_reference,
        _squares_launch,
        flops=lambda node: 2 * node.inputs["page"].size,
    )
)


def decide(
    state: Tensor,
    loss: Tensor,
    scale: Tensor,
    partials: Sequence[Tensor],
    clip: float,
    betas: tuple[float, float],
    adapts: bool = False,
) -> Tensor:
    """Turn the step's loss and gradient norm into the new state: whether to apply the update, and how much to clip.

    The gradients are `scale` f32 [1] times the true ones. clip factor = min(1, clip / (norm + 1e-6)) / scale, as
    torch.nn.utils.clip_grad_norm_ does it to the true norm; clip 0 never clips. Updates `state` in place, sets the
    accumulated `loss` back to zero and, where it `adapts`, adjusts the scale.
    """
    inputs = {"state": state, "loss": loss, "scale": scale, "partials": list(partials)}
    new, zero, rescaled = record("decide", **inputs, clip=clip, betas=betas, adapts=adapts)
    in_place(zero, loss)
    in_place(rescaled, scale)
    return in_place(new, state)


def _decide_reference(
    node: Node, state: np.ndarray, loss: np.ndarray, scale: np.ndarray, partials: Sequence[np.ndarray] = ()
) -> Sequence[np.ndarray]:
    kind = state.dtype.type
    new, new_scale = state.copy(), scale.copy()
    over = scale[0] if node.attrs["adapts"] else kind(1)
    with np.errstate(over="ignore", invalid="ignore"):
        norm = np.sqrt(sum((p.sum(dtype=kind) for p in partials), kind(0))) / over
    good = bool(np.isfinite(norm)) and bool(np.isfinite(loss[0]))
    new[_index("loss")], new[_index("grad_norm")] = loss[0], norm
    new[_index("apply")] = 1 if good else 0
    limit = node.attrs["clip"]
    new[_index("clip")] = (min(kind(1), kind(limit) / (norm + kind(1e-6))) if limit > 0 and good else 1) / over
    if node.attrs["adapts"]:
        new[_index("steady")] = new[_index("steady")] + 1 if good else 0
        if not good:
            new_scale[0] = max(scale[0] / 2, 1)
        elif new[_index("steady")] >= STEPS_TO_DOUBLE:
            new_scale[0], new[_index("steady")] = min(scale[0] * 2, LARGEST_SCALE), 0
    if good:
        new[_index("taken")] += 1
        new[_index("in_a_row")] = 0
        for name, beta in zip(("correction1", "correction2"), node.attrs["betas"], strict=True):
            new[_index(name)] = new[_index(name)] * kind(beta) + kind(1 - beta)
    else:
        new[_index("skipped")] += 1
        new[_index("in_a_row")] += 1
    return [new, np.zeros_like(loss), new_scale]


def _decide_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    partials = node.group("partials")
    beta1, beta2 = node.attrs["betas"]
    constants: dict[str, Any] = {
        **{name: i for i, name in enumerate(STATE_FIELDS)},
        "limit": literal(node.attrs["clip"]),
        "clips": node.attrs["clip"] > 0,
        "beta1": literal(beta1),
        "beta2": literal(beta2),
        "rest1": literal(1 - beta1),
        "rest2": literal(1 - beta2),
        "adapts": node.attrs["adapts"],
        "largest": literal(LARGEST_SCALE),
        "steps_to_double": literal(STEPS_TO_DOUBLE),
        "WIDTH": 256,
    }
    # Pages beyond what one dispatch can bind are added up first, into the state's spare word.
    launches, room = [], caps.max_storage_buffers - 3
    groups = [partials[i : i + room] for i in range(0, len(partials), room)] or [()]
    for number, group in enumerate(groups):
        bindings = [reads(f"part{i}", t) for i, t in enumerate(group)]
        bindings += [writes("state", node.outputs[0]), writes("loss_sum", node.outputs[1])]
        if node.attrs["adapts"]:
            bindings.append(writes("scale", node.outputs[2]))
        sizes = [t.size for t in group]
        each = constants | {"sizes": sizes, "first": number == 0, "last": number == len(groups) - 1, "spare": STATE - 1}
        launches.append(Launch("decide", tuple(bindings), each, (1, 1, 1)))
    return launches


register(
    Op(
        "decide",
        same_as("state", "loss", "scale"),
        _decide_reference,
        _decide_launch,
        inplace=lambda node: [(0, "state"), (1, "loss"), (2, "scale")],
    )
)


def adam(
    page: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    state: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    decoupled: bool,
) -> None:
    """One step of AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) or, not `decoupled`, Adam with L2 decay
    (Kingma & Ba, arXiv 1412.6980, algorithm 1) over a page, in place; the gradient page is left at zero.

    page, grad, m, v f32 [n]; lr f32 [1]; state as `decide` left it: nothing moves when it says not to apply.
    """
    held = {"page": page, "grad": grad, "m": m, "v": v}
    attrs = {"betas": tuple(betas), "eps": eps, "decay": decay, "decoupled": decoupled}
    for out, target in zip(record("adam", **held, state=state, lr=lr, **attrs), held.values(), strict=True):
        in_place(out, target)


def sgd(
    page: Tensor, grad: Tensor, velocity: Tensor | None, state: Tensor, lr: Tensor, momentum: float, decay: float
) -> None:
    """v = momentum v + g + decay p; p -= lr v, as torch.optim.SGD; in place, the gradient page is left at zero."""
    held = {"page": page, "grad": grad} | ({"v": velocity} if velocity is not None else {})
    outs = record("sgd", **held, state=state, lr=lr, momentum=momentum, decay=decay)
    for out, target in zip(outs, held.values(), strict=True):
        in_place(out, target)


def _adam_reference(
    node: Node,
    page: np.ndarray,
    grad: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    state: np.ndarray,
    lr: np.ndarray,
) -> Sequence[np.ndarray]:
    if not field(state, "apply"):
        return [page, np.zeros_like(grad), m, v]
    kind = page.dtype.type
    beta1, beta2 = node.attrs["betas"]
    decay, rate = kind(node.attrs["decay"]), lr[0]
    g = grad * state[_index("clip")]
    if node.attrs["decoupled"]:
        page = page * (1 - rate * decay)
    else:
        g = g + decay * page
    m = kind(beta1) * m + kind(1 - beta1) * g
    v = kind(beta2) * v + kind(1 - beta2) * g * g
    root = np.sqrt(v) / np.sqrt(state[_index("correction2")]) + kind(node.attrs["eps"])
    return [page - rate / state[_index("correction1")] * m / root, np.zeros_like(grad), m, v]


def _sgd_reference(
    node: Node,
    page: np.ndarray,
    grad: np.ndarray,
    state: np.ndarray,
    lr: np.ndarray,
    v: np.ndarray | None = None,
) -> Sequence[np.ndarray]:
    if not field(state, "apply"):
        return [page, np.zeros_like(grad), *([] if v is None else [v])]
    kind = page.dtype.type
    g = grad * state[_index("clip")] + kind(node.attrs["decay"]) * page
    step = g if v is None else kind(node.attrs["momentum"]) * v + g
    return [page - lr[0] * step, np.zeros_like(grad), *([] if v is None else [step])]


def _update_launch(node: Node, caps: Caps, placed: Placement) -> Sequence[Launch]:
    held, attrs = _held(node), node.attrs
    constants: dict[str, Any] = {
        "mode": node.op if node.op == "adam" else "momentum" if len(held) == 3 else "sgd",
        "N": node.output.size,
        "apply": _index("apply"),
        "clip": _index("clip"),
        "correction1": _index("correction1"),
        "correction2": _index("correction2"),
        "decays": attrs["decay"] > 0,
        "decay": literal(attrs["decay"]),
        "decoupled": attrs.get("decoupled", False),
        "momentum": literal(attrs.get("momentum", 0.0)),
        "eps": literal(attrs.get("eps", 0.0)),
    }
    beta1, beta2 = attrs.get("betas", (0.0, 0.0))
    constants |= {"beta1": literal(beta1), "rest1": literal(1 - beta1)}
    constants |= {"beta2": literal(beta2), "rest2": literal(1 - beta2)}
    bindings = [reads(name, node.inputs[name]) for name in ("state", "lr")]
    bindings += [writes(name, out) for name, out in zip(held, node.outputs, strict=True)]
    return [Launch("optimizer", tuple(bindings), constants, grid_of(ceil_div(node.output.size, 256), caps))]


def _held(node: Node) -> dict[str, Tensor]:
    """The pages that an update reads and overwrites."""
    return {name: t for name, t in node.inputs.items() if name not in ("state", "lr")}


for _name, _ref in (("adam", _adam_reference), ("sgd", _sgd_reference)):
    register(
        Op(
            _name,
            lambda node: [(t.shape, t.dtype) for t in _held(node).values()],
            _ref,
            _update_launch,
            flops=lambda node: 14 * node.output.size,
            inplace=lambda node: list(enumerate(_held(node))),
        )
    )


@dataclass(frozen=True)
class Optimizer:
    """How many moments it keeps of a page of parameters, and what records its step over one, in place.

    step(page, grad, moments, state, lr, decay, options): the options are those of the run.
    """

    moments: int
    step: Callable[[Tensor, Tensor, Sequence[Tensor], Tensor, Tensor, float, TrainConfig], None]


def _adam_step(decoupled: bool) -> Optimizer:
    def step(
        page: Tensor, grad: Tensor, moments: Sequence[Tensor], state: Tensor, lr: Tensor, decay: float, c: TrainConfig
    ) -> None:
        m, v = moments
        adam(page, grad, m, v, state, lr, (c.beta1, c.beta2), c.eps, decay, decoupled)

    return Optimizer(2, step)


def _sgd_step(
    page: Tensor, grad: Tensor, moments: Sequence[Tensor], state: Tensor, lr: Tensor, decay: float, c: TrainConfig
) -> None:
    sgd(page, grad, moments[0] if c.momentum else None, state, lr, c.momentum, decay)


# By the names that --optimizer takes (config/train_config.py).
OPTIMIZERS = {"adamw": _adam_step(True), "adam": _adam_step(False), "sgd": Optimizer(1, _sgd_step)}
