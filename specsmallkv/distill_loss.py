"""The two losses of a distilled draft: say what the target says, and look where the target looks.

Shapes: B sequences, T tokens, R query rows, V vocabulary; M draft heads and A target heads (layers x heads).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "specsmallkv_distill"
CHUNK = 256  # positions whose logits exist at one time
EPSILON = 1e-8


class RowRecorder:
    """Attention probabilities of all heads of a forward pass, for the query positions `positions` only."""

    def __init__(self, positions: Tensor):
        self.positions, self.layers = positions, list[Tensor]()

    def record(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """query (B, H, T, D), key (B, H_kv, T, D); keeps (B, H, R, T) float32."""
        rows = query[:, :, self.positions].float()
        keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = rows @ keys.transpose(2, 3) * scaling
        future = torch.arange(key.shape[2], device=key.device) > self.positions[:, None]
        self.layers.append(scores.masked_fill(future, float("-inf")).softmax(-1))

    def rows(self) -> Tensor:
        """(B, layers x H, R, T)"""
        return torch.cat(self.layers, dim=1)


def recording_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    recorder: RowRecorder | None = kwargs.pop("row_recorder", None)
    if recorder is not None:
        with torch.autocast(query.device.type, enabled=False):
            recorder.record(query, key, kwargs["scaling"])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def hidden_states(model: PreTrainedModel, ids: Tensor, recorder: RowRecorder | None = None) -> Tensor:
    """What the head reads, (B, T, d). The residual stream has the layers' own precision, also under autocast."""
    embedded = model.get_input_embeddings()(ids).to(next(model.base_model.layers.parameters()).dtype)
    return model.base_model(inputs_embeds=embedded, use_cache=False, row_recorder=recorder).last_hidden_state


AttentionInterface.register(NAME, recording_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class LogitDivergence(torch.autograd.Function):
    """Mean KL(target || draft) over positions and the share of equal argmax, over the tokens that `head` has rows for.

    With a trimmed head both distributions are renormalised on its tokens: elsewhere the draft's probability is 0 by
    construction, and no hidden state could change that.
    The head is frozen, so the gradient towards the draft's hidden states is known in the forward pass,
    (draft - target) @ head, and no (positions, V) tensor outlives its chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, target_hidden: Tensor, head: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden, target_hidden (N, d), head (V, d). temperature: of both; below 1 the likeliest tokens count more."""
        gradient = torch.empty_like(hidden)
        total, agreed = hidden.new_zeros(2, dtype=torch.float32).unbind()
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            drafted = (hidden[part].to(head.dtype) @ head.T).float()
            wanted = (target_hidden[part].to(head.dtype) @ head.T).float()
            agreed = agreed + (drafted.argmax(-1) == wanted.argmax(-1)).sum()
            drafted, wanted = (drafted / temperature).log_softmax(-1), (wanted / temperature).log_softmax(-1)
            probability = wanted.exp()
            total = total + (probability * wanted.sub_(drafted)).sum()
            gradient[part] = (drafted.exp_().sub_(probability)).to(head.dtype) @ head
        ctx.save_for_backward(gradient / (temperature * len(hidden)))
        return total / len(hidden), agreed / len(hidden)

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * loss_gradient, None, None, None


def predict_rows(mixture: Tensor, draft_rows: Tensor) -> Tensor:
    """Target rows (B, A, R, T) as mixtures, weights softmax(mixture) (A, M), of draft rows (B, M, R, T)."""
    return torch.einsum("am,bmrt->bart", mixture.softmax(-1), draft_rows)


def without_sink(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows renormalised without the first token, and the mass that they had there left out."""
    rest = rows[..., 1:]
    mass = rest.sum(-1, keepdim=True)
    return rest / (mass + EPSILON), mass


def attention_divergence(mixture: Tensor, draft_rows: Tensor, target_rows: Tensor) -> Tensor:
    """Mean KL(target row || predicted row) without the sink, weighted by the target's mass off the sink."""
    predicted, _ = without_sink(predict_rows(mixture, draft_rows))
    wanted, mass = without_sink(target_rows)
    divergence = F.kl_div((predicted + EPSILON).log(), wanted, reduction="none").sum(-1, keepdim=True)
    return (mass * divergence).sum() / mass.sum()


def attention_recall(predicted: Tensor, target_rows: Tensor, share: float = 0.1) -> float:
    """Share of the target's off-sink mass that lies on the `share` of tokens with the highest prediction."""
    (guess, _), (wanted, mass) = without_sink(predicted), without_sink(target_rows)
    kept = guess.topk(max(1, round(share * guess.shape[-1])), dim=-1).indices
    return ((wanted.gather(-1, kept).sum(-1, keepdim=True) * mass).sum() / mass.sum()).item()


def initial_mixture(target_layers: list[int], num_target_layers: int, num_heads: int, bias: float = 3.0) -> Tensor:
    """(A, M): a target head leans on the same head of the draft layer that was copied nearest to its own."""
    mixture = torch.zeros(num_target_layers, num_heads, len(target_layers), num_heads)
    for layer in range(num_target_layers):
        nearest = min(range(len(target_layers)), key=lambda i: abs(target_layers[i] - layer))
        mixture[layer, :, nearest] += bias * torch.eye(num_heads)
    return mixture.reshape(num_target_layers * num_heads, -1)
