"""Attention on matrix units: which kernels, how they are cut up, and their launches.

They take the place of the kernels in plain WGSL where products are of f16 operands, the device multiplies matrices of
f16 with sums in f32 (`Caps.matrices`), and heads are whole matrices long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entrenar_gpu.graph import Caps, MatrixConfig
from entrenar_gpu.integers import ceil_div
from entrenar_gpu.ops.gemm.tiles import matrices_of

BLOCK = 64  # tokens of a block of P and dS each way
MARGIN = 8  # powers of two by which weights may exceed 1 until sums are rescaled: f16 holds up to 2^16
KEYS = (64, 32, 16)  # that may be met at a time
_BUSY = 528  # workgroups that keep a large card busy


def matrices_for(e: int, caps: Caps) -> MatrixConfig | None:
    """The matrices that heads of `e` columns are multiplied by; None where there are none or they do not fit."""
    config = matrices_of(caps)
    if config is None or config.m not in (8, 16) or e % 16 or e % config.n or e % config.k:
        return None
    if config.max_subgroup % config.m or BLOCK // config.m * config.max_subgroup > caps.max_invocations:
        return None
    blockings = (forward_blocking, dscores_blocking, products_blocking)
    return config if all(blocking(e, config, caps) for blocking in blockings) else None


def constants_of(config: MatrixConfig) -> dict[str, int]:
    """What lib/matrix.wgsl wants to know."""
    sizes = {"MM": config.m, "MN": config.n, "MK": config.k}
    return {**sizes, "SUBGROUP": config.max_subgroup, "pinned": config.pinned}


def forward_blocking(e: int, config: MatrixConfig, caps: Caps) -> Mapping[str, Any]:
    """The constants of the forward pass; none where nothing fits the device."""
    lanes = config.max_subgroup // config.m
    for keys in KEYS:
        tile, rows = BLOCK * (e // 8 + 1) * 16, BLOCK * ((keys + 4) * 4 + (keys // 2 + 4) * 4)
        whole = keys % config.n == keys % config.k == keys % (4 * lanes) == 0
        if whole and tile + rows + 4 <= caps.max_workgroup_bytes:
            return {"BQ": BLOCK, "BK": keys, "MARGIN": MARGIN}
    return {}


def dscores_blocking(e: int, config: MatrixConfig, caps: Caps) -> Mapping[str, Any]:
    """The constants of P and dS."""
    lanes = config.max_subgroup // config.m
    for keys in KEYS[1:]:
        tile, rows = max(BLOCK, 2 * keys) * (e // 8 + 1) * 16, 2 * BLOCK * (keys + 4) * 4
        if keys % config.n == keys % (8 * lanes) == 0 and tile + rows <= caps.max_workgroup_bytes:
            return {"BK": keys}
    return {}


def products_blocking(e: int, config: MatrixConfig, caps: Caps, blocks: int = 1) -> Mapping[str, Any]:
    """The constants of dq, dk and dv for so many blocks of 64 tokens a workgroup: four subgroups, two by two where
    columns can be halved."""
    across = 2 if e % (2 * config.n) == 0 else 1
    columns = e // across  # of a subgroup; some of them at a time go through workgroup memory
    step, own, lanes = BLOCK // blocks, BLOCK * blocks, config.max_subgroup // config.m
    words = max(own * (step // 8 + 1), step * (own // 8 + 1))  # of 16 bytes, of the block, which sums go through later
    for pieces in (2, 4, 8, 1) if columns % (2 * config.n) == 0 else (1,):
        part = columns // pieces
        whole = columns % (pieces * config.n) == part % (4 * lanes) == step % config.k == 0
        used = max(words, 4 * config.m * (part // 4 + 1)) + step * (e // 8 + 1)
        if whole and used * 16 <= caps.max_workgroup_bytes:
            return {"BLOCKS": blocks, "STEP": step, "TM": 16 * blocks * across, "TN": columns, "PART": part}
    return {}


def blocks_owned(e: int, config: MatrixConfig, caps: Caps) -> int:
    """Blocks of 64 tokens whose gradient a workgroup sums. Of two, each operand in workgroup memory is read half as
    often, but a subgroup holds 64 x 64 sums, as in the largest tiles of matrix products."""
    large = caps.large and config.m == config.n == 16 and config.max_subgroup == 32 and e <= 128
    return 2 if large and products_blocking(e, config, caps, 2) else 1


def split_of(workgroups: int, blocks: int, caps: Caps) -> int:
    """In how many workgroups the blocks of keys of some queries are met, for all of a card to be busy."""
    return min(ceil_div(_BUSY, workgroups), blocks) if caps.large else 1
