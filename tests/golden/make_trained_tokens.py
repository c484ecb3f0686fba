"""Records which tokens TRL and mlx-lm train of rows: `python -m tests.golden.make_trained_tokens trl` (or mlx-lm).

Each runs in an environment that has it. Writes tests/golden/trained_tokens.json, of which the other's part stays.

Labels are -100 where there is no loss. TRL's are those of its SFTTrainer, mlx-lm's those of its data sets with
`mask_prompt`, in which everything behind the offset is trained.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.data.test_chat import assistant, model_folder, user
from tests.helpers import chat_templates

FILE = Path(__file__).with_name("trained_tokens.json")
SYSTEM = {"role": "system", "content": "Be brief."}

# What the tokenizer of a case has: a chat template or none, and BOS before every text or not.
MODELS: dict[str, dict[str, Any]] = {
    "base": {"template": None, "bos": True},
    "chatml": {"template": chat_templates.QWEN25, "bos": False},
    "generation tags": {"template": chat_templates.GENERATION_TAGS, "bos": False},
    "llama3": {"template": chat_templates.LLAMA3, "bos": True},
    "qwen3": {"template": chat_templates.QWEN3, "bos": False},
}
PAIRS = [
    {"prompt": "Q: x\nA:", "completion": " y é"},
    {"prompt": "a", "completion": "b</s>"},  # a token "ab" across the border
    {"prompt": "1 2 ", "completion": "3"},
]
CHATS = [
    {"messages": [user("a"), assistant("b")]},
    {"messages": [SYSTEM, user("a b"), assistant("ab"), user("c"), assistant("d é")]},
]
SPLIT = [
    {"prompt": [SYSTEM, user("a")], "completion": [assistant("b")]},
    {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]},
]
TOOLS = [{"messages": [user("a"), assistant("b")], "tools": [{"name": "add"}]}]
TEXTS = [{"text": "hello ab"}, {"text": "hello</s>"}]
# (by whom, tokenizer, rows, --completions)
CASES: list[tuple[str, str, list[dict[str, Any]], str]] = [
    ("trl", "base", PAIRS, "raw"),
    ("trl", "chatml", PAIRS, "raw"),
    ("trl", "base", TEXTS, "raw"),
    ("trl", "generation tags", CHATS, "raw"),
    ("trl", "chatml", SPLIT, "raw"),
    ("trl", "qwen3", SPLIT, "raw"),
    ("mlx-lm", "chatml", PAIRS, "chat"),
    ("mlx-lm", "llama3", PAIRS, "chat"),
    ("mlx-lm", "qwen3", PAIRS, "chat"),
    ("mlx-lm", "chatml", CHATS[:1], "chat"),
    ("mlx-lm", "qwen3", CHATS[:1], "chat"),
    ("mlx-lm", "qwen3", TOOLS, "chat"),
    ("mlx-lm", "base", TEXTS, "chat"),
]


def make_folder(folder: Path, name: str) -> Path:
    """A model folder with the tokenizer of a case."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    template = MODELS[name]["template"]
    return model_folder(folder, config | ({"chat_template": template} if template else {}), bos=MODELS[name]["bos"])


def of_trl(tokenizer: Any, rows: list[dict[str, Any]], folder: Path) -> list[tuple[list[int], list[int]]]:
    import transformers
    import trl
    from datasets import Dataset

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    arguments = trl.SFTConfig(
        output_dir=str(folder / "out"),
        assistant_only_loss="messages" in rows[0],
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    tokenizer.pad_token = "</s>"
    model = transformers.LlamaForCausalLM(config)
    trainer = trl.SFTTrainer(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return [(row["input_ids"], row.get("labels", row["input_ids"])) for row in trainer.train_dataset]


def of_mlx_lm(tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    from types import SimpleNamespace

    from mlx_lm.tuner.datasets import create_dataset

    data = create_dataset(rows, tokenizer, SimpleNamespace(mask_prompt="text" not in rows[0]))
    found = (data.process(row) for row in rows)
    return [(list(ids), [-100] * offset + list(ids[offset:])) for ids, offset in found]


def main() -> None:
    peer = sys.argv[1]
    import importlib.metadata

    import transformers

    recorded = json.loads(FILE.read_text()) if FILE.exists() else {}
    made = []
    for by, name, rows, completions in CASES:
        if by == peer:
            with tempfile.TemporaryDirectory() as temporary:
                folder = make_folder(Path(temporary) / "model", name)
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                found = of_trl(tokenizer, rows, folder) if peer == "trl" else of_mlx_lm(tokenizer, rows)
            samples = [{"input_ids": ids, "labels": labels} for ids, labels in found]
            made.append({"tokenizer": name, "completions": completions, "rows": rows, "samples": samples})
    version, date = importlib.metadata.version(peer), datetime.now().date().isoformat()
    recorded[peer] = {"version": version, "date": date, "cases": made}
    cases = json.dumps(recorded, ensure_ascii=False).replace('{"tokenizer"', '\n{"tokenizer"')
    FILE.write_text(cases + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
