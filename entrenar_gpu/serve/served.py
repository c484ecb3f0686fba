"""What a server offers: a model, its adapters under their names, and how a body becomes requests to it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from entrenar_gpu.chat import Conversation
from entrenar_gpu.errors import UserError
from entrenar_gpu.infer import LanguageModel, Request
from entrenar_gpu.serve.bodies import Asked, Prompt
from entrenar_gpu.serve.problems import Problem, bad_request

BASE = "base"


@dataclass(frozen=True)
class Served:
    """A model and what its base is called besides "base"."""

    model: LanguageModel
    name: str
    created: int = field(default_factory=lambda: int(time.time()))

    def names(self) -> list[str]:
        """What a body's `model` may be."""
        return list(dict.fromkeys([BASE, self.name, *self.model.adapters]))

    def describe(self) -> list[dict[str, Any]]:
        """The objects of /v1/models."""
        return [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "entrenar-gpu",
                "parent": BASE if name in self.model.adapters else None,
                "max_model_len": self.model.context,
            }
            for name in self.names()
        ]

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a body's `model` means. Raises Problem for a name that is not served."""
        if name in self.model.adapters:
            return name
        if name in (None, BASE, self.name):
            return None
        raise Problem(404, f"model: {str(name)[:80]!r} is not served here; see /v1/models", "model", "model_not_found")

    def requests(self, asked: Asked) -> Sequence[Request]:
        """Requests of token ids. Raises Problem for prompts that the model's tokenizer or chat template refuses."""
        adapter = self.adapter(asked.model)
        try:
            return [Request(self._ids(prompt), asked.options, adapter, asked.n) for prompt in asked.prompts]
        except UserError as error:
            raise bad_request(error) from None

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Conversation):
            return self.model.encode_chat(prompt)
        return self.model.encode(prompt) if isinstance(prompt, str) else prompt
