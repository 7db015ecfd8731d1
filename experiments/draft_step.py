"""What one step of a draft costs beside one of its target: one token, one sequence, full caches.

    python experiments/draft_step.py [--model NAME] [--target DIR] [--draft DIR] [--text FILE]
        [--context-tokens 1024] [--repeats 60]

Steps alternate (target, draft, and, where both are as wide, the draft with all rows of the target's head) in one
process, so that a machine whose speed drifts shows it to all alike. Medians of wall and CPU time in milliseconds,
ratios of each round's with their quartiles.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from draft_quality import named_pair, pair_parser

from specsmallkv.attention import AttentionCall, use_tiered_attention
from specsmallkv.errors import UserError
from specsmallkv.hub_text import tokens_of
from specsmallkv.models import ModelPair
from specsmallkv.passes import Passes, full_cache

WARMUP = 5  # rounds that are not counted: weights and caches are touched for the first time


def arguments() -> argparse.Namespace:
    parser = pair_parser(__doc__.splitlines()[0])
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=60)
    return parser.parse_args()


class Steps:
    """The three kinds of step, each behind the same tokens in a full cache of its own."""

    def __init__(self, pair: ModelPair, tokens: list[int], rounds: int):
        target, draft = pair.target, pair.draft
        assert draft is not None
        self.passes = Passes(target, draft, "sdpa")
        self.heads = {"draft": draft.get_output_embeddings(), "whole_head": target.get_output_embeddings()}
        self.models = {"target": target, "draft": draft}
        if draft.config.hidden_size == target.config.hidden_size:
            self.models["whole_head"] = draft
        self.caches = {name: full_cache(model, len(tokens) + rounds) for name, model in self.models.items()}
        for name, model in self.models.items():
            use_tiered_attention(model)
            self.passes.feed(model, self.caches[name], tokens)

    def run(self, name: str, token: int) -> None:
        if name in self.heads:
            self.models[name].set_output_embeddings(self.heads[name])
        self.passes.forward(self.models[name], self.caches[name], [token], AttentionCall("sdpa"))


def timed(step: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def ratio(step: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Of milliseconds (rounds,)."""
    low, median, high = np.percentile(step / target, [25, 50, 75]).round(3).tolist()
    return {"median": median, "quartiles": [low, high]}


def check(given: argparse.Namespace) -> None:
    for name in ("context_tokens", "repeats"):
        if getattr(given, name) < 1:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option}={getattr(given, name)} measures nothing; use 1 or more.")


def read(pair: ModelPair, given: argparse.Namespace) -> list[int]:
    tokens = tokens_of(pair.tokenizer, "--text", given.text)
    if len(tokens) < given.context_tokens:
        raise UserError(
            f"--text={given.text} has {len(tokens)} tokens; give a longer one, or --context-tokens={len(tokens)}."
        )
    return tokens[: given.context_tokens]


@torch.inference_mode()
def measure(given: argparse.Namespace) -> dict[str, object]:
    check(given)
    pair = named_pair(given)
    tokens = read(pair, given)
    steps = Steps(pair, tokens, WARMUP + given.repeats)
    names = list(steps.caches)
    rounds = [[timed(partial(steps.run, name, tokens[-1])) for name in names] for _ in range(WARMUP + given.repeats)]
    wall, cpu = np.array(rounds)[WARMUP:].transpose(2, 0, 1)
    found: dict[str, Any] = {
        "context_tokens": len(tokens),
        "repeats": given.repeats,
        "threads": torch.get_num_threads(),
    }
    for kind, ms in (("wall", wall), ("cpu", cpu)):
        found[kind] = {"ms": dict(zip(names, np.median(ms, axis=0).round(2).tolist(), strict=True))}
        found[kind] |= {f"{name} / target": ratio(ms[:, i], ms[:, 0]) for i, name in enumerate(names) if i}
    return found


def main() -> None:
    try:
        print(json.dumps(measure(arguments()), indent=2))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
