"""How good a distilled draft is: its agreement with the target, and the curve of its training as a picture."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .distill_loss import hidden_states

WIDTH, HEIGHT, MARGIN = 640, 360, 48  # of the picture, in pixels
BINS = 60  # points of the drawn curve: means over equal shares of the steps


def _bf16(model: PreTrainedModel, ids: Tensor) -> torch.autocast:
    enabled = model.get_output_embeddings().weight.dtype == torch.bfloat16
    return torch.autocast(ids.device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def hidden_argmax(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """ids (B, T) -> the likeliest next token at each of the B x T positions."""
    head = model.get_output_embeddings()
    with _bf16(model, ids):
        hidden = hidden_states(model, ids).flatten(0, 1)
    return torch.cat([head(part.to(head.weight.dtype)).argmax(-1) for part in hidden.split(256)])


def agreement(target: PreTrainedModel, draft: PreTrainedModel, ids: Tensor) -> float:
    """Share of positions of `ids` (B, T) at which both models have the same argmax."""
    same = [(hidden_argmax(target, row) == hidden_argmax(draft, row)).float() for row in ids.split(1)]
    return torch.cat(same).mean().item()


def answer_agreement(draft: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """Share of the tokens of the target's greedy answers that the draft would have written there."""
    agreed = total = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        guesses = hidden_argmax(draft, torch.tensor([prompt + answer], device=draft.device))
        agreed += int((guesses[len(prompt) - 1 : -1].cpu() == torch.tensor(answer)).sum())
        total += len(answer)
    return agreed / max(1, total)


def curve_svg(tokens: list[int], agreements: list[float]) -> str:
    """Agreement in training (vertical, 0 to 1) against tokens seen (horizontal), smoothed, as an SVG document."""
    size = -(-len(tokens) // BINS)
    means = [sum(agreements[i : i + size]) / len(agreements[i : i + size]) for i in range(0, len(tokens), size)]
    ends = [tokens[min(i + size, len(tokens)) - 1] for i in range(0, len(tokens), size)]

    def place(x: float, y: float) -> tuple[float, float]:
        across = MARGIN + x / tokens[-1] * (WIDTH - 2 * MARGIN)
        return round(across, 1), round(HEIGHT - MARGIN - y * (HEIGHT - 2 * MARGIN), 1)

    def label(x: float, y: float, shift: tuple[int, int], text: str) -> str:
        left, top = place(x, y)
        return f'<text x="{left + shift[0]}" y="{top + shift[1]}" font-size="12">{text}</text>'

    line = " ".join(f"{x},{y}" for x, y in (place(*point) for point in zip(ends, means, strict=True)))
    frame = " ".join(f"{x},{y}" for x, y in (place(0, 1), place(0, 0), place(tokens[-1], 0)))
    marks = [label(0, tick / 5, (-28, 4), f"{tick / 5:.1f}") for tick in range(6)]
    marks += [
        label(0, 1, (0, -12), "agreement with the target"),
        label(tokens[-1], means[-1], (-20, -8), f"{means[-1]:.2f}"),
    ]
    marks += [label(tokens[-1], 0, (-72, 24), f"{tokens[-1]:,} tokens")]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<polyline points="{frame}" fill="none" stroke="black"/>',
            f'<polyline points="{line}" fill="none" stroke="steelblue" stroke-width="2"/>',
            *marks,
            "</svg>\n",
        ]
    )
