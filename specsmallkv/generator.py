"""The Python API: text in, text out, with the figures of the run.

    spec = SpecSmallKV.from_preset("smollm2-135m", kv_budget=0.2)
    print(spec.generate("Why is the sky blue?").text)

Everything about tokens happens in `decode.py`; this file turns prompts into ids, and `generation.py` ids into text
and counters into figures.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from .backends import check_selection, choose_backend
from .chat_template import render
from .config import ModelConfig
from .controller import Controller
from .decode import Decoder
from .errors import UserError
from .generation import Generation, GenerationSettings
from .generation_batch import GenerationBatch, settings_of_each
from .generation_config import eos_ids, refuse_other_inputs, refuse_unsupported, sampler_of
from .models import ModelPair, load_pair
from .policies import Policy
from .prefill import check_prefill
from .presets import load_model_settings, load_policy
from .prompts import Messages
from .sampling import Sampler


class SpecSmallKV:
    """A target, a draft that both speculates and predicts the target's attention, and a policy that uses it.

    num_draft_tokens: 0 turns speculation off. attention: auto, sdpa, reference, flash or triton. controller:
    `controller.py`, e.g. `Adaptive()`, which drafts `num_draft_tokens` at most. Raises UserError for what cannot work
    together.
    """

    def __init__(
        self,
        pair: ModelPair,
        policy: Policy,
        num_draft_tokens: int = 3,
        attention: str = "auto",
        controller: Controller | None = None,
    ):
        if num_draft_tokens < 0:
            raise UserError(f"num_draft_tokens={num_draft_tokens} is negative; give 0 (no speculation) or more.")
        if pair.draft is None and (num_draft_tokens or policy.reads_draft):
            raise UserError(
                f"policy={policy.name} with num_draft_tokens={num_draft_tokens} needs a draft model; set model.draft, "
                "or use policy=full or policy=snapkv with speculation=none."
            )
        check_selection(attention, policy.selection)
        check_prefill(policy, pair.head_map)
        self.pair, self.policy, self.num_draft_tokens = pair, policy, num_draft_tokens
        self.attention, self.controller = choose_backend(attention, pair.target.device), controller

    @classmethod
    def from_pretrained(
        cls,
        target: str,
        draft: str | None = None,
        *,
        policy: str | Policy = "specsmallkv",
        kv_budget: float | None = None,
        num_draft_tokens: int = 3,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "auto",
        head_map: str | None = None,
        head_map_check: bool = True,
        linear: str = "auto",
        draft_view_size: int = 512,
        draft_vocab_size: int = 0,
        compile: str | None = None,
        draft_bits: int | None = None,
    ) -> "SpecSmallKV":
        """Load a pair (hub ids, local directories or other sources of `models.py`) and a preset of conf/policy.

        Raises UserError for what cannot be loaded or cannot work together.

        head_map: a file that `task=calibrate` wrote for this pair; UserError if it belongs to other models, unless
        head_map_check is false. draft_view_size: tokens of its own long cache that the draft's steps read; 0: all.
        draft_vocab_size: tokens, those of the lowest ids, that it may propose besides its context's; 0: all.
        compile: torch.compile's mode for short passes, "default" or "reduce-overhead".
        draft_bits: 4 holds the weights of the draft's layers in four bits, on a CPU.
        linear: how weights lie, "auto", "torch", or for a CPU "packed" or "blocked" (`linear.py`).
        """
        if isinstance(policy, str):
            policy = load_policy(policy, **({} if kv_budget is None else {"kv_budget": kv_budget}))
        elif kv_budget is not None:
            raise UserError(f"kv_budget={kv_budget} is given beside a policy object; set it on the policy.")
        needs_draft = bool(num_draft_tokens) or policy.reads_draft
        options = dtype, device, attention, head_map, head_map_check, linear, draft_vocab_size, compile, draft_bits
        config = ModelConfig(target, target, draft, *options)
        controller = Controller(view_size=draft_view_size)
        return cls(load_pair(config, need_draft=needs_draft), policy, num_draft_tokens, attention, controller)

    @classmethod
    def from_preset(cls, name: str = "smollm2-135m", **options: Any) -> "SpecSmallKV":
        """Load the pair of a preset of conf/model, e.g. the embedded one, which needs no hub.

        options: of `from_pretrained`, in the place of the preset's. Raises UserError for an unknown name.
        """
        return cls.from_pretrained(**load_model_settings(name) | options)

    def decoder(self, sampler: Sampler | None = None, policy: Policy | None = None) -> Decoder:
        """A decoder under the generator's own policy or another one."""
        pair, controller = self.pair, self.controller
        if policy is not None and policy is not self.policy and controller is not None:
            controller = controller.anew()
        return Decoder(
            pair.target,
            pair.draft,
            policy or self.policy,
            self.num_draft_tokens,
            sampler,
            self.attention,
            pair.head_map,
            controller,
        )

    def encode(
        self, prompt: str | Messages, chat: bool | None = None, beginning: list[int] | None = None
    ) -> list[int]:
        """Prompt ids; a string becomes one user message unless `chat` is false or there is no template.

        beginning: ids that are kept as they are if the text begins with theirs, since models do not always split
        their own words as the tokenizer does.
        """
        text, add_special_tokens = self.render(prompt, chat)
        tokenizer = self.pair.tokenizer
        said = tokenizer.decode(beginning, clean_up_tokenization_spaces=False) if beginning else ""
        if beginning and text.startswith(said):
            return beginning + tokenizer(text[len(said) :], add_special_tokens=False)["input_ids"]
        return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def encode_parts(
        self, context: str, question: str, chat: bool | None = None, prefix: str = ""
    ) -> tuple[list[int], int]:
        """Ids of the prompt context + question, and how many of them lie before the question.

        The border changes no id; a token that spans it counts as the question's. prefix: how the answer begins.
        """
        text, add_special_tokens = self.render(context + question, chat)
        border = text.rindex(question.strip())  # templates strip
        text += prefix
        encoded = self.pair.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]
        return encoded["input_ids"], next(i for i, end in enumerate(ends) if end > border)

    def render(self, prompt: str | Messages, chat: bool | None = None) -> tuple[str, bool]:
        """The text that is tokenised, and whether the tokenizer adds its special tokens to it."""
        return render(self.pair.tokenizer, self.pair.target_origin, prompt, chat)

    def stream(
        self, prompt: str | Messages | list[int], continues: Generation | None = None, **settings: Any
    ) -> Generation:
        """A `Generation` to iterate over. prompt: text, chat messages or token ids; settings as GenerationSettings,
        with temperature, top_p and top_k accepted directly.

        continues: an earlier generation that the prompt (the whole conversation) begins with. Its caches are taken
        over, so that only what is new is read; it cannot be continued twice. Raises UserError if the prompt differs.
        """
        sampling = {key: settings.pop(key) for key in ("temperature", "top_p", "top_k") if key in settings}
        if sampling:
            settings["sampler"] = Sampler(**sampling)
        chosen = GenerationSettings(**settings)
        said = continues.sequence.tokens if continues and continues.sequence else None
        is_ids = isinstance(prompt, list) and all(isinstance(x, int) for x in prompt)
        ids: list[int] = prompt if is_ids else self.encode(prompt, chosen.chat, said)  # type: ignore
        self.check_length(ids, chosen.max_new_tokens)
        self._check_turns(ids, chosen.compress_after, continues)
        return Generation(self, ids, chosen, continues.hand_over() if continues else None)

    def _check_turns(self, ids: list[int], compress_after: int | None, continues: Generation | None) -> None:
        if compress_after is not None and not 1 <= compress_after <= len(ids):
            raise UserError(f"compress_after={compress_after} is not within the prompt; give 1 to {len(ids)} tokens.")
        if continues is None:
            return
        if compress_after is not None:
            raise UserError(f"compress_after={compress_after} and continues are given together; keep one of them.")
        if continues.spec is not self:
            raise UserError("The generation to continue is another generator's; call stream on that one.")
        continues.check_continuation(ids)

    def generate(
        self, prompt: str | Messages | list[int], continues: Generation | None = None, **settings: Any
    ) -> Generation:
        """The finished `Generation`; arguments as for `stream`."""
        generation = self.stream(prompt, continues, **settings)
        for _ in generation:
            pass
        return generation

    def stream_batch(
        self, prompts: list[str | Messages | list[int]], batch_size: int = 8, **settings: Any
    ) -> GenerationBatch:
        """A `GenerationBatch` to iterate over for finished generations; each is what `generate` gives for its prompt.

        Settings as for `stream`; `seed` and `max_new_tokens` may be lists, one value for each prompt. All prompts are
        checked before the first is read. Raises UserError.
        """
        if settings.get("continues") is not None:
            raise UserError("continues= goes on from one generation's caches, not in a batch; use generate or stream.")
        each = settings_of_each(len(prompts), settings)
        generations = [self.stream(prompt, **own) for prompt, own in zip(prompts, each, strict=True)]
        return GenerationBatch(self, generations, batch_size)

    def generate_batch(
        self, prompts: list[str | Messages | list[int]], batch_size: int = 8, **settings: Any
    ) -> list[Generation]:
        """All finished generations, in order of the prompts; arguments as for `stream_batch`."""
        batch = self.stream_batch(prompts, batch_size, **settings)
        for _ in batch:
            pass
        return batch.generations

    def check_length(self, ids: list[int], max_new_tokens: int) -> None:
        if not ids:
            raise UserError("The prompt has no tokens; give some text.")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} is not positive; give at least 1.")
        vocabulary = self.pair.target.config.vocab_size  # a draft reads ids beyond its own as its last one
        if outside := [i for i in (min(ids), max(ids)) if not 0 <= i < vocabulary]:
            raise UserError(
                f"Token id {outside[0]} is outside the vocabulary of {vocabulary}; use the pair's tokenizer."
            )
        for model in filter(None, (self.pair.target, self.pair.draft)):
            window = model.config.max_position_embeddings
            if len(ids) + max_new_tokens > window:
                raise UserError(
                    f"The prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the context window "
                    f"of {window} tokens; shorten one of them."
                )

    def custom_generate(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """For transformers' `model.generate(ids, custom_generate=spec.custom_generate)`: ids (1, prompt + new)."""
        if model is not self.pair.target:
            raise UserError("custom_generate was called on another model; call it on spec.pair.target.")
        refuse_unsupported(generation_config, input_ids, logits_processor)
        refuse_other_inputs(model_kwargs)
        prompt = input_ids[0].tolist()
        self.check_length(prompt, generation_config.max_length - len(prompt))
        sampler, seed = sampler_of(generation_config), int(torch.randint(2**63 - 1, ()))
        ids = list(prompt)
        decoder = self.decoder(sampler)
        budget = generation_config.max_length - len(prompt)
        for round_, _ in decoder.generate(prompt, budget, eos_ids(generation_config), seed):
            for token in round_.tokens:
                ids.append(token)
                if stopping_criteria(torch.tensor([ids], device=input_ids.device), None).all():
                    return torch.tensor([ids], device=input_ids.device)
        return torch.tensor([ids], device=input_ids.device)
