"""A head map in a file: written by `task=calibrate`, read for `model.head_map`, refused for other models.

One safetensors file: per target head the indices and weights of its few draft heads and the similarity measured on
texts that were left out. Its metadata tell which models it is for, how it was made and how good it is.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import PreTrainedConfig

from .config import PACKAGE
from .errors import UserError
from .matching import HeadMap

FORMAT = "specsmallkv head map 1"
MAKE_ONE = "make one for this pair with task=calibrate, or leave model.head_map out"


@dataclass
class SavedMap:
    """facts: what the file's metadata hold, e.g. fingerprints, texts and figures."""

    source: str
    head_map: HeadMap
    facts: dict[str, Any]

    def check_shape(self, target: PreTrainedConfig, draft: PreTrainedConfig) -> None:
        """Raise a UserError unless the map has these models' layers and heads."""
        wanted = (
            target.num_hidden_layers,
            target.num_attention_heads,
            draft.num_hidden_layers * draft.num_attention_heads,
        )
        if tuple(self.head_map.weights.shape) != wanted:
            raise UserError(
                f"model.head_map={self.source} maps {_shape(self.head_map.weights.shape)}, but these models have "
                f"{_shape(wanted)}; {MAKE_ONE}."
            )

    def check_models(self, target: str, draft: str) -> None:
        """Raise a UserError unless the map was made with models of these fingerprints."""
        for name, own in (("target", target), ("draft", draft)):
            wanted = self.facts[f"{name}_fingerprint"]
            if own != wanted:
                raise UserError(
                    f"model.head_map={self.source} was made for another {name} (fingerprint {wanted}, here {own}); "
                    f"{MAKE_ONE}, or set model.head_map_check=false if these are the same models in another precision."
                )


def save_head_map(path: Path, head_map: HeadMap, facts: dict[str, Any]) -> None:
    """Only what is not zero: float16 weights (L, H_q, n), n the most draft heads that any head uses."""
    count = int((head_map.weights > 0).sum(-1).max())
    weights, indices = head_map.weights.topk(count, dim=-1)
    tensors = {
        "weights": weights.half(),
        "indices": indices.to(torch.int16),
        "similarity": head_map.similarity.half(),
        "num_draft_heads": torch.tensor(head_map.weights.shape[-1]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(save(contiguous, metadata={"format": FORMAT, "facts": json.dumps(facts)}))
    partial.replace(path)  # whole or not at all


def load_head_map(source: str) -> SavedMap:
    """source: a path, or `package:maps/NAME.safetensors` for one that this package ships."""
    path = PACKAGE / source.removeprefix("package:") if source.startswith("package:") else Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"model.head_map={source} is no file; {MAKE_ONE}.")
    try:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.head_map={source} cannot be read ({error}); {MAKE_ONE}.") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"model.head_map={source} is not a head map that this version wrote; {MAKE_ONE}.")
    shape = (*tensors["similarity"].shape, int(tensors["num_draft_heads"]))
    weights = torch.zeros(shape).scatter(-1, tensors["indices"].long(), tensors["weights"].float())
    head_map = HeadMap(weights / weights.sum(-1, keepdim=True), tensors["similarity"].float())
    return SavedMap(source, head_map, json.loads(metadata["facts"]))


def _shape(shape: Any) -> str:
    return f"{shape[0]} x {shape[1]} target heads to {shape[2]} draft heads"
