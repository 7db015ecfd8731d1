"""Self-contained HTML: the page of one run from its trace, and how any page is put together from `web/`.

A page is a body, one style sheet, scripts and the data as JSON, in one file: it loads nothing and runs from a disk.
What is large, the tier sets, travels as deflated bitmaps that the browser unpacks.
"""

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from .record import plain

if TYPE_CHECKING:
    from .trace import AttentionSample, TierSets, Trace

WEB = resources.files("specsmallkv") / "web"
MAX_MAP_BYTES = 2_500_000  # of the tier sets in the page; heads are left out until they fit
MAX_MAP_UNPACKED = 2**26  # bytes, in the browser's memory; what hardly changes deflates to nothing
MAX_MAP_ROUNDS = 400
NO_SENSE = "\ufffd"  # what a tokenizer decodes a split character to


def assemble(name: str, title: str, data: Mapping[str, Any]) -> str:
    """The page `web/<name>.html` with `web/<name>.js`, around the data."""
    parts = {
        "title": html.escape(title),
        "style": read("style.css"),
        "body": read(f"{name}.html"),
        "script": read("charts.js") + read(f"{name}.js"),
        "data": json.dumps(plain(data), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], read("page.html"))


def read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def run_page(record: Mapping[str, Any], trace: "Trace", prompt_ids: list[int]) -> str:
    """The page of one generation. record: the run's setting, figures and surroundings."""
    tokenizer = trace.spec.pair.tokenizer
    emitted = [token for row in trace.rows for token in row["tokens"]]
    known = {token: word(tokenizer, [token]) for token in mentioned(trace)}
    data = {
        "record": record,
        "prompt": words(tokenizer, prompt_ids),
        "text": words(tokenizer, emitted),
        "vocabulary": known,
        "rounds": trace.rows,
        "alternatives": [[[token, round(p, 4)] for token, p in best] for best in trace.alternatives],
        "map": tier_map(trace.sets),
        "attention": attention(trace),
    }
    return assemble("run", f"{record['model']}, {record['policy']}: a run of SpecSmallKV", data)


def mentioned(trace: "Trace") -> set[int]:
    """Tokens that stand in no text: refused drafts and alternatives."""
    drafts = {token for row in trace.rows for token in row["drafts"]}
    return drafts | {token for best in trace.alternatives for token, _ in best}


def word(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def words(tokenizer: Any, tokens: list[int]) -> list[str]:
    """The text of every token; of a character that is split over several the last one has it, the others nothing."""
    found, pending = [], []
    for token in tokens:
        pending.append(token)
        text = word(tokenizer, pending)
        whole = not text.endswith(NO_SENSE) or len(pending) > 4  # longer than any character: bytes without sense
        found.append(text if whole else "")
        pending = [] if whole else pending
    return found


# --- the map of tiers ----------------------------------------------------------------------------------------------


def tier_map(sets: list["TierSets"]) -> dict[str, Any] | None:
    """Bitmaps per (layer, KV head) and round: kept, and marginal if there are any; None if nothing was evicted.

    Each is the difference to the round before, which deflates well: [head][round][bytes over positions].
    """
    if not sets or not sets[-1].tail_start:
        return None
    step = -(-len(sets) // MAX_MAP_ROUNDS)
    shown = sets[::step]
    planes = {"kept": [x.kept for x in shown], "marginal": [x.marginal for x in shown]}
    packed = {name: deltas(plane, sets[-1].tail_start) for name, plane in planes.items()}  # (L, H_kv, R, bytes)
    heads = [divmod(i, packed["kept"].shape[1]) for i in range(packed["kept"].shape[0] * packed["kept"].shape[1])]
    bitmaps = {name: x.reshape(len(heads), *x.shape[2:]) for name, x in packed.items() if x.any()}
    while sum(x.nbytes for x in bitmaps.values()) > MAX_MAP_UNPACKED and len(heads) > 1:
        heads, bitmaps = heads[::2], {name: x[::2] for name, x in bitmaps.items()}
    encoded = {name: encode(x) for name, x in bitmaps.items()}
    while sum(map(len, encoded.values())) > MAX_MAP_BYTES and len(heads) > 1:
        heads, bitmaps = heads[::2], {name: x[::2] for name, x in bitmaps.items()}
        encoded = {name: encode(x) for name, x in bitmaps.items()}
    return {
        "heads": heads,
        "step": step,
        "stride": packed["kept"].shape[-1],
        "tail": [x.tail_start for x in shown],
        "seen": [x.seen for x in shown],
        "layers": packed["kept"].shape[0],
        "all_heads": packed["kept"].shape[0] * packed["kept"].shape[1],
        **encoded,
    }


def deltas(rounds: list[np.ndarray], length: int) -> np.ndarray:
    """Bool (L, H, any n) per round as bits over `length` positions, each xor the one before: (L, H, R, bytes)."""
    padded = [np.packbits(np.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2])]), axis=-1) for x in rounds]
    bits = np.stack(padded, axis=2)
    bits[:, :, 1:] ^= bits[:, :, :-1].copy()
    return bits


def encode(bits: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(bits.tobytes(), 6)).decode()


# --- attention -----------------------------------------------------------------------------------------------------


def attention(trace: "Trace") -> dict[str, Any] | None:
    if trace.similarity is None:
        return None
    sinks = trace.spec.policy.num_sink_tokens
    return {
        "similarity": [[round(float(x), 3) for x in row] for row in trace.similarity],
        "sinks": sinks,
        "samples": [sample_data(sample, sinks) for sample in trace.samples],
    }


def sample_data(sample: "AttentionSample", sinks: int) -> dict[str, Any]:
    rows = []
    for layer, head, target, predicted, kept, marginal in sample.rows:
        compared = np.arange(len(kept)) >= sinks
        if not sample.everything:  # what is gone cannot be compared
            compared &= kept
        row = {
            "layer": layer,
            "head": head,
            "similarity": round(cosine(target[compared], predicted[compared]), 4),
            "kept_share": round(float(kept.mean()), 4),
            "kept_mass": round(float(target[kept].sum()), 4),
            "predicted_mass": round(float(predicted[kept].sum()), 4),
            "predicted_marginal": round(float(predicted[marginal].sum()), 4),
            "target": quantised(target),
            "predicted": quantised(predicted),
            "kept": packed_bits(kept),
        }
        rows.append(row | ({"marginal": packed_bits(marginal)} if marginal.any() else {}))
    return {"round": sample.round, "position": sample.position, "everything": sample.everything, "rows": rows}


def packed_bits(flags: np.ndarray) -> str:
    return base64.b64encode(np.packbits(flags).tobytes()).decode()


def quantised(probabilities: np.ndarray) -> str:
    """Square roots in 255 steps, so that what is small keeps its digits: 0.00002 is the first step."""
    return base64.b64encode((255 * np.sqrt(probabilities.clip(0, 1))).round().astype(np.uint8).tobytes()).decode()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12))
