"""task=generate: answer the prompt or prompts, streaming text to stdout; the default task."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..attention_form import refuse_windows
from ..config import RunConfig
from ..controller import Adaptive, make_controller
from ..display import Display, batch_line, live_line
from ..errors import UserError
from ..generation import Generation
from ..generation_batch import GenerationBatch
from ..generator import SpecSmallKV
from ..memory import peak_memory_bytes, reset_peak_memory
from ..models import load_pair
from ..page import run_page
from ..policies import Policy
from ..prompts import Request, read_requests
from ..record import asked_for, environment, plain, write_whole
from ..sampling import Sampler
from ..trace import Trace

SUMMED = (
    "new_tokens",
    "prompt_tokens",
    "seconds",
    "rounds",
    "drafted_tokens",
    "undrafted_rounds",
    "accepted_tokens",
    "recall_bytes",
)
LARGEST = (
    "target_kv_allocated_bytes",
    "target_kv_host_bytes",
    "target_kv_window_bytes",
    "target_kv_prefill_bytes",
    "draft_kv_bytes",
    "scratch_bytes",
    "peak_memory_bytes",
)


def load_generator(config: RunConfig, need_draft: bool = False, chosen: Policy | None = None) -> SpecSmallKV:
    """The pair, policy and draft length that a run's configuration asks for. need_draft: load it in any case.

    chosen: the policy that the user named, where another, the neediest of several, stands in for it.
    """
    num_draft_tokens = asked_for(config)["num_draft_tokens"]
    controller = make_controller(config.speculation, config.model.name, (chosen or config.policy).name)
    needs_draft = need_draft or bool(num_draft_tokens) or config.policy.reads_draft
    pair = load_pair(config.model, need_draft=needs_draft, quiet=config.quiet)
    return SpecSmallKV(pair, config.policy, num_draft_tokens, config.model.attention, controller)


def setting_figures(config: RunConfig, spec: SpecSmallKV) -> dict[str, Any]:
    """The keys of a record that say what was run."""
    controller = spec.controller
    costs: dict[str, Any] = {}
    if isinstance(controller, Adaptive) and controller.table.rows:  # of several policies each measures its own
        costs = {"cost_table": controller.table.plain()}
    own = asked_for(config) | costs
    return own | {
        "device": str(spec.pair.target.device),
        "dtype": str(spec.pair.target.dtype).removeprefix("torch."),
        "attention": spec.attention,
        "linear": spec.pair.linear,
        "target_weights": spec.pair.target_origin,
        "draft_weights": spec.pair.draft_origin,
        "target_weight_bytes": spec.pair.target_weight_bytes,
        "draft_weight_bytes": spec.pair.draft_weight_bytes,
    }


@dataclass
class GenerateTask:
    """Answers every request, `batch_size` at once; after Ctrl-C the record holds what there is, with `interrupted`."""

    name: str
    uses_batch_size = True

    def run(self, config: RunConfig) -> dict[str, Any]:
        if config.batch_size > 1 and config.prompts_file is None:
            raise UserError(f"batch_size={config.batch_size} needs several prompts; give them as prompts_file=FILE.")
        requests = read_requests(config)
        display = Display(config.quiet)
        with display.waiting("loading the models"):
            spec = load_generator(config)
        if config.report or config.trace:
            refuse_windows("report=true or trace=true", spec.pair.target.config)
        loading_peak = peak_memory_bytes(spec.pair.target.device)
        generations = [open_stream(spec, request, config) for request in requests]  # all are checked before the first
        if config.batch_size > 1:
            batch = GenerationBatch(spec, generations, config.batch_size)
            outputs, interrupted = answer_batch(batch, display)
            figures = combine(outputs, batch.figures())
        else:
            outputs, interrupted = answer_in_turn(generations, config, display)
            figures = combine(outputs)
        record = setting_figures(config, spec) | figures | {"interrupted": interrupted}
        record["finished"] = record["finished"] and not interrupted  # prompts that never began have no output
        if loading_peak is not None:
            record["peak_memory_bytes"] = max(loading_peak, record["peak_memory_bytes"])
        if config.prompts_file is not None:
            record["outputs"] = outputs
        display.table(record, config.policy)
        return record


def answer_in_turn(
    generations: list[Generation], config: RunConfig, display: Display
) -> tuple[list[dict[str, Any]], bool]:
    """Figures per generation, and whether Ctrl-C came; the caches are freed one by one."""
    outputs: list[dict[str, Any]] = []
    for number, generation in enumerate(generations):
        observed = Observed(generation, config, number)
        try:
            reset_peak_memory()
            show(generation, display)
        except KeyboardInterrupt:
            return [*outputs, output(generation) | observed.write(display)], True
        outputs.append(output(generation) | observed.write(display))
        generation.release()
    return outputs, False


def show(generation: Generation, display: Display) -> None:
    """Text to stdout as it comes, a line break behind it whatever happens."""
    first = f"reading a prompt of {len(generation.prompt_ids)} tokens"
    try:
        with display.progress(first, lambda: live_line(generation)) as progress:
            for piece in generation:
                sys.stdout.write(piece)
                sys.stdout.flush()
                progress(True)
    finally:
        print(flush=True)


class Observed:
    """What `report` and `trace` leave in the run directory of one generation; without them nothing happens."""

    def __init__(self, generation: Generation, config: RunConfig, number: int):
        self.generation, self.config, self.trace = generation, config, None
        if not (config.report or config.trace):
            return
        directory = Path(str(config.run_dir))
        directory.mkdir(parents=True, exist_ok=True)
        self.page = directory / (f"report-{number}.html" if number else "report.html")
        self.trace = Trace(generation.spec, directory / "trace.jsonl", number, detailed=config.report)
        if not number:
            (directory / "trace.jsonl").write_text("")  # of an earlier run into the same directory
        generation.observer = self.trace

    def write(self, display: Display) -> dict[str, str]:
        """The page, if there is a first round to show; the record's keys of what was written."""
        if self.trace is None:
            return {}
        written = {"trace": str(self.trace.path)}
        if self.config.report and self.trace.rows:
            spec, figures = self.generation.spec, self.generation.figures()
            surroundings = environment(spec.pair.target.device) | {"config": plain(self.config)}
            own = {"seed": self.generation.settings.seed, "interrupted": not self.generation.finished}
            record = setting_figures(self.config, spec) | figures | surroundings | own
            write_whole(self.page, run_page(record, self.trace, self.generation.prompt_ids))
            written["report"] = str(self.page)
            display.console.print(f"report: {self.page}", soft_wrap=True, highlight=False)
        return written


