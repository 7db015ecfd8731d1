"""task=calibrate: fit the head map of a pair on texts, and write it with figures of how well it does on others.

Both models read a passage of each text; the attention rows of its last windows are summed up. Figures are
cross-validated: for each text (of a single text: each window) a map is fitted on all others.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import AttentionCall, AttentionRows, window_mask
from ..attention_form import attention_scaling
from ..backends import attention_probabilities
from ..cache import TieredCache
from ..config import RunConfig
from ..decode import Decoder
from ..display import Display
from ..errors import UserError
from ..generator import SpecSmallKV
from ..intervals import bootstrap
from ..matching import HeadMap, HeadMapFit
from ..metrics import mass_caught
from ..models import UNTRAINED
from ..observation import OBSERVED_CHUNK
from ..passes import PREFILL_CHUNK, full_cache
from ..policies import Policy
from ..presets import load_policy
from ..saved_map import save_head_map
from ..weights import fingerprint
from .generate import load_generator, setting_figures
from .texts import passage, read_texts

FILE = "head_map.safetensors"  # in the run directory
SHARES = (0.05, 0.1)  # of the tokens, at which the caught mass is measured
RANKED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # of the tokens, the most attended first


@dataclass
class Fold:
    """What is left out together: sums of its rows, and the last row of each chunk itself.

    samples: the draft's (M, N) and the target's (L, H_q, N), without sinks, float16.
    """

    fit: HeadMapFit
    samples: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, draft_rows: Tensor, layers: Iterator[Tensor]) -> None:
        """A chunk of rows: the draft's (M, W, N), and (H_q, W, N) of every target layer in turn."""
        self.fit.add_draft(draft_rows)
        sampled = []
        for index, rows in enumerate(layers):
            self.fit.add_layer(index, rows)
            sampled.append(self._last(rows))
        self.fit.end_chunk()
        self.samples.append((self._last(draft_rows), torch.stack(sampled)))

    def _last(self, rows: Tensor) -> Tensor:
        return rows[:, -1, self.fit.sinks :].half().cpu()


