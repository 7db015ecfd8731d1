"""What lm-evaluation-harness asks, answered by several policies at once; only `tasks/lm_eval.py` imports this.

The harness evaluates one model at a time. Here every policy is a model of its own (`PolicyLM`), and all of them share
`Answers`: the first one that asks has each request answered for all, from one reading of its prompt, and the others
find the answers there.

A continuation's log-likelihood is read through the decode path. The context but for its last token is the prompt,
which is compressed; verify blocks begin with that last token, so that every scored token is predicted from the
compressed cache. A context of one token leaves nothing to compress: there the first token behind it is predicted from
it alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..benchmarks.example import Example
from ..config import RunConfig
from ..errors import UserError
from ..generation_config import refuse_unsupported
from ..generator import SpecSmallKV
from ..policies import Policy
from ..sampling import Sampler
from ..trials import prefill_once, read_on
from .grid import neediest
from .perplexity import Readings
from .systems import limit_of, make_systems, read_once

DEFAULT_LENGTH = 256  # new tokens where a task says nothing, as in the harness's own models
Likelihood = tuple[float, bool]  # sum of log-probabilities; whether greedy decoding would have said the same
Pair = tuple[list[int], list[int]]  # ids of a context, at least one, and of what follows it


class Answers:
    """Every policy's answers, by request. advance: hears how many requests were answered.

    readings, systems: per policy, the figures of likelihoods and of generated texts. truncated: requests that were
    longer than the context window and lost their beginning.
    """

    def __init__(
        self, spec: SpecSmallKV, policies: list[Policy], config: RunConfig, gold: bool, advance: Callable[[int], None]
    ):
        self.spec, self.policies, self.config, self.gold, self.advance = spec, policies, config, gold, advance
        self.readings = [Readings(policy) for policy in policies]
        self.systems = list(make_systems(spec, policies, [], Sampler()))
        self.truncated = 0
        self._known: dict[Any, list[Any]] = {}

    @property
    def max_length(self) -> int:
        """Tokens that both models can read."""
        models = filter(None, (self.spec.pair.target, self.spec.pair.draft))
        return min(model.config.max_position_embeddings for model in models)

    # --- log-likelihoods -------------------------------------------------------------------------------------------

    def likelihoods(self, pairs: list[Pair], counts: bool = True) -> list[list[Likelihood]]:
        """Per pair, one for each policy; pairs with the same context share its reading.

        counts: whether those that are cut count as `truncated`; the policies ask for the same ones in turn.
        """
        asked = [self._fitted(*pair, counts) for pair in pairs]
        groups: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
        for context, continuation in asked:
            if (context, continuation) not in self._known:
                groups.setdefault(context, {})[continuation] = None
        for context, continuations in groups.items():
            self._read(context, list(continuations))
        return [self._known[pair] for pair in asked]

    def _fitted(
        self, context: list[int], continuation: list[int], counts: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Cut from the left to what the models can read; the last token is never read."""
        excess = max(0, len(context) + len(continuation) - self.max_length - 1)
        if excess >= len(context):
            raise UserError(
                f"task=lm_eval has to score {len(continuation)} tokens at once, more than the context window of "
                f"{self.max_length} tokens; leave that task out, or use a pair with a longer window."
            )
        self.truncated += counts and excess > 0
        return tuple(context[excess:]), tuple(continuation)

    def _read(self, context: tuple[int, ...], continuations: list[tuple[int, ...]]) -> None:
        """One prompt, then every continuation behind a copy of its cache."""
        prompt_tokens = max(1, len(context) - 1)
        text = [*context, *max(continuations, key=len)]
        base = prefill_once(self.spec, neediest(self.policies), text, prompt_tokens, self.policies)
        ahead = base.logits.float().log_softmax(-1) if len(context) == 1 else None
        for continuation in continuations:
            trials = read_on(base, self.policies, [*context, *continuation], self.gold)
            answers = []
            for reading, trial in zip(self.readings, trials, strict=True):
                scores, first = trial.scores, continuation[0] if ahead is not None and continuation else None
                logprob, greedy = -sum(scores.nll), all(scores.greedy)
                if ahead is not None and first is not None:
                    logprob, greedy = logprob + float(ahead[first]), greedy and int(ahead.argmax()) == first
                if scores.nll:
                    reading.add(trial)
                answers.append((logprob, greedy))
            self._known[context, continuation] = answers
            self.advance(1)

    # --- generated texts -------------------------------------------------------------------------------------------

    def texts(self, requests: Iterable[tuple[list[int], dict[str, Any]]]) -> list[list[str]]:
        """Per request (ids, its generation arguments), one text for each policy; a repeated one has its own seed."""
        found, times = [], Counter[str]()
        for ids, arguments in requests:
            request = repr((ids, sorted(arguments.items())))
            key = request, times[request]
            if key not in self._known:
                self._known[key] = self._generate(ids, arguments, self.config.seed + times[request])
                self.advance(1)
            times[request] += 1
            found.append(self._known[key])
        return found

    def _generate(self, ids: list[int], arguments: dict[str, Any], seed: int) -> list[str]:
        wanted = normalize_gen_kwargs(arguments, DEFAULT_LENGTH)
        example = Example(
            context="", question="", max_new_tokens=wanted["max_gen_toks"], stop=tuple(filter(None, stops(wanted)))
        )
        limit = limit_of(example, self.config)
        if limit >= self.max_length:
            raise UserError(
                f"task=lm_eval asks for {limit} new tokens, but the context window has {self.max_length}; "
                "set max_new_tokens to less."
            )
        self.truncated += len(ids) > self.max_length - limit
        ids = ids[-(self.max_length - limit) :]
        sampler = sampler_of(wanted)
        for system in self.systems:
            system.decoder.sampler = sampler
        reading = read_once(self.spec, self.systems, neediest(self.policies), ids, len(ids), limit)
        texts, config = [], replace(self.config, seed=seed)
        for system in self.systems:
            answer = system.answer(self.spec, reading, example, config)
            system.figures.append(answer.figures)
            texts.append(answer.text)
        return texts


