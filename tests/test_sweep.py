"""A sweep goes on where it was stopped, tells of every point, and loses at most the one in work."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from specsmallkv.record import config_hash
from specsmallkv.run import main
from specsmallkv.sweep import Sweep

POINT = ["+model=tiny-random", "prompt=hello, this is a test", "max_new_tokens=3", "quiet=true"]


def sweep(directory: Path, *argv: str) -> int:
    return main(["-m", *POINT, f"hydra.sweep.dir={directory}", *argv])


def results(directory: Path) -> dict[str, tuple]:
    """What a run gives that does not depend on the clock, by configuration."""
    records = [json.loads(path.read_text()) for path in directory.rglob("record.json")]
    keys = ("policy", "kv_budget", "seed", "text", "rounds", "accepted_tokens", "recall_bytes", "error")
    found = {record["config_hash"]: tuple(record.get(key) for key in keys) for record in records}
    assert len(found) == len(records)
    return found


def kill_after(directory: Path, count: int, *argv: str) -> None:
    """A sweep in a process of its own (forked: torch is loaded), killed when it has written so many records."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(sweep(directory, *argv))
    deadline = time.monotonic() + 300
    while len(list(directory.rglob("record.json"))) < count:
        assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def killed_and_repeated(tmp_path: Path, stops: list[int], *argv: str) -> None:
    assert sweep(tmp_path / "alone", *argv) == 0
    for count in stops:
        kill_after(tmp_path / "killed", count, *argv)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("record.json")}
    assert sweep(tmp_path / "killed", *argv) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "alone")
    assert len(before) >= stops[-1]
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_sweep_that_is_repeated_ends_with_the_records_of_one_left_alone(tmp_path, capfd):
    killed_and_repeated(tmp_path, [2], "policy=snapkv,specsmallkv", "seed=1,2")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twelve_points_killed_three_times_end_with_the_same_twelve_records(tmp_path, capfd):
    argv = "policy=full,snapkv,specsmallkv", "seed=1,2", "policy.kv_budget=0.3,0.6"
    killed_and_repeated(tmp_path, [2, 5, 9], *argv)
    assert len(results(tmp_path / "killed")) == 12


def test_done_points_are_left_out_their_records_printed_and_failed_ones_tried_again(tmp_path, capsys):
    argv = "policy=snapkv", "temperature=0,-1", "quiet=false"
    assert sweep(tmp_path, *argv) == 2
    first = results(tmp_path)
    assert [error for *_, error in first.values() if error] == [
        "temperature=-1.0 is not possible; use 0 (greedy) or a positive number."
    ]
    capsys.readouterr()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("record.json")}
    assert sweep(tmp_path, *argv) == 2
    out, err = capsys.readouterr()
    errors = [json.loads(line).get("error") for line in out.splitlines() if line.startswith("{")]
    assert errors == [None, "temperature=-1.0 is not possible; use 0 (greedy) or a positive number."]
    assert "done before, " in err
    assert "\n1 of 2 points, 1 of them done before; " in err
    assert "\n2 of 2 points, 1 of them done before, 1 failed; " in err
    changed = [path for path, time_ in written.items() if path.stat().st_mtime_ns != time_]
    assert [path.parent.name[0] for path in changed] == ["1"]
    assert results(tmp_path) == first


def test_a_sweep_with_another_value_keeps_every_record(tmp_path, capfd):
    """Points are numbered, and another value gives some of them the numbers of others."""
    assert sweep(tmp_path, "policy=snapkv", "seed=1,3") == 0
    before = results(tmp_path)
    assert sweep(tmp_path, "policy=snapkv", "seed=1,2,3") == 0
    after = results(tmp_path)
    assert before.items() <= after.items()
    assert sorted(row[2] for row in after.values()) == [1, 2, 3]


def test_one_directory_for_all_points_is_refused_before_one_overwrites_another(tmp_path, capsys):
    assert sweep(tmp_path / "sweep", "policy=snapkv", "seed=1,2", f"run_dir={tmp_path}/one") == 2
    assert capsys.readouterr().err.count("is one place for all points of a sweep; set hydra.sweep.dir=DIR") == 2
    assert not (tmp_path / "one").exists()
    assert [error is not None for *_, error in results(tmp_path / "sweep").values()] == [True, True]


def test_resume_can_be_turned_off(tmp_path, capfd):
    assert sweep(tmp_path, "policy=snapkv", "seed=1") == 0
    [path] = tmp_path.rglob("record.json")
    written = path.stat().st_mtime_ns
    assert sweep(tmp_path, "policy=snapkv", "seed=1", "resume=false") == 0
    assert [found.stat().st_mtime_ns > written for found in tmp_path.rglob("record.json")] == [True]


def test_the_hash_is_of_what_a_run_is_not_of_where_it_goes():
    config = {"model": {"name": "a"}, "seed": 0, "run_dir": None, "quiet": False, "resume": True}
    assert config_hash(config) == config_hash({"seed": 0, "model": {"name": "a"}, "run_dir": "x", "quiet": True})
    assert config_hash(config) != config_hash(config | {"seed": 1})
    assert config_hash(config) != config_hash(config | {"model": {"name": "b"}})


def test_an_interrupted_or_damaged_record_is_not_done(tmp_path):
    for name, text in {
        "whole": '{"config_hash": "a"}',
        "ended": '{"config_hash": "b", "interrupted": true}',
        "wrong": '{"config_hash": "c", "error": "no"}',
        "half": '{"config_hash": "d"',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(text)
    known = Sweep()
    assert [known.finished(tmp_path, hash_) is not None for hash_ in "abcd"] == [True, False, False, False]


def test_the_time_to_go_is_that_of_points_really_run(monkeypatch):
    known = Sweep(total=10, ended=4, skipped=2, failed=1, started=time.perf_counter() - 60)
    assert known.line() == "4 of 10 points, 2 of them done before, 1 failed; 0:01:00 gone, about 0:03:00 to go"
    assert Sweep(total=None, ended=2, started=time.perf_counter()).line() == "2 points of this process; 0:00:00 gone"


def test_points_in_other_processes_leave_the_same_records_and_the_exit_code_tells_of_a_failed_one(
    tmp_path, monkeypatch
):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    points = ["policy.kv_budget=0.2,7,0.4"]
    beside = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert sweep(tmp_path / "alone", *points) == 2
    assert sweep(tmp_path / "beside", *points, *beside) == 1
    alone, others = (results(tmp_path / name) for name in ("alone", "beside"))
    assert {key: row[-1] for key, row in alone.items()} == {key: row[-1] for key, row in others.items()}, "errors too"
    assert len(others) == 3
    records = (tmp_path / "beside").rglob("record.json")
    times = {path: path.stat().st_mtime for path in records if json.loads(path.read_text()).get("error") is None}
    assert sweep(tmp_path / "beside", "policy.kv_budget=0.2,0.4", *beside) == 0, (
        "an older failure is none of this sweep"
    )
    assert len(times) == 2 and all(path.stat().st_mtime == before for path, before in times.items())
