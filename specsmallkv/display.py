"""What a person sees beside the text: live status while waiting and a table at the end, on stderr only.

A live line and streamed text would overwrite each other on one terminal, so the status moves only where stdout is
piped away or nothing has been printed yet. rich honours NO_COLOR and falls silent where stderr is no terminal.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from .generation import Generation
from .generation_batch import GenerationBatch
from .policies import Policy

UNITS = ("B", "KiB", "MiB", "GiB")
WIDTH = 120


class Display:
    """quiet: show nothing at all."""

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = WIDTH  # a log file has no width to wrap at

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner, on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(what):
            yield

    @contextmanager
    def progress(self, first: str, line: Callable[[], str]) -> Iterator[Callable[[bool], None]]:
        """Status, at first `first`; call the yielded function after every round, and tell whether text was printed."""
        status = self.console.status(first)
        if self.console.is_terminal:
            status.start()

        def update(printed: bool) -> None:
            if printed and sys.stdout.isatty():
                status.stop()
            else:
                status.update(line())

        try:
            yield update
        finally:
            status.stop()

    def table(self, record: dict[str, Any], policy: Policy) -> None:
        """Speed, acceptance and what lies where."""
        table = Table(
            title=title(record, policy), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        for name, value in rows(record):
            table.add_row(name, value)
        self.console.print(table)

    def calibration(self, results: list[dict[str, Any]]) -> None:
        """One line per number of mixed heads; intervals and single layers stand in the record."""
        columns = [key for key, value in results[0].items() if not isinstance(value, list)]
        table = Table(title="head map, on texts left out", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for key in columns:
            table.add_column(key, justify="right")
        for row in results:
            table.add_row(*(f"{row[key]:.3f}" if isinstance(row[key], float) else str(row[key]) for key in columns))
        self.console.print(table)

    def fidelity(self, results: list[dict[str, Any]]) -> None:
        """One line per kind of rows, policy and budget; of several texts the means alone."""
        means = [row for row in results if row["text"] == "mean"]
        texts = len({row["text"] for row in results}) - 1
        title = "distance to the full cache" + (f", mean of {texts} texts" if means else "")
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        columns = ("kl_mean", "top1_agreement", "attention_recall", "kv_share_mean", "total_share_mean")
        names = "KL mean", "top-1", "recall", "bytes", "with draft", "KL / snapkv", "KL / oracle"
        for name in ("rows", "policy", "kv_budget", *names):
            table.add_column(name, overflow="fold")  # a variant's name may be long
        for row in means or results:
            numbers = [f"{row[key]:.4f}" for key in columns]
            ratios = [row.get(f"kl_ratio_to_{rival}") for rival in ("snapkv", "oracle")]
            ratios = ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
            table.add_row(row["rows"], row["policy"], f"{row['kv_budget']:.4g}", *numbers, *ratios)
        self.console.print(table)

    def benchmark(self, name: str, results: list[dict[str, Any]]) -> None:
        """One line per policy and budget, and the baselines."""
        table = Table(title=name, title_justify="left", box=None, padding=(0, 2, 0, 0))
        columns = (
            "policy",
            "kv_budget",
            "score",
            "95% interval",
            "correct",
            "answered",
            "kept",
            "tokens/s",
            "seconds",
        )
        for column in columns:
            table.add_column(column, overflow="fold")
        for r in results:
            low, high = r["accuracy_interval"] or (None, None)
            score = "" if r["accuracy"] is None else f"{r['accuracy']:.3f}"
            interval = "" if low is None else f"{low:.3f} to {high:.3f}"
            correct = "" if r["correct"] is None else f"{r['correct']} of {r['total']}"
            numbers = score, interval, correct, str(r["answered"]), f"{r['kv_budget_effective'] or 0:.1%}"
            speed = f"{r['decode_tokens_per_second'] or 0:.1f}"
            table.add_row(r["policy"], f"{r['kv_budget']:.4g}", *numbers, speed, f"{r['seconds']:.1f}")
        self.console.print(table)

    def perplexity(self, results: list[dict[str, Any]]) -> None:
        """One line per policy and budget."""
        table = Table(title="perplexity", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("policy", "kv_budget", "perplexity", "full cache", "top-1", "kept", "tokens"):
            table.add_column(column, overflow="fold")
        for r in results:
            numbers = f"{r['perplexity']:.4f}", f"{r['perplexity_full']:.4f}", f"{r['top1_agreement']:.4f}"
            kept = f"{r['kv_budget_effective'] or 1:.1%}"
            table.add_row(r["policy"], f"{r['kv_budget']:.4g}", *numbers, kept, str(r["scored_tokens"]))
        self.console.print(table)

    def lm_eval(self, results: list[dict[str, Any]]) -> None:
        """One line per task, policy, budget and metric."""
        table = Table(title="lm-evaluation-harness", title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("task", "n", "policy", "kv_budget", "metric", "value", "stderr", "kept"):
            table.add_column(column, overflow="fold")
        for r in results:
            setting = r["name"], str(r["n"]), r["policy"], f"{r['kv_budget']:.4g}"
            for metric, error in [(key.replace("_stderr", "", 1), key) for key in r if "_stderr" in key]:
                errors = "" if r[error] is None else f"{r[error]:.4f}"
                table.add_row(*setting, metric, f"{r[metric]:.4f}", errors, f"{r['kv_budget_effective'] or 1:.1%}")
        self.console.print(table)

    def plan(self, record: dict[str, Any], policy: Policy) -> None:
        """Where the bytes of a run would go."""
        batch, tokens = record["batch_size"], f"{record['prompt_tokens']} + {record['max_new_tokens']} tokens"
        heading = f"{title(record, policy)}: {batch} x {tokens}, {record['dtype']}"
        table = Table(title=heading, title_justify="left", box=None)
        table.add_column("device")
        table.add_column("planned", justify="right")
        names = {
            "target weights": "target_weight_bytes",
            "draft weights": "draft_weight_bytes",
            "target KV": "target_kv_bytes",
            "draft KV": "draft_kv_bytes",
            "scratch": "scratch_bytes",
            "in all": "device_bytes",
            "target alone, full cache": "device_bytes_full",
            "full KV": "target_kv_bytes_full",
            "target KV while the prompt is read": "target_kv_prefill_bytes",
            "host store": "target_kv_host_bytes",
        }
        for name, key in names.items():
            table.add_row(name, size(record[key]))
        even = record["break_even_context_tokens"]
        table.add_row("the pair breaks even at", "never" if even is None else f"{even} tokens")
        self.console.print(table)

    def throughput(self, rows: list[dict[str, Any]]) -> None:
        """One line per system: speed, ratios by wall clock and CPU time, acceptance, bytes, share of the roofline."""
        table = Table(title="decoding", title_justify="left", box=None, padding=(0, 2, 0, 0))
        names = ("tokens/s", "spread", "/ transformers", "/ assisted", "/ full", "CPU / transf.", "CPU / full")
        for name in ("system", *names, "accepted", "KV read", "roofline"):
            table.add_column(name, overflow="fold")
        for row in rows:
            spread = f"{row['tokens_per_second_min']:.2f}-{row['tokens_per_second_max']:.2f}"
            keys = ("ratio_to_transformers", "ratio_to_assisted", "ratio_to_full")
            ratios = [row.get(key) for key in (*keys, "cpu_ratio_to_transformers", "cpu_ratio_to_full")]
            cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            read = f"{row['kv_bytes_read_per_token'] / 2**20:.1f} MiB"
            last = f"{row['acceptance_length']:.2f}", read, f"{row['roofline_share']:.0%}"
            table.add_row(row["name"], f"{row['tokens_per_second']:.2f}", spread, *cells, *last)
        self.console.print(table)


def live_line(generation: Generation) -> str:
    count, seconds = len(generation.token_ids), max(generation.seconds, 1e-9)
    counters = generation.sequence.counters if generation.sequence else None
    accepted = f", {counters.accepted}/{counters.drafted} drafts accepted" if counters and counters.drafted else ""
    return f"{count} tokens, {count / seconds:.1f} tokens/s{accepted}"


def batch_line(batch: GenerationBatch) -> str:
    begun, seconds = batch.begun, max(batch.seconds, 1e-9)
    count, done = sum(len(generation.token_ids) for generation in begun), sum(one.finished for one in begun)
    work = f"{done} of {len(batch.generations)} prompts answered, {len(begun) - done} in work"
    return f"{work}, {count / seconds:.1f} tokens/s"


def title(record: dict[str, Any], policy: Policy) -> str:
    drafts = record["num_draft_tokens"]
    speculation = f"{drafts} draft tokens" if drafts else "no speculation"
    held = {what: getattr(policy, f"{what}_bits", None) for what in ("key", "value")}
    bits = [f"{what}s in {number} bits" for what, number in held.items() if number]
    return f"{record['model']}: {', '.join([record['policy'], *bits])}, kv_budget {record['kv_budget']}, {speculation}"


def rows(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, value) of every figure that the run has."""
    yield "tokens", f"{record['prompt_tokens']} prompt, {record['new_tokens']} new"
    yield (
        "speed",
        (
            f"{record['tokens_per_second']:.2f} tokens/s in all, "
            f"{record['decode_tokens_per_second'] or 0:.2f} decoding, "
            f"first token after {record['ttft_seconds']:.2f} s"
        ),
    )
    if record.get("acceptance_rate") is not None:
        yield (
            "speculation",
            (
                f"{record['acceptance_rate']:.0%} of {record['drafted_tokens']} drafts accepted, "
                f"{record['acceptance_length']:.2f} tokens per verify pass"
            ),
        )
    if record["target_kv_bytes"] is None:
        return
    full = record["target_kv_bytes_full"]
    used = f"{size(record['target_kv_bytes'])} of {size(full)} full"
    yield "target KV", f"{used} ({record['kv_budget_effective']:.1%})"
    host, recalled = of_full(record["target_kv_host_bytes"], full), size(record["recall_bytes"])
    yield "host store", f"{host}, {recalled} recalled"
    yield "draft KV", f"{of_full(record['draft_kv_bytes'], full)}, and {size(record['draft_weight_bytes'])} of weights"
    yield "tiers per head", tiers(record["kept_per_layer"])


def tiers(kept: list[dict[str, int]]) -> str:
    """Mean over layers at the end of the run."""
    mean = {key: sum(layer[key] for layer in kept) / len(kept) for key in ("critical", "marginal", "total")}
    return f"{mean['critical']:.0f} critical, {mean['marginal']:.0f} marginal of {mean['total']:.0f} tokens"


def of_full(count: int, full: int) -> str:
    """Bytes beside what the target's full cache would have held in its fullest round."""
    return f"{size(count)} ({count / max(full, 1):.1%} of full)"


def size(count: float) -> str:
    unit = 0
    while count >= 1024 and unit + 1 < len(UNITS):
        count, unit = count / 1024, unit + 1
    return f"{count:.1f} {UNITS[unit]}" if unit else f"{count:.0f} B"
