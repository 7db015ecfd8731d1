"""What a model's attention is like: how its scores are scaled and capped, how far its layers see."""

from typing import Any

from .errors import UserError


class Scaling(float):
    """Factor of the attention scores; with `softcap` c (Gemma2) a scaled score s becomes c tanh(s / c)."""

    softcap: float | None

    def __new__(cls, value: float, softcap: float | None = None) -> "Scaling":
        scaling = super().__new__(cls, value)
        scaling.softcap = softcap
        return scaling


def softcap_of(scaling: float) -> float | None:
    return scaling.softcap if isinstance(scaling, Scaling) else None


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_scaling(config: Any) -> Scaling:
    """1 / sqrt(head_dim), as Llama, Mistral and Qwen scale their scores; Gemma2 names its own and caps them."""
    scalar = getattr(config, "query_pre_attn_scalar", None) or head_dim(config)
    return Scaling(scalar**-0.5, getattr(config, "attn_logit_softcapping", None))


def layer_windows(config: Any) -> list[int | None]:
    """Of each layer, how many tokens its queries see, themselves included; None for all before them."""
    num_layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:  # then no text is longer than the window
        return [None] * num_layers
    if config.model_type == "mistral":  # its layers are all alike
        return [window] * num_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * num_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def refuse_windows(what: str, *configs: Any) -> None:
    """UserError for models with sliding windows or capped scores, from what only knows plain attention."""
    for config in configs:
        if any(layer_windows(config)) or getattr(config, "attn_logit_softcapping", None):
            raise UserError(
                f"{what} does not support sliding windows or capped scores, which this {config.model_type} model has; "
                "use another model."
            )
