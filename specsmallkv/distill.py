"""Make a draft from any Llama- or Qwen-family target: some of its layers, trained to say and look as it does.

The draft keeps the target's width and uses its embeddings and head, or some rows of it (frozen, never saved). What a
step reads is a function of (seed, step) alone, so a run that is killed and resumed ends with the same weights.
"""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .distill_data import Lessons
from .distill_loss import NAME, LogitDivergence, RowRecorder, attention_divergence, hidden_states, initial_mixture
from .errors import UserError
from .trimmed_head import IDS_KEY, trim_head
from .weights import fingerprint

SHARED = ("embed_tokens", "lm_head")
MIXTURE_LR = 30  # the mixture's logits learn this much faster than the draft's weights
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


@dataclass(frozen=True)
class Settings:
    layers: list[int]  # target layers that the draft starts from
    tokens: int  # trained on in all; fixes the schedule
    batch_size: int = 4  # sequences a step; a long step has one
    long_every: int = 8  # every so many steps is a long one; 0: never
    answers_share: float = 0.5  # of the short sequences
    lr: float = 1e-3
    warmup: float = 0.05  # share of the steps
    attention_loss_weight: float = 0.5
    loss_temperature: float = 1.0  # of both distributions in the KL
    average: float = 0.98  # decay of the running mean of the weights that is exported
    gradient_checkpointing: bool = False
    checkpoint_minutes: float = 5.0
    seed: int = 0

    def learning_rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then a cosine to a fiftieth."""
        warm = max(1, round(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


@dataclass
class Curriculum:
    """Which lessons a step reads. answers and long may be missing."""

    text: Lessons
    answers: Lessons | None
    long: Lessons | None
    settings: Settings

    def __post_init__(self) -> None:
        s = self.settings
        self.every = s.long_every if self.long is not None else 0
        self.share = s.answers_share if self.answers is not None else 0.0
        self.short_tokens = s.batch_size * self.text.ids.shape[1]
        self.long_tokens = self.long.ids.shape[1] if self.long is not None else 0

    def tokens(self, steps: int) -> int:
        """Seen in the first `steps` steps."""
        long = steps // self.every if self.every else 0
        return (steps - long) * self.short_tokens + long * self.long_tokens

    @property
    def steps(self) -> int:
        cycle = self.every or 1
        return max(1, round(self.settings.tokens * cycle / self.tokens(cycle)))

    def lesson(self, step: int) -> list[tuple[Lessons, list[int]]]:
        """Groups of sequences of equal length and their indices."""
        s, before = self.settings, step // self.every if self.every else 0
        if self.every and step % self.every == self.every - 1:
            assert self.long is not None
            return [(self.long, self.long.pick(before, 1, s.seed))]
        first, last = (step - before) * s.batch_size, (step - before + 1) * s.batch_size
        answered = [math.floor(n * self.share) for n in (first, last)]
        groups = []
        if self.answers is not None and answered[1] > answered[0]:
            groups.append((self.answers, self.answers.pick(answered[0], answered[1] - answered[0], s.seed)))
        plain = [n - a for n, a in zip((first, last), answered, strict=True)]
        if plain[1] > plain[0]:
            groups.append((self.text, self.text.pick(plain[0], plain[1] - plain[0], s.seed)))
        return groups

    def read(self, step: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """ids (B, T), positions (R,) of the rows, and what the target made of them."""
        groups = self.lesson(step)
        parts = [lessons.read(picks) for lessons, picks in groups]
        wanted = {name: torch.cat([answer[name] for _, answer in parts]) for name in parts[0][1]}
        return torch.cat([ids for ids, _ in parts]), groups[0][0].positions, wanted


def build_draft(target: PreTrainedModel, layers: list[int], token_ids: Tensor | None = None) -> PreTrainedModel:
    """A float32 copy of the given layers and the final norm, over the target's own embeddings and head.

    token_ids (S,): the tokens that the draft's head can propose; None: all.
    """
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
    base.embed_tokens.requires_grad_(False)
    target.get_output_embeddings().requires_grad_(False)
    draft.set_output_embeddings(target.get_output_embeddings())
    if token_ids is not None:
        trim_head(draft, token_ids)
    for parameters in (base.layers.parameters(), base.norm.parameters()):
        for parameter in parameters:
            parameter.requires_grad_(True)
    return draft


def even_layers(num_layers: int, count: int) -> list[int]:
    """The first layer and `count` - 1 spread evenly from the second to the last one."""
    return [0, *torch.linspace(num_layers - 1, 1, count - 1).round().int().flip(0).tolist()]


@torch.no_grad()
def busiest_layers(target: PreTrainedModel, count: int, ids: Tensor) -> list[int]:
    """The `count` layers that turn the residual stream most on `ids` (B, T): largest mean angle between what goes in
    and what comes out ("block influence", ShortGPT, arXiv 2403.03853)."""
    turned: list[float] = []

    def compare(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
        turned.append(1 - cosine.mean().item())

    hooks = [layer.register_forward_hook(compare) for layer in target.base_model.layers]
    target.base_model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return sorted(sorted(range(len(turned)), key=lambda i: -turned[i])[:count])


def own_parameters(draft: PreTrainedModel) -> dict[str, nn.Parameter]:
    """All but what is shared with the target."""
    return {n: p for n, p in draft.named_parameters() if not any(part in SHARED for part in n.split("."))}


def earlier_weights(directory: str) -> dict[str, Tensor]:
    """Of a draft, or of the checkpoint in the output_dir of an earlier run, which has the head mixture too."""
    path = Path(directory).expanduser()
    try:
        if not (path / "checkpoint.safetensors").exists():
            return {name: w for name, w in load_file(path / "model.safetensors").items() if name != IDS_KEY}
        kept = load_file(path / "checkpoint.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"task.start_from={directory} cannot be read ({error}); give a draft's directory.") from error
    means = {name.removeprefix("average."): w for name, w in kept.items() if name.startswith("average.")}
    return means | {"mixture": kept["parameter.mixture"]}


def earlier_layers(directory: str) -> list[int] | None:
    """The target's layers that an earlier draft was made of; None: it does not say."""
    path = Path(directory).expanduser()
    for file in (path / "config.json", path / "draft" / "config.json"):
        if file.exists():
            return (json.loads(file.read_text(encoding="utf-8")).get("specsmallkv_draft") or {}).get("target_layers")
    return None


