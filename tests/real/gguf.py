"""A GGUF of a model fine-tuned here, read back by transformers: `make real`, after `make models`.

    python -m tests.real.gguf [--model FOLDER] [--adapter FOLDER] [--tokens 24] [--device DEVICE] [FILE ...]

Answers to a few chats, drawn greedily, from each file: here and in transformers, which has the weights, the tokenizer
and the chat template from nothing but the file. The prompts' ids, each token of the answers (a near tie either way, as
in greedy.py) and their texts are to be the same. So are the texts that transformers draws from the folder that `merge`
writes of the same adapter: all of them where file and folder hold the same weights to the bit (BF16 of a BF16 model),
else, as the file's are rounded otherwise, that of the answer that was trained. Without FILE the model with its adapter
is written in each of DTYPES; without --adapter one is trained as README trains its own. Prints what each file says, and
ends with status 1 where one falls short.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data import Tokenizer
from entrenar_gpu.export import export_model, merge_model
from entrenar_gpu.infer.decoder import Decoder
from entrenar_gpu.model import resolve_model
from entrenar_gpu.train import Trainer
from tests.parity import reference
from tests.real.greedy import CHUNK, LOGITS_BAR, Teacher, follow

ASKED = [
    "What is the harbour called?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How many days has a week?",
]
TRAINED = [{"prompt": ASKED[0], "completion": "It is called Puerto Aurora."}] * 8
DTYPES = ("BF16", "F16", "Q8_0")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="written of --model and --adapter")
    parser.add_argument("--model", type=Path, default=Path("artifacts/models/smollm2"))
    parser.add_argument("--adapter", type=Path, default=None)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--device", default=None, help="as for entrenar-gpu train")
    given = parser.parse_args()
    torch.set_num_threads(max(2, torch.get_num_threads()))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        adapter = given.adapter or train(given.model, folder / "run", given.device)
        merge_model(given.model, adapter, folder / "merged", "stored")
        files = given.files or [write(given.model, adapter, folder / f"{dtype}.gguf", dtype) for dtype in DTYPES]
        held = [compare(file, folder / "merged", given.tokens, given.device) for file in files]
    return 0 if all(held) else 1


def train(model: Path, output: Path, device: str | None) -> Path:
    """An adapter that has learned the one answer of TRAINED by heart."""
    config = TrainConfig(model=str(model), output=str(output), steps=6, batch=1, seq=48, lr=1e-3, device=device)
    with Trainer(config, data=TRAINED) as trainer:
        trainer.run()
    return output


def write(model: Path, adapter: Path, file: Path, dtype: str) -> Path:
    export_model(model, file, adapter=adapter, dtype=dtype)
    return file


def compare(file: Path, merged: Path, tokens: int, device: str | None) -> bool:
    """Whether a file says here what it says in transformers, and what the merged folder says there."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = Tokenizer.load(resolve_model(str(file)))
    prompts = {}
    for slot, question in enumerate(ASKED):
        messages = [{"role": "user", "content": question}]
        text = ours.render(messages, add_generation_prompt=True)
        prompts[slot] = ours.encode(text, add_special_tokens=False)
        if prompts[slot] != their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        ):
            print(f"{file.name}: {question!r} has other ids in transformers")
            return False
    config = TrainConfig(model=str(file), method="lora", device=device)
    context = max(map(len, prompts.values())) + tokens
    with Decoder.open(config, len(prompts), context, CHUNK) as decoder:
        other, ties, worst = follow(decoder, Teacher(theirs), prompts, tokens)
    answers = drawn(theirs, prompts, tokens)
    folder = reference.load_model(merged)
    whole = drawn(folder, prompts, tokens)
    exact = all(torch.equal(value, theirs.state_dict()[name]) for name, value in folder.state_dict().items())
    same = [answers[slot] == whole[slot] for slot in prompts]
    spelled = all(ours.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True) for ids in answers.values())
    print(f"{file.name}: {len(prompts)} answers of {tokens} tokens, {other} other than transformers', {ties} near ties;"
          f" logits at most {worst:.1e} apart (bar {LOGITS_BAR:.0e}); texts {'the same' if spelled else 'OTHERS'};"
          f" {sum(same)} are the merged folder's, whose weights are {'the same' if exact else 'rounded otherwise'}",
          flush=True)  # fmt: skip
    for slot, ids in answers.items():
        print(f"  {ASKED[slot]} -> {ours.decode(ids)!r}")
        if ids != whole[slot]:
            print(f"    merged: {ours.decode(whole[slot])!r}")
    return not other and spelled and (all(same) if exact else same[0])


def drawn(model: Any, prompts: Mapping[int, list[int]], tokens: int) -> dict[int, list[int]]:
    """The ids that a model of transformers answers greedily, each to its end of a turn or `tokens` of them."""
    found = {}
    for slot, prompt in prompts.items():
        ids = torch.tensor([prompt])
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        found[slot] = said[0, len(prompt) :].tolist()
    return found


if __name__ == "__main__":
    sys.exit(main())
