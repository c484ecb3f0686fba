"""The directions of imports that docs/architecture.md promises."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs" / "architecture.md").read_text()

# Blocks of the map, top to bottom: a module imports from its own block or from those above.
BLOCKS = ["facts", "files", "graph", "executors", "runs"]
# `Tensor.numpy()` and `.backward()` reach down on purpose, when they are called.
LATE = {("graph", "eager")}
ONLY_THESE_TOUCH_WGPU = {"device", "native", "kernel", "replay", "info"}


def modules() -> dict[str, Path]:
    package = ROOT / "entrenar_gpu"
    return {p.stem if p.parent == package else "ops": p for p in package.rglob("*.py") if p.stem != "__init__"}


def imports(path: Path, of: str) -> set[str]:
    """Top-level names that a file imports from the package `of`, those that functions import included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == of:
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {[*a.name.split("."), ""][1] for a in node.names if a.name.split(".")[0] == of}
    return found


def block_of() -> dict[str, int]:
    """Which block of the map names each module."""
    result, current = {}, -1
    for line in MAP.splitlines():
        title = re.match(r"\| \*\*(\w+)\*\*", line)
        if title:
            current = BLOCKS.index(title[1])
        elif line.startswith("|") and current >= 0:
            for name in re.findall(r"`([\w*]+)(?:\.py|/)`", line.split("|")[1]):
                result[name] = current
    return result


def test_every_module_is_on_the_map() -> None:
    known = block_of()
    missing = [
        m for m in modules() if m not in known and not any(m.startswith(k[:-1]) for k in known if k.endswith("*"))
    ]
    assert not missing
    gone = [k for k in known if not k.endswith("*") and k not in modules()]
    assert not gone


@pytest.mark.parametrize("path", sorted((ROOT / "entrenar_gpu").rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_upwards(path: Path) -> None:
    if path.name == "__init__.py" and path.parent.name == "entrenar_gpu":
        return  # the public face names modules and imports them when they are asked for
    known = block_of()

    def level(name: str) -> int:
        starred = [v for k, v in known.items() if k.endswith("*") and name.startswith(k[:-1])]
        return known.get(name, starred[0] if starred else len(BLOCKS))

    own = "ops" if path.parent.name == "ops" else path.stem
    for name in imports(path, "entrenar_gpu") - {"__version__", ""}:
        assert level(name) <= level(own) or (own, name) in LATE, f"{own} imports {name}, which stands below it"


def test_only_the_executors_touch_wgpu() -> None:
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        if any(n.split(".")[0] == "wgpu" for n in names):
            assert name in ONLY_THESE_TOUCH_WGPU, f"{name} imports wgpu"


def test_observability_knows_nothing_of_the_trainer() -> None:
    for path in (ROOT / "observability").rglob("*.py"):
        assert not imports(path, "entrenar_gpu"), path


def test_the_trainer_leaves_observers_to_the_command_line() -> None:
    wiring = {name for name, path in modules().items() if imports(path, "observability")}
    tree = {n for n, p in modules().items() if "import observability" in p.read_text()}
    assert wiring | tree <= {"cli"}
