"""task=chat: turns over one cache are what fresh runs of the same conversation are, and mistakes end nothing."""

import io
import json

import pytest

from specsmallkv.run import main

TINY = ["+model=tiny-random", "task=chat", "max_new_tokens=4", "ignore_eos=true", "policy=full"]


@pytest.fixture
def talk(tmp_path, monkeypatch, capsys):
    """Type lines: exit code, record, stdout without the record, stderr."""
    monkeypatch.chdir(tmp_path)

    def talk(typed: str | bytes, *argv: str):
        raw = typed.encode() if isinstance(typed, str) else typed
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
        code = main([*TINY, *argv])
        out, err = capsys.readouterr()
        *text, line = out.splitlines()
        return code, json.loads(line), text, err

    return talk


def test_turns_reuse_the_cache_and_plain_texts_follow_each_other(talk):
    code, record, _, err = talk("Hello there\n\nAnd then?\n/quit\nnot read\n", "chat=false")
    first, second = record["outputs"]
    assert (code, record["new_tokens"], len(record["outputs"])) == (0, 8, 2)
    assert first["reused_tokens"] == 0
    assert second["reused_tokens"] == first["prompt_tokens"] + first["new_tokens"] - 1
    assert second["prompt_tokens"] == first["prompt_tokens"] + first["new_tokens"] + len("\nAnd then?\n")
    assert f"; {second['reused_tokens']} of {second['prompt_tokens']} prompt tokens were there; 100.0% of the" in err


def test_reset_forgets_all_but_the_system_message(talk):
    _, record, _, _ = talk("Hello\nMore\n/reset\nHello\n", "task.system=Be brief.")
    first, _, again = record["outputs"]
    assert (again["text"], again["prompt_tokens"], again["reused_tokens"]) == (
        first["text"],
        first["prompt_tokens"],
        0,
    )


def test_a_document_may_come_first(talk, tmp_path):
    (tmp_path / "document.txt").write_text("A long story. " * 9)
    _, record, _, _ = talk("Who?\n", "prompt_file=document.txt")
    assert len(record["outputs"]) == 2
    assert record["outputs"][1]["prompt_tokens"] > record["outputs"][0]["prompt_tokens"] > 126


def test_a_turn_that_does_not_fit_is_told_and_forgotten(talk):
    code, record, _, err = talk("Hello\n" + "x" * 40000 + "\nHello\n", "chat=false")
    assert (code, len(record["outputs"])) == (0, 2)
    assert err.count("exceed the context window of 32768 tokens; shorten one of them.") == 1
    assert record["outputs"][1]["reused_tokens"] > 0


def test_bytes_that_are_no_text_end_nothing(talk):
    code, record, _, _ = talk(b"caf\xe9?\nna\xc3\xafve\n", "chat=false")
    assert (code, len(record["outputs"])) == (0, 2)


def test_nothing_typed_is_a_record_too(talk):
    code, record, text, _ = talk("")
    assert (code, text, record["outputs"], record["new_tokens"]) == (0, [], [], None)


def test_a_prompts_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "prompts_file=x"]) == 2
    assert capsys.readouterr().err.startswith("task=chat holds one conversation; ")
