"""task=lm_eval: any task of lm-evaluation-harness (extra `eval`), answered through the speculative loop.

Tasks, prompts, filters and metrics are the harness's own; only the model is ours (`lm_eval_model.py`).
"""

import difflib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ..config import RunConfig
from ..display import Display
from ..errors import UserError
from ..generator import SpecSmallKV
from ..policies import Policy
from ..record import plain
from ..trials import check_rows
from .benchmark import rows_path
from .benchmark_results import headline, ratio
from .generate import load_generator, setting_figures
from .grid import neediest, policy_grid

NOT_METRICS = ("alias", "name", "sample_len", "sample_count")
OF_TEXTS = ("new_tokens", "seconds", "drafted_tokens", "accepted_tokens", "rounds", "emitted_tokens", "recall_bytes")


@dataclass
class LMEvalTask:
    """tasks: names, groups, tags or patterns of the harness, or YAML files. include_path: a folder with further ones.

    num_examples: at most so many of each task, None for all. num_fewshot: None is the task's own. rows: whose rows a
    verify block of a likelihood brings, drafted or gold, as in task=perplexity. confirm_run_unsafe_code: for tasks
    that run what the model writes. policies, kv_budgets, max_new_tokens as for other benchmarks.
    """

    name: str
    tasks: list[str]
    include_path: str | None
    num_examples: int | None
    num_fewshot: int | None
    rows: str
    confirm_run_unsafe_code: bool
    policies: list[str]
    kv_budgets: list[float]
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("task.tasks names no task; give some of lm-evaluation-harness, e.g. 'task.tasks=[piqa]'.")
        check_rows(self.rows)
        for key, least in (("num_examples", 1), ("num_fewshot", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"task.{key}={value} is too small; give at least {least}, or null.")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UserError(f"task.include_path={self.include_path} is no directory; give one with task YAML files.")

    @torch.inference_mode()
    def run(self, config: RunConfig) -> dict[str, Any]:
        display, chosen = Display(config.quiet), config.policy
        policies = policy_grid(chosen, self.policies or [chosen.name], self.kv_budgets or [chosen.kv_budget])
        with display.waiting("reading the tasks"), kept_quiet(config.quiet):
            manager, tasks = self._load(config.quiet)
        config.policy = neediest(policies)
        with display.waiting("loading the models"):
            spec = load_generator(config, chosen=chosen)
        if config.chat:
            spec.render([{"role": "user", "content": "?"}], True)  # refuses a tokenizer without a template

        path = rows_path(config)
        results, truncated = self._answer(spec, policies, manager, tasks, config, path)
        display.lm_eval(results)
        figures = {"text": None, "results": results, "examples_file": str(path), "truncated": truncated}
        return setting_figures(config, spec) | headline(results, chosen) | figures

    def _answer(
        self,
        spec: SpecSmallKV,
        policies: list[Policy],
        manager: Any,
        tasks: list[Any],
        config: RunConfig,
        path: Path,
    ) -> tuple[list[dict[str, Any]], int]:
        """The rows of all policies, and how many requests were cut; samples go to `path`, policy by policy."""
        from .lm_eval_model import Answers, PolicyLM

        results: list[dict[str, Any]] = []
        with Progress(console=Display(config.quiet).console, transient=True) as progress, kept_quiet(config.quiet):
            bar = progress.add_task("answering", total=None)
            answers = Answers(spec, policies, config, self.rows == "gold", lambda n: progress.advance(bar, n))
            for number, policy in enumerate(policies):
                found = self._evaluate(PolicyLM(answers, number), tasks, manager, config)
                setting = {"policy": policy.name, "kv_budget": policy.kv_budget}
                own = figures_of(answers, number)
                results += [setting | row | own for row in rows_of(found)]
                write_samples(path, "a" if number else "w", found, setting)
        return results, answers.truncated

    def _evaluate(self, model: Any, tasks: list[Any], manager: Any, config: RunConfig) -> dict[str, Any]:
        from lm_eval import simple_evaluate

        try:
            return simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=manager,
                limit=self.num_examples,
                num_fewshot=self.num_fewshot,
                gen_kwargs=gen_kwargs(config),
                apply_chat_template=bool(config.chat),
                confirm_run_unsafe_code=self.confirm_run_unsafe_code,
            )
        except ValueError as error:
            if "unsafe" in str(error) or "multimodal" in str(error):
                remedy = "set task.confirm_run_unsafe_code=true" if "unsafe" in str(error) else "leave it out"
                raise UserError(f"lm-evaluation-harness refuses a task ({one_line(error)}); {remedy}.") from error
            raise

    def _load(self, quiet: bool) -> tuple[Any, list[Any]]:
        """The harness's index, and its tasks and groups with their data, before any model is loaded."""
        try:
            import lm_eval  # noqa: F401
            from datasets import disable_progress_bars
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(
                f"task=lm_eval needs lm-evaluation-harness ({one_line(error)}); install it with "
                "pip install 'specsmallkv[eval]'."
            ) from None
        if quiet:
            disable_progress_bars()
        if self.include_path is not None:  # the harness's own index is read from 14,000 files, which takes a while
            own = TaskManager(include_path=self.include_path, include_defaults=False)
            if all(own.match_tasks([name]) for name in self.tasks):
                with suppress(UserError):  # a group may name tasks of the harness
                    return own, [found for name in self.tasks for found in load(own, name)]
        manager = TaskManager(include_path=self.include_path)
        return manager, [found for name in self.tasks for found in load(manager, name)]


