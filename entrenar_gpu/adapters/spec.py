"""The adapters of a model: which modules get one, how they start, and what their tensors are called.

Tensors are called by their module's path in the checkpoint, as in `model.layers.0.self_attn.q_proj.lora_A.weight`;
PEFT puts `base_model.model.` before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np

from entrenar_gpu.adapters.lora import LoraConfig, LoraEmbedding, LoraHead, LoraModule, fresh_values, read_peft_config
from entrenar_gpu.adapters.pattern import TooSlow, one_file
from entrenar_gpu.adapters.peft_reader import PeftReader
from entrenar_gpu.adapters.selection import ModuleSelection, chosen_layers, chosen_tables, chosen_targets, chosen_tokens
from entrenar_gpu.adapters.tables import SavedTable, TrainedTokens
from entrenar_gpu.config import TrainConfig, flag
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import read_json_object
from entrenar_gpu.model import EmbeddingAdapter, HeadAdapter, ModelConfig, Storage, WeightSpec
from entrenar_gpu.quant import Floats

CONFIG_FILE = "adapter_config.json"
PEFT_PREFIX = "base_model.model."

HEAD_PATH = "lm_head"

TableModule = LoraEmbedding | LoraHead | SavedTable | TrainedTokens


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a model of `num_layers`, by module path, in the order the modules run.

    `modules` are those of projections, `tables` of the embedding and the head.
    `dropout` is the probability with which an element of an adapter's input is dropped in training. `notes` say in
    words what an adapter's file asks for and the model does not have.
    """

    modules: dict[str, LoraModule]
    num_layers: int
    dropout: float
    notes: tuple[str, ...] = ()
    tables: Mapping[str, TableModule] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: TrainConfig, model: ModelConfig) -> AdapterSpec:
        """What --rank, --alpha, --target, --layers, --layers-to-transform, --rslora, --dropout, --modules-to-save and
        --trainable-token-indices ask for."""
        targets, layers = chosen_targets(config.target, model), chosen_layers(config, model)
        selection = ModuleSelection(
            targets, layers=layers, saved=chosen_tables(config, model), tokens=chosen_tokens(config, model)
        )
        spec = cls.select(selection, LoraConfig.from_options(config), model)
        if dropped := [t for t in targets if layers is not None and _is_table(t, model) and t not in spec.lora_tables]:
            raise UserError(f"--target: {dropped[0]} lies in none of the layers that are asked for")
        return spec

    @classmethod
    def from_peft(cls, folder: str | Path, model: ModelConfig) -> AdapterSpec:
        """What the `adapter_config.json` of a folder asks for, matched against modules as PEFT does.

        Raises UserError naming the file and key when it asks for what is not supported, or matches no projection.
        """
        path = Path(folder) / CONFIG_FILE
        file = PeftReader(read_json_object(path, missing="an adapter folder holds it"), path)
        selection, config = read_peft_config(file)
        try:
            with one_file():
                return cls._matched(file, selection, config, model)
        except TooSlow as error:
            raise file.error(str(error)) from None

    @classmethod
    def _matched(
        cls, file: PeftReader, selection: ModuleSelection, config: LoraConfig, model: ModelConfig
    ) -> AdapterSpec:
        others = [] if selection.is_all_linear else sorted(filter(selection.matches, _other_modules(model)))
        if others:
            raise file.error(f"target_modules includes {others[0]!r}; projections, embedding and head are supported")
        try:
            spec = cls.select(selection, config, model)
        except UserError as error:
            raise file.error(str(error)) from None
        if not spec.modules and not spec.lora_tables:
            raise file.error(f"target_modules {selection.target_modules!r} matches no projection of the model")
        targets = replace(selection, exclude_modules=[])
        takes = [weight.module for weight in model.weights if weight.adaptable]
        takes += [table.module for table in model.tables if not targets.is_all_linear and targets.matches(table.module)]
        unmatched = [*selection.unmatched(takes), *config.unmatched([*spec.modules, *spec.lora_tables.values()])]
        notes = (f"{file.path}: {key} {name[:80]!r} matches no module" for key, name in unmatched)
        return replace(spec, notes=tuple(notes))

    @classmethod
    def select(cls, selection: ModuleSelection, config: LoraConfig, model: ModelConfig) -> AdapterSpec:
        """The modules that a selection matches, each with what `config` gives it.

        Raises UserError where the embedding or the head is asked for in two ways, or has no such token.
        """
        chosen = [spec for spec in model.weights if spec.adaptable and selection.matches(spec.module)]
        modules = {spec.module: config.module(spec, LoraModule) for spec in chosen}
        tables: dict[str, TableModule] = {}
        for table in model.tables:
            asked = list(_asked_of(table, selection, config))
            if len(asked) > 1:
                raise UserError(f"{table.module}: {asked[0][0]} and {asked[1][0]} ask for it; one of them can")
            if asked:
                tables[table.module] = asked[0][1]
        return cls(modules, len(model.layers), config.dropout, tables=tables)

    @property
    def lora_tables(self) -> dict[str, str]:
        """Paths of the tables that have LoRA, by their names."""
        return {path.rpartition(".")[2]: path for path, made in self.tables.items() if isinstance(made, LoraModule)}

    @property
    def lora_modules(self) -> list[LoraModule]:
        """Whatever has LoRA, in the order it runs."""
        tables = [made for made in self.tables.values() if isinstance(made, LoraModule)]
        first = [made for made in tables if isinstance(made, LoraEmbedding)]
        return [*first, *self.modules.values(), *(made for made in tables if made not in first)]

    @property
    def saved(self) -> dict[str, SavedTable]:
        """The tables that are trained whole, by path."""
        return {path: made for path, made in self.tables.items() if isinstance(made, SavedTable)}

    @property
    def tokens(self) -> dict[str, TrainedTokens]:
        """The tables of which chosen rows are trained, by path."""
        return {path: made for path, made in self.tables.items() if isinstance(made, TrainedTokens)}

    @property
    def embedding(self) -> LoraEmbedding | SavedTable | TrainedTokens | None:
        """The embedding's."""
        return next((m for p, m in self.tables.items() if p != HEAD_PATH and not isinstance(m, LoraHead)), None)

    @property
    def head(self) -> LoraHead | SavedTable | TrainedTokens | None:
        """The head's."""
        made = self.tables.get(HEAD_PATH)
        return None if isinstance(made, LoraEmbedding) else made

    def changes_head(self, model: ModelConfig) -> bool:
        """Whether logits of hidden states differ with this adapter."""
        follows = self.embedding is not None and self.embedding.tied_head is not None
        return self.head is not None or (model.tie_word_embeddings and follows)

    def unties(self, model: ModelConfig) -> bool:
        """Whether a tied model with this adapter has a head that is no longer its embedding."""
        follows = self.embedding is None or self.embedding.tied_head is not None
        return model.tie_word_embeddings and (self.head is not None or not follows)

    def looked_up(self, ids: np.ndarray) -> np.ndarray:
        """Tokens as the ids that the embedding of a graph is given."""
        return self.embedding.looked_up(ids) if isinstance(self.embedding, TrainedTokens) else ids

    def constants(self) -> dict[str, np.ndarray]:
        """What graphs with these adapters are made with besides `shapes`, by name; some have no use for it."""
        return {name: values for table in self.tokens.values() for name, values in table.constants().items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every adapter tensor, in the order the modules run."""
        others = [made for made in self.tables.values() if not isinstance(made, LoraModule)]
        return {name: shape for made in (*self.lora_modules, *others) for name, shape in made.shapes().items()}


def adapted(storage: Storage, spec: AdapterSpec | None, prefix: str = "") -> Storage:
    """A run's weights with these adapters, whose tensors' names begin with `prefix`."""
    if spec is None:
        return replace(storage, adapters={}, embedding_adapter=None, head_adapter=None, adapter_prefix=prefix)
    tables: tuple[EmbeddingAdapter | None, HeadAdapter | None] = spec.embedding, spec.head
    return replace(
        storage, adapters=spec.modules, embedding_adapter=tables[0], head_adapter=tables[1], adapter_prefix=prefix
    )


def adapter_spec(config: TrainConfig, model: ModelConfig) -> AdapterSpec | None:
    """The fresh adapters of a run; None in full training, where a wrong --target is refused all the same."""
    spec = AdapterSpec.from_config(config, model)
    return None if config.method == "full" else spec


def refuse_other_adapter(config: TrainConfig, model: ModelConfig, said: Collection[str] | None = None) -> None:
    """Raise UserError where a run's options ask for another adapter than that of --adapter-init.

    What nobody asked for is the adapter's: a default is no contradiction. `said` are the options that somebody gave, by
    default those that are not at their defaults.
    """
    if said is None:
        said = {f.name for f in fields(config) if getattr(config, f.name) != f.default}
    names = ("rank", "alpha", "rslora", "target", "modules_to_save", "trainable_token_indices")
    asked = [name for name in names if name in said]
    if config.adapter_init is None or config.method == "full" or not asked:
        return
    held, wanted = AdapterSpec.from_peft(config.adapter_init, model), AdapterSpec.from_config(config, model)
    modules = held.lora_modules
    differs = {
        "rank": any(m.rank != config.rank for m in modules),
        "alpha": any(m.alpha != config.lora_alpha for m in modules),
        "rslora": any(m.use_rslora != config.rslora for m in modules),
        "target": (held.modules.keys(), held.lora_tables) != (wanted.modules.keys(), wanted.lora_tables),
        "modules_to_save": held.saved != wanted.saved,
        "trainable_token_indices": held.tokens != wanted.tokens,
    }
    for name in asked:
        if differs[name]:
            raise UserError(f"{flag(name)}: {config.adapter_init} has another; leave it out, or --adapter-init")


def init_adapter(
    spec: AdapterSpec,
    seed: int,
    kind: Literal["kaiming", "gaussian"] = "kaiming",
    base: Callable[[str], Floats] = lambda path: _no_rows(path),
) -> dict[str, Floats]:
    """Fresh values of every adapter tensor; `base` gives a table of the model by its module's path, f32 [V, D], for
    those that are trained themselves."""
    fresh = {n: v for module in spec.lora_modules for n, v in fresh_values(module, seed, kind).items()}
    for path, made in spec.tables.items():
        if not isinstance(made, LoraModule):
            fresh |= made.fresh(lambda path=path: base(path))  # type: ignore[misc]
    return fresh


def _no_rows(path: str) -> Floats:
    raise ValueError(f"{path} begins with the model's rows, which are not given")


def _asked_of(table: WeightSpec, selection: ModuleSelection, config: LoraConfig) -> Iterator[tuple[str, TableModule]]:
    """What a selection asks of the embedding or the head: PEFT's key, and the module."""
    rows, columns = table.shape
    if not selection.is_all_linear and selection.matches(table.module):
        embeds = table.kind == "embedding"
        yield "target_modules", config.module(table, LoraEmbedding) if embeds else config.module(table, LoraHead)
    if any(f".{table.module}".endswith(f".{name}") for name in selection.saved):
        yield "modules_to_save", SavedTable(table.module, rows, columns)
    for name, tokens in selection.tokens.items():
        if f".{table.module}".endswith(f".{name}"):
            if wrong := [token for token in tokens if not 0 <= token < rows]:
                raise UserError(f"trainable_token_indices: {wrong[0]} is not a token of the model's {rows}")
            yield "trainable_token_indices", TrainedTokens(table.module, rows, columns, tuple(tokens))


def _is_table(target: str, model: ModelConfig) -> bool:
    return target in (table.module.rpartition(".")[2] for table in model.tables)


def _other_modules(model: ModelConfig) -> set[str]:
    """Paths of the modules with weights that take no adapter: norms."""
    return {spec.module for spec in model.weights if not (spec.adaptable or spec.is_table or spec.kind == "bias")}
