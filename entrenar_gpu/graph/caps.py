"""What a device can do, as far as launches and plans depend on it, and what was measured on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace


@dataclass(frozen=True)
class MatrixConfig:
    """Matrices that a subgroup multiplies: result [m, n] += left [m, k] right [k, n]. Types are WGSL's; a subgroup has
    between `min_subgroup` and `max_subgroup` invocations."""

    component: str
    result: str
    m: int
    n: int
    k: int
    min_subgroup: int
    max_subgroup: int

    @property
    def pinned(self) -> int:
        """Whether a kernel must ask for its subgroups' size, as they vary."""
        return int(self.min_subgroup != self.max_subgroup)


@dataclass(frozen=True)
class Caps:
    """What a device can do, as far as launches and plans depend on it. The defaults are WebGPU's guaranteed limits."""

    name: str = "webgpu"
    max_binding_bytes: int = 128 << 20
    max_buffer_bytes: int = 256 << 20
    max_workgroup_bytes: int = 16 << 10
    max_invocations: int = 256
    max_workgroups: int = 65535
    max_storage_buffers: int = 8
    f16: bool = False
    subgroups: bool = False
    timestamps: bool = False
    timestamps_inside_passes: bool = False
    matrices: tuple[MatrixConfig, ...] = ()  # what the device's matrix units multiply, where the engine reaches them
    software: bool = False
    memory_bytes: int | None = None  # of the GPU, where known
    free_bytes: int | None = None  # of a card's own memory, what nobody else uses, where known
    flops_per_second: float = 1e11  # assumed pace of matmuls: cuts runs into submits, tells large cards

    @property
    def large(self) -> bool:
        """Whether this is a large card, told by its assumed pace."""
        return self.flops_per_second >= 1e12

    def measured_tile(self, matmul: str) -> tuple[int, ...] | None:
        """The tile measured to be fastest for a matmul (its `tiles.key`); None where sizes alone decide."""
        return None

    def limited(self) -> Caps:
        """The same device asked for nothing but WebGPU's guaranteed limits and no optional feature."""
        return replace(Caps(), software=self.software, memory_bytes=self.memory_bytes, name=f"{self.name} (defaults)")


@dataclass(frozen=True)
class Target(Caps):
    """A device as the planner hands it to launches: what it can do, and the matmul tiles that were measured on it."""

    # By `tiles.key`. Not compared: what a device can do, and what is predicted from that, does not depend on them.
    tiles: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, caps: Caps, tiles: Mapping[str, tuple[int, ...]]) -> Target:
        return cls(**({f.name: getattr(caps, f.name) for f in fields(Caps)} | {"tiles": tiles}))

    def measured_tile(self, matmul: str) -> tuple[int, ...] | None:
        return self.tiles.get(matmul)
