"""experiments/: every command in its table can be typed, and every picture is made from committed records."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from specsmallkv.cli import prepare_arguments
from specsmallkv.config import CONFIG_DIR, check
from specsmallkv.presets import build, load_model_settings
from specsmallkv.run import main

FOLDER = Path(__file__).resolve().parent.parent / "experiments"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SUPPORT = {"plotting", "keep", "results_table", "draft_quality"}
SCRIPTS = sorted(set(re.findall(r"python experiments/(\w+)\.py", README)) - SUPPORT)
PICTURES = sorted(path.stem for path in (FOLDER / "pictures").glob("*.svg"))
ROWS = [line for line in README.splitlines() if line.startswith("| ") and line.count(" | ") == 4][1:]
COMMANDS = [shlex.split(found) for row in ROWS for found in re.findall(r"`([^`]*\+experiment=[^`]*)`", row)]


def test_every_command_names_an_experiment_and_a_script_that_exist_and_none_is_left_out():
    experiments = set(re.findall(r"\+experiment=([\w-]+)", README))
    assert experiments == {path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")}
    assert set(SCRIPTS) | SUPPORT == {path.stem for path in FOLDER.glob("*.py")}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_of_the_table_composes_whatever_files_it_names(command):
    config = composed(*command)
    check(config)
    build(OmegaConf.create(config.task), "task"), build(OmegaConf.create(config.policy), "policy")


def test_every_row_has_a_command_or_names_the_record_that_it_reads():
    assert len(ROWS) > 15
    for row in ROWS:
        assert re.search(r"\+experiment=|the records? of", row.split(" | ")[1]), row
        assert "LOG.md" not in row.split(" | ")[1], row


def composed(*arguments: str):
    """The configuration of a command line, of a sweep its first point's."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        overrides = prepare_arguments(list(arguments))
        config = compose("config", overrides, return_hydra_config=True)
        if sweeper := config.hydra.sweeper.params:
            config = compose("config", [*(f"{key}={str(v).split(',')[0]}" for key, v in sweeper.items()), *overrides])
    with open_dict(config):
        config.pop("hydra", None)
    return OmegaConf.to_object(config)


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")))
def test_what_an_experiment_sets_of_the_model_holds_for_any_pair_wherever_it_is_typed(experiment):
    own, other = f"+experiment={experiment}", "+model=qwen2.5-coder-1.5b"
    dtype = composed(own).model.dtype
    for arguments in ((other, own), (own, "seed=3", other)):
        model = composed(*arguments).model
        assert (model.name, model.dtype) == ("qwen2.5-coder-1.5b", dtype)
    text = (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    assert dtype == ("float32" if "dtype: float32" in text else "auto")


def test_directories_on_the_command_lines_are_those_that_the_experiments_write():
    written = {
        directory
        for path in (CONFIG_DIR / "experiment").glob("*.yaml")
        for directory in re.findall(r"dir: (outputs/[\w-]+)-\$\{model\.name\}", path.read_text(encoding="utf-8"))
    }
    named = set(re.findall(r"python experiments/\w+\.py (outputs/[\w-]+)-smollm2-135m", README))
    assert named and named <= written


def test_every_picture_that_a_text_shows_is_there_and_no_other():
    shown = set(re.findall(r"pictures/(\w+)\.svg", README))
    assert shown == set(PICTURES) and {script_of(name) for name in PICTURES} <= set(SCRIPTS) and len(shown) > 5
    front = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"experiments/pictures/(\w+)\.svg", front)) <= shown


def script_of(picture: str) -> str:
    """A picture has its script's name, and perhaps a suffix: that of other records of the kind."""
    return max((script for script in SCRIPTS if picture.startswith(script)), key=len)


