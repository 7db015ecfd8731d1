"""Byte-level tokenizers: read from a directory, built from a GGUF's own tables, or made of plain bytes.

GGUF files carry vocabulary, merges, token types and the name of a pre-tokenizer; transformers' own reading of them
differs between releases, so the tokenizer is assembled here. Nothing in this file knows weights.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import UserError

# GGUF token types; unused tokens only pad the table to the matrix's height.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
# One digit a piece in both. SmolLM's other pieces are GPT-2's; Qwen2 keeps line breaks and punctuation apart.
QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTE_VOCAB_SIZE = 256 + len(BYTE_SPECIALS)
BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROBE = "In 2024, naïve tests cost 1,299€:\n\n\tx = f(y)[0]; // isn't it?  日本語 🙂\r\n"


def load_tokenizer(directory: Path, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer.json as it stands: model-specific classes rebuild it, and not alike in every release."""
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json; download the checkpoint again with all its tokenizer files.")
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as error:  # the tokenizers library raises bare Exception for malformed files
        raise UserError(f"the tokenizer.json of {source} cannot be read ({error}); download it again.") from error


def gguf_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """fields: the GGUF's `tokenizer.*` metadata."""
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    _set_pre_tokenizer(backend, fields["tokenizer.ggml.pre"])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    )
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    )
    eos = tokens[fields["tokenizer.ggml.eos_token_id"]]
    padding = fields.get("tokenizer.ggml.padding_token_id")
    return _wrap(backend, eos, eos if padding is None else tokens[padding], fields.get("tokenizer.chat_template"))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Token id = byte value, then three specials: what the `random:` models speak."""
    vocab = {char: byte for byte, char in enumerate(_byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in BYTE_SPECIALS])
    return _wrap(backend, "<|im_end|>", "<|endoftext|>", BYTE_CHAT_TEMPLATE)


def live_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Token -> id without the `[PAD151936]` fillers that some converters write for a matrix's spare rows."""
    return {token: i for token, i in tokenizer.get_vocab().items() if not re.fullmatch(r"\[PAD\d+\]", token)}


def check_tokenizers_agree(
    target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase, target_source: str, draft_source: str
) -> None:
    """A drafted id must mean the same text to the target; chat templates may differ."""
    ours, theirs = live_vocabulary(target), live_vocabulary(draft)
    difference = ""
    if ours != theirs:
        token, _ = min(ours.items() ^ theirs.items(), key=lambda item: item[1])
        difference = f"token {token!r} has id {ours.get(token)} in the one and {theirs.get(token)} in the other"
    elif _probe_ids(target) != _probe_ids(draft):
        difference = f"they split {PROBE!r} differently"
    if difference:
        raise UserError(
            f"the tokenizers of target {target_source} and draft {draft_source} differ: {difference}; "
            "set model.draft to a smaller model of the target's own family."
        )


def _probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(PROBE, add_special_tokens=False)


def _set_pre_tokenizer(backend: Tokenizer, name: str) -> None:
    if name == "smollm":
        first: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    elif name == "qwen2":
        first = pre_tokenizers.Split(Regex(QWEN2_PIECES), behavior="isolated")
        backend.normalizer = normalizers.NFC()
    else:
        raise UserError(
            f"the GGUF's pre-tokenizer {name!r} is not supported, only smollm and qwen2; "
            "use the safetensors checkpoint of this model."
        )
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])


def _wrap(backend: Tokenizer, eos: str, pad: str, chat_template: str | None) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=pad,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the rest follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
