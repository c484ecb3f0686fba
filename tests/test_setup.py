"""scripts/setup.sh on made-up machines: what it installs as root, what it asks others for, what it repairs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

TOOLS = ["bash", "cat", "cksum", "cp", "dirname", "grep", "mkdir", "rm", "sed", "touch"]

# Stand-ins for what a machine has. Files in $MACHINE are its state; $MACHINE/calls records what was asked of it.
PYTHON = """#!/bin/sh
echo "python $*" >>"$MACHINE/calls"
case "$*" in
    *gpus*) [ -e "$MACHINE/driver" ] || exit 3 ;;
    *"version_info < (3, 11)"*) [ ! -e "$MACHINE/old-python" ] ;;
    *"import ensurepip"*) [ -e "$MACHINE/venv-module" ] ;;
    *"-venv"*) echo python3.11-venv ;;
    *"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "$PWD/$3" >"$3/bin/activate" ;;
    *"pip install"*)
        for argument; do case $argument in *" "*) exit 1 ;; esac; done
        [ ! -e "$MACHINE/offline" ] ;;
    --version) echo "Python 3.11.2" ;;
esac
"""
APT_GET = """#!/bin/sh
echo "apt-get $*" >>"$MACHINE/calls"
case "$*" in
    *update*) ;;
    *mesa-vulkan-drivers*) touch "$MACHINE/driver" ;;
    *python3.11-venv*) touch "$MACHINE/venv-module" ;;
    *python3.11*) rm "$MACHINE/old-python" ;;
esac
"""
# Ubuntu 22.04: python3 is too old, python3.11 stands beside it.
APT_CACHE = """#!/bin/sh
case "$2" in
    python3) echo "  Candidate: 3.10.6-1" ;;
    python3.11) echo "  Candidate: 3.11.0~rc1-1" ;;
    *) echo "  Candidate: (none)" ;;
esac
"""


class Machine:
    """A folder with a copy of the project's set-up and a PATH of stand-ins, on which setup.sh can be run."""

    def __init__(self, root: Path, user_id: int) -> None:
        self.root, self.project, self.path = root, root / "project", root / "bin"
        (self.project / "scripts").mkdir(parents=True)
        shutil.copy(ROOT / "scripts/setup.sh", self.project / "scripts")
        (self.project / "pyproject.toml").write_text("[project]\n")
        self.path.mkdir()
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool) or pytest.fail(f"this machine has no {tool}"))
        self.program("id", f"#!/bin/sh\necho {user_id}\n")
        self.program("python3", PYTHON)
        self.has("venv-module", "driver")

    def program(self, name: str, text: str) -> None:
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def debian(self) -> None:
        self.program("apt-get", APT_GET)
        self.program("apt-cache", APT_CACHE)

    def has(self, *states: str) -> None:
        for state in states:
            (self.root / state).touch()

    def lacks(self, *states: str) -> None:
        for state in states:
            (self.root / state).unlink()

    def setup(self, verb: str = "run", **variables: str) -> tuple[int, str, list[str]]:
        """Runs `setup.sh verb`: exit status, last line of its messages, and what it asked of the machine."""
        calls = self.root / "calls"
        calls.write_text("")
        environment = {"PATH": str(self.path), "MACHINE": str(self.root), "LC_ALL": "C", **variables}
        script = self.project / "scripts/setup.sh"
        result = subprocess.run(["bash", script, verb], env=environment, capture_output=True, text=True, timeout=60)
        return result.returncode, result.stderr.strip().rpartition("\n")[2], calls.read_text().splitlines()


@pytest.fixture
def root_machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path, user_id=0)
    machine.debian()
    return machine


@pytest.fixture
def user_machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path, user_id=1000)
    machine.debian()
    return machine


def installs(calls: list[str], what: str) -> bool:
    return any("install" in call and call.endswith(what) for call in calls)


def made_environment(calls: list[str]) -> bool:
    return any("-m venv" in call for call in calls)


def test_second_run_installs_nothing(user_machine: Machine) -> None:
    status, _, calls = user_machine.setup()
    assert status == 0
    assert installs(calls, "--editable . --group dev")
    status, _, calls = user_machine.setup()
    assert status == 0
    assert not any("install" in call for call in calls)


