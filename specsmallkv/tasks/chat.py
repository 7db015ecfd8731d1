"""task=chat: a conversation over one cache, a line of stdin a turn; only what is new is read.

    specsmallkv task=chat prompt_file=report.txt          a document as the first turn, then questions
    printf 'Hello\nAnd now?\n' | specsmallkv task=chat    piped

Answers stream to stdout, figures of each turn go to stderr. `/reset` forgets the conversation, `/quit` or the end of
the input ends it.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import UnsupportedOperation
from typing import Any

from ..config import RunConfig
from ..display import Display
from ..errors import UserError
from ..generation import Generation
from ..generator import SpecSmallKV
from ..prompts import Messages, read_requests
from ..record import asked_for
from .generate import combine, generation_settings, load_generator, setting_figures, show

QUIT, RESET = "/quit", "/reset"
COMMANDS = f"{RESET} forgets the conversation, {QUIT} ends it"


@dataclass
class ChatTask:
    """system: what the system message says; None: there is none."""

    name: str
    system: str | None

    def run(self, config: RunConfig) -> dict[str, Any]:
        if config.prompts_file is not None:
            raise UserError("task=chat holds one conversation; give prompt, prompt_file or messages_file instead.")
        opening = self._opening(config)
        display = Display(config.quiet)
        with display.waiting("loading the models"):
            spec = load_generator(config)
        display.console.print(f"[dim]{COMMANDS}[/dim]")
        session = Session(spec, config, display, self._system())
        interrupted = False
        try:
            session.hold(opening)
        except KeyboardInterrupt:
            interrupted = True
        figures = combine(session.turns) if session.turns else asked_for(config)
        return setting_figures(config, spec) | figures | {"interrupted": interrupted, "outputs": session.turns}

    def _system(self) -> Messages:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _opening(self, config: RunConfig) -> Messages:
        """What is said before anything is typed; the built-in document is no part of a conversation."""
        if config.prompt is None and config.prompt_file is None and config.messages_file is None:
            return []
        [request] = read_requests(config)
        return request.messages or [{"role": "user", "content": str(request.prompt)}]


@dataclass
class Session:
    """The talk so far, and the generation whose caches hold it. turns: figures of each answer."""

    spec: SpecSmallKV
    config: RunConfig
    display: Display
    talk: Messages
    previous: Generation | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._beginning = list(self.talk)

    def hold(self, opening: Messages) -> None:
        if opening:
            self.answer(opening)
        for line in lines(self.config.quiet):
            if line == RESET:
                self.talk, self.previous = list(self._beginning), None
            elif line:
                self.answer([{"role": "user", "content": line}])

    def answer(self, said: Messages) -> None:
        """One turn; a mistake in it is told, and the conversation goes on as if it had not been said."""
        try:
            generation = self._open(said)
        except UserError as error:
            print(error, file=sys.stderr)
            return
        try:
            show(generation, self.display)
        finally:
            if generation.sequence is not None:
                figures = generation.figures()
                self.turns.append({"reused_tokens": generation.reused_tokens} | figures)
                self.display.console.print(f"[dim]{turn_line(self.turns[-1])}[/dim]", soft_wrap=True, highlight=False)
        self.talk = [*self.talk, *said, {"role": "assistant", "content": generation.text}]
        self.previous = generation

    def _open(self, said: Messages) -> Generation:
        """Over the caches of the turn before, or afresh where the template words earlier turns differently."""
        settings, prompt = generation_settings(self.config), self._prompt(said)
        if self.previous is not None:
            try:
                return self.spec.stream(prompt, self.previous, **settings)
            except UserError as error:
                generation = self.spec.stream(prompt, **settings)  # what is wrong with the turn itself is raised here
                print(f"{error} All of it is read anew.", file=sys.stderr)
                self.previous = None
                return generation
        return self.spec.stream(prompt, **settings)

    def _prompt(self, said: Messages) -> Messages | list[int]:
        """The whole conversation; without a chat template the texts, one behind the other."""
        if self.config.chat is not False and getattr(self.spec.pair.tokenizer, "chat_template", None):
            return [*self.talk, *said]
        before = self.previous.prompt_ids + self.previous.token_ids if self.previous else []
        words = "\n".join(message["content"] for message in ([] if before else self.talk) + said)
        return before + self.spec.encode(f"\n{words}\n" if before else f"{words}\n", chat=False)


def lines(quiet: bool) -> Iterator[str]:
    """What is typed or piped, stripped, up to /quit or the end; bytes that are no text become question marks."""
    with suppress(AttributeError, UnsupportedOperation):  # stdin may be closed, another's, or read already
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    while sys.stdin is not None:
        if sys.stdin.isatty() and not quiet:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == QUIT:
            return
        yield line.strip()


def turn_line(figures: dict[str, Any]) -> str:
    """`12 tokens, 3.4 tokens/s; 62% of drafts accepted; 50 of 74 prompt tokens were there; 20.3% of the cache held`"""
    parts = [f"{figures['new_tokens']} tokens, {figures['tokens_per_second']:.1f} tokens/s"]
    if figures["acceptance_rate"] is not None:
        parts.append(f"{figures['acceptance_rate']:.0%} of drafts accepted")
    parts.append(f"{figures['reused_tokens']:,} of {figures['prompt_tokens']:,} prompt tokens were there")
    if figures["kv_budget_effective"] is not None:
        parts.append(f"{figures['kv_budget_effective']:.1%} of the cache held")
    return "; ".join(parts)
