"""The target's own answers, which a distilled draft is trained on: prompts go in, token ids come out."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

COMPACT_BELOW = 0.75  # drop finished rows from a batch once fewer than this share of them is still writing
BLOCK = 128  # the vocabulary is searched in blocks of this many tokens: far cheaper than torch.multinomial on a CPU


def sample_tokens(logits: Tensor, temperatures: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row of `logits` (rows, vocab); a row with temperature 0 takes its argmax."""
    greedy = temperatures == 0
    scale = torch.where(greedy, torch.ones_like(temperatures), temperatures)
    shifted = (logits.float() - logits.float().amax(-1, keepdim=True)) / scale[:, None]
    weights = torch.nn.functional.pad(shifted.exp(), (0, -logits.shape[-1] % BLOCK))
    blocks = weights.unflatten(-1, (-1, BLOCK))  # (rows, blocks, BLOCK)
    cumulative = blocks.sum(-1).double().cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator, dtype=torch.double) * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, drawn, right=True).clamp(max=cumulative.shape[-1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), torch.zeros_like(drawn))
    inside = blocks[torch.arange(len(logits)), block[:, 0]].double().cumsum(-1)
    offset = torch.searchsorted(inside, (drawn - before).clamp(min=0), right=True).clamp(max=BLOCK - 1)
    sampled = (block * BLOCK + offset)[:, 0].clamp(max=logits.shape[-1] - 1)
    return torch.where(greedy, logits.argmax(-1), sampled)


def left_padded(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.inference_mode()
def sample_batch(
    target: PreTrainedModel,
    prompts: list[list[int]],
    temperatures: list[float],
    max_new_tokens: int,
    eos: set[int],
    generator: torch.Generator,
) -> list[list[int]]:
    """The target's continuation of each prompt, its end-of-sequence token included; rows that end leave the batch."""
    answers: list[list[int]] = [[] for _ in prompts]
    ids, mask = left_padded(prompts, pad=min(eos, default=0))
    heat, rows, cache = torch.tensor(temperatures), torch.arange(len(prompts)), None
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(max_new_tokens):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        out = target(
            **{k: v.to(target.device) for k, v in inputs.items() if isinstance(v, Tensor)}
            | {"past_key_values": cache},
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        ids = sample_tokens(out.logits[:, -1].cpu(), heat, generator)[:, None]
        alive = torch.tensor(
            [append_token(answers[r], t, eos) for r, t in zip(rows.tolist(), ids[:, 0].tolist(), strict=True)]
        )
        mask, positions = torch.cat([mask, torch.ones_like(ids)], -1), positions[:, -1:] + 1
        if not alive.any():
            break
        if alive.float().mean() < COMPACT_BELOW:
            cache.batch_select_indices(alive.nonzero()[:, 0].to(target.device))
            ids, mask, positions, heat, rows = (x[alive] for x in (ids, mask, positions, heat, rows))
    return answers


def append_token(answer: list[int], token: int, eos: set[int]) -> bool:
    """Add the token unless the answer has already ended; true while the answer goes on."""
    if answer and answer[-1] in eos:
        return False
    answer.append(token)
    return token not in eos
