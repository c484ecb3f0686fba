"""`config.json` of a Hugging Face checkpoint, as the one transformer of model.py needs it.

Letters used for shapes throughout: B rows, S positions a row, T = B*S tokens, D hidden size, F feed-forward size,
H query heads, K key/value heads, E head size, V vocabulary, R adapter rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar_gpu.config import PROJECTIONS, SHAPES
from entrenar_gpu.errors import UserError
from entrenar_gpu.files import read_json_object


def is_projection(name: str) -> bool:
    """Whether a checkpoint tensor is the weight of one of the seven projections."""
    return name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Shape and variant of a decoder-only transformer.

    The architectures differ in three switches only: `qk_norm` (Qwen3), `qkv_bias` (Qwen2) and `rope_scaling`
    (Llama 3.1); Llama 2 and 3 have none of them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    max_positions: int

    @property
    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(out features, in features) of each projection, as in the checkpoint."""
        d, f, e = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * e, self.num_kv_heads * e
        return {
            "q_proj": (q, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "o_proj": (d, q),
            "gate_proj": (f, d),
            "up_proj": (f, d),
            "down_proj": (d, f),
        }

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint, by its Hugging Face name, in the order the model runs."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden_size,)
            for name, shape in self.projection_shapes.items():
                shapes[f"{prefix}.{PROJECTIONS[name]}.{name}.weight"] = shape
                if self.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
                    shapes[f"{prefix}.self_attn.{name}.bias"] = (shape[0],)
            if self.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden_size,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def rope_frequencies(self) -> list[float]:
        """Angular frequency of each of the E/2 rotary pairs, radians per position, in float64.

        RoFormer (arXiv 2104.09864) equation 15; with `rope_scaling`, Llama 3.1's three bands: wavelengths shorter
        than original/high_freq_factor are kept, longer than original/low_freq_factor are divided by `factor`, and
        those between are blended linearly in original/wavelength.
        """
        base = [self.rope_theta ** (-2.0 * i / self.head_dim) for i in range(self.head_dim // 2)]
        scaling = self.rope_scaling
        if scaling is None:
            return base
        span = scaling.high_freq_factor - scaling.low_freq_factor
        scaled = []
        for frequency in base:
            wavelength = 2 * math.pi / frequency
            turns = scaling.original_max_position_embeddings / wavelength
            kept = min(1.0, max(0.0, (turns - scaling.low_freq_factor) / span))
            scaled.append(frequency * (kept + (1.0 - kept) / scaling.factor))
        return scaled


def load_model_config(path: str | Path) -> ModelConfig:
    """Read `config.json` (or the folder that holds it).

    Raises UserError naming the file and key when the file is missing or malformed, the architecture unknown, or the
    model uses something this trainer does not compute (sliding windows, other rope scalings, other activations, ...).
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.json"
    return parse_model_config(read_json_object(path), source=str(path))


ARCHITECTURES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
}


def parse_model_config(raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """The same, from the decoded JSON; `source` names it in errors."""
    architecture = _architecture(raw, source)

    def number(key: str, kind: type = int, default: Any = None) -> Any:
        value = raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{source}: key {key!r} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (kind is int and value != int(value)):
            raise UserError(f"{source}: {key} must be a number, not {value!r}")
        if not 0 < value < 2**40 or not math.isfinite(value):
            raise UserError(f"{source}: {key} must be positive and finite, not {value!r}")
        return kind(value)

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    kv_heads = number("num_key_value_heads", default=heads)
    head_dim = number("head_dim", default=hidden // heads)
    if heads % kv_heads:
        raise UserError(f"{source}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise UserError(f"{source}: head_dim {head_dim} is odd; rotary embedding needs pairs")
    _refuse_unsupported(raw, architecture, source)
    theta, scaling = _rope(raw, source, number)
    return ModelConfig(
        architecture=architecture,
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=number("intermediate_size"),
        num_layers=number("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number("rms_norm_eps", float, 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        # transformers' own defaults where the key is absent
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        max_positions=number("max_position_embeddings", default=32768),
    )


def _architecture(raw: dict[str, Any], source: str) -> str:
    names = raw.get("architectures") or []
    known = [ARCHITECTURES[n] for n in names if isinstance(n, str) and n in ARCHITECTURES]
    if not known and not names and raw.get("model_type") in ARCHITECTURES.values():
        known = [raw["model_type"]]
    if not known:
        raise UserError(
            f"{source}: architecture {', '.join(map(str, names)) or raw.get('model_type')!r} is not supported;"
            f" supported: {', '.join(ARCHITECTURES)}"
        )
    return known[0]


def _refuse_unsupported(raw: dict[str, Any], architecture: str, source: str) -> None:
    """What would be computed wrongly is refused by name."""
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{source}: hidden_act {raw['hidden_act']!r} is not supported (silu is)")
    if raw.get("use_sliding_window") and any(kind != "full_attention" for kind in raw.get("layer_types") or ["?"]):
        raise UserError(f"{source}: use_sliding_window is not supported")
    if architecture != "qwen2" and raw.get("attention_bias"):
        raise UserError(f"{source}: attention_bias is not supported for {architecture}")
    if raw.get("mlp_bias"):
        raise UserError(f"{source}: mlp_bias is not supported")
    if raw.get("attention_dropout"):
        raise UserError(f"{source}: attention_dropout is not supported (use --dropout for the adapters)")


def _rope(raw: dict[str, Any], source: str, number: Any) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, in the old layout (`rope_theta`, `rope_scaling`) or the new (`rope_parameters`)."""
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise UserError(f"{source}: rope_scaling must be an object, not {parameters!r}")
    theta = parameters.get("rope_theta", raw.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 0:
        raise UserError(f"{source}: rope_theta must be a positive number, not {theta!r}")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if float(parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor")) or 1.0) != 1.0:
        raise UserError(f"{source}: partial_rotary_factor is not supported")
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise UserError(f"{source}: rope scaling {kind!r} is not supported (default and llama3 are)")
    try:
        scaling = RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position_embeddings=int(
                parameters.get("original_max_position_embeddings") or number("max_position_embeddings")
            ),
        )
    except KeyError as error:
        raise UserError(f"{source}: rope_scaling lacks {error.args[0]!r}") from None
    except (TypeError, ValueError):
        raise UserError(f"{source}: rope_scaling holds something that is not a number") from None
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(f"{source}: rope_scaling.high_freq_factor must exceed low_freq_factor")
    return float(theta), scaling


def model_shape(name: str) -> ModelConfig:
    """The configuration of a named shape. Raises UserError naming the flag and the shapes there are."""
    if name not in SHAPES:
        raise UserError(f"--shape: {name!r} is not one of {', '.join(SHAPES)}")
    return parse_model_config(SHAPES[name], source=name)
