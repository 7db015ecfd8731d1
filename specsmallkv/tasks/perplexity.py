"""task=perplexity: how well each policy's cache predicts a text, read in verify blocks as decoding reads it.

The text is cut into windows. The first `context_tokens` of a window are its prompt, which is compressed; the next
`eval_tokens` are scored as `trials.py` describes, so a compressed cache is really read. Perplexity is exp of the mean
negative log-likelihood over all scored tokens. It is not the perplexity of a full forward pass over long strides.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from ..benchmarks.data import HUB, KEY, SAMPLES, HubSource, hub_rows
from ..config import RunConfig
from ..display import Display
from ..errors import UserError
from ..generator import SpecSmallKV
from ..intervals import bootstrap
from ..policies import Policy
from ..prompts import read_text
from ..trials import Trial, check_rows, prefill_once, read_on
from .benchmark_results import headline
from .generate import load_generator, setting_figures
from .grid import neediest, policy_grid

HUB_SOURCE = HubSource("Salesforce/wikitext", "wikitext-2-raw-v1", "test")


@dataclass
class Readings:
    """One policy's windows: negative log-likelihoods of each, its own and the full cache's, and the fullest trial."""

    policy: Policy
    nll: list[list[float]] = field(default_factory=list)
    nll_full: list[list[float]] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)
    recall_bytes: int = 0
    fullest: Trial | None = None

    def add(self, trial: Trial) -> None:
        self.nll.append(trial.scores.nll)
        self.nll_full.append(trial.scores.nll_full)
        self.agrees += trial.scores.agrees
        self.recall_bytes += trial.sequence.target.recall_bytes
        if self.fullest is None or used_bytes(trial) >= used_bytes(self.fullest):
            self.fullest = trial

    def row(self) -> dict[str, Any]:
        """One of the record's results; the interval is a bootstrap over windows, which are independent."""
        nll, full = (sum(map(sum, lists)) / sum(map(len, lists)) for lists in (self.nll, self.nll_full))
        means = [sum(window) / len(window) for window in self.nll]
        return {
            "policy": self.policy.name,
            "kv_budget": self.policy.kv_budget,
            "perplexity": math.exp(nll),
            "perplexity_interval": [math.exp(border) for border in bootstrap(means)] if len(means) > 1 else None,
            "perplexity_full": math.exp(full),
            "nll": nll,
            "nll_full": full,
            "top1_agreement": sum(self.agrees) / len(self.agrees),
            "windows": len(self.nll),
            "scored_tokens": len(self.agrees),
        } | self.held()

    def held(self) -> dict[str, Any]:
        """Bytes of the window that held most, recalled ones of all."""
        counters = self.fullest.sequence.counters if self.fullest else None
        used, whole = (counters.max_target_bytes, counters.full_bytes_then) if counters else (0, 0)
        return {
            "target_kv_bytes": used,
            "target_kv_bytes_full": whole,
            "kv_budget_effective": used / whole if whole else None,
            "recall_bytes": self.recall_bytes,
            "kept_per_layer": self.fullest.sequence.target.kept_per_layer() if self.fullest else None,
        }


def used_bytes(trial: Trial) -> int:
    return trial.sequence.counters.max_target_bytes


@dataclass
class PerplexityTask:
    """data_path: a UTF-8 text (.gz too), `hub` for WikiText-2, or None for the package's. num_examples: windows.

    rows: whose rows a verify block brings, drafted or gold, as in task=fidelity. policies, kv_budgets as there; empty
    is the run's own.
    """

    name: str
    data_path: str | None
    num_examples: int
    context_tokens: int
    eval_tokens: int
    rows: str
    policies: list[str]
    kv_budgets: list[float]

    def __post_init__(self) -> None:
        check_rows(self.rows)
        for key, least in (("num_examples", 1), ("context_tokens", 64), ("eval_tokens", 1)):
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)} is too small; give at least {least}.")

    @torch.inference_mode()
    def run(self, config: RunConfig) -> dict[str, Any]:
        display, chosen = Display(config.quiet), config.policy
        policies = policy_grid(chosen, self.policies or [chosen.name], self.kv_budgets or [chosen.kv_budget])
        text, config.policy = self._text(), neediest(policies)
        with display.waiting("loading the models"):
            spec = load_generator(config, chosen=chosen)
        windows = self._windows(spec, text)
        readings, interrupted = self._measure(spec, policies, windows, display)
        results = [reading.row() for reading in readings]
        display.perplexity(results)
        figures = {"results": results, "text": None, "prompt_tokens": self.context_tokens, "interrupted": interrupted}
        return setting_figures(config, spec) | headline(results, chosen) | figures

    def _text(self) -> str:
        if self.data_path == HUB:
            return "".join(str(row["text"]) for _, row in hub_rows(HUB_SOURCE))
        return read_text(KEY, self.data_path or str(SAMPLES / "text.txt"))

    def _windows(self, spec: SpecSmallKV, text: str) -> list[list[int]]:
        """As many windows as are asked for and the text has, one behind the other."""
        ids = spec.pair.tokenizer(text, add_special_tokens=False)["input_ids"]
        size = self.context_tokens + self.eval_tokens + 1  # the token behind the prompt comes from its own logits
        spec.check_length(ids[: self.context_tokens], self.eval_tokens)
        windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)][: self.num_examples]
        if not windows:
            raise UserError(
                f"{f'{KEY}={self.data_path}' if self.data_path else 'the text in the package'} has {len(ids)} tokens, "
                f"fewer than a window of {size}; give {KEY} a longer text, or lower task.context_tokens or "
                "task.eval_tokens."
            )
        return windows

    def _measure(
        self, spec: SpecSmallKV, policies: list[Policy], windows: list[list[int]], display: Display
    ) -> tuple[list[Readings], bool]:
        """Every policy on every window, and whether Ctrl-C left only the first ones."""
        readings = [Readings(policy) for policy in policies]
        try:
            with Progress(console=display.console, transient=True) as progress:
                bar = progress.add_task("scoring", total=self.eval_tokens * len(windows))
                for window in windows:
                    base = prefill_once(spec, neediest(policies), window, self.context_tokens, policies)
                    trials = read_on(base, policies, window, self.rows == "gold", partial(progress.advance, bar))
                    for reading, trial in zip(readings, trials, strict=True):
                        reading.add(trial)
        except KeyboardInterrupt:
            if not readings[0].nll:
                raise
            return readings, True
        return readings, False
