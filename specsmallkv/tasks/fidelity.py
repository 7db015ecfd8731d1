"""task=fidelity: how far each policy's next-token distributions are from the full cache's, teacher-forced on texts.

The first `context_tokens` of a text are the prompt; the next `eval_tokens` are scored in verify blocks of
`num_draft_tokens` + 1, as `trials.py` describes. `fidelity_results.py` makes the record's rows out of it.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from ..config import RunConfig
from ..display import Display
from ..errors import UserError
from ..generator import SpecSmallKV
from ..policies import Policy
from ..trials import BLOCK_ROWS, Base, Trial, check_rows, open_trial, prefill_once, run_trials
from .fidelity_results import MEAN, Result, summary, with_means, with_ratios
from .generate import load_generator, setting_figures
from .grid import neediest, policy_grid
from .texts import passage, read_texts

ROWS = {rows: (rows,) for rows in BLOCK_ROWS} | {"both": BLOCK_ROWS}
MATCHED, ITS_NAME = "snapkv", "snapkv@total"  # the policy that gets a total of bytes, and what it is then called


@dataclass
class FidelityTask:
    """text_file or text_files, text_field of JSONL rows, offset (characters of each), context_tokens, eval_tokens.

    rows: drafted, gold or both. policies: presets or variants of them (`grid.py`), each at every one of kv_budgets.
    matched_total: for each budget, also snapkv with as many bytes as a policy that reads the draft holds in total.
    """

    name: str
    text_file: str | None
    text_files: list[str]
    text_field: str
    offset: int
    context_tokens: int
    eval_tokens: int
    rows: str
    policies: list[str]
    kv_budgets: list[float]
    matched_total: bool

    def __post_init__(self) -> None:
        check_rows(self.rows, ROWS)
        for key, least in (("offset", 0), ("context_tokens", 64), ("eval_tokens", 1)):
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)} is too small; give at least {least}.")

    @torch.inference_mode()
    def run(self, config: RunConfig) -> dict[str, Any]:
        display, chosen = Display(config.quiet), config.policy
        policies = self._policies(chosen)
        contents = read_texts("fidelity", self.text_file, self.text_files, self.text_field)
        config.policy = neediest(policies)
        with display.waiting("loading the models"):
            spec = load_generator(config, chosen=chosen)
        if self.matched_total and spec.pair.draft is None:
            raise UserError("task.matched_total=true needs a draft, whose bytes are matched; set model.draft.")
        needed, lower = self.context_tokens + self.eval_tokens + 1, "task.context_tokens or task.eval_tokens"
        texts = {name: passage(spec, name, text, self.offset, needed, lower) for name, text in contents.items()}
        measured, draft_bytes, interrupted = self._measure(spec, policies, texts, display)
        results = with_ratios(with_means(measured))
        display.fidelity(results)
        figures = {"results": results, "rows": self.rows, "prompt_tokens": self.context_tokens, "text": None}
        figures |= {"draft_kv_bytes": draft_bytes, "interrupted": interrupted}
        return setting_figures(config, spec) | headline(results, chosen) | figures

    def _measure(
        self, spec: SpecSmallKV, policies: list[Policy], texts: dict[str, list[int]], display: Display
    ) -> tuple[list[Result], int, bool]:
        """Results text by text, bytes of the draft's cache, and whether Ctrl-C left only the first texts."""
        results: list[Result] = []
        draft_bytes = 0
        try:
            for name, tokens in texts.items():
                with display.waiting(f"reading {self.context_tokens} tokens of {name}"):
                    base = prefill_once(spec, neediest(policies), tokens, self.context_tokens, policies)
                results += self._results(base, name, tokens, display)
                draft_bytes = base.sequence.draft.held_nbytes if base.sequence.draft else 0
        except KeyboardInterrupt:
            if not results:
                raise
            return results, draft_bytes, True
        return results, draft_bytes, False

    def _results(self, base: Base, name: str, tokens: list[int], display: Display) -> list[Result]:
        """One text's, for each kind of rows."""
        results: list[Result] = []
        for rows in ROWS[self.rows]:
            trials = self._trials(base)
            with Progress(console=display.console, transient=True) as progress:
                bar = progress.add_task(f"scoring {name}, {rows} rows", total=self.eval_tokens)
                run_trials(base, trials, tokens, rows == "gold", partial(progress.advance, bar))
            results += [summary(trial, name, rows) for trial in trials]
        return results

    def _trials(self, base: Base) -> list[Trial]:
        trials = [open_trial(base, policy) for policy in base.policies]
        for kv_budget in self.kv_budgets if self.matched_total else []:
            total = min(1.0, kv_budget + base.draft_share)
            rival = next(p for p in base.policies if p.name == MATCHED)
            trials.append(open_trial(base, replace(rival, name=ITS_NAME, kv_budget=total), kv_budget))
        return trials

    def _policies(self, chosen: Policy) -> list[Policy]:
        if not (self.policies and self.kv_budgets):
            raise UserError("task.policies or task.kv_budgets is empty; name at least one of each.")
        policies = policy_grid(chosen, self.policies, self.kv_budgets)
        for policy in policies:
            if self.context_tokens <= policy.num_sink_tokens + policy.window_size:
                raise UserError(
                    f"task.context_tokens={self.context_tokens} leaves nothing to evict beside num_sink_tokens and "
                    f"window_size={policy.window_size} of {policy.name}; give more."
                )
        if self.matched_total and MATCHED not in [policy.name for policy in policies]:
            raise UserError(f"task.matched_total=true compares with {MATCHED}; add it to task.policies.")
        return policies


def headline(results: list[dict[str, Any]], chosen: Policy) -> dict[str, Any]:
    """The row whose figures stand at the top of the record: the run's own policy's, else the first.

    At its budget if that was measured, over all texts if there are several, and of drafted rows if there are both.
    """
    rows = [row for row in results if row["text"] == MEAN] or results
    own = [row for row in rows if row["policy"] == chosen.name] or rows
    return next((row for row in own if row["kv_budget"] == chosen.kv_budget), own[0])
