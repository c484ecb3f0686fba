"""NF4: weights in blocks of 64 four-bit codes with one scale each, byte for byte as bitsandbytes stores them.

Source: QLoRA (arXiv 2305.14314), section 3 and appendix E; 8-bit scales: arXiv 2110.02861 and 1511.04561. Where the
papers leave room, the CPU backend of bitsandbytes 0.50 decides. Every operation below rounds once to float32 (to
nearest, ties to even), a*b+c is never contracted, and the shaders must reproduce all of it bit for bit:

quantise, block b of 64 values x along the flattened row-major weight (the last block may be shorter)
    absmax[b] = max |x|
    r         = 1 / max(absmax[b], 1e-38)           correctly rounded: `reciprocal`; a WGSL `/` is not
    y         = clamp(x * r, -1, 1)                 a short last block divides: y = x / max(absmax, 1e-38)
    code      = number of MIDPOINTS below y         `nearest_code`: a value on a midpoint takes the lower code
    byte      = code[2i] << 4 | code[2i+1]          first of two in the high nibble; an odd last nibble is 7 (0.0)
    A short last block stores max(absmax, 1e-38), a whole one absmax itself.

quantise the scales (double quantisation), groups g of 256 scales
    offset    = mean(absmax)                        summed in float64, rounded once
    d         = absmax - offset
    nested[g] = max |d|;  r = 1 / max(nested[g], 3e-39)
    i         = floor(((clamp(d * r, -1, 1) + 1) * 0.5) * 65535 + 0.5)
    code      = SCALE_STEPS[i]                      `nearest_scale_code`: nearest on a grid of 65,536 points, so not
                                                    always the nearest; a group of zeros takes code 0
dequantise
    scale[b]  = nested_code[code[b]] * nested[g] + offset        two roundings
    w         = CODEBOOK[code] * scale[b]           then rounded to bfloat16 or float16 where the state says so
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from entrenar_gpu.errors import UserError
from entrenar_gpu.integers import ceil_div

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
StateDtype = Literal["float32", "bfloat16", "float16"]

BLOCK = 64
SCALE_BLOCK = 256
SMALLEST_ABSMAX = np.float32(1e-38)
SMALLEST_NESTED = np.float32(3e-39)  # about the smallest whose reciprocal is finite
GRID_STEPS = 65535  # of the grid that 8-bit scale codes are looked up on

CODEBOOK: Floats = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)
MIDPOINTS: Floats = (CODEBOOK[:-1] + CODEBOOK[1:]) / np.float32(2)
ZERO_CODE = 7

# Elements worked on at a time: small enough for the second-level cache, a multiple of BLOCK.
_CHUNK = 1 << 16
ROUNDED_TYPES: dict[str, Any] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def dynamic_map() -> Floats:
    """The 256 sorted values of the signed 8-bit dynamic type: 7 decades, the top one with 6 bits of fraction.

    Decade i holds the 2**i midpoints of an even division of [0.1, 1] scaled by 10**(i-6), with both signs; 0 and 1 are
    added. The division is computed from both ends towards the middle, as torch.linspace does, one rounding a point.
    """
    first = np.float32(0.1)
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade
        step = np.float64((np.float32(1) - first) / np.float32(parts))
        point = np.arange(parts + 1)
        from_below, from_above = np.float64(first) + step * point, 1.0 - step * (parts - point)
        edges = np.where(point < (parts + 1) // 2, from_below, from_above).astype(np.float32)
        means = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [*means.tolist(), *(-means).tolist()]
    return np.sort(np.array(values, dtype=np.float32))


def _scale_steps(code: Floats) -> Bytes:
    """The nearest of 256 sorted values for each of the 65,536 grid points -1 + 2*i/65535; ties take the lower."""
    grid = np.float32(-1) + np.float32(2) * np.arange(GRID_STEPS + 1, dtype=np.float32) / np.float32(GRID_STEPS)
    return np.searchsorted(np.float32(0.5) * (code[:-1] + code[1:]), grid, side="left").astype(np.uint8)


SCALE_CODE: Floats = dynamic_map()
SCALE_STEPS: Bytes = _scale_steps(SCALE_CODE)


def reciprocal(absmax: Floats, floor: np.float32 = SMALLEST_ABSMAX) -> Floats:
    """1 / max(absmax, floor), rounded to nearest: the factor that brings a block into [-1, 1]."""
    result: Floats = np.reciprocal(np.maximum(absmax, floor))
    return result


def nearest_code(values: Floats) -> Bytes:
    """The NF4 code of each value in [-1, 1]: how many midpoints lie strictly below it."""
    codes = np.zeros(values.shape, dtype=np.uint8)
    above = np.empty(values.shape, dtype=np.bool_)
    for midpoint in MIDPOINTS:
        np.greater(values, midpoint, out=above)
        codes += above.view(np.uint8)
    return codes


def nearest_scale_code(values: Floats) -> Bytes:
    """The 8-bit code of each value in [-1, 1], through the grid of 65,536 points."""
    position = (values + np.float32(1)) * np.float32(0.5) * np.float32(GRID_STEPS) + np.float32(0.5)
    return SCALE_STEPS[position.astype(np.int32)]


def quantize(weight: NDArray[Any]) -> tuple[Bytes, Floats]:
    """Codes (two a byte, [ceil(n/2)]) and block scales ([ceil(n/64)]) of a floating point array of n elements.

    Works in chunks: beside the result and the input, memory stays below a megabyte. Raises UserError when the weight
    holds NaN or an infinity.
    """
    flat = weight.reshape(-1)
    packed = np.empty((flat.size + 1) // 2, dtype=np.uint8)
    scales = np.empty(ceil_div(flat.size, BLOCK), dtype=np.float32)
    whole = flat.size - flat.size % BLOCK
    for start in range(0, whole, _CHUNK):
        chunk = flat[start : min(start + _CHUNK, whole)].astype(np.float32).reshape(-1, BLOCK)
        absmax = _absmax(chunk)
        with np.errstate(under="ignore"):
            chunk *= reciprocal(absmax)[:, None]
        packed[start // 2 : (start + chunk.size) // 2] = _pack(_nearest_clamped(chunk))
        scales[start // BLOCK : (start + chunk.size) // BLOCK] = absmax
    if whole < flat.size:
        tail = flat[whole:].astype(np.float32)
        scales[-1] = max(_absmax(tail[None])[0], SMALLEST_ABSMAX)
        with np.errstate(under="ignore"):
            packed[whole // 2 :] = _pack(_nearest_clamped(tail / scales[-1]))
    return packed, scales


def _absmax(blocks: Floats) -> Floats:
    absmax: Floats = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
    if not np.isfinite(absmax).all():
        raise UserError("a weight to quantise holds NaN or an infinity")
    return absmax


def _nearest_clamped(values: Floats) -> Bytes:
    return nearest_code(np.clip(values, np.float32(-1), np.float32(1))).reshape(-1)


def _pack(codes: Bytes) -> Bytes:
    if codes.size % 2:
        codes = np.append(codes, np.uint8(ZERO_CODE))
    packed: Bytes = codes[0::2] * np.uint8(16) + codes[1::2]
    return packed


def unpack(packed: Bytes, count: int) -> Bytes:
    """The first `count` four-bit codes, one a byte."""
    codes = np.empty(packed.size * 2, dtype=np.uint8)
    codes[0::2] = packed >> 4
    codes[1::2] = packed & 15
    return codes[:count]


def quantize_scales(absmax: Floats) -> tuple[Bytes, Floats, np.float32]:
    """Double quantisation: 8-bit codes ([blocks]), nested scales ([ceil(blocks/256)]) and the offset."""
    offset = np.float32(absmax.mean(dtype=np.float64))
    return *quantize_centred(absmax - offset), offset


def quantize_centred(centred: Floats) -> tuple[Bytes, Floats]:
    """8-bit codes and nested scales of block scales from which the offset has been taken."""
    starts = np.arange(0, centred.size, SCALE_BLOCK)
    nested: Floats = np.maximum.reduceat(np.abs(centred), starts)
    with np.errstate(under="ignore"):
        normed = np.clip(
            centred * _spread(reciprocal(nested, SMALLEST_NESTED), centred.size), np.float32(-1), np.float32(1)
        )
    codes = nearest_scale_code(normed)
    codes[_spread(nested, centred.size) == 0] = 0
    return codes, nested


def expand_scales(codes: Bytes, nested: Floats, nested_code: Floats, offset: float) -> Floats:
    """Block scales from their 8-bit codes."""
    with np.errstate(under="ignore"):
        return nested_code[codes] * _spread(nested, codes.size) + np.float32(offset)


def _spread(per_group: Floats, count: int) -> Floats:
    return np.repeat(per_group, SCALE_BLOCK)[:count]


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A quantised tensor. Either `absmax` is set, or the four fields of double quantisation are.

    `codes` uint8 [ceil(n/2)]; `absmax` f32 [blocks]; `absmax_codes` uint8 [blocks]; `nested_absmax` f32
    [ceil(blocks/256)]; `nested_code` f32 [256]. `dtype` is what dequantised values are rounded to.
    """

    shape: tuple[int, ...]
    codes: Bytes
    absmax: Floats | None = None
    absmax_codes: Bytes | None = None
    nested_absmax: Floats | None = None
    nested_code: Floats | None = None
    offset: float | None = None
    dtype: StateDtype = "float32"
    block: int = BLOCK

    @classmethod
    def from_dense(cls, weight: NDArray[Any], double: bool, dtype: StateDtype = "float32") -> Nf4Weight:
        """Quantise a floating point array of any shape; `double` quantises its block scales too."""
        codes, absmax = quantize(weight)
        if not double:
            return cls(weight.shape, codes, absmax, dtype=dtype)
        absmax_codes, nested, offset = quantize_scales(absmax)
        return cls(weight.shape, codes, None, absmax_codes, nested, SCALE_CODE, float(offset), dtype)

    @property
    def double(self) -> bool:
        return self.absmax is None

    @property
    def size(self) -> int:
        """Elements of the dequantised tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of the scales in the form they are kept."""
        parts = (self.codes, self.absmax, self.absmax_codes, self.nested_absmax, self.nested_code)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def is_finite(self) -> bool:
        """Whether every value that a code can stand for is finite in `dtype`."""
        with np.errstate(over="ignore", invalid="ignore"):
            largest = np.abs(self.scales()).max(initial=0)  # the codebook ends in -1 and 1
            return bool(np.isfinite(largest.astype(ROUNDED_TYPES.get(self.dtype, np.float32))))

    def scales(self) -> Floats:
        """Block scales, f32 [blocks]; computed at each call where they are double-quantised."""
        if self.absmax is not None:
            return self.absmax
        assert self.absmax_codes is not None
        assert self.nested_absmax is not None
        assert self.nested_code is not None
        assert self.offset is not None
        return expand_scales(self.absmax_codes, self.nested_absmax, self.nested_code, self.offset)

    def dequantize(self) -> Floats:
        """The tensor in float32, its values rounded to `dtype`."""
        values, all_scales = np.empty(self.size, dtype=np.float32), self.scales()
        rounded = ROUNDED_TYPES.get(self.dtype)
        for start in range(0, values.size, _CHUNK):
            chunk = values[start : start + _CHUNK]
            scales = all_scales[start // self.block : ceil_div(start + chunk.size, self.block)]
            codes = unpack(self.codes[start // 2 : (start + chunk.size + 1) // 2], chunk.size)
            with np.errstate(under="ignore", over="ignore"):
                np.multiply(CODEBOOK[codes], np.repeat(scales, self.block)[: chunk.size], out=chunk)
                if rounded is not None:
                    chunk[:] = chunk.astype(rounded)
        return values.reshape(self.shape)