class Trainer:
    """The state of a run: draft, head mixture, optimizer, the weights' running mean and the number of steps done."""

    def __init__(
        self, target: PreTrainedModel, draft: PreTrainedModel, curriculum: Curriculum, settings: Settings
    ) -> None:
        self.target, self.draft = target.eval(), draft.train()
        self.curriculum, self.settings = curriculum, settings
        for model in (self.target, self.draft):
            model.set_attn_implementation(NAME)
        if settings.gradient_checkpointing:
            enable = getattr(draft, "activation_checkpointing_enable", None) or draft.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        num_layers, num_heads = target.config.num_hidden_layers, target.config.num_attention_heads
        self.mixture = nn.Parameter(initial_mixture(settings.layers, num_layers, num_heads).to(target.device))
        own = own_parameters(self.draft)
        self.parameters = own | {"mixture": self.mixture}
        groups = [{"params": list(own.values())}, {"params": [self.mixture]}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.averages = {name: p.detach().clone() for name, p in own.items()}
        self.steps, self.step = curriculum.steps, 0
        self.origin: str | None = None  # digest of the weights that it started from

    def start_from(self, directory: str) -> None:
        """Take the weights of an earlier draft of the same layers."""
        weights, layers = earlier_weights(directory), earlier_layers(directory)
        own = {name: p for name, p in self.parameters.items() if name in weights or name != "mixture"}
        same = {name: w.shape for name, w in weights.items()} == {name: p.shape for name, p in own.items()}
        if not same or layers not in (None, self.settings.layers):
            raise UserError(
                f"task.start_from={directory} has other layers than {self.settings.layers}, which task.layers asks "
                f"for; leave it out, or set task.layers={layers or '[...]'}."
            )
        self.origin = hashlib.sha256(b"".join(w.float().numpy().tobytes() for w in weights.values())).hexdigest()[:16]
        for name, parameter in own.items():
            parameter.data.copy_(weights[name])
        for name, mean in self.averages.items():
            mean.copy_(weights[name])

    @property
    def tokens(self) -> int:
        return self.curriculum.tokens(self.step)

    def losses(self, ids: Tensor, positions: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        recorder = RowRecorder(positions.to(ids.device)) if "rows" in wanted else None
        bf16 = self.target.dtype == torch.bfloat16
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            hidden = hidden_states(self.draft, ids, recorder)
        head, temperature = self.draft.get_output_embeddings().weight, self.settings.loss_temperature
        target_hidden = wanted["hidden"].to(hidden.dtype)
        kl, agreement = LogitDivergence.apply(hidden.flatten(0, 1), target_hidden.flatten(0, 1), head, temperature)
        attention = kl.new_zeros(())
        if recorder is not None:
            attention = attention_divergence(self.mixture, recorder.rows(), wanted["rows"].float())
        return {"kl": kl, "agreement": agreement, "attention": attention}

    def train_step(self) -> dict[str, float]:
        s = self.settings
        losses = self.losses(*self.curriculum.read(self.step))
        (losses["kl"] + s.attention_loss_weight * losses["attention"]).backward()
        nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        for group, factor in zip(self.optimizer.param_groups, (1, MIXTURE_LR), strict=True):
            group["lr"] = factor * s.learning_rate(self.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        weights = [self.parameters[name].detach() for name in self.averages]
        young = min(s.average, self.step / (self.step + 9))  # an early mean forgets where it began
        torch._foreach_lerp_(list(self.averages.values()), weights, 1 - young)
        return {name: value.item() for name, value in losses.items()}

    def use_averages(self) -> None:
        """Give the draft the weights that are exported."""
        for name, mean in self.averages.items():
            self.parameters[name].data.copy_(mean)

    def save(self, path: Path) -> None:
        """One file, replaced in one step: a kill leaves the old checkpoint or the new one."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": mean for name, mean in self.averages.items()}
        for name, p in self.parameters.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[p].items()}
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
                    f"checkpoint {path} belongs to other settings; set them as they were (layers named by number: "
                    "task.layer_choice), or set task.resume=false or another output_dir."
                )
            for name, mean in self.averages.items():
                mean.copy_(file.get_tensor(f"average.{name}"))
            for name, p in self.parameters.items():
                p.data.copy_(file.get_tensor(f"parameter.{name}"))
                keys = [key for key in MOMENTS if f"{key}.{name}" in file.keys()]  # noqa: SIM118
                self.optimizer.state[p] = {key: file.get_tensor(f"{key}.{name}").to(p.device) for key in keys}
        self.step = int(facts["step"])

    def _identity(self) -> str:
        c = self.curriculum
        data = [lessons.digest for lessons in (c.text, c.answers, c.long) if lessons is not None]
        head, target = len(self.draft.get_output_embeddings().weight), fingerprint(self.target)
        besides = {"checkpoint_minutes": None, "data": data, "head": head, "target": target}
        besides |= {"origin": self.origin} if self.origin else {}
        return json.dumps(asdict(self.settings) | besides)


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
    saved, path = time.monotonic(), output_dir / "curve.jsonl"
    cut = trainer.step and path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a" if trainer.step else "w") as curve:
        curve.write("\n" if cut else "")  # a kill, or a full disk, may have cut the last line
        while trainer.step < trainer.steps:
            losses = trainer.train_step()
            curve.write(json.dumps({"step": trainer.step, "tokens": trainer.tokens, **losses}) + "\n")
            curve.flush()
            on_step(trainer.step, losses)
            if time.monotonic() - saved > 60 * trainer.settings.checkpoint_minutes:
                trainer.save(output_dir / "checkpoint.safetensors")
                on_checkpoint()
                saved = time.monotonic()
    trainer.save(output_dir / "checkpoint.safetensors")
    on_checkpoint()


def export(trainer: Trainer, directory: Path, facts: dict[str, object]) -> None:
    """The draft as `models.load_draft` reads it: configuration, training facts and the running mean of its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: mean.to(torch.bfloat16) for name, mean in trainer.averages.items()}
    if (ids := getattr(trainer.draft.get_output_embeddings(), IDS_KEY, None)) is not None:
        weights[IDS_KEY] = ids.to(torch.int32)
    save_atomically(weights, directory / "model.safetensors", {})
    config = trainer.draft.config.to_dict() | {"dtype": "bfloat16", "specsmallkv_draft": facts}
    config.pop("_name_or_path", None)
    config.pop("_model_name_or_path", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