@dataclass
class CalibrateTask:
    """text_file or text_files, text_field of JSONL rows, offset (characters of each): the texts.

    context_tokens: read of each. The last num_windows x window_size of them give rows. mixtures: how many draft heads
    a target head may mix; the best by cosine is written to output, None: a file in the run directory.
    untrained: random weights in the draft's layers, as a negative control.
    """

    name: str
    text_file: str | None
    text_files: list[str]
    text_field: str
    offset: int
    context_tokens: int
    window_size: int
    num_windows: int
    mixtures: list[int]
    untrained: bool
    output: str | None

    def __post_init__(self) -> None:
        for key, least in (("offset", 0), ("context_tokens", 64), ("window_size", 1), ("num_windows", 1)):
            if getattr(self, key) < least:
                raise UserError(f"task.{key}={getattr(self, key)} is too small; give at least {least}.")
        if not self.mixtures or min(self.mixtures) < 1:
            raise UserError(f"task.mixtures={self.mixtures} names no numbers of draft heads; give e.g. [1,4,8,16].")
        if self.window_size * self.num_windows > self.context_tokens:
            raise UserError(
                f"task.num_windows={self.num_windows} of task.window_size={self.window_size} are more than "
                f"task.context_tokens={self.context_tokens}; lower one of them."
            )

    @torch.inference_mode()
    def run(self, config: RunConfig) -> dict[str, Any]:
        display, path = Display(config.quiet), Path(self.output or Path(str(config.run_dir)) / FILE).expanduser()
        contents = read_texts(self.name, self.text_file, self.text_files, self.text_field)
        if len(contents) * self.num_windows < 2:
            raise UserError("one window of one text leaves nothing to measure the map on; set task.num_windows=2.")
        config.model.head_map = None  # one is made here
        if self.untrained and config.model.draft:
            config.model.draft = UNTRAINED + config.model.draft
        with display.waiting("loading the models"):
            spec = load_generator(config, need_draft=True)
        texts = {
            name: passage(spec, name, text, self.offset, self.context_tokens, "task.context_tokens")
            for name, text in contents.items()
        }
        folds = self._read(spec, config.policy, texts, display)
        figures, head_map = self._best(folds)
        facts = self._facts(spec, folds, contents)
        save_head_map(path, head_map, facts | {"results": figures})
        display.calibration(figures)
        own = {"output": str(path), "output_bytes": path.stat().st_size, "results": figures}
        lengths = {"prompt_tokens": self.context_tokens, "text": None}
        beside = {"cosine_per_head": per_head(head_map.similarity), "controls": controls(folds)}
        return setting_figures(config, spec) | lengths | own | beside | {"sparsity": sparsity(folds)} | facts

    def _read(self, spec: SpecSmallKV, policy: Policy, texts: dict[str, list[int]], display: Display) -> list[Fold]:
        """A fold for each text, or for each window if there is one text."""
        pair, folds = spec.pair, dict[tuple[str, int], Fold]()
        decoder = Decoder(pair.target, pair.draft, load_policy("full"), 1, attention=spec.attention)
        for name, tokens in texts.items():
            with display.waiting(f"reading {len(tokens)} tokens of {name}"):
                for window, draft_rows, layers in observe(decoder, tokens, self.num_windows, self.window_size):
                    key = (name, window if len(texts) == 1 else 0)
                    if key not in folds:
                        folds[key] = Fold(HeadMapFit(policy.num_sink_tokens, pair.target.config.num_hidden_layers))
                    folds[key].add(draft_rows, layers)
        return list(folds.values())

    def _best(self, folds: list[Fold]) -> tuple[list[dict[str, Any]], HeadMap]:
        """Figures of every mixture, and the best one's map of all folds, with the similarity on what was left out."""
        counts = sorted(set(self.mixtures))
        figures, similarities = zip(*(quality(folds, mixture_of(count)) for count in counts), strict=True)
        for count, row in zip(counts, figures, strict=True):
            row["num_draft_heads"] = count
        best = max(range(len(figures)), key=lambda index: figures[index]["cosine"])
        for index, row in enumerate(figures):
            row["chosen"] = index == best
        weights = total(folds).solve("mixture", num_heads=figures[best]["num_draft_heads"]).weights
        return list(figures), HeadMap(weights, similarities[best])

    def _facts(self, spec: SpecSmallKV, folds: list[Fold], contents: dict[str, str]) -> dict[str, Any]:
        """What the map was made with."""
        assert spec.pair.draft is not None
        texts = [
            {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()} for name, text in contents.items()
        ]
        return {
            "target_fingerprint": fingerprint(spec.pair.target),
            "draft_fingerprint": fingerprint(spec.pair.draft),
            "num_rows": sum(fold.fit.num_rows for fold in folds),
            "num_sink_tokens": folds[0].fit.sinks,
            "context_tokens": self.context_tokens,
            "offset": self.offset,
            "texts": texts,
        }


def observe(
    decoder: Decoder, tokens: list[int], num_windows: int, size: int
) -> Iterator[tuple[int, Tensor, Iterator[Tensor]]]:
    """Both models read the tokens, the last of which are windows; their rows come in chunks of some queries.

    Yields the window's number, the draft's rows (M, W, N) and those of each target layer (H_q, W, N) in turn.
    """
    assert decoder.draft_model is not None
    models, scaling = (decoder.target, decoder.draft_model), attention_scaling(decoder.target.config)
    target, draft = caches = [full_cache(model, len(tokens)) for model in models]
    before = len(tokens) - num_windows * size
    for model, cache in zip(models, caches, strict=True):
        for start in range(0, before, PREFILL_CHUNK):
            chunk = tokens[start : min(start + PREFILL_CHUNK, before)]
            decoder.forward(model, cache, chunk, AttentionCall(decoder.attention))
    for window in range(num_windows):
        begin = before + window * size
        call = AttentionCall(decoder.attention, num_queries=size)
        decoder.forward(decoder.target, target, tokens[begin : begin + size], call)
        for start in range(begin, begin + size, OBSERVED_CHUNK):
            end = min(start + OBSERVED_CHUNK, begin + size)
            rows = draft_rows(decoder, draft, tokens[start:end])
            queries = {index: x[:, :, start - begin : end - begin] for index, x in call.queries.items()}
            layers = (
                attention_probabilities(
                    queries[index], layer.keys[:, :, :end], scaling, window_mask(layer, queries[index].shape[2], end)
                )[0]
                for index, layer in enumerate(target.layers)
            )
            yield window, rows, layers


