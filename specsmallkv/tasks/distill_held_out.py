"""What a draft of task=distill is judged on: text and prompts that it was not trained on."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..distill import Trainer
from ..distill_data import cut_text
from ..distill_report import agreed_tokens, agreement, attention_recalls, speculate
from ..distill_text import sample_batch
from ..errors import UserError
from ..hub_text import tokens_of
from ..models import ModelPair
from ..prompts import read_requests_file
from .distill_answers import ANSWER_BATCH, encode

LENGTH, SEQUENCES, ANSWER_TOKENS, DRAFTS = 512, 20, 128, 3


@dataclass
class HeldOut:
    """text (N, LENGTH): pieces spread evenly over it; prompts: token ids. None: that figure is not measured."""

    text: Tensor | None
    prompts: list[list[int]] | None

    @classmethod
    def read(cls, pair: ModelPair, text_file: str | None, prompts_file: str | None) -> "HeldOut":
        """Before anything is trained, so that a wrong name costs no time. Raises UserError."""
        text = prompts = None
        if text_file is not None:
            text = cut_text(tokens_of(pair.tokenizer, "task.eval_text_file", text_file), LENGTH, SEQUENCES).long()
            if not len(text):
                raise UserError(f"task.eval_text_file={text_file} is too short; give {LENGTH} tokens.")
        if prompts_file is not None:
            requests = read_requests_file("task.eval_prompts_file", prompts_file, chat=None)
            prompts = [ids for ids in (encode(pair, request) for request in requests) if ids]
        return cls(text, prompts)

    def on_text(self, pair: ModelPair, trainer: Trainer) -> dict[str, float | None]:
        if self.text is None:
            return dict.fromkeys(("agreement", "attention_recall", "attention_recall_target"))
        ids = self.text.to(pair.target.device)
        recalls = attention_recalls(pair.target, trainer.draft, trainer.mixture.detach(), ids)
        same = agreement(pair.target, trainer.draft, ids)
        return {"agreement": same, "attention_recall": recalls[0], "attention_recall_target": recalls[1]}

    def on_answers(self, pair: ModelPair, draft: PreTrainedModel) -> dict[str, float | None]:
        """Along the target's greedy answers."""
        if self.prompts is None:
            return dict.fromkeys(("answer_agreement", "acceptance_rate", "acceptance_length"))
        return along(self.agreed(pair, draft))

    def agreed(self, pair: ModelPair, draft: PreTrainedModel) -> list[list[bool]]:
        """Of each token of the target's greedy answer to each prompt, whether the draft would have written it."""
        answers: list[list[int]] = []
        prompts = self.prompts or []
        for start in range(0, len(prompts), ANSWER_BATCH):
            batch, greedy = prompts[start : start + ANSWER_BATCH], torch.Generator()
            answers += sample_batch(pair.target, batch, [0.0] * len(batch), ANSWER_TOKENS, pair.eos_token_ids, greedy)
        return agreed_tokens(draft, prompts, answers)


def along(agreed: list[list[bool]]) -> dict[str, float | None]:
    """Agreement on the tokens of answers, and what greedy speculation with `DRAFTS` drafts has of them."""
    rounds = [speculate(own, DRAFTS, ANSWER_TOKENS) for own in agreed]
    drafted, accepted, passes, emitted = (sum(column) for column in zip(*rounds, strict=True))
    return {
        "answer_agreement": sum(map(sum, agreed)) / max(1, sum(map(len, agreed))),
        "acceptance_rate": accepted / max(1, drafted),
        "acceptance_length": emitted / max(1, passes),
    }
