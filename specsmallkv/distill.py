"""Train a draft that was built from a target's layers (`distill_build.py`) to say and look as the target does.

The draft keeps the target's width and uses its embeddings and head, or some rows of it (frozen, never saved). What a
step does follows from (seed, step) alone, so a run that is killed and resumed ends with the same weights.
"""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .distill_curriculum import Curriculum, Settings
from .distill_loss import NAME, LogitDivergence, RowRecorder, attention_divergence, hidden_states, initial_mixture
from .errors import UserError
from .sources import resolve
from .trimmed_head import IDS_KEY
from .weights import fingerprint

SHARED = ("embed_tokens", "lm_head")
MIXTURE_LR = 30  # the mixture's logits learn this much faster than the draft's weights
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter


def own_parameters(draft: PreTrainedModel) -> dict[str, nn.Parameter]:
    """All but what is shared with the target."""
    return {n: p for n, p in draft.named_parameters() if not any(part in SHARED for part in n.split("."))}


def earlier_weights(directory: str) -> dict[str, Tensor]:
    """Of a draft, or of the checkpoint in the output_dir of an earlier run, which has the head mixture too."""
    path = _directory(directory)
    try:
        if not (path / "checkpoint.safetensors").exists():
            return {name: w for name, w in load_file(path / "model.safetensors").items() if name != IDS_KEY}
        kept = load_file(path / "checkpoint.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"task.start_from={directory} cannot be read ({error}); give a draft's directory.") from error
    means = {name.removeprefix("average."): w for name, w in kept.items() if name.startswith("average.")}
    return means | {"mixture": kept["parameter.mixture"]}


def earlier_facts(directory: str) -> dict[str, Any]:
    """What an earlier draft says of its training, as `export` wrote it; empty: nothing."""
    path = _directory(directory)
    for file in (path / "config.json", path / "draft" / "config.json"):
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8")).get("specsmallkv_draft") or {}
    return {}


def refuse_other_layers(directory: str, layers: list[int], same_shapes: bool = True) -> None:
    """UserError if an earlier draft was made of other layers of the target, as far as it says."""
    then = earlier_facts(directory).get("target_layers")
    if not same_shapes or then not in (None, layers):
        raise UserError(
            f"task.start_from={directory} has other layers than {layers}, which task.layers asks for; leave it out, "
            f"or set task.layers={then or '[...]'}."
        )


def _directory(source: str) -> Path:
    return resolve(source) if source.startswith("package:") else Path(source).expanduser()


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
        weights = earlier_weights(directory)
        own = {name: p for name, p in self.parameters.items() if name in weights or name != "mixture"}
        same = {name: w.shape for name, w in weights.items()} == {name: p.shape for name, p in own.items()}
        refuse_other_layers(directory, self.settings.layers, same)
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
        save_atomically(tensors, path, {"step": str(self.step), "settings": json.dumps(self._identity())})

    def load(self, path: Path) -> None:
        try:
            opened = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"checkpoint {path} cannot be read ({error}); remove it to start anew.") from error
        with opened as file:
            facts, own = file.metadata(), self._identity()
            then = json.loads(facts["settings"])
            if changed := [key for key in sorted(own | then) if own.get(key) != then.get(key)]:
                raise UserError(
                    f"checkpoint {path} belongs to other settings ({', '.join(changed)}); set them as they were, or "
                    f"go on from it elsewhere: another task.output_dir, with answers.jsonl copied there, and "
                    f"task.start_from={path.parent}."
                )
            for name, mean in self.averages.items():
                mean.copy_(file.get_tensor(f"average.{name}"))
            for name, p in self.parameters.items():
                p.data.copy_(file.get_tensor(f"parameter.{name}"))
                keys = [key for key in MOMENTS if f"{key}.{name}" in file.keys()]  # noqa: SIM118
                self.optimizer.state[p] = {key: file.get_tensor(f"{key}.{name}").to(p.device) for key in keys}
        self.step = int(facts["step"])

    def _identity(self) -> dict[str, Any]:
        """All that decides what a step does; under equal ones a checkpoint goes on as the run would have."""
        c, ids = self.curriculum, getattr(self.draft.get_output_embeddings(), IDS_KEY, None)
        return asdict(self.settings) | {
            "checkpoint_minutes": None,
            "texts and answers": [lessons.digest for lessons in (c.text, c.answers, c.long) if lessons is not None],
            "head_tokens": None if ids is None else hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16],
            "target": fingerprint(self.target),
            "dtype": str(self.target.dtype),
            "start_from": self.origin,
        }


def save_atomically(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata | {"format": "pt"})
    os.replace(partial, path)


@contextmanager
def ctrl_c_waits() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted and told, so that a step is done whole; not outside of the main thread, where none arrives."""
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    trainer: Trainer,
    output_dir: Path,
    on_step: Callable[[int, dict[str, float]], None],
    on_checkpoint: Callable[[], None],
) -> None:
    """Run to the last step; every few minutes, and at Ctrl-C, write `checkpoint.safetensors` and call back."""
    saved, path = time.monotonic(), output_dir / "curve.jsonl"
    cut = trainer.step and path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a" if trainer.step else "w") as curve, ctrl_c_waits() as interrupted:
        curve.write("\n" if cut else "")  # a kill, or a full disk, may have cut the last line
        while trainer.step < trainer.steps and not interrupted():
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
        if interrupted():
            raise KeyboardInterrupt


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
