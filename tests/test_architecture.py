"""The map in docs/architecture.md: every module is on it, imports point upwards, and there are no circles."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = ("entrenar_gpu", "observability")
OLD_ADDRESSES = {("observability", "live"), ("observability", "live_spans")}
ONLY_THESE_TOUCH_WGPU = ("gpu", "cli.info")


def rooms_of_the_trainer() -> list[tuple[list[str], list[str]]]:
    """(names of the rooms, names of the modules) of each row of the map, top to bottom."""
    rows = []
    for line in PAGE[PAGE.index("## Rooms") :].splitlines():
        cells = line.split("|")
        if not line.startswith("| **") and not line.startswith("| `"):
            if rows and not line.startswith("|"):
                break
            continue
        rows.append((re.findall(r"[`*]+(\w+)[`*]+", cells[1]), re.findall(r"`([\w]+)`", cells[2])))
    return rows


def rooms_of_observability() -> list[str]:
    """The rooms of observability/, from top to bottom, as the paragraph on them has it."""
    text = PAGE[PAGE.index("Its rooms, likewise in order:") :]
    return re.findall(r"(?:`|\*\*)(\w+)(?:`|\*\*)", text[: text.index("The schema of")])


def modules(package: str) -> dict[str, Path]:
    """Every module by its dotted name within the package; a package by that of its folder."""
    folder = ROOT / package
    found = {".".join(p.relative_to(folder).with_suffix("").parts): p for p in folder.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in found.items()}


def imports(path: Path, package: str) -> set[str]:
    """Dotted names within the package that a file imports, those that functions import included."""
    known, found = modules(package), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            base = (node.module or "").removeprefix(package).removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in known else base)
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix(package).removeprefix(".") for a in node.names if a.name.split(".")[0] == package
            }
    return found - {""}


def room_of(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_on_the_map_and_the_map_has_no_other() -> None:
    on_the_map = set()
    for rooms, names in rooms_of_the_trainer():
        on_the_map |= {(room, name) for room in rooms for name in names if (ROOT / "entrenar_gpu" / room).is_dir()}
        on_the_map |= {("", room) for room in rooms if not (ROOT / "entrenar_gpu" / room).is_dir()}
    there = set()
    for name, path in modules("entrenar_gpu").items():
        if path.stem not in ("__init__", "__main__"):
            there.add((room_of(name) if "." in name else "", path.stem))
    assert on_the_map == there


EVERY_MODULE = [(package, name) for package in PACKAGES for name in sorted(modules(package)) if name]


@pytest.mark.parametrize(("package", "name"), EVERY_MODULE)
def test_imports_point_upwards(package: str, name: str) -> None:
    if package == "entrenar_gpu":
        levels = {room: level for level, (rooms, _) in enumerate(rooms_of_the_trainer()) for room in rooms}
    else:
        levels = {room: level for level, room in enumerate(rooms_of_observability())}
    for other in imports(modules(package)[name], package) - {"__version__"}:
        assert levels[room_of(other)] <= levels[room_of(name)], f"{name} imports {other}, which stands below it"


@pytest.mark.parametrize(("package", "name"), EVERY_MODULE)
def test_rooms_are_entered_by_the_door(package: str, name: str) -> None:
    """What another room's `__init__` does not hand on is private to that room; the table of ops is for all."""
    if (package, name) in OLD_ADDRESSES:
        return
    for node in ast.walk(ast.parse(modules(package)[name].read_text())):
        parts = (node.module or "").split(".") if isinstance(node, ast.ImportFrom) else []
        past = len(parts) > 2 and parts[0] in PACKAGES and parts[1] not in (room_of(name), "ops")
        assert not past, f"{name} imports from {'.'.join(parts)} past the door of {parts[1]}"


@pytest.mark.parametrize("package", ["entrenar_gpu", "observability"])
def test_no_two_modules_import_each_other(package: str) -> None:
    known = modules(package)
    graph = {name: imports(path, package) & known.keys() for name, path in known.items() if name}
    assert not list(circles(graph))


def circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """Paths that come back to where they began, one for each edge that closes one."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for other in sorted(graph[name]):
                yield from walk(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        yield from walk(name, [])


def test_a_circle_is_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == [["a", "b", "c", "a"]]


def test_nothing_is_imported_under_a_second_name() -> None:
    """A module or function that needs another name where it is used has the wrong one."""
    renamed = []
    for package in ("entrenar_gpu", "observability"):
        for name, path in modules(package).items():
            for node in ast.walk(ast.parse(path.read_text())):
                ours = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
                    "entrenar_gpu",
                    "observability",
                )
                if ours and name:
                    renamed += [f"{name}: {a.name} as {a.asname}" for a in node.names if a.asname not in (None, a.name)]
    assert not renamed


def test_only_the_gpu_room_touches_wgpu() -> None:
    for name, path in modules("entrenar_gpu").items():
        tree = ast.parse(path.read_text())
        names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        if any(n.split(".")[0] == "wgpu" for n in names):
            assert name.startswith(ONLY_THESE_TOUCH_WGPU), f"{name} imports wgpu"


def test_observability_knows_nothing_of_the_trainer() -> None:
    for path in modules("observability").values():
        assert not imports(path, "entrenar_gpu"), path


def test_the_trainer_leaves_observers_to_the_command_line() -> None:
    wiring = {
        n
        for n, p in modules("entrenar_gpu").items()
        if re.search(r"^\s*(from|import) observability", p.read_text(), re.M)
    }
    assert wiring <= {"cli.main", "cli.serve"}


def test_files_that_pages_and_code_point_to_are_there() -> None:
    """A file is named alone or with some of its folder; what was moved takes its pointers along."""
    folders = ("entrenar_gpu", "observability", "shaders", "tests", "benchmarks", "scripts", "examples")
    suffixes = (".py", ".wgsl")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes]
    there = [p.relative_to(ROOT).as_posix() for p in files]
    pages = [ROOT / "README.md", ROOT / "BENCHMARKS.md", *(ROOT / "docs").glob("*.md")]
    code = [p for p in files if p.relative_to(ROOT).parts[0] in folders[:3]]
    gone = set()
    for path in (*pages, *code):
        for named in re.findall(r"(?<![\w*./}])((?:[\w-]+/)*[\w-]+\.(?:py|wgsl))\b", path.read_text(encoding="utf-8")):
            attribute = named == "dtype.wgsl"  # of a table's rows
            if not attribute and not any(f"/{file}".endswith(f"/{named}") for file in there):
                gone.add(f"{path.relative_to(ROOT)}: {named}")
    assert not gone


def test_the_tests_that_the_page_of_tests_names_are_there() -> None:
    """An ellipsis or an asterisk stands for any ending."""
    names, wrong = 0, []
    for found in re.finditer(r"`([^`\s]*)::(test_[a-z0-9_*…]+)`", (ROOT / "docs/tests.md").read_text(encoding="utf-8")):
        path = "tests/adapters/test_qlora_properties.py" if found[1] == "…" else found[1]
        there = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        if not any(fnmatch.fnmatch(name, found[2].replace("…", "*")) for name in there):
            wrong.append(found[0])
        names += 1
    assert names > 20
    assert not wrong
