"""Streamed text is the decoded text, cut at the first stop string, never inside a character."""

import pytest

from specsmallkv.errors import UserError
from specsmallkv.streaming import TextStream
from specsmallkv.tokenizer import byte_tokenizer

TEXT = "naïve café 🙂 said: STOP here, STOPPED"


def stream(text, stop=()):
    tokenizer = byte_tokenizer()
    text_stream, pieces = TextStream(tokenizer, stop), []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(text_stream.push(token))
        if text_stream.stopped:
            break
    pieces.append(text_stream.finish())
    return text_stream, pieces


def test_pieces_join_to_the_text_and_split_no_character():
    text_stream, pieces = stream(TEXT)
    assert "".join(pieces) == text_stream.text == TEXT
    assert not any("\ufffd" in piece for piece in pieces) and len(pieces) > 20


@pytest.mark.parametrize("stop, expected", [(["STOP"], "naïve café 🙂 said: "), (["🙂", "zzz"], "naïve café ")])
def test_text_ends_before_the_first_stop_string(stop, expected):
    text_stream, pieces = stream(TEXT, stop)
    assert text_stream.stopped and "".join(pieces) == text_stream.text == expected


def test_a_stop_string_may_come_without_a_list_and_an_empty_one_is_refused():
    text_stream, _ = stream("so ST it STOPs", "STOP")
    assert text_stream.text == "so ST it "
    with pytest.raises(UserError, match="empty string"):
        stream("a", ["b", ""])


def test_a_beginning_of_a_stop_string_that_never_completes_is_not_lost():
    text_stream, pieces = stream("wait ST", ["STOP"])
    assert "".join(pieces) == text_stream.text == "wait ST" and not text_stream.stopped


def test_an_unfinished_character_at_the_end_is_shown_as_the_tokenizer_decodes_it():
    tokenizer = byte_tokenizer()
    text_stream = TextStream(tokenizer)
    tokens = tokenizer("ok🙂")["input_ids"][:-1]
    for token in tokens:
        text_stream.push(token)
    text_stream.finish()
    assert text_stream.text == tokenizer.decode(tokens, skip_special_tokens=True)