@pytest.mark.parametrize("name", PICTURES)
def test_a_script_draws_its_picture_from_the_committed_records(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    picture, module = tmp_path / "picture.svg", importlib.import_module(script_of(name))
    records = records_of(name, module.RECORDS)
    monkeypatch.setattr(sys, "argv", [name, str(records), str(picture)])
    module.main()
    assert picture.stat().st_size < 200_000
    assert sentences(picture) == sentences(FOLDER / "pictures" / f"{name}.svg"), "the committed one is of others"
    plotting = importlib.import_module("plotting")
    monkeypatch.setattr(sys, "argv", [name, str(records)])
    assert plotting.picture(module.__file__, module.RECORDS) == FOLDER / "pictures" / f"{name}.svg"


def records_of(picture: str, own: str) -> Path:
    """Of a picture; own: the script's records, whose name may begin that of others."""
    added = picture.removeprefix(script_of(picture))
    found = FOLDER / "records" / (own + added)
    return found if found.is_dir() else FOLDER / "records" / added.removeprefix("_")


def test_the_picture_of_a_run_lies_beside_its_record_and_never_over_a_committed_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    plotting = importlib.import_module("plotting")
    for argv, expected in (
        ([], FOLDER / "pictures" / "kl_budget.svg"),
        ([str(tmp_path)], tmp_path / "kl_budget.svg"),
        ([str(tmp_path), "here.svg"], Path("here.svg")),
    ):
        monkeypatch.setattr(sys, "argv", ["kl_budget", *argv])
        assert plotting.picture("kl_budget.py", "kl_budget") == expected


def test_a_script_without_records_ends_with_a_sentence(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["speed_sweep", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"is no directory.*README\.md has its command"):
        importlib.import_module("speed_sweep").main()


def test_what_is_kept_tells_its_commit_but_no_directory_or_text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    keep = importlib.import_module("keep")
    record = {"schema_version": 1, "task": "generate", "git_hash": "abc", "text": "a\ntext", "seconds": 1.23456789}
    record |= {"config": {"prompt_file": "/home/someone/deep/file.txt"}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(keep, "HERE", tmp_path)
    keep.main(str(tmp_path / "run"), "kept")
    (kept,) = (tmp_path / "records" / "kept").glob("*.json")
    expected = record | {"seconds": 1.2346, "config": {"prompt_file": "file.txt"}}
    del expected["text"]
    assert json.loads(kept.read_text()) == expected


def test_the_results_table_of_the_main_readme_is_what_its_script_prints(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    script = importlib.import_module("results_table")
    printed = script.table(script.collect(script.RECORDS).rows)
    front = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert len(printed) == 5 and "\n".join(printed) in front and "python experiments/results_table.py" in front


@pytest.mark.parametrize("name", ["efficiency", "throughput_qwen_8k"])
def test_break_even_as_the_readme_has_it_is_what_the_script_prints(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["bytes_ledger", str(FOLDER / "records" / name), str(tmp_path / "x.svg")])
    importlib.import_module("bytes_ledger").main()
    lines = [line.removesuffix(" |") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(lines) == 6 and "measured" in lines[0] and all(line in README for line in lines)


def sentences(picture: Path) -> set[str]:
    """Titles, axes and legends; ticks may differ between versions of matplotlib."""
    texts = {node.text or "" for node in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")}
    found = {text for text in texts if len(text) > 8}
    assert len(found) > 2
    return found


def test_committed_records_are_small_and_hold_no_path_of_a_machine():
    files = list((FOLDER / "records").rglob("*.json"))
    assert files and sum(file.stat().st_size for file in files) < 1_200_000
    for file in files:
        assert not re.search(r'"[^"]*(/home/|/root/|/tmp/|/Users/|[A-Z]:\\)', file.read_text(encoding="utf-8")), file


# --- end to end -----------------------------------------------------------------------------------------------------

SHRUNK = {  # by task: random models read bytes, and know nothing
    "fidelity": ["task.context_tokens=192", "task.eval_tokens=48", "task.offset=0"],
    "calibrate": ["task.context_tokens=192", "task.window_size=32"],
    "gsm8k": ["task.num_examples=1", "max_new_tokens=4"],
    "ruler": ["task.num_examples=1", "task.length=1536", "max_new_tokens=4"],
    "throughput": ["task.context_tokens=96", "max_new_tokens=4", "task.repeats=1", "task.warmup_tokens=1"],
    "retrieval": ["task.num_items=12", "task.num_examples=1", "max_new_tokens=4"],
    "generate": ["max_new_tokens=4", "prompt=Once", "hydra.sweep.dir=outputs/sweep"],
}
FEWER = {  # what takes minutes on random models too
    "benchmark-budget": ["task.kv_budgets=[0.2,0.5]", "task=gsm8k"],  # BBH has 27 subtasks
    "budget-sweep": ["policy.kv_budget=0.2"],  # four points in all, each met again and skipped
    "speed-documents": ["task.num_prompts=2"],
    "parts": ["model.head_map=null"],  # random models have none
}


def scripts_of(experiment: str) -> set[str]:
    """Those of the rows that have its command, or name its record."""
    cells = [row.split(" | ")[1] for row in ROWS]
    own = [cell for cell in cells if re.search(rf"\+experiment={experiment}\b(?!-)|records? of `{experiment}`", cell)]
    return {script for cell in own for script in re.findall(r"python experiments/(\w+)\.py", cell)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml")))
def test_every_experiment_runs_and_its_scripts_draw_what_it_wrote(experiment, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    needed = ["attention-similarity", "removed-ranks"] if experiment == "removed-ranks" else [experiment]
    for name in needed:
        task = composed(f"+experiment={name}").task["name"]
        assert (
            main([f"+experiment={name}", "+model=tiny-random", "quiet=true", *SHRUNK[task], *FEWER.get(name, [])]) == 0
        )
    scripts = scripts_of(experiment)
    if experiment == "attention-similarity":
        scripts.remove("attention_sparsity")  # needs the other one's record too
    (directory,) = (tmp_path / "outputs").iterdir()
    for script in scripts:
        monkeypatch.setattr(sys, "argv", [script, str(directory)])
        importlib.import_module(script).main()
        assert len(sentences(directory / f"{script}.svg")) > 2
    assert scripts or experiment == "budget-sweep"


def test_a_draft_that_is_its_target_agrees_with_it_everywhere(monkeypatch, capsys, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Why?"}\n{"turns": ["How?", "And then?"]}\n')
    monkeypatch.syspath_prepend(str(FOLDER))
    target = load_model_settings("tiny-random")["target"]
    argv = ["draft_quality", "--model", "tiny-random", "--draft", target, "--prompts", str(tmp_path / "asked.jsonl")]
    monkeypatch.setattr(sys, "argv", argv)
    importlib.import_module("draft_quality").main()
    told = json.loads(capsys.readouterr().out)
    assert told["text"] == {"agreement": 1.0, "interval": [1.0, 1.0], "pieces": 20}
    assert told["answers"]["answer_agreement"] == 1.0
    assert 0.9 < told["answers"]["acceptance_rate"] <= 1.0, "an answer may end within a block"


def test_the_steps_whose_time_is_compared_take_turns_behind_equally_many_tokens(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    module, seen = importlib.import_module("draft_step"), []
    run = module.Steps.run

    def noted(self, name, token):
        head = self.models[name].get_output_embeddings()
        run(self, name, token)
        seen.append((name, self.caches[name].seen, self.models[name].get_output_embeddings() is head))

    monkeypatch.setattr(module.Steps, "run", noted)
    target = load_model_settings("tiny-random")["target"]
    argv = ["draft_step", "--model", "tiny-random", "--draft", target, "--context-tokens", "40", "--repeats", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    module.main()
    told = json.loads(capsys.readouterr().out)
    rounds = module.WARMUP + 2
    assert [(name, length) for name, length, _ in seen] == [
        (name, 41 + i) for i in range(rounds) for name in ("target", "draft", "whole_head")
    ]
    assert [kept for _, _, kept in seen[3:]] == [True, False, False] * (rounds - 1), "the draft's heads change places"
    assert told["wall"].keys() == {"ms", "draft / target", "whole_head / target"}
    assert all(value > 0 for value in told["wall"]["ms"].values())


@pytest.mark.parametrize(
    ("script", "argv", "said"),
    [
        ("draft_step", ["--model", "tiny-rondom"], "tiny-rondom"),
        ("draft_step", ["--model", "tiny-random", "--repeats", "0"], "--repeats=0 measures nothing; use 1 or more."),
        ("draft_step", ["--model", "tiny-random", "--context-tokens", "10000000"], "give a longer one, or --context-"),
        ("draft_quality", ["--model", "tiny-random", "--draft", "no-such-directory"], "no-such-directory"),
        ("draft_quality", ["--model", "tiny-random", "--text", "no-such-file"], "--text=no-such-file does not exist"),
    ],
)
def test_bad_input_to_a_script_is_one_sentence(script, argv, said, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert said in str(ended.value) and "\n" not in str(ended.value)
