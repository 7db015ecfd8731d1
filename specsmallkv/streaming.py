"""Tokens to text, piece by piece: whole UTF-8 characters only, cut at the first stop string."""

from collections.abc import Sequence
from typing import Any

from .errors import UserError

UNFINISHED = "\ufffd"  # what a tokenizer decodes a split character to


class TextStream:
    """Feed tokens, get the text that is certain by now. `text` is all of it, `stopped` tells that a stop string came.

    Text that may be the beginning of a stop string is held back until it is clear that it is not one. stop: one such
    string or several; UserError for an empty one.
    """

    def __init__(self, tokenizer: Any, stop: str | Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self.stop):
            raise UserError(f"stop={list(self.stop)} holds an empty string, which ends every text; leave it out.")
        self.text, self.stopped = "", False
        self._context: list[int] = []  # tokens already shown, kept because decoding depends on the left neighbour
        self._pending: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Text that becomes certain with this token."""
        self._pending.append(token)
        piece = self._decode(self._context + self._pending)[len(self._decode(self._context)) :]
        if piece.endswith(UNFINISHED):
            return ""
        self._context, self._pending = self._pending, []
        return self._release(piece)

    def finish(self) -> str:
        """What was held back, at the end of the sequence."""
        piece = self._decode(self._context + self._pending)[len(self._decode(self._context)) :]
        self._pending = []
        shown = self._release(piece)
        rest, self._held = self._held, ""
        self.text += rest
        return shown + rest

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        waiting = self._held + piece
        found = [at for at in (waiting.find(s) for s in self.stop) if at >= 0]
        self.stopped = bool(found)
        keep = min(found) if found else len(waiting) - self._possible_stop(waiting)
        self._held = "" if found else waiting[keep:]
        self.text += waiting[:keep]
        return waiting[:keep]

    def _possible_stop(self, waiting: str) -> int:
        """Length of the longest end of `waiting` that begins a stop string."""
        lengths = range(min(len(waiting), max(map(len, self.stop), default=0)), 0, -1)
        return next((n for n in lengths if any(s.startswith(waiting[-n:]) for s in self.stop)), 0)

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
