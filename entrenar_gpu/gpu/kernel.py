"""Shader templates to pipelines: declarations derived from a launch's bindings, one compile for equal launches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jinja2

from entrenar_gpu.dtypes import WGSL_TYPES
from entrenar_gpu.gpu.device import Device
from entrenar_gpu.graph import Launch

_PACKAGE = Path(__file__).parents[1]
# A wheel carries the shaders inside the package; a checkout keeps them beside it.
SHADER_FOLDER = next(p for p in (_PACKAGE / "shaders", _PACKAGE.parent / "shaders") if p.is_dir())
LIBRARY = "lib"  # its files are included by others, as "lib/grid.wgsl", and are no shaders themselves


def shader_files() -> dict[str, Path]:
    """Every shader's template by its name, which is unique whatever folder it lies in."""
    found = sorted(p for p in SHADER_FOLDER.rglob("*.wgsl") if p.parent.name != LIBRARY)
    return {path.stem: path for path in found}


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([SHADER_FOLDER, *(path.parent for path in shader_files().values())]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["dialect"] = "chromium"  # of matrices: see lib/matrix.wgsl
    return environment


def render(launch: Launch) -> str:
    """The WGSL of a launch: directives and declarations derived from its bindings, then the template."""
    lines = ["enable f16;"] if _uses_f16(launch) else []
    for index, binding in enumerate(launch.bindings):
        scalar = "u32" if binding.words else WGSL_TYPES[binding.tensor.dtype]
        element = scalar if binding.vector == 1 else f"vec{binding.vector}<{scalar}>"
        access = "read_write" if binding.write else "read"
        lines.append(f"@group(0) @binding({index}) var<storage, {access}> {binding.name}: array<{element}>;")
    environment = _environment()
    if launch.source:
        template = environment.from_string(launch.source)
    else:
        template = environment.get_template(f"{launch.shader}.wgsl")
    body = template.render(**launch.constants)
    return "\n".join(lines) + "\n" + body


def _uses_f16(launch: Launch) -> bool:
    return any(b.tensor.dtype == "f16" and not b.words for b in launch.bindings) or bool(launch.constants.get("f16"))


class KernelCache:
    """Pipelines of one device, by what distinguishes them: the rendered text and the access of each binding."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._pipelines: dict[str, tuple[Any, Any]] = {}
        self._layouts: dict[tuple[bool, ...], Any] = {}

    def __len__(self) -> int:
        return len(self._pipelines)

    def pipeline(self, launch: Launch) -> tuple[Any, Any]:
        """(compute pipeline, bind group layout) of a launch. A compile error shows the numbered source."""
        code = self.device.engine.complete(render(launch))
        if code not in self._pipelines:
            layout = self._layout(tuple(b.write for b in launch.bindings))
            handle = self.device.handle
            try:
                module = self.device.engine.shader_module(handle, launch.shader, code, launch.trusted)
                pipeline = handle.create_compute_pipeline(
                    label=launch.shader,
                    layout=handle.create_pipeline_layout(bind_group_layouts=[layout]),
                    compute={"module": module, "entry_point": "main"},
                )
            except self.device.engine.api.GPUError as error:
                numbered = "\n".join(f"{n:4} {line}" for n, line in enumerate(code.splitlines(), 1))
                raise RuntimeError(f"shader {launch.shader} does not compile: {error}\n{numbered}") from error
            self._pipelines[code] = (pipeline, layout)
        return self._pipelines[code]

    def _layout(self, writes: tuple[bool, ...]) -> Any:
        if writes not in self._layouts:
            api = self.device.engine.api
            kinds = api.BufferBindingType
            self._layouts[writes] = self.device.handle.create_bind_group_layout(
                entries=[
                    {
                        "binding": index,
                        "visibility": api.ShaderStage.COMPUTE,
                        "buffer": {"type": kinds.storage if write else kinds.read_only_storage},
                    }
                    for index, write in enumerate(writes)
                ]
            )
        return self._layouts[writes]
