#!/usr/bin/env bash
# Sets up this checkout, from a bare Debian or Ubuntu to a machine that trains. Safe to run again: what is there is
# kept, what is missing or broken is made anew. Runs from any folder, with bash 3.2 (macOS) or newer.
#
#   scripts/setup.sh run      .venv with the project and its test tools, and a GPU adapter, real or software
#   scripts/setup.sh tools    .venv alone: enough for linters and type checks
#   scripts/setup.sh parity   .venv-parity with torch, transformers, peft and bitsandbytes, and a GPU adapter
#   scripts/setup.sh models   .venv-parity as parity without an adapter, with what reads GGUF files
#   scripts/setup.sh profile  as run, with py-spy; where that cannot be had, profiles go without functions
#   scripts/setup.sh dawn     wgpudawn into .venv, and Chromium's SwiftShader where there is no other driver for it
#   scripts/setup.sh receivers  .venv-receivers with arize-phoenix and mlflow, which spans are sent to
#   scripts/setup.sh browser  Chromium, which the test of the HTML report opens; without it that test is skipped
#
# System packages are installed by root on Debian and Ubuntu only; for anyone else the missing ones are named.
# Variables:
#   PYTHON  interpreter to build the environments with (default: the first of $interpreters that is new enough)
#   TORCH   pip's arguments for torch (default: $torch). Where PyPI's build brings CUDA along, the CPU build is smaller:
#           TORCH='torch==2.13.0'
# Exit status 2: something has to be installed by hand; the last line says what.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

interpreters="python3 python3.14 python3.13 python3.12 python3.11"
torch="torch==2.13.0"
browsers="chromium chromium-browser google-chrome"

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

# --- system packages ---------------------------------------------------------------------------------------------

# require WHY PACKAGE...: installs Debian packages, or says how and stops.
require() {
    local why=$1; shift
    if ! command -v apt-get >/dev/null; then die "$why; install what your system calls: $*"; fi
    if [ "$(id -u)" != 0 ]; then die "$why; run: sudo apt-get update && sudo apt-get install $*"; fi
    say "$why: installing $*"
    refresh_package_lists
    # The lock timeout outlasts the unattended upgrade that a fresh cloud machine runs at its first boot.
    DEBIAN_FRONTEND=noninteractive DEBCONF_NOWARNINGS=yes apt-get install -qq -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 "$@" </dev/null >/dev/null || die "apt-get could not install $*"
}

lists_are_fresh=
refresh_package_lists() {
    if [ -z "$lists_are_fresh" ]; then
        apt-get update -qq </dev/null >/dev/null || say "apt-get update failed; using the package lists that are there"
        lists_are_fresh=yes
    fi
}

# --- Python ------------------------------------------------------------------------------------------------------

# Version managers leave stand-ins on the PATH for interpreters they will not run, so each candidate has to answer.
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-$interpreters}; do
        if is_new_enough "$candidate"; then command -v "$candidate"; return; fi
    done
    return 1
}

# The newest interpreter that the distribution has beside one that is too old: Ubuntu 22.04 has 3.11 beside its 3.10.
packaged_python() {
    local name
    for name in $interpreters; do
        case $(apt-cache policy "$name" 2>/dev/null | sed -n 's/ *Candidate: //p') in
            3.1[1-9]* | 3.[2-9][0-9]*) echo "$name"; return ;;
        esac
    done
    return 1
}

# choose_python: sets $python to an interpreter of 3.11 or newer that can make virtual environments.
choose_python() {
    local package
    if ! python=$(find_python); then
        if [ -n "${PYTHON:-}" ]; then die "PYTHON=$PYTHON is not a Python of version 3.11 or newer"; fi
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then refresh_package_lists; fi
        package=$(packaged_python) || die "no Python 3.11 or newer found (tried: $interpreters): install one, with venv"
        require "no Python 3.11 or newer found" "$package" "$package-venv"
        python=$(find_python) || die "$package is installed, yet none of these is 3.11 or newer: $interpreters"
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        require "$python cannot make virtual environments" \
            "$("$python" -c 'import sys; print("python{}.{}-venv".format(*sys.version_info))')"
    fi
}

# --- virtual environments ----------------------------------------------------------------------------------------

# An environment's .setup file holds the fingerprint of what it was made from, or `unfinished` while it is being made.
# Scripts of a virtual environment hold its absolute path, so a moved checkout needs a new one: the path is part of it.
fingerprint() { echo "$PWD"; cksum pyproject.toml scripts/setup.sh; }

