"""How good a distilled draft is: what it says and where it looks against its target, and a picture of its training."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .distill_loss import RowRecorder, attention_recall, hidden_states, predict_rows

NUM_ROWS = 8  # last queries of a piece of text whose attention is compared
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


@torch.no_grad()
def attention_recalls(target: PreTrainedModel, draft: PreTrainedModel, mixture: Tensor, ids: Tensor) -> list[float]:
    """Of the target's attention off the sink, what lies on a tenth of the tokens: those that the draft's rows put
    first, through the head mixture (A, M), and the target's own first ones. ids (B, T); the last rows of each."""
    sums = torch.zeros(2)
    for row in ids.split(1):
        recorders = [RowRecorder(torch.arange(row.shape[1], device=row.device)[-NUM_ROWS:]) for _ in range(2)]
        for model, recorder in zip((target, draft), recorders, strict=True):
            with _bf16(model, row):
                hidden_states(model, row, recorder)
        wanted, rows = (recorder.rows() for recorder in recorders)
        guesses = predict_rows(mixture, rows), wanted
        sums += torch.tensor([attention_recall(guess, wanted) for guess in guesses])
    return (sums / len(ids)).tolist()


def agreed_tokens(draft: PreTrainedModel, prompts: list[list[int]], answers: list[list[int]]) -> list[list[bool]]:
    """Of each token of the target's greedy answers, whether the draft would have written it there."""
    agreed = []
    for prompt, answer in zip(prompts, answers, strict=True):
        guesses = hidden_argmax(draft, torch.tensor([prompt + answer], device=draft.device))
        agreed.append((guesses[len(prompt) - 1 : -1].cpu() == torch.tensor(answer)).tolist())
    return agreed


class Speculated(NamedTuple):
    """Greedy speculation along one answer, its first token given by the prompt's pass."""

    drafted: int
    accepted: int
    passes: int
    emitted: int


def speculate(agreed: list[bool], num_draft_tokens: int, limit: int) -> Speculated:
    """What the loop would do along an answer of at most `limit` tokens, by one of `agreed_tokens`, with no pass run:
    what it accepts is the target's own text, so the draft always stands behind that."""
    position = 1
    drafted = accepted = passes = 0
    while position < len(agreed):
        count = min(num_draft_tokens, limit - position - 1)
        block = agreed[position : position + count]
        run = block.index(False) if False in block else len(block)
        drafted, accepted, passes, position = drafted + count, accepted + run, passes + 1, position + run + 1
    return Speculated(drafted, accepted, passes, max(0, min(position, len(agreed)) - 1))


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
