"""Running text from a file, or from a data set: `hub:REPOSITORY?config=NAME&split=train&field=text&rows=10000`.

The optional `datasets` library reads it row by row, so that only as much is fetched as is asked for. A local directory
of JSONL, Parquet or text files is a repository too.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from transformers import PreTrainedTokenizerBase

from .errors import UserError
from .prompts import read_text

SCHEME = "hub:"
DEFAULTS = {"config": "", "split": "train", "field": "text", "rows": "10000"}


def tokens_of(tokenizer: PreTrainedTokenizerBase, key: str, source: str) -> list[int]:
    """Token ids of a text file or a `hub:` source. Raises UserError."""
    return tokenizer(hub_text(key, source) if source.startswith(SCHEME) else read_text(key, source))["input_ids"]


def hub_text(key: str, source: str) -> str:
    """The first rows' texts, joined by blank lines; rows without any do not count. Raises UserError."""
    name, options = parse(key, source)
    where, field = f"{key}={source}", options["field"]
    texts: list[str] = []
    for row in load_hub(where, name, options["config"] or None, options["split"], streaming=True):
        text = row.get(field, 0)
        if not isinstance(text, str | None):
            raise UserError(f"{where} has no text in field={field}; its fields are {', '.join(row)}.")
        texts += [text] if text and text.strip() else []
        if len(texts) == int(options["rows"]):
            break
    if not texts:
        raise UserError(f"{key}={source} has no rows with text; give another split or field.")
    return "\n\n".join(texts)


def parse(key: str, source: str) -> tuple[str, dict[str, str]]:
    """Repository and options of a `hub:` source."""
    name, _, query = source.removeprefix(SCHEME).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := [option for option in given if option not in DEFAULTS]:
        raise UserError(f"{key}={source} has the option {unknown[0]}; choose from {', '.join(DEFAULTS)}.")
    options = DEFAULTS | given
    if not name or not options["rows"].isdigit() or int(options["rows"]) < 1:
        raise UserError(f"{key}={source} is incomplete; write hub:REPOSITORY?field=text&rows=10000.")
    return name, options


def load_hub(
    where: str,
    repository: str,
    configuration: str | None,
    split: str,
    streaming: bool = False,
    file: str | None = None,
) -> Iterator[Any]:
    """Rows of a data set, or of one file of its repository; where: the setting that names it, for a UserError."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"{where} needs the datasets library; install it with pip install 'specsmallkv[eval]', "
            "or give a local file."
        ) from None
    try:
        yield from load_dataset(repository, configuration, split=split, streaming=streaming, data_files=file)
    except Exception as error:  # offline, gated, moved: the library raises some dozen types
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: {repository} cannot be loaded ({reason}); give a local file.") from None
