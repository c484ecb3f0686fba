"""Text from a model and its adapter: one forward pass a token, without a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from entrenar_gpu.config import TrainConfig
from entrenar_gpu.data import Tokenizer
from entrenar_gpu.errors import UserError
from entrenar_gpu.gpu import KernelCache
from entrenar_gpu.graph import Caps, Graph
from entrenar_gpu.model import resolve_model
from entrenar_gpu.train import RunShape, Session, logits_graph


class Generator:
    """Samples continuations of prompts of at most `config.seq` tokens, the continuation included."""

    def __init__(self, config: TrainConfig, with_adapter: bool, kernels: KernelCache | None = None) -> None:
        """Load the model, and the adapter of `config.adapter_init` when `with_adapter`; `kernels` as for a Session."""

        def trace(shape: RunShape, caps: Caps) -> dict[str, Graph]:
            return {"logits": logits_graph(shape, caps)}

        self.config = replace(config, batch=1)
        self.tokenizer = Tokenizer.load(resolve_model(config.model))
        self.session = Session.open(self.config, trace, with_adapter=with_adapter, kernels=kernels)

    def encode(self, prompt: str) -> list[int]:
        """The prompt as a message of the user where there is a chat template, unless raw; else as it is."""
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # bytes of the command line
            raise UserError("--prompt: not UTF-8 text")
        if self.config.completions == "raw" or not self.tokenizer.has_chat_template:
            return self.tokenizer.encode_prompt(prompt)
        text = self.tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
        """The continuation of a prompt, without special tokens, up to a text that closes the model's turns."""
        return "".join(self.pieces(prompt, max_tokens, temperature, seed))

    def pieces(self, prompt: str, max_tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The same, piece by piece as it is made.

        What may yet change waits for the next token or the end: bytes that do not make a character so far, and the
        beginning of a closing text.
        """
        ids: list[int] = []
        shown, text = 0, ""
        for token in self.tokens(self.encode(prompt), max_tokens, temperature, seed):
            ids.append(token)
            text = self.tokenizer.decode(ids)
            closed = [at for stop in self.tokenizer.stop_texts if (at := text.find(stop, shown)) >= 0]
            if closed:
                text = text[: min(closed)]
                break
            sure = len(text.rstrip("\ufffd")) - _beginning(text, self.tokenizer.stop_texts)
            if sure > shown:
                yield text[shown:sure]
                shown = sure
        if len(text) > shown:
            yield text[shown:]

    def tokens(self, prompt: Sequence[int], max_tokens: int, temperature: float, seed: int) -> Iterator[int]:
        """Token ids until an end of turn or text, or `max_tokens`; `temperature` 0 takes the likeliest each time."""
        ids = list(prompt)
        if not ids:
            raise UserError("--prompt: empty; the model needs a token to continue")
        if len(ids) + max_tokens > self.config.seq:
            raise UserError(f"--prompt: {len(ids)} tokens and --max-tokens {max_tokens} exceed --seq {self.config.seq}")
        vocabulary = self.session.checkpoint.config.vocab_size
        if max(ids) >= vocabulary:
            word = self.tokenizer.decode([max(ids)], skip_special_tokens=False)[:40]
            raise UserError(
                f"--prompt: token id {max(ids)} ({word!r}) is outside the model's vocabulary of {vocabulary}"
            )
        rng = np.random.default_rng(seed)
        for _ in range(max_tokens):
            token = _draw(next_logits(self.session, ids), temperature, rng)
            if token in self.tokenizer.eos_ids:
                return
            ids.append(token)
            yield token

    def close(self) -> None:
        self.session.close()


def next_logits(session: Session, ids: Sequence[int]) -> np.ndarray:
    """Logits [V] of the token after `ids`."""
    seq = session.config.seq
    padded = np.zeros(seq, np.uint32)
    padded[: len(ids)] = ids
    segment = np.arange(seq, dtype=np.uint32)
    segment[: len(ids)] = 0
    session.write_batch({"input_ids": padded, "positions": np.arange(seq, dtype=np.uint32), "segment_start": segment})
    session.executor.write("logits_at", np.array([len(ids) - 1], np.uint32))
    session.executor.run("logits")
    return session.executor.read("logits")[0]


def _beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop may begin with."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(lengths, default=0)


def _draw(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    if temperature <= 0:
        return int(np.argmax(logits))
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    weights = np.exp(scaled)
    return int(rng.choice(len(weights), p=weights / weights.sum()))