def stops(arguments: dict[str, Any]) -> list[str]:
    until = arguments.get("until") or []
    return [until] if isinstance(until, str) else list(until)


def sampler_of(arguments: dict[str, Any]) -> Sampler:
    """By the request's own arguments; UserError for what this generator would silently ignore."""
    refuse_unsupported(SimpleNamespace(**arguments), torch.empty(1), None)
    if not arguments.get("do_sample") or not arguments["temperature"]:
        return Sampler()
    return Sampler(arguments["temperature"], float(arguments.get("top_p") or 1), int(arguments.get("top_k") or 0))


class PolicyLM(TemplateLM):
    """The harness's view of one policy: `number` among the shared answers."""

    def __init__(self, answers: Answers, number: int):
        super().__init__()
        self.answers, self.number = answers, number
        self.tokenizer = answers.spec.pair.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        beginning = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if beginning is None else beginning

    @property
    def max_length(self) -> int:
        return self.answers.max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text that brings the beginning-of-sequence token, as chat templates do, gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.bos_token)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Likelihood]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[Likelihood]:
        pairs = [(context, follows) for _, context, follows in requests]
        return self._own(self.answers.likelihoods(pairs, counts=self.number == 0))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Whole texts, cut into windows as the harness cuts them for its own models."""
        return [sum(logprob for logprob, _ in self._window_likelihoods(request.args[0])) for request in requests]

    def _window_likelihoods(self, text: str) -> list[Likelihood]:
        tokens = self.tok_encode(text)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
        pairs = [make_disjoint_window(window) for window in windows]
        return self._own(self.answers.likelihoods(pairs, counts=self.number == 0))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        pairs = [request.args for request in requests]
        return self._own(self.answers.texts((self.tok_encode(text), arguments) for text, arguments in pairs))

    def _own(self, answers: list[list[Any]]) -> list[Any]:
        return [of_all[self.number] for of_all in answers]
