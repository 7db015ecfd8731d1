"""The target's own answers to the prompts of task=distill: asked for once, kept in `answers.jsonl`."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..chat_template import render
from ..distill_text import sample_batch
from ..errors import UserError
from ..models import ModelPair
from ..prompts import Request, read_requests_file
from ..weights import fingerprint

PROMPT_LIMIT, ANSWER_TOKENS, ANSWER_BATCH = 320, 208, 64
Answers = dict[tuple[int, ...], list[int]]


def encode(pair: ModelPair, request: Request) -> list[int]:
    """Token ids as the target reads them: through its chat template, or plain if it has none."""
    text, add_special_tokens = render(pair.tokenizer, pair.target_origin, request.messages or request.prompt or "")
    return pair.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


def read_prompts(pair: ModelPair, path: str, console: Console) -> list[list[int]]:
    """Those below PROMPT_LIMIT tokens, shortest first."""
    prompts = [encode(pair, request) for request in read_requests_file("task.prompts_file", path, chat=None)]
    fitting = [prompt for prompt in prompts if 0 < len(prompt) < PROMPT_LIMIT]
    if not fitting:
        raise UserError(f"task.prompts_file={path} has no prompt below {PROMPT_LIMIT} tokens; give shorter ones.")
    if left_out := len(prompts) - len(fitting):
        console.print(f"{left_out} of {len(prompts)} prompts left out: empty, or of {PROMPT_LIMIT} tokens or more")
    return sorted(fitting, key=lambda ids: (len(ids), ids))


def conversations(
    pair: ModelPair, prompts: list[list[int]], path: Path, seed: int, temperature: float, console: Console
) -> list[list[int]]:
    """Every prompt with its answer, shuffled; only those not yet answered are asked, in batches of like length."""
    made_by = {"target": fingerprint(pair.target), "seed": seed, "temperature": temperature}
    done = read_answers(path, made_by)
    missing = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts)) if prompt not in done]
    for start in range(0, len(missing), ANSWER_BATCH):
        batch = missing[start : start + ANSWER_BATCH]
        first = len(done)  # so a run that was stopped goes on as it would have
        heat = [0.0 if (first + i) % 5 < 2 else temperature for i in range(len(batch))]
        generator = torch.Generator().manual_seed(seed * 1000 + first)
        answers = sample_batch(pair.target, batch, heat, ANSWER_TOKENS, pair.eos_token_ids, generator)
        facts = made_by | {"batch": [first, len(batch)]}
        rows = [facts | {"prompt_ids": p, "answer_ids": a} for p, a in zip(batch, answers, strict=True)]
        with path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        done |= {tuple(prompt): answer for prompt, answer in zip(batch, answers, strict=True)}
        console.print(f"{min(start + ANSWER_BATCH, len(missing))} of {len(missing)} prompts answered")
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    return [prompts[i] + done[tuple(prompts[i])] for i in order.tolist()]


def read_answers(path: Path, made_by: dict[str, Any]) -> Answers:
    """What an earlier run of the same target, seed and temperature got.

    A batch that a kill or a full disk cut is dropped whole, from the file too, and sampled again as it had been.
    """
    if not path.exists():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = {line: json.loads(line) for line in lines if line.endswith("\n")}
        of_batch = Counter(batch_of(row) for row in rows.values())
        whole = {line: row for line, row in rows.items() if of_batch[batch_of(row)] >= row.get("batch", [0, 0])[1]}
        own = [row for row in whole.values() if {key: row.get(key) for key in made_by} == made_by]
        answers = {tuple(row["prompt_ids"]): row["answer_ids"] for row in own}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(
            f"{path} holds no answers of an earlier run; remove it or set another task.output_dir."
        ) from None
    if len(whole) < len(lines):
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(whole), encoding="utf-8")
        os.replace(partial, path)
    return answers


def batch_of(row: dict[str, Any]) -> str:
    """What the rows of one batch, and no others, have in common; rows of earlier versions do not say."""
    return json.dumps([row.get(key) for key in ("target", "seed", "temperature", "batch")])
