"""Where prompts come from: the command line, a text, a conversation, many rows, or the built-in document.

It reads and checks files; chat templates and token counts belong to the tokenizer and are applied elsewhere.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .config import PACKAGE, RunConfig
from .errors import UserError

ROLES = ("system", "user", "assistant", "tool")
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Request:
    """One thing to answer: a plain prompt or a conversation, never both. seed: None is the run's."""

    prompt: str | None = None
    messages: Messages | None = None
    seed: int | None = None


def read_requests(config: RunConfig) -> list[Request]:
    if config.prompt is not None:
        return [Request(prompt=config.prompt)]
    if config.prompt_file is not None:
        return [Request(prompt=read_text("prompt_file", config.prompt_file))]
    if config.messages_file is not None:
        text = read_text("messages_file", config.messages_file)
        where = f"messages_file={config.messages_file}"
        return [Request(messages=_messages(_parse_json(text, where), where))]
    if config.prompts_file is not None:
        return read_requests_file("prompts_file", config.prompts_file, config.chat)
    return [Request(prompt=default_prompt())]


def default_prompt() -> str:
    """The built-in long document with its question; written for this project, see `data/README.md`."""
    document = resources.files("specsmallkv").joinpath("data/default_prompt.txt")
    return document.read_text(encoding="utf-8").rstrip("\n")


def read_text(key: str, path: str) -> str:
    """The file's text, byte for byte but for a byte-order mark; whitespace alone is empty; `.gz` is unpacked.

    `package:PATH` lies inside this package, e.g. package:data/default_prompt.txt.
    """
    file = PACKAGE / path.removeprefix("package:") if path.startswith("package:") else Path(path).expanduser()
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if path.endswith(".gz") else content).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{key}={path} does not exist; give the path of a text file.") from None
    except IsADirectoryError:
        raise UserError(f"{key}={path} is a directory; give the path of a text file.") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={path} cannot be read ({reason}); give a readable text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}={path} is not UTF-8 (byte {error.start}); convert it, for example with iconv -t utf-8."
        ) from None
    if not text.strip():
        raise UserError(f"{key}={path} is empty; put the text into it.")
    return text


def read_requests_file(key: str, path: str, chat: bool | None) -> list[Request]:
    """A JSONL file, one request a row; key: what the configuration calls the file."""
    return [_request(row, where, chat) for where, row in read_rows(key, path)]


def read_rows(key: str, path: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of a JSONL file that the user named by `key`; empty lines are skipped."""
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(read_text(key, path).split("\n"), start=1):
        if line.strip():
            where = f"{key}={path} line {number}"
            yield where, _parse_json(line, where)


def _request(row: Any, where: str, chat: bool | None) -> Request:
    """A row may hold a seed and other columns (an id, a category); it must hold exactly one of the two sources."""
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UserError(f'{where} is {_short(row)}; write {{"prompt": ...}} or {{"messages": [...]}}.')
    seed = row.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise UserError(f"{where} has the seed {_short(seed)}; give a number from 0 to 2**63 - 1, or leave it out.")
    if "messages" in row:
        if chat is False:
            raise UserError(f"{where} holds messages, which need a chat template; drop chat=false.")
        return Request(messages=_messages(row["messages"], where), seed=seed)
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where} has the prompt {_short(prompt)}; give it some text.")
    return Request(prompt=prompt, seed=seed)


def _messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise UserError(f'{where} holds {_short(value)}; write a list of {{"role": ..., "content": ...}}.')
    for message in value:
        _check_message(message, where)
    return value


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise UserError(f'{where} has the message {_short(message)}; write {{"role": ..., "content": ...}}.')
    if message["role"] not in ROLES:
        raise UserError(f"{where} has the role {_short(message['role'])}; use one of {', '.join(ROLES)}.")
    if not isinstance(message["content"], str):
        raise UserError(f"{where} has the content {_short(message['content'])}; give it as one string.")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({error}); correct it there.") from None


def _short(value: object, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."