def test_changed_dependencies_are_installed_into_the_same_environment(user_machine: Machine) -> None:
    user_machine.setup()
    (user_machine.project / "pyproject.toml").write_text("[project]\ndependencies = ['numpy']\n")
    status, _, calls = user_machine.setup()
    assert status == 0
    assert installs(calls, "--editable . --group dev")
    assert not made_environment(calls)


def test_interrupted_installation_starts_anew(user_machine: Machine) -> None:
    user_machine.has("offline")
    assert user_machine.setup()[0] != 0
    user_machine.lacks("offline")
    status, _, calls = user_machine.setup()
    assert status == 0
    assert made_environment(calls)


def test_moved_checkout_gets_a_new_environment(user_machine: Machine) -> None:
    user_machine.setup()
    user_machine.project = user_machine.project.rename(user_machine.root / "moved")
    status, _, calls = user_machine.setup()
    assert status == 0
    assert made_environment(calls)


@pytest.mark.parametrize("fails_at", ["*", '*"version_info < (3, 11)"*', '*"import pip"*'])
def test_environment_of_a_removed_old_or_upgraded_python_is_made_anew(user_machine: Machine, fails_at: str) -> None:
    user_machine.setup()
    broken = PYTHON.replace('case "$*" in', f'case "$*" in {fails_at}) exit 1 ;;')
    (user_machine.project / ".venv/bin/python").write_text(broken)
    status, _, calls = user_machine.setup()
    assert status == 0
    assert made_environment(calls)


def test_root_gets_a_software_adapter(root_machine: Machine) -> None:
    root_machine.lacks("driver")
    status, _, calls = root_machine.setup()
    assert status == 0
    assert installs(calls, "mesa-vulkan-drivers libvulkan1")


def test_adapter_that_is_there_is_enough(root_machine: Machine) -> None:
    assert not any(call.startswith("apt-get") for call in root_machine.setup()[2])


def test_tools_need_no_adapter(user_machine: Machine) -> None:
    user_machine.lacks("driver")
    assert user_machine.setup("tools")[0] == 0


def test_ordinary_user_is_told_the_driver_packages(user_machine: Machine) -> None:
    user_machine.lacks("driver")
    status, message, calls = user_machine.setup()
    assert status == 2
    assert message.endswith("sudo apt-get install mesa-vulkan-drivers libvulkan1")
    assert not any(call.startswith("apt-get") for call in calls)


def test_system_without_apt_is_told_the_driver_packages(tmp_path: Path) -> None:
    machine = Machine(tmp_path, user_id=0)
    machine.lacks("driver")
    status, message, _ = machine.setup()
    assert status == 2
    assert message.endswith("install what your system calls: mesa-vulkan-drivers libvulkan1")


def test_root_gets_the_venv_module(root_machine: Machine) -> None:
    root_machine.lacks("venv-module")
    status, _, calls = root_machine.setup()
    assert status == 0
    assert installs(calls, " python3.11-venv")


def test_ordinary_user_is_told_the_newer_python_beside_an_old_one(user_machine: Machine) -> None:
    user_machine.has("old-python")
    status, message, _ = user_machine.setup()
    assert status == 2
    assert message.endswith("sudo apt-get install python3.11 python3.11-venv")


def test_named_python_must_be_new_enough(user_machine: Machine) -> None:
    status, message, _ = user_machine.setup(PYTHON="/nonexistent/python3")
    assert status == 2
    assert "PYTHON=/nonexistent/python3" in message


def test_named_python_replaces_another_environment(user_machine: Machine) -> None:
    user_machine.setup()
    user_machine.program("python3.13", PYTHON.replace("3.11.2", "3.13.0"))
    status, _, calls = user_machine.setup(PYTHON="python3.13")
    assert status == 0
    assert made_environment(calls)


@pytest.mark.parametrize("torch", ["torch==2.13.0", "torch --extra-index-url https://example.org/cpu"])
def test_parity_passes_pip_the_torch_asked_for(user_machine: Machine, torch: str) -> None:
    status, _, calls = user_machine.setup("parity", TORCH=torch)
    assert status == 0
    assert installs(calls, f"--group parity {torch}")
    assert (user_machine.project / ".venv-parity").is_dir()