# make_environment FOLDER PIP-ARGUMENT...: the environment FOLDER, with the project (editable) and what is asked for.
make_environment() {
    local folder=$1; shift
    local inputs; inputs=$(fingerprint; echo "$*")
    if is_sound "$folder" && [ "$(cat "$folder/.setup" 2>/dev/null)" = "$inputs" ]; then return; fi
    if ! is_reusable "$folder"; then
        choose_python
        say "making $folder with $("$python" --version)"
        rm -rf "$folder"
        mkdir "$folder"
        echo unfinished >"$folder/.setup"
        "$python" -m venv "$folder"
    fi
    echo unfinished >"$folder/.setup"
    say "installing the project and its tools into $folder"
    # Dependency groups need pip 25.1; Debian 12 brings 23.0.
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check 'pip>=25.1' </dev/null
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable . "$@" </dev/null
    echo "$inputs" >"$folder/.setup"
}

# What an interrupted pip leaves behind can look installed and not be, so `unfinished` is never built upon.
is_reusable() { [ "$(cat "$1/.setup" 2>/dev/null)" != unfinished ] && was_made_here "$1" && is_sound "$1"; }

was_made_here() { grep -Fqs "$PWD/$1" "$1/bin/activate"; }

# An upgrade of the system's Python leaves an environment without its packages, pip among them.
is_sound() {
    is_new_enough "$1/bin/python" && "$1/bin/python" -c 'import pip' 2>/dev/null &&
        { [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" --version 2>/dev/null)" = "$("$1/bin/python" --version)" ]; }
}

# --- GPU adapter -------------------------------------------------------------------------------------------------

# Exit status 3 is "none", so that a trainer or wgpu that cannot be loaded at all shows its own error.
probe_adapters='import sys; from entrenar_gpu.gpu import gpus; sys.exit(0 if gpus("wgpu") else 3)'

has_adapter() {
    local status=0
    "$1/bin/python" -c "$probe_adapters" || status=$?
    case $status in
        0) return 0 ;;
        3) return 1 ;;
        *) die "GPU adapters cannot be listed from $1; the error is above" ;;
    esac
}

make_adapter() {
    if has_adapter "$1"; then return; fi
    require "no GPU adapter found (Vulkan, Metal or DX12), so Mesa's software Vulkan is needed" \
        mesa-vulkan-drivers libvulkan1
    has_adapter "$1" || die "Mesa's software Vulkan is installed, yet no adapter is found; see vulkaninfo --summary"
}

# --- py-spy ------------------------------------------------------------------------------------------------------

make_profiler() {
    if [ -x "$1/bin/py-spy" ]; then return; fi
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: 'py-spy>=0.4' </dev/null ||
        say "py-spy could not be installed: going on without"
}

# --- Chromium ----------------------------------------------------------------------------------------------------

make_browser() {
    local name
    for name in $browsers; do
        if command -v "$name" >/dev/null; then return; fi
    done
    require "no Chromium found" chromium
}

# --- Dawn --------------------------------------------------------------------------------------------------------

make_dawn() {
    "$1/bin/python" -c 'from entrenar_gpu.gpu.engines import installed_version; installed_version()' 2>/dev/null ||
        "$1/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[dawn]' </dev/null
}

# --- conversion of GGUF files ------------------------------------------------------------------------------------

make_converter() {
    "$1/bin/python" -c 'import gguf' 2>/dev/null ||
        "$1/bin/python" -m pip install --quiet --disable-pip-version-check --group models </dev/null
}

case "${1:-}" in
    run) make_environment .venv --group dev; make_adapter .venv ;;
    tools) make_environment .venv --group dev ;;
    parity)
        # shellcheck disable=SC2086  # TORCH may hold pip options beside the requirement
        make_environment .venv-parity --group parity ${TORCH:-$torch}
        make_adapter .venv-parity
        ;;
    models)
        # shellcheck disable=SC2086
        make_environment .venv-parity --group parity ${TORCH:-$torch}
        make_converter .venv-parity
        ;;
    profile) make_environment .venv --group dev; make_adapter .venv; make_profiler .venv ;;
    browser) make_browser ;;
    receivers) make_environment .venv-receivers --group receivers ;;
    dawn) make_environment .venv --group dev; make_dawn .venv; make_browser ;;
    *) die "usage: scripts/setup.sh run|tools|parity|models|profile|receivers|dawn|browser" ;;
esac
