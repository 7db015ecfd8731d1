"""task=report: any set of records becomes rows, tables and figures that say what the records say."""

import csv
import io
import json
from pathlib import Path

import pytest

from specsmallkv.errors import UserError
from specsmallkv.figures import figures
from specsmallkv.records import as_csv, as_latex, as_markdown, collect, columns, differences, natural, rows_of
from specsmallkv.run import main

ENVIRONMENT = {"versions": {"torch": "2.6"}, "git_hash": "abc", "device_name": "a CPU"}


def record(task="generate", policy="snapkv", kv_budget=0.2, seed=0, **figures):
    config = {"policy": {"name": policy, "kv_budget": kv_budget}, "seed": seed, "run_dir": None}
    known = {"schema_version": 1, "task": task, "policy": policy, "kv_budget": kv_budget, "seed": seed, "text": "long"}
    return known | {"model": "tiny", "config": config, "interrupted": False} | ENVIRONMENT | figures


@pytest.fixture
def directory(tmp_path):
    """A sweep of two points, a failed one, a fidelity run at two budgets, and files that are no records."""
    fidelity = [
        {"policy": p, "kv_budget": b, "kl_mean": k, "text": t, "rows": "drafted", "target_kv_bytes": 2**20}
        for t, factor in (("a", 1), ("b", 4), ("mean", 2))
        for p, b, k in (("snapkv", 0.1, 0.2 * factor), ("snapkv", 0.2, 0.1 * factor), ("oracle", 0.1, 0.01 * factor))
    ]
    files = {
        "sweep/2-x/record.json": record(seed=1, tokens_per_second=3.0, acceptance_rate=0.5),
        "sweep/10-x/record.json": record(seed=2, tokens_per_second=5.0, acceptance_rate=None),
        "sweep/11-x/record.json": record(policy="a_b|c", error="it 50% failed"),
        "fidelity/record.json": record("fidelity", results=fidelity),
        "old/report/record.json": record("report"),
        "other.json": {"a": 1},
        "list.json": [1],
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "half.json").write_text('{"schema_version": 1')
    return tmp_path


def test_every_record_below_is_found_in_order_and_nothing_else(directory):
    found = collect(directory)
    assert [path.removesuffix("/record.json") for path in found.records] == [
        "fidelity",
        "sweep/2-x",
        "sweep/10-x",
        "sweep/11-x",
    ]
    assert found.failed == {"sweep/11-x/record.json": "it 50% failed"}
    assert len(found.rows) == 9 + 3


def test_a_record_is_one_row_or_one_per_result():
    [row] = rows_of("x", record(tokens_per_second=1.0))
    assert (row["record"], row["tokens_per_second"], row["text"]) == ("x", 1.0, None)
    systems = [{"name": "full", "tokens_per_second": 2.0}, {"name": "ours", "tokens_per_second": 4.0}]
    rows = rows_of("x", record("throughput", systems=systems))
    assert [(row["name"], row["model"], row["task"]) for row in rows] == [
        ("full", "tiny", "throughput"),
        ("ours", "tiny", "throughput"),
    ]
    [row] = rows_of("x", record(results=[{"accuracy": 0.5, "accuracy_interval": [0.2, 0.8]}]))
    assert (row["accuracy_low"], row["accuracy_high"]) == (0.2, 0.8)


def test_the_csv_has_every_number_as_measured(directory):
    rows = collect(directory).rows
    read = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert [row["record"] for row in read] == [row["record"] for row in rows]
    for given, row in zip(read, rows, strict=True):
        assert {key: given[key] for key in row if row[key] is not None} == {
            key: str(value) for key, value in row.items() if value is not None
        }


