"""Make a draft from any Llama- or Qwen-family target: some of its layers, trained to say and look as it does.

The draft keeps the target's width and uses its embeddings and head (frozen, never saved). What a step reads and which
rows it compares are functions of (seed, step) alone, so a run that is killed and resumed ends with the same weights.
"""

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .distill_loss import (
    NAME,
    LogitDivergence,
    RowRecorder,
    attention_divergence,
    initial_mixture,
)
from .distill_text import TokenStream
from .errors import UserError

SHARED = ("embed_tokens", "lm_head")
MIXTURE_LR = 30  # the mixture's logits learn this much faster than the draft's weights
NUM_ROWS = 16  # query positions per sequence whose attention is compared


@dataclass(frozen=True)
class Settings:
    layers: list[int]  # target layers that the draft starts from
    tokens: int  # trained on in all; fixes the schedule
    seq_len: int = 256
    batch_size: int = 8
    long_every: int = 4  # every so many steps the batch is one sequence of batch_size * seq_len tokens; 0: never
    answers_share: float = 0.5  # probability that a sequence comes from the target's own answers
    lr: float = 1e-3
    warmup: float = 0.05  # share of the steps
    attention_loss_weight: float = 0.5
    checkpoint_minutes: float = 5.0
    seed: int = 0

    @property
    def step_tokens(self) -> int:
        return self.seq_len * self.batch_size

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.step_tokens)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a fiftieth."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))))


