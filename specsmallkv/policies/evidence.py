"""What a policy may look at; what it freezes of one sequence lies here, so that the policy itself stays stateless."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from ..attention import AttentionMass
from ..oracle import AttentionOracle
from ..own_attention import LastQueries


@dataclass
class Evidence:
    """What a policy may look at, for one sequence.

    queries: the target's observation window per layer, (1, H_q, W, D), until nobody asks for it again. observed: there
    has been one. frozen: per layer, a policy's own memory.
    saliency: (L, H_kv, N) from the draft, for policies that ask for it; (L, H_kv, q, N), one per query of the coming
    verify pass, under `selection=query`. scaling: of the target's attention scores.
    mass: the target's accumulated attention, for policies that ask for it. budgeted: the target's layers that the
    budget is about; one with a sliding window is none of them.
    foreseen: by number of rows, the sum (M, N) of the draft's rows behind the prompt; all forks share it.
    last: the target's queries of the last verify pass, for policies that ask for them.
    """

    scaling: float
    budgeted: list[int] = field(default_factory=lambda: [0])
    oracle: AttentionOracle | None = None
    queries: dict[int, Tensor] = field(default_factory=dict)
    observed: bool = False
    frozen: dict[int, Tensor] = field(default_factory=dict)
    saliency: Tensor | None = None
    mass: AttentionMass | None = None
    foreseen: dict[int, Tensor] = field(default_factory=dict)
    last: LastQueries | None = None

    @property
    def num_layers(self) -> int:
        return len(self.budgeted)

    def place(self, index: int) -> int:
        """Of layer `index` among those that share the budget."""
        return self.budgeted.index(index) if index in self.budgeted else index

    @property
    def trusts_draft(self) -> bool:
        return self.oracle is None or self.oracle.trusted

    def trusts_odds(self, least: float) -> bool:
        """Whether the draft's rows are alike enough to the target's to weigh values: `least` is a mean cosine."""
        return self.trusts_draft and (self.oracle is None or self.oracle.similarity >= least)

    def observe(self, queries: dict[int, Tensor]) -> None:
        self.queries, self.observed = queries, True

    def forget_window(self, every_round: bool) -> None:
        """After an eviction: drop the window's queries, unless what they say is yet to be frozen.

        every_round: the policy chooses later, and by them if it does not trust the draft.
        """
        if not every_round or self.trusts_draft or self.frozen.keys() >= set(self.budgeted):
            self.queries = {}

    @property
    def nbytes(self) -> int:
        """Of the window's queries; what branches share is not counted, nor what has bytes of its own."""
        return sum(x.nbytes for x in self.queries.values())

    def fork(self, reads_mass: bool, reads_last: bool) -> "Evidence":
        """The same prompt's evidence for another run: what a run changes is its own; it brings its own oracle."""
        mass = self.mass.clone() if self.mass and reads_mass else None
        last = LastQueries() if reads_last else None
        return replace(self, frozen={}, saliency=None, oracle=None, mass=mass, last=last)
