"""task=distill as a command: what it refuses, asks the target for, keeps, and says of the finished draft."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from specsmallkv.config import CONFIG_DIR, option
from specsmallkv.errors import UserError
from specsmallkv.presets import build
from specsmallkv.prompts import Request
from specsmallkv.run import main
from specsmallkv.tasks import distill, distill_answers

LEAST = ["task.layers=1", "task.layer_choice=busiest", "task.tokens=64", "task.seq_len=16", "task.batch_size=2"]
PROMPTS = [f'{{"prompt": "{word}"}}\n' for word in ("Hello", "Why is it so?", "Go on")]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """task=distill on the text `text.txt`: exit code, its record or None, what else it printed."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("One two three, said the cat to the dog. " * 40)
    Path("prompts.jsonl").write_text("".join(PROMPTS))
    own = ["+model=tiny-random", "task=distill", "task.text_files=[text.txt]", "task.output_dir=out", *LEAST]

    def run(*overrides: str) -> tuple[int, dict | None, str]:
        code = main([*own, *overrides])
        out, err = capsys.readouterr()
        records = [json.loads(line) for line in out.splitlines() if line.startswith('{"schema_version"')]
        return code, records[-1] if records else None, err

    return run


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", 0), ("seq_len", 1), ("batch_size", 0), ("long_every", -1), ("answers_share", 1.5), ("lr", 0.0),
        ("warmup", -0.1), ("attention_loss_weight", -1.0), ("temperature", -1.0), ("checkpoint_minutes", -1.0),
        ("lr", float("nan")), ("repeats", 0), ("loss_temperature", 0.0), ("long_len", 1), ("average", 1.5),
    ],
)  # fmt: skip
def test_a_number_that_makes_no_sense_is_refused(key, value):
    task = OmegaConf.merge(option(CONFIG_DIR / "task" / "distill.yaml"), {key: value})
    with pytest.raises(UserError, match=rf"task\.{key}={value} is not possible; give "):
        build(task, "task")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("task.layers=[]", "task.layers=[] does not fit a target of 2 layers; name some of 0-1, or how many."),
        ("task.layers=[2]", "task.layers=[2] does not fit a target of 2 layers; name some of 0-1, or how many."),
        ("task.layers=[a]", "task.layers=['a'] does not fit a target of 2 layers; name some of 0-1, or how many."),
        ("task.text_files=[nope]", "task.text_files=nope does not exist; give the path of a text file."),
        ("task.text_files=[empty]", "task.text_files=empty is empty; put the text into it."),
        ("task.text_files=[]", "task=distill needs task.output_dir=DIR and task.text_files=[FILE,...] or "),
        ("task.seq_len=9000", "task.text_files comes to only 1600 tokens; give at least task.seq_len=9000."),
        ("task.eval_text_file=short", "task.eval_text_file=short is too short; give 512 tokens."),
        ("task.eval_prompts_file=nope", "task.eval_prompts_file=nope does not exist; give the path of a text file."),
        ("task.layer_choice=odd", "task.layer_choice=odd is unknown; choose one of even, busiest."),
        ("task.layers=3", "task.layers=3 does not fit a target of 2 layers; name some of 0-1, or how many."),
        ("task.head_tokens=1", "task.head_tokens=1 is below the "),
        ("task.start_from=nope", "task.start_from=nope cannot be read ("),
        ("task.start_from=package:drafts/no", "this installation does not ship 'package:drafts/no'"),
        ("task.prompts_file=nope", "task.prompts_file=nope does not exist; give the path of a text file."),
        ("task.prompts_file=other", 'task.prompts_file=other line 1 is {"a": 1}; write {"prompt": ...}'),
        ("task.prompts_file=long", "task.prompts_file=long has no prompt below 320 tokens; give shorter ones."),
        ("task.output_dir=empty", "empty: File exists; check the path"),
    ],
)  # fmt: skip
def test_what_it_cannot_use_is_refused_before_anything_is_computed(run, monkeypatch, override, sentence):
    for name, text in {
        "empty": "",
        "short": "ab",
        "other": '{"a": 1}',
        "long": f'{{"prompt": "{400 * "a"}"}}',
    }.items():
        Path(name).write_text(text)
    monkeypatch.setattr(distill_answers, "sample_batch", lambda *_: pytest.fail("the target was asked"))
    monkeypatch.setattr(distill, "train_with_progress", lambda *_: pytest.fail("training began"))
    asks = (
        []
        if any(key in override for key in ("prompts_file", "seq_len", "text_files=[]"))
        else ["task.prompts_file=prompts.jsonl"]
    )
    code, record, err = run(*asks, override, "quiet=true")
    assert (code, record, len(err.splitlines())) == (2, None, 1)
    assert err.startswith(sentence)