@contextmanager
def kept_quiet(quiet: bool) -> Iterator[None]:
    """stdout is the record's, so what libraries print goes to stderr, and with quiet nowhere."""
    with open(os.devnull, "w") as nowhere:
        elsewhere = nowhere if quiet else sys.stderr
        with redirect_stdout(elsewhere), redirect_stderr(elsewhere):
            yield


def load(manager: Any, asked: str) -> Iterator[Any]:
    """What one entry of `task.tasks` stands for: a group, or single tasks."""
    names = [asked] if Path(asked).is_file() else manager.match_tasks([asked])
    if not names:
        near = difflib.get_close_matches(asked, manager.all_tasks, n=3)
        hint = f" (near: {', '.join(near)})" if near else ""
        raise UserError(
            f"task.tasks={asked} is no task of lm-evaluation-harness{hint}; name one, or give the folder of your own "
            "as task.include_path."
        )
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # offline, gated, moved, not YAML: a dozen types
            raise UserError(
                f"task.tasks={name} cannot be loaded ({type(error).__name__}: {one_line(error)}); its data come from "
                "the hub, so go online once, or give a YAML with local data_files in task.include_path."
            ) from error
        yield from [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()


def gen_kwargs(config: RunConfig) -> dict[str, Any] | None:
    """The run's sampling, if it samples, takes the place of the tasks' own."""
    if config.temperature == 0:
        return None
    return {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}


def rows_of(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row per task and group: its metrics, each with its standard error, and how many documents they are of."""
    for name, metrics in (found["results"] | found.get("groups", {})).items():
        counts = found["n-samples"].get(name)
        n = counts["effective"] if counts else metrics.get("sample_len") or metrics.get("sample_count")
        known = {metric_name(key): value for key, value in metrics.items() if key not in NOT_METRICS}
        fewshot, version = found["n-shot"].get(name), found["versions"].get(name)
        yield {"name": name, "n": n, "num_fewshot": fewshot, "task_version": version, **numbers(known)}


def metric_name(key: str) -> str:
    """`acc,none` is acc; a filter keeps its name: `exact_match,strict-match`."""
    return key.removesuffix(",none")


def numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """What is a number; the standard error of a metric that has none ("N/A") is null."""
    found = {key: plain(value) for key, value in metrics.items() if not isinstance(value, str)}
    return found | {key: None for key, value in metrics.items() if value == "N/A"}


def figures_of(answers: Any, number: int) -> dict[str, Any]:
    """Bytes of the request that held most, likelihoods and texts together; speed and acceptance of texts."""
    likelihoods, texts = answers.readings[number].held(), answers.systems[number].figures
    fullest = max([likelihoods, *texts], key=lambda figures: figures["target_kv_bytes"])
    total = {key: sum(figures[key] for figures in texts) for key in OF_TEXTS}
    keys = ("target_kv_bytes", "target_kv_bytes_full", "kv_budget_effective", "kept_per_layer")
    return {key: fullest[key] for key in keys} | {
        "likelihood_requests": len(answers.readings[number].nll),
        "generated_texts": len(texts),
        "new_tokens": total["new_tokens"],
        "seconds": total["seconds"],
        "acceptance_rate": ratio(total["accepted_tokens"], total["drafted_tokens"]),
        "acceptance_length": ratio(total["emitted_tokens"], total["rounds"]),
        "recall_bytes": total["recall_bytes"] + likelihoods["recall_bytes"],
    }


def write_samples(path: Path, mode: str, found: dict[str, Any], setting: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as file:
        for name, samples in found.get("samples", {}).items():
            for sample in samples:
                file.write(json.dumps(setting | {"name": name} | sample, ensure_ascii=False, default=str) + "\n")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
