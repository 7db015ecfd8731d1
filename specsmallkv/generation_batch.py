"""Several texts in the making at once: prompts wait in a queue, `batch_size` of them are answered in shared passes.

    for generation in spec.stream_batch(prompts, batch_size=8):
        print(generation.number, generation.text)

As `generation.py` for one text: tokens happen in `batch.py`; this file hands them to their `Generation`.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .batch import BatchDecoder, Job
from .errors import UserError

if TYPE_CHECKING:
    from .generation import Generation
    from .generator import SpecSmallKV

PER_PROMPT = ("seed", "max_new_tokens")  # settings that may be a list, one value for each prompt


class GenerationBatch:
    """Iterate for the generations that finish, as they do; `generations` has all of them in order of the prompts.

    A finished generation has its text and figures but no caches, so it cannot be continued.
    """

    def __init__(self, spec: "SpecSmallKV", generations: "list[Generation]", batch_size: int):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is not positive; give at least 1.")
        self.spec, self.generations, self.batch_size = spec, generations, batch_size
        for number, generation in enumerate(generations):
            generation.number = number
        self.seconds = 0.0
        self._batch: BatchDecoder | None = None

    def __iter__(self) -> "Iterator[Generation]":
        return (generation for generation in self.rounds() if generation.finished)

    def rounds(self) -> "Iterator[Generation]":
        """The generation that has grown, after every round of each; finished ones come once more, with all text."""
        if self._batch is not None:
            raise UserError("This batch was iterated over before; call stream_batch again.")
        if not self.generations:
            return
        self._batch = BatchDecoder(self.spec.decoder(self.generations[0].settings.sampler), self.batch_size)
        started = time.perf_counter()
        for row, round_ in self._batch.generate(map(job_of, self.generations)):
            generation = self.generations[row.number]
            generation.sequence = row.sequence
            generation.take(round_, row.started)
            row.stopped = generation.stopped
            if row.finished:
                generation.finish()
                generation.release()
            self.seconds = time.perf_counter() - started
            yield generation

    @property
    def begun(self) -> "list[Generation]":
        """Those that have a token, in order: all of them once the batch is through, else the first ones."""
        return [generation for generation in self.generations if generation.token_ids]

    def figures(self) -> dict[str, Any]:
        """What is the batch's and no row's: wall-clock time, shared passes, bytes of all rows at the fullest pass."""
        if self._batch is None:
            return {}
        counters = self._batch.counters
        figures: dict[str, Any] = {"seconds": self.seconds, "verify_passes": counters.verify_passes} | counters.held
        if counters.verify_passes:
            figures["rows_per_pass"] = counters.rounds / counters.verify_passes
            figures["kv_budget_effective"] = counters.held["target_kv_bytes"] / max(
                counters.held["target_kv_bytes_full"], 1
            )
        return figures | {"batch_size": self.batch_size, "phase_seconds": self._phase_seconds(counters.seconds)}

    def _phase_seconds(self, shared: dict[str, float]) -> dict[str, float]:
        """Of the shared phases, and of what every row did alone."""
        total = dict(shared)
        for generation in self.begun:
            for phase, seconds in (generation.figures()["phase_seconds"] or {}).items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total


def job_of(generation: "Generation") -> Job:
    settings = generation.settings
    return Job(
        generation.prompt_ids, settings.max_new_tokens, generation.stop_ids, settings.seed, settings.compress_after
    )


def settings_of_each(count: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of each of `count` prompts. Raises UserError for a list of another length."""
    lists = {key: value for key, value in settings.items() if key in PER_PROMPT and isinstance(value, list)}
    for key, value in lists.items():
        if len(value) != count:
            raise UserError(f"{key} has {len(value)} values for {count} prompts; give one for each, or a single one.")
    return [settings | {key: value[i] for key, value in lists.items()} for i in range(count)]
