"""HumanEval and MBPP: prompts as published, sample files, and completions that are run only on request."""

import json
import os
import time
from pathlib import Path

import pytest
from conftest import run_task
from omegaconf import OmegaConf

from specsmallkv.benchmarks.data import SAMPLES
from specsmallkv.benchmarks.execution import passes
from specsmallkv.config import CONFIG_DIR
from specsmallkv.errors import UserError
from specsmallkv.presets import build


def examples_of(name, **changes):
    return build(OmegaConf.merge(OmegaConf.load(CONFIG_DIR / "task" / f"{name}.yaml"), changes), "task").read(None)


def sample(name):
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text().splitlines()]


LEAST = ("max_new_tokens=4", "quiet=true", "ignore_eos=true")
SOLUTIONS = {"humaneval": "canonical_solution", "mbpp": "code"}


# Prompts


def test_humaneval_asks_for_the_rest_of_a_function_in_plain_text():
    for example, row in zip(examples_of("humaneval"), sample("humaneval"), strict=True):
        assert example.context + example.question == row["prompt"] and example.chat is False
        assert example.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def test_mbpp_asks_after_three_worked_examples_and_knows_its_test_split(tmp_path):
    (example, *others) = examples_of("mbpp")
    row = sample("mbpp")[0]
    assert example.question == (
        f"You are an expert Python programmer, and here is your task: {row['prompt']} Your code should pass these "
        "tests:\n\n" + "\n".join(row["test_list"]) + "\n[BEGIN]\n"
    )
    assert example.context.count("[BEGIN]\n") == example.context.count("\n[DONE]\n\n") == 3
    assert "similar_elements" in example.context and example.stop == ("[DONE]",) and len(others) == 4
    rows = [row | {"task_id": number} for number in (10, 11, 510, 511)]
    full = {"text": row["prompt"], "task_id": 12, "test_list": row["test_list"], "test_setup_code": "", "code": ""}
    (tmp_path / "all.json").write_text(json.dumps([*rows, full]))
    found = examples_of("mbpp", data_path=str(tmp_path / "all.json"))
    assert [e.task_id for e in found] == [11, 510, 12] and len({e.question for e in found}) == 1


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("humaneval", {"prompt": "def f():"}, "no field test of type str"),
        ("mbpp", {"task_id": 11, "test_list": ["a"]}, r"has no prompt \(or text\)"),
        ("mbpp", {"task_id": 11, "prompt": "a", "test_list": [1]}, "test_list of texts"),
        ("mbpp", {"prompt": "a"}, "no field task_id of type int"),
        ("mbpp", {"task_id": 11, "prompt": "a", "test_list": ["a"], "test_imports": [1]}, r"test_imports is \[1\]"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, name, row, problem):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"rows.jsonl line 1.*{problem}"):
        examples_of(name, data_path=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_time_limit_that_is_none_is_refused(timeout):
    with pytest.raises(UserError, match=r"^task\.timeout="):
        examples_of("humaneval", timeout=timeout)


# What a completion is worth


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_published_solutions_pass_and_others_do_not(name):
    for example, row in zip(examples_of(name, execute=True, timeout=30), sample(name), strict=True):
        assert example.judge(row[SOLUTIONS[name]]).score == 1, row["task_id"]
        assert example.judge("    return None\n").score == example.judge("").score == 0
        assert example.judge(" ").answer is None


@pytest.mark.parametrize("name", SOLUTIONS)
def test_nothing_is_run_unless_the_task_says_so(name, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *args, **options: pytest.fail("something was run"))
    (example, *_) = examples_of(name)
    assert example.judge("raise SystemExit").score is None


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "def f(:",
        "import mmap; mmap.mmap(-1, 1 << 33)",
        "open('big', 'wb').write(b'x' * (1 << 25))",
        "while True: print('x' * 1000)",
        "input()",
        "\x00",
    ],
)
def test_a_program_that_does_not_reach_its_end_has_not_passed(program):
    assert not passes(program, 5)


def test_a_program_that_does_reach_it_has_passed():
    assert passes("import math\nprint('é' * 100)\nif __name__ == '__main__': raise SystemExit", 30)


def test_what_a_program_has_started_ends_with_its_time(tmp_path):
    started = time.monotonic()
    source = (
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
    )
    source += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\nchild.wait()"
    assert not passes(source, 10) and time.monotonic() - started < 40
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):  # the kernel takes a moment; a zombie of somebody else's counts as ended
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("it lives on")


# A run


def test_each_system_has_a_file_of_samples_for_the_benchmarks_own_harness(tmp_path):
    record = run_task("+model=tiny-random", "task=humaneval", "task.num_examples=2", *LEAST, f"run_dir={tmp_path}")
    rows = [json.loads(line) for line in Path(record["examples_file"]).read_text().splitlines()]
    assert [Path(file).name for file in record["samples_files"]] == [
        "tiny-random-specsmallkv-0.2.jsonl",
        "tiny-random-full-1.jsonl",
    ]
    for file, policy in zip(record["samples_files"], ("specsmallkv", "full"), strict=True):
        samples = [json.loads(line) for line in Path(file).read_text().splitlines()]
        assert [set(sample) for sample in samples] == [{"task_id", "completion"}] * 2
        assert [s["task_id"] for s in samples] == ["HumanEval/0", "HumanEval/1"]
        assert [s["completion"] for s in samples] == [row["text"] for row in rows if row["policy"] == policy]
    assert record["accuracy"] is None and 0 <= record["results"][0]["same_prefix"] <= 1


def test_with_execute_the_record_has_a_pass_rate(tmp_path):
    tiny = "+model=tiny-random"
    record = run_task(tiny, "task=mbpp", "task.num_examples=1", "task.execute=true", *LEAST, f"run_dir={tmp_path}")
    assert (record["accuracy"], record["correct"], record["total"]) == (0, 0, 1)
