"""What `entrenar-gpu info` tells: the adapters, and what the trainer would use of each."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import wgpu
from rich.console import Console
from rich.text import Text

from entrenar_gpu import __version__
from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu import NO_GPU, REFUSED_FEATURES, choose_gpu, gpu_caps, gpus


def describe() -> dict[str, Any]:
    """Adapters in order of preference, with features, limits and abilities in use; `chosen` is the index used."""
    found = gpus()
    if not found:
        raise UserError(NO_GPU)
    chosen = choose_gpu()
    return {
        "version": __version__,
        "wgpu": wgpu.__version__,
        "python": platform.python_version(),
        "chosen": found.index(chosen),
        "adapters": [
            {
                "index": index,
                **{
                    key: adapter.info[key]
                    for key in ("device", "vendor", "description", "adapter_type", "backend_type")
                },
                "uses": dataclasses.asdict(gpu_caps(adapter)),
                "features": sorted(set(adapter.features) - REFUSED_FEATURES),
                "limits": dict(adapter.limits),
            }
            for index, adapter in enumerate(found)
        ],
    }


def show(found: dict[str, Any]) -> None:
    """The same for a person."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"entrenar-gpu {found['version']}, wgpu {found['wgpu']}, Python {found['python']}",
        highlight=False,
        soft_wrap=True,
    )
    for adapter in found["adapters"]:
        uses, chosen = adapter["uses"], adapter["index"] == found["chosen"]
        console.print(
            Text(f"{'→' if chosen else ' '} {adapter['index']}: {adapter['device']}", "bold" if chosen else "")
        )
        memory = uses["memory_bytes"]
        known = "memory not told" if memory is None else f"{memory / 2**30:.1f} GiB"
        has = [name for name in ("f16", "subgroups", "timestamps") if uses[name]]
        facts = [adapter["adapter_type"], adapter["backend_type"], adapter["description"], known]
        facts.append(f"binds {uses['max_binding_bytes'] / 2**20:.0f} MiB")
        facts.append(f"{uses['max_workgroup_bytes'] >> 10} KiB a workgroup")
        console.print(Text("     " + ", ".join(facts)))
        console.print(Text("     uses " + (", ".join(has) or "no optional feature")))
    console.print(
        "→ is used; choose with --device INDEX|NAME or ENTRENAR_DEVICE", style="dim", highlight=False, soft_wrap=True
    )