def build_draft(target: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """A float32 copy of the given layers and the final norm, over the target's own embeddings and head."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in layers]
    with torch.device("meta"):
        draft = type(target)(config)
    base, source = draft.base_model, target.base_model
    base.layers = nn.ModuleList(copy.deepcopy(source.layers[i]).float() for i in layers)
    for index, layer in enumerate(base.layers):
        layer.self_attn.layer_idx, layer.self_attn.config = index, config  # one config decides the attention
    base.norm, base.rotary_emb = copy.deepcopy(source.norm).float(), copy.deepcopy(source.rotary_emb)
    base.embed_tokens = source.embed_tokens
    draft.set_output_embeddings(target.get_output_embeddings())
    base.embed_tokens.requires_grad_(False)
    target.get_output_embeddings().requires_grad_(False)
    for parameters in (base.layers.parameters(), base.norm.parameters()):
        for parameter in parameters:
            parameter.requires_grad_(True)
    return draft


def own_parameters(draft: PreTrainedModel) -> dict[str, nn.Parameter]:
    """All but what is shared with the target."""
    return {n: p for n, p in draft.named_parameters() if not any(part in SHARED for part in n.split("."))}


def hidden_states(model: PreTrainedModel, ids: Tensor, recorder: RowRecorder | None = None) -> Tensor:
    """What the head reads, (B, T, d). The residual stream has the layers' own precision, also under autocast."""
    embedded = model.get_input_embeddings()(ids).to(next(model.base_model.layers.parameters()).dtype)
    return model.base_model(inputs_embeds=embedded, use_cache=False, row_recorder=recorder).last_hidden_state


class Trainer:
    """The state of a run: draft, head mixture, optimizer and the number of steps done."""

    def __init__(self, target: PreTrainedModel, streams: list[TokenStream], settings: Settings):
        self.target, self.streams, self.settings = target.eval(), streams, settings
        self.draft = build_draft(target, settings.layers).train()
        for model in (self.target, self.draft):
            model.set_attn_implementation(NAME)
        num_layers, num_heads = target.config.num_hidden_layers, target.config.num_attention_heads
        self.mixture = nn.Parameter(initial_mixture(settings.layers, num_layers, num_heads).to(target.device))
        self.parameters = own_parameters(self.draft) | {"mixture": self.mixture}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizer.param_groups[0]["params"].pop()
        self.optimizer.add_param_group({"params": [self.mixture]})
        self.step = 0

    def batch(self, generator: torch.Generator) -> Tensor:
        """(B, T) token ids; a long step has one sequence."""
        s = self.settings
        long = s.long_every > 0 and self.step % s.long_every == s.long_every - 1
        count, length = (1, s.step_tokens) if long else (s.batch_size, s.seq_len)
        shares = torch.tensor([1 - s.answers_share, s.answers_share] if len(self.streams) == 2 else [1.0])
        choice = torch.multinomial(shares, count, replacement=True, generator=generator).tolist()
        return torch.stack([self.streams[i].sequence(length, generator) for i in choice]).to(self.target.device)

    def losses(self, ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
        watched, followed = RowRecorder(positions), RowRecorder(positions)
        attends = self.settings.attention_loss_weight > 0
        bf16 = self.target.dtype == torch.bfloat16
        with torch.no_grad():
            wanted = hidden_states(self.target, ids, watched if attends else None)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            hidden = hidden_states(self.draft, ids, followed if attends else None)
        head = self.target.get_output_embeddings().weight
        kl, agreement = LogitDivergence.apply(hidden.flatten(0, 1), wanted.flatten(0, 1), head)
        attention = kl.new_zeros(())
        if attends:
            attention = attention_divergence(self.mixture, followed.rows(), watched.rows())
        return {"kl": kl, "agreement": agreement, "attention": attention}

    def train_step(self) -> dict[str, float]:
        s = self.settings
        generator = torch.Generator().manual_seed(s.seed * 1_000_003 + self.step)
        ids = self.batch(generator)
        positions = torch.randperm(ids.shape[1] - 1, generator=generator)[:NUM_ROWS].add(1).sort().values
        losses = self.losses(ids, positions.to(ids.device))
        (losses["kl"] + s.attention_loss_weight * losses["attention"]).backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        for group, factor in zip(self.optimizer.param_groups, (1, MIXTURE_LR), strict=True):
            group["lr"] = factor * s.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: value.item() for name, value in losses.items()}

    def save(self, path: Path) -> None:
        """One file, replaced in one step: a kill leaves the old checkpoint or the new one."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"{key}.{name}"] = value
        save_atomically(tensors, path, {"step": str(self.step), "settings": self._identity()})

    def load(self, path: Path) -> None:
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"checkpoint {path} cannot be read ({error}); remove it to start anew.") from error
        with opened as file:
            facts = file.metadata()
            if facts["settings"] != self._identity():
                raise UserError(
                    f"checkpoint {path} belongs to other settings; set task.resume=false or another output_dir."
                )
            for name, p in self.parameters.items():
                p.data.copy_(file.get_tensor(f"parameter.{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in file.keys()]  # noqa: SIM118
                self.optimizer.state[p] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        self.step = int(facts["step"])

    def _identity(self) -> str:
        return json.dumps(
            asdict(self.settings) | {"checkpoint_minutes": None, "data": [s.digest for s in self.streams]}
        )


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata | {"format": "pt"})
    os.replace(partial, path)


def train(
    trainer: Trainer,
    output_dir: Path,
    on_step: Callable[[int, dict[str, float]], None],
    on_checkpoint: Callable[[], None],
) -> None:
    """Run to the last step; every few minutes write `checkpoint.safetensors` and call back."""
    saved = time.monotonic()
    with (output_dir / "curve.jsonl").open("a") as curve:
        while trainer.step < trainer.settings.steps:
            losses = trainer.train_step()
            curve.write(json.dumps({"step": trainer.step, **losses}) + "\n")
            on_step(trainer.step, losses)
            if time.monotonic() - saved > 60 * trainer.settings.checkpoint_minutes:
                curve.flush()
                trainer.save(output_dir / "checkpoint.safetensors")
                on_checkpoint()
                saved = time.monotonic()
    trainer.save(output_dir / "checkpoint.safetensors")
    on_checkpoint()


@torch.no_grad()
def agreement(target: PreTrainedModel, draft: PreTrainedModel, ids: Tensor) -> float:
    """Share of positions of `ids` (B, T) at which both models have the same argmax."""
    same = [(hidden_argmax(target, row) == hidden_argmax(draft, row)).float() for row in ids.split(1)]
    return torch.cat(same).mean().item()


def hidden_argmax(model: PreTrainedModel, ids: Tensor) -> Tensor:
    head = model.get_output_embeddings().weight
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=head.dtype == torch.bfloat16):
        hidden = hidden_states(model, ids).flatten(0, 1)
    return torch.cat([(part.to(head.dtype) @ head.T).argmax(-1) for part in hidden.split(256)])


def export(trainer: Trainer, directory: Path, facts: dict[str, object]) -> None:
    """The draft as `models.load_draft` reads it: configuration, training facts and its own bf16 weights."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16) for name, p in own_parameters(trainer.draft).items()}
    save_atomically(weights, directory / "model.safetensors", {})
    config = trainer.draft.config.to_dict() | {"dtype": "bfloat16", "specsmallkv_draft": facts}
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
