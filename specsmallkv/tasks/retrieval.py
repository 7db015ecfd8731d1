"""task=retrieval: find one item of a long list, with the question visible or hidden when the cache is compressed."""

from dataclasses import dataclass

from ..benchmarks.example import Example
from ..config import RunConfig
from ..errors import UserError
from .benchmark import ContextBenchmark
from .retrieval_data import KINDS, make_examples, read_examples


@dataclass
class RetrievalTask(ContextBenchmark):
    """kind: lines or kv. Without data_path lists are made, num_items long, from seed (None: the run's)."""

    kind: str
    num_items: int
    seed: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise UserError(f"task.kind={self.kind} is unknown; choose one of {', '.join(KINDS)}.")
        if self.num_items < 1:
            raise UserError(f"task.num_items={self.num_items} is too small; give at least 1.")
        if self.seed is not None and type(self.seed) is not int:
            raise UserError(f"task.seed={self.seed} is not a whole number; give one, or null for the run's seed.")

    def read(self, config: RunConfig) -> list[Example]:
        if self.data_path is not None:
            return [*read_examples(self.kind, self.data_path, self.num_examples)]
        seed = config.seed if self.seed is None else self.seed
        return [*make_examples(self.kind, self.num_items, self.num_examples, seed)]