def test_a_disk_too_small_for_what_is_kept_is_told_before_training(run, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    code, _, err = run("quiet=true")
    assert code == 2 and err.startswith("task.output_dir=out has 0.0 GiB free, and what the target says")
    assert run("task.repeats=1", "quiet=true")[0] == 0, "which keeps nothing"


def test_held_out_figures_are_measured_reported_and_recorded(run):
    code, record, _ = run("task.eval_text_file=text.txt", "task.eval_prompts_file=prompts.jsonl", "quiet=true")
    report = json.loads(Path("out/report.json").read_text())
    shares = ("agreement", "attention_recall", "attention_recall_target", "answer_agreement", "acceptance_rate")
    assert code == 0 and all(0 <= report[key] <= 1 for key in shares)
    assert report["attention_recall"] <= report["attention_recall_target"] and 1 <= report["acceptance_length"] <= 4
    assert {key: record[key] for key in report} == report
    assert Path("out/curve.svg").read_text().startswith("<svg")


def test_prompts_without_texts_are_enough(run):
    assert run("task.text_files=[]", "task.prompts_file=prompts.jsonl")[0] == 0
    assert Path("out/draft/model.safetensors").is_file()


def test_conversations_too_short_for_a_sequence_are_refused(run, monkeypatch):
    monkeypatch.setattr(distill_answers, "sample_batch", lambda target, prompts, *_: [[65, 66]] * len(prompts))
    code, _, err = run("task.prompts_file=prompts.jsonl", "task.seq_len=400", "quiet=true")
    assert code == 2 and "task.prompts_file comes to only " in err and "give at least task.seq_len=400." in err


def test_texts_that_are_read_over_and_over_are_told(run):
    code, _, err = run("task.tokens=4096", "task.repeats=1", "task.long_len=4000")
    assert code == 0 and "text: 100 sequences of 16 tokens, each read 2.6 times" in err
    assert "oftener than task.repeats=1" in err and "fewer than task.long_len=4000" in err


def test_a_target_without_a_chat_template_is_asked_plainly():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [len(text), add_special_tokens]}

    pair = SimpleNamespace(tokenizer=tokenizer, target_origin="base")
    assert distill_answers.encode(pair, Request(prompt="abc")) == [3, True]
    with pytest.raises(UserError, match=r"The target \(base\) has no chat template"):
        distill_answers.encode(pair, Request(messages=[{"role": "user", "content": "abc"}]))


def test_a_draft_counts_the_tokens_of_the_runs_before_it(run):
    assert run("quiet=true")[0] == 0
    first = json.loads(Path("out/draft/config.json").read_text())["specsmallkv_draft"]["tokens"]
    layers = json.loads(Path("out/draft/config.json").read_text())["specsmallkv_draft"]["target_layers"]
    other = ["task.output_dir=later", f"task.layers={[1 - layers[0]]}", "task.prompts_file=prompts.jsonl"]
    code, _, err = run("task.start_from=out", *other, "quiet=true")
    assert code == 2 and "task.start_from=out has other layers than " in err
    assert not Path("later/answers.jsonl").exists(), "the target was asked before"
    assert run("task.start_from=out", "task.output_dir=more", f"task.layers={layers}", "quiet=true")[0] == 0
    later = json.loads(Path("more/draft/config.json").read_text())["specsmallkv_draft"]["tokens"]
    assert (first, later) == (64, 128)


