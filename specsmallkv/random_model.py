"""Tiny random models for tests and dry runs: `random:llama?layers=2&hidden=64&heads=4&kv_heads=2&seed=0`.

Seeded, so that a source string always means the same weights, and scaled so that attention and greedy text vary.
They speak the byte tokenizer of `tokenizer.py`.
"""

import math
from urllib.parse import parse_qsl

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .errors import UserError
from .tokenizer import BYTE_SPECIALS, BYTE_VOCAB_SIZE

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2")
DEFAULTS = {
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "intermediate": 128,
    "vocab": BYTE_VOCAB_SIZE,
    "context": 8192,
    "window": 0,  # of sliding-window layers: mistral's are all of the kind, gemma2's every other one; 0: none
    "seed": 0,
}
OWN_OPTIONS = {  # of families
    "gemma2": {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0, "query_pre_attn_scalar": 24},
}
LOGIT_SCALE = 1.6  # standard deviation of a layer's output for a normalised input


def build(source: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    family, sizes = _parse(source)
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(_config(family, sizes), dtype=torch.float32)
    _fill(model, sizes["seed"])
    for weight in model.parameters():  # model.to(dtype) would round the rotary frequencies too
        weight.data = weight.data.to(dtype)
    model.config.dtype = dtype
    return model


def empty(source: str) -> PreTrainedModel:
    """The same without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_config(*_parse(source)))


@torch.no_grad()
def untrain(model: PreTrainedModel, seed: int = 0) -> None:
    """Random weights in the layers of any model, a negative control; norms, biases and embeddings stay."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted(model.get_decoder().layers.named_parameters()):
        if weight.dim() > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * _deviation(model))


def _deviation(model: PreTrainedModel) -> float:
    return LOGIT_SCALE / math.sqrt(model.config.hidden_size)


def _parse(source: str) -> tuple[str, dict[str, int]]:
    family, _, query = source.removeprefix("random:").partition("?")
    try:
        given = {
            key: int(value) for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        }
    except ValueError as error:
        raise _refusal(source, str(error)) from None
    if family not in FAMILIES:
        raise _refusal(source, f"family {family!r} is none of {', '.join(FAMILIES)}")
    if unknown := given.keys() - DEFAULTS.keys():
        raise _refusal(source, f"{min(unknown)!r} is none of {', '.join(DEFAULTS)}")
    sizes = DEFAULTS | given
    _check(source, sizes)
    return family, sizes


def _check(source: str, sizes: dict[str, int]) -> None:
    if zero := [key for key, value in sizes.items() if value < 1 and key not in ("seed", "window")]:
        raise _refusal(source, f"{zero[0]} must be positive")
    if sizes["hidden"] % (2 * sizes["heads"]):
        raise _refusal(source, "hidden must be an even multiple of heads")
    if sizes["heads"] % sizes["kv_heads"]:
        raise _refusal(source, "heads must be a multiple of kv_heads")
    if sizes["vocab"] < BYTE_VOCAB_SIZE:
        raise _refusal(source, f"vocab must be at least {BYTE_VOCAB_SIZE}")


def _refusal(source: str, reason: str) -> UserError:
    example = "random:llama?layers=2&hidden=64&heads=4&kv_heads=2&seed=0"
    return UserError(f"model source {source!r} is malformed: {reason}; write for example {example}.")


def _config(family: str, sizes: dict[str, int]) -> PreTrainedConfig:
    no_window = {"mistral": None, "gemma2": sizes["context"]}  # gemma2 must have one
    slides = {"sliding_window": sizes["window"] or no_window[family]} if family in no_window else {}
    return AutoConfig.for_model(
        family,
        num_hidden_layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        vocab_size=sizes["vocab"],
        max_position_embeddings=sizes["context"],
        bos_token_id=None,
        eos_token_id=256 + BYTE_SPECIALS.index("<|im_end|>"),
        pad_token_id=256 + BYTE_SPECIALS.index("<|endoftext|>"),
        tie_word_embeddings=False,
        **slides,
        **OWN_OPTIONS.get(family, {}),
    )


@torch.no_grad()
def _fill(model: PreTrainedModel, seed: int) -> None:
    """Not by transformers, whose weights for one seed may change with its release. Norms and biases stay as built."""
    generator = torch.Generator().manual_seed(seed)
    for _, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            weight.normal_(0.0, _deviation(model), generator=generator)
    model.get_output_embeddings().weight[BYTE_VOCAB_SIZE:] = 0.0  # ids without a token are never the likeliest