def answer_batch(batch: GenerationBatch, display: Display) -> tuple[list[dict[str, Any]], bool]:
    """The same for several at once: a text is shown whole, once it and all before it are there."""
    shown, interrupted = 0, False
    reset_peak_memory()
    try:
        with display.progress("reading the first prompts", lambda: batch_line(batch)) as progress:
            for generation in batch.rounds():
                while shown < len(batch.generations) and batch.generations[shown].finished:
                    print(batch.generations[shown].text, flush=True)
                    shown += 1
                progress(generation.finished)
    except KeyboardInterrupt:
        interrupted = True
    begun = batch.begun or batch.generations[:1]
    for generation in begun[shown:]:
        print(generation.text, flush=True)
    return [output(generation) for generation in begun], interrupted


def output(generation: Generation) -> dict[str, Any]:
    """A row of `outputs`."""
    return generation.figures() | {"seed": generation.settings.seed}


def open_stream(spec: SpecSmallKV, request: Request, config: RunConfig) -> Generation:
    prompt = request.messages if request.messages is not None else request.prompt
    assert prompt is not None, "a request has a prompt or messages"
    settings = generation_settings(config)
    return spec.stream(prompt, **settings | ({} if request.seed is None else {"seed": request.seed}))


def generation_settings(config: RunConfig) -> dict[str, Any]:
    """The fields of `GenerationSettings` that a run's configuration has."""
    return {
        "max_new_tokens": config.max_new_tokens,
        "sampler": Sampler(config.temperature, config.top_p, config.top_k),
        "seed": config.seed,
        "stop": tuple(config.stop),
        "chat": config.chat,
        "ignore_eos": config.ignore_eos,
    }


def combine(outputs: list[dict[str, Any]], batch: dict[str, Any] | None = None) -> dict[str, Any]:
    """One run's figures from its outputs': counts are summed, bytes are those of the fullest output.

    batch: what outputs that were made together have in common takes the place of both.
    """
    if len(outputs) == 1:
        return outputs[0] | (batch or {})
    fullest = max(outputs, key=lambda figures: figures["target_kv_bytes"] or 0)
    total = dict(fullest) | {key: sum(figures.get(key) or 0 for figures in outputs) for key in SUMMED}
    total |= {key: max(figures.get(key) or 0 for figures in outputs) for key in LARGEST}
    total |= {"finished": all(figures.get("finished") for figures in outputs)} | (batch or {})
    total.pop("seed", None)  # rows have their own; the record's is the run's
    begun = [figures for figures in outputs if figures["new_tokens"]]
    emitted = total["new_tokens"] - len(begun)  # the first token of each comes from its prefill
    reading = sum(figures["ttft_seconds"] for figures in begun)
    decoding = total["seconds"] - reading
    return total | {
        "text": None,
        "ttft_seconds": reading / max(len(begun), 1),
        "tokens_per_second": total["new_tokens"] / max(total["seconds"], 1e-9),
        "decode_tokens_per_second": emitted / max(decoding, 1e-9),
        "acceptance_rate": total["accepted_tokens"] / total["drafted_tokens"] if total["drafted_tokens"] else None,
        "drafted_per_round": total["drafted_tokens"] / total["rounds"] if total["rounds"] else None,
        "acceptance_length": emitted / total["rounds"] if total["rounds"] else None,
    }
