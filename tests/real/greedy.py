"""Greedy answers of a pretrained model here and in transformers: `make real`, after `make models`.

    python -m tests.real.greedy [--model FOLDER] [--prompts 20] [--tokens 64] [--device DEVICE] [VARIANT ...]

Chats of an instruction-tuned model in f32, its weights as they are stored, in NF4, and in NF4 with an adapter; in
transformers from the weights that NF4 stands for, with scales in f32: of double-quantised ones host and device may
choose neighbouring codes. Each token must be transformers' own. Where the two best logits of
transformers are nearer than the bar of docs/equality.md either counts, and both go on from its token. Prints a line
for each variant, and ends with status 1 where a token is another.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from entrenar_gpu.cli import docstrings
from entrenar_gpu.config import TrainConfig
from entrenar_gpu.gpu import KernelCache, open_device
from entrenar_gpu.infer.decoder import Decoder
from tests.parity import reference

LOGITS_BAR = 1e-5  # relative; of whole models, as in tests/parity/test_decoding_parity.py
CHUNK = 32
# By name: the method whose base it is, and whether an adapter is on it.
VARIANTS = {"stored": ("lora", False), "nf4": ("qlora", False), "adapter": ("qlora", True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--model", type=Path, default=Path("artifacts/models/smollm2"))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default=None, help="as for entrenar-gpu train")
    given = parser.parse_args()
    torch.set_num_threads(max(2, torch.get_num_threads()))
    prompts = chats(given.model, given.prompts)
    kernels = None if given.device == "numpy" else KernelCache(open_device(given.device))
    held = [
        compare(name, given.model, prompts, given.tokens, given.device, kernels) for name in given.variants or VARIANTS
    ]
    return 0 if all(held) else 1


def chats(model: Path, count: int) -> dict[int, list[int]]:
    """The ids of so many questions about the standard library, each a chat that waits for its answer."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    pairs = docstrings.collect().train
    asked = [pairs[i * len(pairs) // count].prompt for i in range(count)]
    said = [[{"role": "user", "content": question}] for question in asked]
    return {
        slot: list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        for slot, messages in enumerate(said)
    }


@dataclass
class Teacher:
    """transformers, a sequence at a time: the logits that follow what it was given so far."""

    model: Any
    _caches: dict[int, Any] = field(default_factory=dict)

    def extend(self, ids: Mapping[int, list[int]]) -> dict[int, np.ndarray]:
        found = {}
        for slot, more in ids.items():
            with torch.no_grad():
                out = self.model(torch.tensor([more]), past_key_values=self._caches.get(slot), use_cache=True)
            self._caches[slot] = out.past_key_values
            found[slot] = out.logits[0, -1].numpy()
        return found


def compare(
    name: str, folder: Path, prompts: Mapping[int, list[int]], tokens: int, device: str | None, kernels: Any
) -> bool:
    """Whether every token of a variant is transformers' own."""
    method, adapted = VARIANTS[name]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        model = reference.load_model(folder, quantised=False if method == "qlora" else None)
        adapters = {}
        if adapted:
            model = reference.random_adapter(Path(work), model, target_modules="all-linear", r=16, lora_alpha=32)
            adapters = {"trained": Path(work)}
        config = TrainConfig(model=str(folder), method=method, double_quant=False, device=device)
        context = max(map(len, prompts.values())) + tokens
        with Decoder.open(config, len(prompts), context, CHUNK, adapters=adapters, kernels=kernels) as decoder:
            decoder.set_adapter("trained" if adapted else None)
            other, ties, worst = follow(decoder, Teacher(model), prompts, tokens)
    print(f"{folder.name} {name}: {len(prompts)} chats of {tokens} tokens, {other} other than transformers', {ties}"
          f" near ties; logits at most {worst:.1e} apart (bar {LOGITS_BAR:.0e}); {time.perf_counter() - begin:.0f} s",
          flush=True)  # fmt: skip
    return not other


def follow(decoder: Decoder, teacher: Teacher, prompts: Mapping[int, list[int]], tokens: int) -> tuple[int, int, float]:
    """(tokens that are neither the teacher's best nor tied with it, ties that went the other way, the largest relative
    difference of logits). Sequences go on from the teacher's token behind its end of a turn too."""
    ids: dict[int, list[int]] = {slot: list(prompt) for slot, prompt in prompts.items()}
    other = ties = 0
    worst = 0.0
    for _ in range(tokens):
        ours, theirs = decoder.extend(ids), teacher.extend(ids)
        for slot, logits in theirs.items():
            norm = float(np.linalg.norm(logits))
            mine = ours[slot][-1]
            worst = max(worst, float(np.linalg.norm(mine - logits)) / norm)
            best, chosen = int(logits.argmax()), int(mine.argmax())
            if chosen != best:
                tied = logits[best] - logits[chosen] <= LOGITS_BAR * norm
                ties, other = ties + tied, other + (not tied)
            ids[slot] = [best]
    return other, ties, worst


if __name__ == "__main__":
    sys.exit(main())