def test_tables_leave_out_what_is_always_the_same_and_escape_what_is_special(directory):
    rows = [row for row in collect(directory).rows if row["task"] == "generate"]
    assert columns(rows) == [
        *("record", "policy", "kv_budget", "seed", "tokens_per_second", "acceptance_rate", "error")
    ]
    markdown, latex = as_markdown(rows), as_latex(rows)
    assert "| sweep/2-x | snapkv | 0.2 | 1 | 3 | 0.5 |  |\n" in markdown
    assert "a_b\\|c" in markdown
    broken = [{"task": "throughput", "name": name, "error": "a\nb"} for name in ("x", "y")]
    assert "| y | a b |\n" in as_markdown(broken)
    (spoken,) = rows_of("r", {"systems": [{"name": "full", "text": "two\nlines"}]})
    assert spoken["text"] is None
    assert r"sweep/11-x & a\_b|c & 0.2 & 0 &  &  & it 50\% failed \\" in latex
    assert latex.count(r"\\") == 4


def test_bytes_are_mebibytes_for_people(directory):
    rows = [row for row in collect(directory).rows if row["task"] == "fidelity"]
    assert "target_kv MiB" in as_markdown(rows)
    assert "| 1 |" in as_markdown(rows)


def test_lines_are_policies_over_budgets_and_means_stand_for_their_texts(directory):
    found = {(f["task"], f["key"]): f for f in figures(collect(directory).rows)}
    kl = found["fidelity", "kl_mean"]
    assert kl["kind"] == "lines"
    lines = {line["name"]: [(p["x"], pytest.approx(p["y"])) for p in line["points"]] for line in kl["series"]}
    assert lines == {"oracle": [(0.1, 0.02)], "snapkv": [(0.1, 0.4), (0.2, 0.2)]}


def test_seeds_are_one_bar_with_their_range(directory):
    found = {(f["task"], f["key"]): f for f in figures(collect(directory).rows)}
    [bar] = found["generate", "tokens_per_second"]["bars"]
    assert (bar["y"], bar["low"], bar["high"], bar["count"]) == (4.0, 3.0, 5.0, 2)
    assert ("generate", "kl_mean") not in found


def test_runs_of_other_settings_are_lines_of_their_own_and_say_what_differs(tmp_path):
    def keep(number, kl_mean, **settings):
        kept = record("fidelity", seed=number, kl_mean=kl_mean)
        kept["config"] |= settings
        (tmp_path / f"{number}.json").write_text(json.dumps(kept))

    for number, length in enumerate((512, 512, 2048)):
        keep(number, 1.0 + number, task={"name": "fidelity", "context_tokens": length, "offset": number})
    found = collect(tmp_path)
    [figure] = [own for own in figures(found.rows, found.settings) if own["key"] == "kl_mean"]
    bars = {bar["name"]: (bar["y"], bar["count"]) for bar in figure["bars"]}
    assert bars == {"snapkv, context_tokens 512": (1.5, 2), "snapkv, context_tokens 2048": (3.0, 1)}


def test_sweeps_over_policies_share_their_full_cache_whatever_else_their_presets_say(tmp_path):
    for number, (name, window) in enumerate((("snapkv", 32), ("specsmallkv", 8))):
        results = [{"policy": p, "kv_budget": b, "accuracy": 0.5} for p, b in ((name, 0.2), ("full", 1.0))]
        kept = record("retrieval", policy=name, results=results)
        kept["config"]["policy"] |= {"window_size": window}
        (tmp_path / f"{number}.json").write_text(json.dumps(kept))
    found = collect(tmp_path)
    [figure] = [own for own in figures(found.rows, found.settings) if own["key"] == "accuracy"]
    assert {bar["name"]: bar["count"] for bar in figure["bars"]} == {"snapkv": 1, "specsmallkv": 1, "full": 2}


