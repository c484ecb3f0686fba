"""What `entrenar-gpu info` tells: engines and GPUs, and what the trainer would use of each."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

from rich.console import Console
from rich.text import Text

from entrenar_gpu import __version__
from entrenar_gpu.cli.text import printable
from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu import ENGINES, NO_GPU, Gpu, choose_gpu, engine, gpu_caps, gpus, is_host


def describe() -> dict[str, Any]:
    """GPUs of every engine in order of preference, with features, limits and abilities in use.

    `chosen` is the index of the one used among `adapters`, those of the `engine` that is used; None where
    ENTRENAR_DEVICE has NumPy instead, whose `engine` is "numpy".
    """
    engines: dict[str, Any] = {}
    for name in ENGINES:
        try:
            names = [gpu.info["device"] for gpu in gpus(name)]
            engines[name] = {"version": engine(name).version, "adapters": names, "said": engine(name).said}
        except UserError as error:
            engines[name] = {"version": None, "off": str(error), "adapters": []}
    if not any(told["adapters"] for told in engines.values()):
        raise UserError(NO_GPU)
    if is_host(None):
        name, why, chosen = "numpy", "ENTRENAR_DEVICE numpy", None
        shown = next(each for each, told in engines.items() if told["adapters"])
    else:
        choice = choose_gpu()
        shown = name = choice.gpu.engine.name
        why, chosen = choice.why, gpus(name).index(choice.gpu)
    return {
        "version": __version__,
        "wgpu": engines["wgpu"]["version"],
        "python": platform.python_version(),
        "engine": name,
        "engine_why": why,
        "engines": engines,
        "chosen": chosen,
        "adapters": [{"index": index, **_described(gpu)} for index, gpu in enumerate(gpus(shown))],
    }


def _described(gpu: Gpu) -> dict[str, Any]:
    facts = {key: gpu.info[key] for key in ("device", "vendor", "description", "adapter_type", "backend_type")}
    offered = [dataclasses.asdict(config) for config in gpu.engine.matrix_configs(gpu.adapter)]
    return {
        **facts,
        "uses": dataclasses.asdict(gpu_caps(gpu)),
        "matrix_configs": offered,
        "features": sorted(set(gpu.adapter.features) - gpu.engine.refused),
        "limits": dict(gpu.adapter.limits),
    }


def show(found: dict[str, Any]) -> None:
    """The same for a person."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"entrenar-gpu {found['version']}, wgpu {found['wgpu']}, Python {found['python']}"))
    console.print(Text(f"engine {found['engine']}: {found['engine_why']}"))
    for name, told in found["engines"].items():
        if name != found["engine"]:
            there = f"{told['version']}, {len(told['adapters'])} GPU(s)" if told["version"] else f"off: {told['off']}"
            said = told.get("said", "").splitlines()
            console.print(Text(printable(f"  {name} {there}{f'; {said[0]}' if said else ''}"), "dim"))
    for adapter in found["adapters"]:
        _show_adapter(console, adapter, adapter["index"] == found["chosen"])
    used = "NumPy is used" if found["chosen"] is None else "→ is used"
    console.print(Text(f"{used}; choose with --device INDEX|NAME|numpy or ENTRENAR_DEVICE, and --engine", "dim"))


def _show_adapter(console: Console, adapter: dict[str, Any], chosen: bool) -> None:
    uses = adapter["uses"]
    title = f"{'→' if chosen else ' '} {adapter['index']}: {adapter['device']}"
    console.print(Text(printable(title), "bold" if chosen else ""))
    memory = uses["memory_bytes"]
    known = "memory not told" if memory is None else f"{memory / 2**30:.1f} GiB"
    optional = ("f16", "subgroups", "timestamps", "timestamps_inside_passes", "matrices")
    has = [name for name in optional if uses[name]]
    off = [name for name in optional if not uses[name]]
    facts = [adapter["adapter_type"], adapter["backend_type"], adapter["description"], known]
    facts.append(f"binds {uses['max_binding_bytes'] / 2**20:.0f} MiB")
    facts.append(f"{uses['max_workgroup_bytes'] >> 10} KiB a workgroup")
    console.print(Text(printable("     " + ", ".join(facts))))
    console.print(Text("     uses " + (", ".join(has) or "no optional feature")))
    if off:
        console.print(Text("     off: " + ", ".join(off), "dim"))
    useful = {tuple(config.values()) for config in uses["matrices"]}
    for config in adapter["matrix_configs"]:
        kind = f"{config['component']} to {config['result']}"
        size = f"{config['m']}x{config['n']}x{config['k']}"
        groups = f"subgroups of {config['min_subgroup']} to {config['max_subgroup']}"
        used = "" if tuple(config.values()) in useful else " (not used)"
        console.print(Text(f"     matrices {kind} {size}, {groups}{used}"))