def draft_rows(decoder: Decoder, cache: TieredCache, chunk: list[int]) -> Tensor:
    """The draft reads the chunk: its rows (M, W, N)."""
    model = decoder.draft_model
    assert model is not None
    config, seen = model.config, cache.seen
    rows = AttentionRows(
        config.num_hidden_layers, config.num_attention_heads, len(chunk), seen + len(chunk), model.device
    )
    rows.start(seen, len(chunk))
    decoder.forward(model, cache, chunk, AttentionCall(decoder.attention, rows=rows))
    return rows.values


def total(folds: list[Fold]) -> HeadMapFit:
    """The sums of several folds together."""
    fit = HeadMapFit(folds[0].fit.sinks, len(folds[0].fit.squares))
    for fold in folds:
        fit.merge(fold.fit)
    return fit


def mixture_of(num_heads: int) -> Callable[[HeadMapFit], HeadMap]:
    return lambda fit: fit.solve("mixture", num_heads=num_heads)


def controls(folds: list[Fold]) -> list[dict[str, Any]]:
    """What maps reach that know nothing."""
    figures, similarity = quality(folds, random_heads)
    return [{"control": "random_heads"} | figures | {"cosine_per_head": per_head(similarity)}]


def per_head(similarity: Tensor) -> list[list[float]]:
    """(L, H_q) for the record."""
    return [[round(value, 4) for value in layer] for layer in similarity.tolist()]


def random_heads(fit: HeadMapFit) -> HeadMap:
    """A negative control: for each target head any draft head."""
    shape = torch.stack(fit.correlations).shape  # (L, H_q, M)
    chosen = torch.randint(shape[-1], shape[:2], generator=torch.Generator().manual_seed(0))
    weights = F.one_hot(chosen, shape[-1]).float().to(fit.correlations[0].device)
    return HeadMap(weights, fit.similarity_of(weights))


def sparsity(folds: list[Fold]) -> list[dict[str, Any]]:
    """Attention mass of the target's sampled rows on their most attended tokens (paper: Fig. 2), sinks left out."""
    rows = [target.float() for fold in folds for _, target in fold.samples]
    found = []
    for share in RANKED:
        mass = torch.stack([mass_caught(true, true, share) for true in rows]).mean(0)  # (L, H_q)
        figures = {"share": share, "mass": float(mass.mean()), "mass_interval": over_heads(mass)}
        found.append(figures | {"mass_per_layer": mass.mean(-1).tolist()})
    return found


def quality(folds: list[Fold], solve: Callable[[HeadMapFit], HeadMap]) -> tuple[dict[str, Any], Tensor]:
    """How well the map that `solve` makes of all other folds predicts each; and the cosines (L, H_q).

    Means over folds, heads and, for the caught mass, sampled rows; the oracle ranks by the true rows. Intervals are
    over the heads, on texts that stay the same.
    """
    cosines, caught = [], []
    for fold in folds:
        head_map = solve(total([other for other in folds if other is not fold]))
        cosines.append(fold.fit.similarity_of(head_map.weights))
        caught += [caught_by(head_map, draft, target) for draft, target in fold.samples]
    similarity, mass = torch.stack(cosines).mean(0), torch.stack(caught).mean(0)
    figures = {
        "cosine": float(similarity.mean()),
        "cosine_interval": over_heads(similarity),
        "cosine_per_layer": similarity.mean(-1).tolist(),
        "cosine_interval_per_layer": [over_heads(heads) for heads in similarity],
    }
    for share, ranks in zip(SHARES, mass, strict=True):
        for key, heads in zip((f"mass_at_{share}", f"mass_at_{share}_oracle"), ranks, strict=True):
            figures |= {key: float(heads.mean()), f"{key}_interval": over_heads(heads)}
    return figures, similarity


def over_heads(values: Tensor) -> list[float]:
    """95% bootstrap interval of the mean over heads, any shape."""
    return list(bootstrap(values.flatten().tolist()))


def caught_by(head_map: HeadMap, draft: Tensor, target: Tensor) -> Tensor:
    """(SHARES, 2, L, H_q): the mass caught by the map and by the oracle; draft (M, N), target (L, H_q, N)."""
    true = target.float().to(head_map.weights.device)
    predicted = head_map.weights @ draft.float().to(true.device)
    return torch.stack(
        [torch.stack([mass_caught(ranks, true, share) for ranks in (predicted, true)]) for share in SHARES]
    )
