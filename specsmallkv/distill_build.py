"""A draft before any training: some of the target's layers over its own embeddings and head."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .trimmed_head import trim_head


def build_draft(target: PreTrainedModel, layers: list[int], token_ids: Tensor | None = None) -> PreTrainedModel:
    """A float32 copy of the given layers and the final norm, over the target's own embeddings and head.

    token_ids (S,): the tokens that the draft's head can propose; None: all.
    """
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    with torch.device("meta"):
        draft = type(target)(config)
    base, source = draft.base_model, target.base_model
    base.layers = nn.ModuleList(copy.deepcopy(source.layers[i]).float() for i in layers)
    for index, layer in enumerate(base.layers):
        layer.self_attn.layer_idx, layer.self_attn.config = index, config  # one config decides the attention
        layer.self_attn.attention_dropout = 0.0  # what a step does follows from the seed and the step alone
    base.norm, base.rotary_emb = copy.deepcopy(source.norm).float(), copy.deepcopy(source.rotary_emb)
    base.embed_tokens = source.embed_tokens
    base.embed_tokens.requires_grad_(False)
    target.get_output_embeddings().requires_grad_(False)
    draft.set_output_embeddings(target.get_output_embeddings())
    if token_ids is not None:
        trim_head(draft, token_ids)
    for parameters in (base.layers.parameters(), base.norm.parameters()):
        for parameter in parameters:
            parameter.requires_grad_(True)
    return draft


def even_layers(num_layers: int, count: int) -> list[int]:
    """The first layer and `count` - 1 spread evenly from the second to the last one."""
    return [0, *torch.linspace(num_layers - 1, 1, count - 1).round().int().flip(0).tolist()]


@torch.no_grad()
def busiest_layers(target: PreTrainedModel, count: int, ids: Tensor) -> list[int]:
    """The `count` layers that turn the residual stream most on `ids` (B, T): largest mean angle between what goes in
    and what comes out ("block influence", ShortGPT, arXiv 2403.03853)."""
    turned: list[float] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
        turned.append(1 - cosine.mean().item())

    hooks = [layer.register_forward_hook(compare) for layer in target.base_model.layers]
    target.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sorted(sorted(range(len(turned)), key=lambda i: -turned[i])[:count])
