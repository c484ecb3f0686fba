"""What ran: the facts of a run in words, for the terminal and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from observability import schema
from observability.detect import Analysis, size
from observability.read import one_line, whole

_MOST_CONFIG: Final = 1 << 20  # bytes
_CONFIG_FILE: Final = "run.json"
# In order: what the run is called here, and the attribute or, in lower case, the key of the configuration.
_FACTS: Final = (
    ("Model", schema.RUN_MODEL),
    ("Data", "data"),
    ("Method", schema.RUN_METHOD),
    ("Rank", "rank"),
    ("Target modules", "target"),
    ("Precision", schema.RUN_PRECISION),
    ("Batch", "batch"),
    ("Sequence length", "seq"),
    ("Micro-batches per step", "accumulate"),
    ("Learning rate", "lr"),
    ("Planned steps", schema.RUN_TOTAL_STEPS),
    ("Parameters", schema.RUN_PARAMETERS),
    ("Trained parameters", schema.RUN_TRAINABLE),
    ("Planned memory", schema.RUN_PLANNED_BYTES),
    ("Device", schema.GPU_ADAPTER),
    ("Backend", schema.GPU_BACKEND),
    ("Driver", schema.GPU_DRIVER),
    ("entrenar-gpu", schema.SERVICE_VERSION),
    ("Python", schema.PYTHON_VERSION),
    ("System", schema.OS_DESCRIPTION),
    ("Status", schema.RUN_STATUS),
    ("Run folder", schema.RUN_OUTPUT),
    ("Run id", schema.RUN_ID),
)


def run_name(analysis: Analysis) -> str:
    """The run's folder and the one around it; its id only where the trace tells no folder."""
    facts = analysis.table.facts
    parts = [part for part in str(facts.get(schema.RUN_OUTPUT) or "").replace("\\", "/").split("/") if part]
    return one_line("/".join(parts[-2:]) or str(facts.get(schema.RUN_ID) or analysis.source))


def run_facts(analysis: Analysis) -> list[tuple[str, str]]:
    """(name, value) of what the trace, or the run folder, tells of the run."""
    facts, config = analysis.table.facts, run_config(analysis)
    result = [("Date", date(analysis))]
    for name, key in _FACTS:
        value = config.get(key) if key in config else facts.get(key)
        if value is not None and value != "" and not (name == "Rank" and facts.get(schema.RUN_METHOD) == "full"):
            result.append((name, _worded(key, value)))
    return result


def subtitle(analysis: Analysis) -> str:
    """Model, method, shape and device in a line."""
    facts, config = analysis.table.facts, run_config(analysis)
    model = str(facts.get(schema.RUN_MODEL) or "").rstrip("/").rpartition("/")[2]
    shape = f"{config['batch']} x {config['seq']} tokens" if {"batch", "seq"} <= config.keys() else ""
    told = (model, facts.get(schema.RUN_METHOD), facts.get(schema.RUN_PRECISION), shape, facts.get(schema.GPU_ADAPTER))
    parts = [str(part) for part in told if part]
    return one_line(" · ".join([*parts, date(analysis)])) if parts else f"read from {analysis.source}"


def date(analysis: Analysis) -> str:
    """When the first step began, in this machine's time."""
    try:
        return datetime.fromtimestamp(analysis.table.began_ns / 1e9).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    except (OverflowError, OSError, ValueError):
        return "unknown"


def run_config(analysis: Analysis) -> Mapping[str, Any]:
    """The configuration: as the trace has it, or the run folder where the run did not end; empty where neither does."""
    config = _mapping(str(analysis.table.facts.get(schema.RUN_CONFIG, "")))
    if config:
        return config
    folder = Path(analysis.source)
    path = (folder if folder.is_dir() else folder.parent) / _CONFIG_FILE
    try:
        with path.open("rb") as file:
            told = _mapping(file.read(_MOST_CONFIG).decode("utf-8", "replace")).get("config")
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _worded(key: str, value: Any) -> str:
    """A count as people write it; as it is, what is none or should have been one."""
    count = whole(value, -1) if key in schema.ATTRIBUTES and schema.ATTRIBUTES[key].type == "int" else -1
    if count < 0:
        return one_line(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return size(count) if key.endswith("bytes") else f"{count:,}"
