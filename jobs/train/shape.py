"""What a model's config.json says about its size. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Configurations leave out what is their class's default; these classes tie the output head to the
# embeddings by default (transformers 5.17).
TIED_BY_DEFAULT = ("gemma", "cohere")


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers: attention with q, k, v and o, and a gated MLP."""

    kind: str  # model_type
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int  # width of a head
    vocabulary: int
    tied: bool
    positions: int
    norms: int  # of a layer
    head_norms: bool  # whether queries and keys are normalised as well
    softcapped: bool
    biased: bool  # whether queries, keys and values have biases

    @property
    def q(self) -> int:
        return self.heads * self.head

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules."""
        return {
            "q_proj": (self.hidden, self.q),
            "k_proj": (self.hidden, self.kv),
            "v_proj": (self.hidden, self.kv),
            "o_proj": (self.q, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of all layers' linear modules."""
        return self.layers * sum(a * b for a, b in self.linears.values())

    @property
    def outer_weights(self) -> int:
        """Weights of the embeddings and the output head, which are never quantized."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def weights(self) -> int:
        """All that count; norms and biases are less than a thousandth."""
        return self.linear_weights + self.outer_weights


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a config.json describes; None where it describes another architecture."""
    if isinstance(config.get("text_config"), Mapping):
        config = {**config, **config["text_config"]}
    if any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")):
        return None
    kind = str(config.get("model_type", ""))
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        tied = config.get("tie_word_embeddings")
        return Shape(
            kind=kind,
            hidden=hidden,
            inner=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=kind.startswith(TIED_BY_DEFAULT) if tied is None else bool(tied),
            positions=int(config.get("max_position_embeddings") or 0),
            norms=4 if kind.startswith(("gemma2", "gemma3")) else 2,
            head_norms=kind.startswith(("qwen3", "gemma3")),
            softcapped=bool(config.get("attn_logit_softcapping")),
            biased=bool(config.get("attention_bias", kind == "qwen2")),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def describes(shape: Shape, weight_bytes: int) -> bool:
    """Whether weights of so many bytes can be of this shape: in 16 or 32 bit, give or take 3 %.

    An architecture with other layers than these has more or fewer.
    """
    return any(
        abs(weight_bytes / (each * weights) - 1) < 0.03
        for each in (2, 4)
        # A tied head is stored by some nevertheless.
        for weights in (shape.weights, shape.linear_weights + 2 * shape.vocabulary * shape.hidden)
    )
