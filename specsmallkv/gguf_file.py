"""A GGUF file as a Hugging Face directory: config, bf16 safetensors, generation config and tokenizer.

Llama, Qwen2 and Qwen3 files only. Anything in a file that is not understood (rope scaling, an unknown tensor) is
refused: left out, it would give a model that runs and is wrong. Where files come from is not known here (`wheel.py`).
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from .errors import UserError
from .tokenizer import gguf_tokenizer

ORIGIN = "dequantised GGUF"
ARCHITECTURES = ("llama", "qwen2", "qwen3")
TENSOR_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONFIG_FIELDS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


class Fields(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise UserError(
            f"the GGUF has no field {name!r}; use another file or the safetensors checkpoint of this model."
        )


def convert(gguf: Path, directory: Path, on_tensor: Callable[[int, int], None]) -> None:
    """Write the directory; on_tensor(done, total) is told of every tensor."""
    reader = _read(gguf)
    fields = Fields({name: field.contents() for name, field in reader.fields.items()})
    config = _config(fields, reader.tensors)
    weights = {}
    for done, (name, weight) in enumerate(_weights(reader.tensors, config), start=1):
        weights[name] = weight
        on_tensor(done, len(reader.tensors))
    _check_complete(config, weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    gguf_tokenizer(fields).save_pretrained(directory)
    _generation_config(fields).save_pretrained(directory)
    config.save_pretrained(directory)


def _read(gguf: Path) -> GGUFReader:
    try:
        return GGUFReader(gguf)
    except ValueError as error:
        raise UserError(f"the model file is no GGUF file ({error}); correct the model source.") from error


def _config(fields: Fields, tensors: list[ReaderTensor]) -> PreTrainedConfig:
    architecture = fields["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"the GGUF's architecture {architecture!r} is not supported; use a {', '.join(ARCHITECTURES)} one."
        )
    unknown = [name for name in fields if ".rope.scaling." in name or name.endswith(".sliding_window")]
    if unknown:
        raise UserError(
            f"the GGUF sets {unknown[0]}, which is not supported; use the safetensors checkpoint of this model."
        )
    options = {ours: fields[f"{architecture}.{theirs}"] for ours, theirs in CONFIG_FIELDS.items()}
    embeddings = next(t for t in tensors if t.name == "token_embd.weight")
    head_dim = options["hidden_size"] // options["num_attention_heads"]
    theta = fields.get(f"{architecture}.rope.freq_base", 10000.0)
    config = AutoConfig.for_model(
        architecture,
        **options,
        vocab_size=int(embeddings.shape[1]),
        head_dim=fields.get(f"{architecture}.attention.key_length", head_dim),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=all(t.name != "output.weight" for t in tensors),
        specsmallkv_origin=ORIGIN,
        dtype="bfloat16",
        **_special_ids(fields),
    )
    config.architectures = [_empty_model(config).__class__.__name__]
    return config


def _weights(tensors: list[ReaderTensor], config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if config.model_type == "llama" and ".attn_q." in tensor.name:
            weight = _halves_of_pairs(weight, config.num_attention_heads)
        if config.model_type == "llama" and ".attn_k." in tensor.name:
            weight = _halves_of_pairs(weight, config.num_key_value_heads)
        yield _hub_name(tensor.name), weight.to(torch.bfloat16)


def _halves_of_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Llama files interleave the two halves that RoPE turns against each other; transformers keeps them apart."""
    pairs = weight.unflatten(0, (num_heads, -1, 2))  # (H, D/2, 2, ...)
    return pairs.transpose(1, 2).reshape(weight.shape)


def _hub_name(name: str) -> str:
    if block := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, stem, kind = block.groups()
        if stem in BLOCK_TENSOR_NAMES:
            return f"model.layers.{layer}.{BLOCK_TENSOR_NAMES[stem]}.{kind}"
    stem, _, kind = name.rpartition(".")
    if stem in TENSOR_NAMES and kind == "weight":
        return f"{TENSOR_NAMES[stem]}.{kind}"
    raise UserError(f"the GGUF's tensor {name!r} is not understood; use the safetensors checkpoint of this model.")


def _check_complete(config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> None:
    expected = {name: p.shape for name, p in _empty_model(config).named_parameters()}
    found = {name: w.shape for name, w in weights.items()}
    if expected != found:
        name = min(name for name, _ in expected.items() ^ found.items())
        raise UserError(
            f"the GGUF's tensor {name!r} has shape {found.get(name)} where its config asks for "
            f"{expected.get(name)}; use the safetensors checkpoint of this model."
        )


def _empty_model(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _generation_config(fields: Fields) -> GenerationConfig:
    return GenerationConfig(**_special_ids(fields))


def _special_ids(fields: Fields) -> dict[str, Any]:
    """All ids that end a text: chat files name the end of a turn beside the end of the text."""
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")}
    ends = sorted({i for i in (ids["eos"], ids["eot"]) if i is not None})
    eos = ends if len(ends) > 1 else ids["eos"]
    return {"bos_token_id": ids["bos"], "eos_token_id": eos, "pad_token_id": ids["padding"]}