def test_a_swept_setting_is_a_column_and_what_other_policies_have_is_none(tmp_path):
    settings = (("specsmallkv", None), ("specsmallkv", 8), ("snapkv", None))
    for number, (policy, key_bits) in enumerate(settings):
        kept = record(policy=policy, seed=number, tokens_per_second=1.0)
        kept["config"] |= {"max_new_tokens": 8 * (number + 1)} if number else {"max_new_tokens": 8}
        kept["config"]["policy"] |= {"window_size": 8, "key_bits": key_bits} if policy == "specsmallkv" else {}
        (tmp_path / f"{number}.json").write_text(json.dumps(kept))
    rows = collect(tmp_path).rows
    assert "config.policy.window_size" not in rows[0]  # it tells policies apart, no run of one
    assert [row.get("config.policy.key_bits") for row in rows] == ["null", 8, None]
    lines = as_markdown(rows).splitlines()
    assert "| policy.key_bits | max_new_tokens | tokens_per_second |" in lines[2]
    assert lines[4] == "| 0 | specsmallkv | 0.2 | 0 | null | 8 | 1 |"
    assert lines[6] == "| 2 | snapkv | 0.2 | 2 |  | 24 | 1 |"


def test_a_swept_setting_stands_on_rows_of_the_policy_that_has_it_alone(tmp_path):
    policies = ("specsmallkv", "specsmallkv:pool=4", "specsmallkv:tail=2,pool=4", "snapkv")
    for number, (tail, dtype) in enumerate((("inf", "float32"), (1.0, "bfloat16"))):
        results = [{"policy": policy, "kv_budget": 0.2, "kl_mean": 1.0} for policy in policies]
        kept = record("fidelity", policy="specsmallkv", results=results, dtype=dtype)
        kept["config"]["policy"]["tail"] = tail
        kept["config"]["model"] = {"dtype": dtype}
        (tmp_path / f"{number}.json").write_text(json.dumps(kept))
    found = collect(tmp_path)
    rows = found.rows
    assert [row.get("config.policy.tail") for row in rows] == ["inf", "inf", None, None, 1.0, 1.0, None, None]
    [figure] = [own for own in figures(rows, found.settings) if own["key"] == "kl_mean"]
    lines = {bar["name"]: bar["count"] for bar in figure["bars"]}
    assert lines["specsmallkv:pool=4, tail inf"] == lines["specsmallkv:pool=4, tail 1.0"] == 1
    assert lines["snapkv"] == lines["specsmallkv:tail=2,pool=4"] == 2
    assert "config.model.dtype" not in rows[0] and "dtype" in columns(rows)


def test_kinds_of_speculation_are_lines_of_their_own():
    rows = [
        row for kind in ("draft", "none") for row in rows_of(kind, record(speculation=kind, tokens_per_second=1.0))
    ]
    [figure] = figures(rows)
    assert {bar["name"] for bar in figure["bars"]} == {"draft", "none"}


def test_settings_that_differ_are_told_from_those_that_all_share(directory):
    common, differing = differences(collect(directory).records)
    assert common == {"policy.kv_budget": 0.2}
    assert differing["sweep/2-x/record.json"] == {"policy.name": "snapkv", "seed": 1}


def test_numbers_sort_as_numbers():
    assert sorted(["a10", "a2", "b1", "a2b"], key=natural) == ["a2", "a2b", "a10", "b1"]


def test_the_task_writes_page_and_tables_and_a_second_report_does_not_count_the_first(directory, capsys):
    argv = ["task=report", f"task.dir={directory}", f"run_dir={directory}/report", "quiet=true"]
    for _ in range(2):
        assert main(argv) == 0
        written = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (written["num_records"], written["num_rows"], written["num_failed"]) == (4, 12, 1)
    assert [Path(path).name for path in written["tables"]] == ["table.csv", "table.md", "table.tex"]
    page = Path(written["report"]).read_text()
    assert "it 50% failed" in page
    assert all(Path(path).is_file() for path in written["tables"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "is no directory; give one with records below it."),
        ("empty", "holds no record; give the directory"),
    ],
)
def test_a_directory_without_records_is_refused(tmp_path, name, sentence):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=sentence):
        collect(tmp_path / name)