def test_answers_of_a_batch_that_was_cut_are_asked_again(tmp_path):
    path, by = tmp_path / "answers.jsonl", {"target": "a", "seed": 0, "temperature": 0.8}
    batches = [(0, 2), (0, 2), (2, 3), (2, 3)]  # of the second one row is missing
    rows = [
        by | {"batch": list(batch), "prompt_ids": [number], "answer_ids": [1, number]}
        for number, batch in enumerate(batches)
    ]
    rows.append(by | {"prompt_ids": [9], "answer_ids": [1, 9]})  # of a version that kept no batches
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert distill_answers.read_answers(path, by) == {(0,): [1, 0], (1,): [1, 1], (9,): [1, 9]}
    assert len(path.read_text().splitlines()) == 3


def test_answers_that_were_written_whole_are_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    by = {"target": "a", "seed": 0, "temperature": 0.8}
    lines = [json.dumps(by | {"prompt_ids": [number], "answer_ids": [1, number]}) + "\n" for number in range(3)]
    path.write_text("".join(lines)[:-5])  # killed while it wrote the last line
    assert distill_answers.read_answers(path, by) == {(0,): [1, 0], (1,): [1, 1]}
    assert path.read_text() == "".join(lines[:2])
    for other in ({"target": "b"}, {"seed": 1}, {"temperature": 0.0}):
        assert distill_answers.read_answers(path, by | other) == {}  # they are not its own
    assert path.read_text() == "".join(lines[:2])
    path.write_text("[]\n")
    with pytest.raises(UserError, match="holds no answers"):
        distill_answers.read_answers(path, by)


def test_the_target_is_asked_only_for_answers_that_it_lacks(run, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(
        distill_answers,
        "sample_batch",
        lambda target, prompts, *_: asked.append(len(prompts)) or [[65, 66]] * len(prompts),
    )
    for count in (2, 3, 3):
        Path("prompts.jsonl").write_text("".join(PROMPTS[:count]))
        Path("out/checkpoint.safetensors").unlink(missing_ok=True)
        assert run("task.prompts_file=prompts.jsonl", "quiet=true")[0] == 0
    assert asked == [2, 1]


def test_a_damaged_checkpoint_is_one_sentence(run):
    Path("out").mkdir()
    Path("out/checkpoint.safetensors").write_bytes(b"half a file")
    code, _, err = run("quiet=true")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "checkpoint.safetensors cannot be read (" in err and "remove it to start anew." in err


@pytest.mark.slow
def test_a_command_that_is_killed_at_any_moment_goes_on_to_the_same_draft(run):
    """SIGKILL three times, each some steps further on, in a process of its own."""
    Path("prompts.jsonl").write_text("".join(PROMPTS))
    more = ["task.tokens=2560", "task.checkpoint_minutes=0", "task.prompts_file=prompts.jsonl", "quiet=true"]
    assert run(*more, "task.output_dir=straight")[0] == 0
    own = ["+model=tiny-random", "task=distill", "task.text_files=[text.txt]", "task.output_dir=killed", *LEAST]
    for steps in (5, 25, 50):
        child = subprocess.Popen([sys.executable, "-m", "specsmallkv.run", *own, *more])
        curve = Path("killed/curve.jsonl")
        while child.poll() is None and (not curve.exists() or len(curve.read_text().splitlines()) < steps):
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert run(*more, "task.output_dir=killed")[0] == 0
    drafts = [load_file(f"{name}/draft/model.safetensors") for name in ("straight", "killed")]
    assert all((drafts[0][name] == drafts[1][name]).all() for name in drafts[0])
    curves = [
        {p["step"]: p["kl"] for p in distill.read_curve(Path(n) / "curve.jsonl")} for n in ("straight", "killed")
    ]
    assert curves[0] == curves[1]
