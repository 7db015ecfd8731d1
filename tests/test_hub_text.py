"""Text from data sets; the real library where it is installed, a directory in the place of the hub."""

import json
import sys

import pytest

from specsmallkv.errors import UserError
from specsmallkv.hub_text import hub_text, parse

KEY = "task.text_files"


@pytest.fixture
def dataset(tmp_path):
    rows = [{"text": "one", "n": 1}, {"text": " \n", "n": 2}, {"text": "two", "n": 3}, {"text": "three", "n": 4}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"hub:{tmp_path}"


@pytest.mark.peers
def test_the_first_rows_with_text_are_joined_by_blank_lines(dataset):
    pytest.importorskip("datasets")
    assert hub_text(KEY, f"{dataset}?rows=2") == "one\n\ntwo", "an empty row does not count"
    assert hub_text(KEY, dataset) == "one\n\ntwo\n\nthree"


@pytest.mark.peers
@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("?field=n", "no text in field=n; its fields are text, n"),
        ("?field=none", "its fields are text, n"),
        ("?split=test", "cannot be loaded"),
    ],
)
def test_what_a_data_set_lacks_is_one_sentence(dataset, query, problem):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match=problem):
        hub_text(KEY, dataset + query)


@pytest.mark.parametrize(
    ("source", "problem"),
    [("hub:", "incomplete"), ("hub:a?rows=0", "incomplete"), ("hub:a?rows=x", "incomplete"), ("hub:a?nope=1", "nope")],
)
def test_a_source_that_is_no_source_is_refused_before_anything_is_loaded(source, problem):
    with pytest.raises(UserError, match=problem):
        hub_text(KEY, source)


def test_options_that_are_not_given_have_defaults():
    name, options = parse(KEY, "hub:owner/name?rows=5&field=content")
    assert (name, options) == ("owner/name", {"config": "", "split": "train", "field": "content", "rows": "5"})


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"hub:a needs the datasets library.*specsmallkv\[eval\]"):
        hub_text(KEY, "hub:a")


@pytest.mark.peers
def test_rows_without_text_do_not_count_and_a_broken_row_is_one_sentence(tmp_path):
    pytest.importorskip("datasets")
    file = tmp_path / "train.jsonl"
    file.write_text('{"text": null}\n{"text": "one"}\n', encoding="utf-8")
    assert hub_text(KEY, f"hub:{tmp_path}") == "one"
    file.write_text('{"text": "one"}\n{"text": ', encoding="utf-8")
    with pytest.raises(UserError, match="cannot be loaded"):
        hub_text(KEY, f"hub:{tmp_path}")
