"""A decoder-only transformer as data: its sizes, its layers, and with them the list of its weights.

Letters used for shapes throughout: B rows, S positions a row, T = B*S tokens, D hidden size, F feed-forward size,
H query heads, K key/value heads, E head size, V vocabulary, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from entrenar_gpu.model.blocks import Layer, RmsNorm
from entrenar_gpu.model.config_file import MOST_PARAMETERS, ConfigFile
from entrenar_gpu.model.rope import Rope
from entrenar_gpu.model.weight_spec import WeightSpec

PREFIX = "model."  # of all names but the head's, in a model of language alone
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class ModelConfig:
    """Embedding, layers, final norm, output head; a family's file states what the layers have.

    `architecture` is the family's name, `max_positions` how many positions its file says. Embeddings are multiplied by
    `embedding_multiplier`, logits by `logits_multiplier`, and bent by `softcap` where there is one. `prefix` begins the
    names of all weights but the head's: of a model that also sees or hears, this is its language part.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: RmsNorm
    tie_word_embeddings: bool
    max_positions: int
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    softcap: float | None = None
    prefix: str = PREFIX

    @classmethod
    def read(
        cls,
        file: ConfigFile,
        layers: Sequence[Layer],
        embedding_multiplier: float = 1.0,
        logits_multiplier: float = 1.0,
        softcap: float | None = None,
    ) -> ModelConfig:
        """What `config.json` says of everything around the layers, with transformers' own defaults."""
        model = cls(
            architecture=file.family,
            vocab_size=file.count("vocab_size"),
            hidden_size=file.count("hidden_size"),
            layers=tuple(layers),
            norm=layers[0].norm,
            tie_word_embeddings=file.flag("tie_word_embeddings"),
            max_positions=file.count("max_position_embeddings", 32768, most=2**40),
            embedding_multiplier=embedding_multiplier,
            logits_multiplier=logits_multiplier,
            softcap=softcap,
            prefix=file.prefix,
        )
        if model.parameters > MOST_PARAMETERS:
            raise file.error(f"{model.parameters} parameters, of hidden_size and others, are above {MOST_PARAMETERS}")
        return model

    @cached_property
    def weights(self) -> tuple[WeightSpec, ...]:
        """Every weight of the checkpoint that the model needs, in the order the model runs."""
        embedding, head = self.tables
        inner = [spec for index, layer in enumerate(self.layers) for spec in layer.weights(self.layer_path(index))]
        heads = [] if self.tie_word_embeddings else [head]
        return (embedding, *inner, self.norm.weight(self.final_norm), *heads)

    @property
    def tables(self) -> tuple[WeightSpec, WeightSpec]:
        """The embedding and the head, which a tied model's file does not hold."""
        table = (self.vocab_size, self.hidden_size)
        return WeightSpec(self.embedding, table, "embedding"), WeightSpec(HEAD, table, "head")

    def stored_as(self, weight: WeightSpec) -> str:
        """The weight in the checkpoint that one is: of a tied head the embedding."""
        return self.embedding if self.tie_word_embeddings and weight.name == HEAD else weight.name

    @property
    def embedding(self) -> str:
        """The name of the embedding's weight."""
        return f"{self.prefix}embed_tokens.weight"

    @property
    def final_norm(self) -> str:
        """The name of the weight of the norm behind the layers."""
        return f"{self.prefix}norm.weight"

    def layer_path(self, index: int) -> str:
        """Where the modules of a layer stand in the checkpoint."""
        return f"{self.prefix}layers.{index}"

    @property
    def rope_tables(self) -> dict[str, Rope]:
        """The rotations that layers need, each once, by the names of the tensors that hold their tables."""
        ropes = dict.fromkeys(rope for layer in self.layers for rope in layer.attention.ropes)
        return {f"rope_table.{number}" if number else "rope_table": rope for number, rope in enumerate(ropes)}

    @property
    def longest_row(self) -> int:
        """Positions that a row may have: those of the file, or what the scaling of a rope reaches beyond them."""
        scalings = [rope.scaling for rope in self.rope_tables.values() if rope.scaling is not None]
        return max([self.max_positions, *(scaling.reach(self.max_positions) for scaling in scalings)])

    @property
    def parameters(self) -> int:
        """How many numbers the model's weights are."""
        return sum(spec.size for spec in self.weights)
