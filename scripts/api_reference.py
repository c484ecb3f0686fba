"""Prints docs/api.md from the docstrings of what is exported: `python scripts/api_reference.py > docs/api.md`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import entrenar_gpu

HEAD = """# The Python API

Made by `python scripts/api_reference.py > docs/api.md` from the docstrings. [python.md](python.md) shows how the parts
go together, [options.md](options.md) what the fields of `TrainConfig` do, [eager.md](eager.md) what tensors with values
can do."""
# What a run does first and last, then what stands beside it.
ORDER = (
    *("Trainer", "TrainConfig", "load", "LanguageModel", "Completion", "Score"),
    *("evaluate", "merge", "export_model", "plan", "quantize", "plot_run", "Progress"),
    *("StepObserver", "RunControl", "RunInfo", "StepRecord", "EvalRecord", "CheckpointRecord", "SampleRecord"),
    "RunSummary",
)


def entries() -> Iterator[str]:
    """Every public name: its signature and what its docstring says."""
    names = [name for name in entrenar_gpu.__all__ if name != "__version__"]
    for name in [*ORDER, *sorted(set(names) - set(ORDER))]:
        yield entry(name, getattr(entrenar_gpu, name))


def entry(name: str, found: Any) -> str:
    lines = [f"## {name}", "", f"```python\n{signature(name, found)}\n```", "", document(found)]
    if inspect.isclass(found):
        if dataclasses.is_dataclass(found) and name != "TrainConfig":
            listed = ", ".join(f"`{field.name}: {field.type}`" for field in dataclasses.fields(found) if field.repr)
            lines += ["", f"Fields: {listed}"]
        for member, value in vars(found).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                inner = value.fget if isinstance(value, property) else value
                shown = f"`.{member}`" if isinstance(value, property) else f"`.{signature(member, inner)}`"
                lines += ["", f"- {shown}: {' '.join(document(inner).split())}".removesuffix(": ")]
    return "\n".join(lines)


def signature(name: str, found: Any) -> str:
    """The signature without `self`, and without the fields of TrainConfig, which are a table of their own."""
    if name == "TrainConfig":
        return "TrainConfig(model=..., data=..., output=..., ...)"
    if getattr(found, "_is_protocol", False):
        return f"class {name}(Protocol)"
    if dataclasses.is_dataclass(found) or (inspect.isclass(found) and issubclass(found, Exception)):
        return f"class {name}"
    shown = str(inspect.signature(found)).replace("(self, ", "(").replace("(self)", "()")
    return re.sub(r"entrenar_gpu\.(\w+\.)*", "", f"{name}{shown}").replace("'", "")


def document(found: Any) -> str:
    return inspect.cleandoc(found.__doc__ or "")


def main() -> None:
    print(HEAD)
    for text in entries():
        print()
        print(text)


if __name__ == "__main__":
    main()
