"""The command line: any text arrives verbatim, a mistake is one sentence, stdout is the text and the record."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from specsmallkv.cli import prepare_arguments, quote_override
from specsmallkv.config import CONFIG_DIR, RunConfig
from specsmallkv.errors import UserError
from specsmallkv.policies import Policy
from specsmallkv.record import environment, plain, write_record
from specsmallkv.run import main

REPOSITORY = Path(__file__).resolve().parents[1]
NASTY = [
    "Hello, world",
    "It's fine",
    "f(x)",
    "[INST]",
    "[INST] a, b [/INST]",
    "${X}",
    r"\${X}",
    "${",
    "$ {a} ${a.b} ${oc.env:HOME}",
    'she said "no"',
    """both ' and " quotes""",
    "trailing backslash \\",
    "\\",
    "C:\\new\\table",
    "two\nlines\r\n",
    "  spaces around  ",
    "",
    "null",
    "true",
    "1e3",
    "???!",
    "a=b c=d",
    "{a: b}",
    "a,b",
    "naïve 日本語 🙂",
    "choice(a,b)",
    "# not a comment",
    "-m",
    "--help",
    "~",
    "%s %(x)s",
]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    pieces = [
        "a",
        " ",
        "\\",
        "'",
        '"',
        "$",
        "${",
        "}",
        "{",
        ",",
        "=",
        "[",
        "]",
        "(",
        ")",
        "\n",
        "é",
        ":",
        "?",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(count)]


def composed(*argv: str) -> RunConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_object(compose("config", prepare_arguments(list(argv))))


class Narrow(Policy):
    """A policy from outside, without most of what the presets set."""

    def __init__(self, name: str):
        super().__init__(name)

    def score(self, index, layer, candidates, evidence):
        return evidence.saliency


@dataclass
class Echo:
    """A task that answers with its prompt, or fails as told."""

    name: str = "echo"
    fail: str | None = None
    interrupted: bool = False

    def run(self, config: RunConfig) -> dict:
        if self.fail == config.policy.name:
            raise UserError(f"policy={config.policy.name} was told to fail; tell another.")
        if self.fail == "bug":
            raise ZeroDivisionError("a bug")
        if self.fail == "ctrl-c":
            raise KeyboardInterrupt
        if self.fail == "disk":
            raise OSError(28, "No space left on device")
        print(f"the text of {config.policy.name}")
        return {"text": config.prompt, "loss": float("nan")} | ({"interrupted": True} if self.interrupted else {})


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line with the echo task: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, policy: str | None = "policy=full") -> tuple[int, str, str]:
        echo = ["task._target_=test_cli.Echo", "+task.fail=null"]
        code = main([*echo, *argv, *([policy] if policy else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def records(directory: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("outputs/**/record.json"))]


# Free text


@pytest.mark.parametrize("text", NASTY)
def test_any_prompt_and_any_one_stop_string_arrive_verbatim(text):
    config = composed(f"prompt={text}", f"stop={text}")
    assert config.prompt == text and config.stop == ([text] if text else [])


def test_random_texts_arrive_verbatim():
    """What composition does with a value, without the rest of it: parse, assign, resolve."""
    parser, config = OverridesParser.create(), OmegaConf.create({"text": "", "overrides": [""]})
    for text in random_texts(3000, seed=0):
        argument = quote_override(f"prompt={text}")
        config.overrides[0] = argument  # Hydra keeps the arguments too, in a config of its own
        config.text = parser.parse_override(argument).value()
        assert config.text == text


@pytest.mark.parametrize("text", ["Hello, world", "It's ${X}, [INST]\n", 'f("x")\\'])
def test_any_prompt_reaches_every_point_of_a_sweep(run, tmp_path, text):
    code, _, err = run("-m", f"prompt={text}", "policy=full,streaming_llm", policy=None)
    assert (code, err.count("Error")) == (0, 0)
    assert [record["text"] for record in records(tmp_path)] == [text, text]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[]", []),
        ("", []),
        ("[a,b]", ["a", "b"]),
        ("[a, b c]", ["a", "b c"]),
        ('["[END]"]', ["[END]"]),
        (r"""['it''s',"${X}"]""", [r"""['it''s',"${X}"]"""]),
        ("""["it's","${X}",1]""", ["it's", "${X}", "1"]),
        ("[a],[b]", ["[a],[b]"]),
        ("[a] or [b,c]", ["[a] or [b,c]"]),
        ("[[a],b]", ["[[a],b]"]),
    ],
)
def test_a_stop_list_is_a_list_only_where_it_parses_as_one(value, expected):
    assert composed(f"stop={value}").stop == expected


@pytest.mark.parametrize("path", ["/a b/c=d, e(1)/[x].txt", "it's", "random:llama?layers=2&hidden=64", "${X}/y"])
def test_paths_arrive_verbatim(path):
    keys = ["prompt_file", "messages_file", "prompts_file", "run_dir", "model.target", "model.draft"]
    config = composed(*(f"{key}={path}" for key in keys))
    assert {key: attrgetter(key)(config) for key in keys} == dict.fromkeys(keys, path)


def test_paths_that_are_named_otherwise_and_a_system_message_arrive_verbatim_too():
    for key in (
        "task.dir",
        "task.output",
        "task.start_from",
        "model.head_map",
        "speculation.cost_table",
        "task.system",
    ):
        assert quote_override(f"{key}=it's a,b") == rf"{key}='it\'s a,b'"
    assert quote_override("task.system=null") == "task.system=null"
    assert quote_override("hydra.sweep.dir=${now:%Y}") == "hydra.sweep.dir=${now:%Y}"


def test_a_path_may_still_be_unset_quoted_or_swept():
    assert composed("model.draft=null").model.draft is None
    assert composed("model.target='/a b'").model.target == "/a b"
    assert quote_override("model.target=a,b", multirun=True) == "model.target=a,b"


def test_other_keys_keep_hydras_grammar():
    assert composed("policy.kv_budget=0.5").policy["kv_budget"] == 0.5
    assert prepare_arguments(["hydra.run.dir=${now:%Y}"]) == ["hydra.run.dir=${now:%Y}"]


def test_flags_may_stand_anywhere():
    assert prepare_arguments(["seed=1", "-m", "prompt=a b"]) == ["seed=1", "prompt='a b'", "-m"]


# Mistakes


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["sead=1"], "sead is not a key; did you mean seed?"),
        (["+sead=1"], "sead is not a key; did you mean seed?"),
        (["policy.kv_budgett=1"], "policy.kv_budgett is not a key; did you mean policy.kv_budget?"),
        (
            ["policy.compensation=raw"],
            "policy.compensation is no setting of the chosen policy; it belongs to policy=smallkv|smallkv_paper.",
        ),
        (["+model.dtyp=x"], "model.dtyp is not a key; did you mean model.dtype?"),
        (["kv_budget=0.1"], "kv_budget is not a key; did you mean policy.kv_budget?"),
        (
            ["speculation.x=1"],
            "speculation.x is not a key; known: speculation.name, speculation.num_draft_tokens",
        ),
        (["policy=snapkw"], "policy=snapkw does not exist; did you mean snapkv? known: full, "),
        (
            ["+model=gpt-5"],
            "+model=gpt-5 does not exist; known: llama3.1-70b, llama3.1-8b, qwen2-72b, qwen2-7b",
        ),
        (["+experiment=x"], "+experiment=x does not exist; known: ablation, "),
        (["model=qwen2-7b"], "model=qwen2-7b needs a plus: write +model=qwen2-7b."),
        (["++model=qwen2-7b"], "++model=qwen2-7b has a plus too many: write +model=qwen2-7b."),
        (
            ["+model=qwen2-7b", "+model=qwen3-8b"],
            "+model=qwen3-8b is a second choice of model; keep one of them.",
        ),
        (["+policy=full"], "+policy=full must not have a plus: write policy=full."),
        (["policy.kv_budget=0.1,0.2"], "policy.kv_budget=0.1,0.2 gives several values; add -m"),
        (["max_new_tokens=abc"], "max_new_tokens=abc is not possible; max_new_tokens takes a whole number."),
        (["seed=1.5"], "seed=1.5 is not possible; seed takes a whole number."),
        (["chat=maybe"], "chat=maybe is not possible; chat takes true or false."),
        (["temperature=warm"], "temperature=warm is not possible; temperature takes a number."),
        (["seed=[1"], "seed=[1 cannot be read; quote its value"),
        (["~speculation"], "speculation has no option; choose one with speculation=NAME."),
        (["~model.draft"], "~model.draft removes what must stay or is not there; leave it out, or set KEY=null."),
        (["~colour"], "~colour removes what must stay or is not there; leave it out"),
        (
            ["policy=[full,snapkv]"],
            "policy=[...] mixes several options; name one, or run each of a list: -m policy=A,B.",
        ),
        (["hydra.nope=1"], "hydra.nope is not a key of Hydra's own; --cfg hydra shows them."),
        (["hydra/launcher=nope"], "hydra/launcher=nope does not exist; known: basic"),
        (["hydra/job_logging=none"], "Hydra refuses this (Unable to configure handler 'console'); "),
        (
            ["--resolve"],
            "Hydra refuses this (The --resolve flag can only be used in conjunction with --cfg or --help)",
        ),
        (["--run", "--multirun"], "Hydra refuses this (Only one of --run, --multirun, "),
        (["--config-path", "/nope"], "the directory of --config-path does not exist; leave"),
        (["policy=3"], "a group takes the name of one of its options"),
        (["model=null"], "a group takes the name of one of its options"),
        (
            ["policy.kv_budget=${nope}"],
            "policy.kv_budget: Interpolation key 'nope' not found; give it a value.",
        ),
        (["prompt=???"], "prompt: "),
        (["hello"], "'hello' is not key=value; put quotes around text that has spaces"),
        (["prompt=Hello,", "world"], "'world' is not key=value; put quotes around text that has spaces"),
        (["--prompt=hi"], "--prompt=hi is not a flag; write prompt=hi."),
        (["--frobnicate"], "--frobnicate is not a flag; write settings as key=value"),
        (["--cfg", "nope"], "argument --cfg/-c: invalid choice: 'nope'"),
        (["--config-name", "nope"], "config nope does not exist; leave --config-name"),
        (["--config-dir", "/nope"], "Additional config directory '/nope' not found."),
        (["hydra.run.dir=/dev/null/x"], "/dev/null/x: Not a directory; check the path"),
        (["temperature=-1"], "temperature=-1.0 is not possible; use 0 (greedy) or a positive number."),
        (["prompt="], "prompt='' is not possible; type some text"),
        (["prompt=a", "prompt_file=b"], "prompt and prompt_file are given together; keep one of them."),
        (["report=true", "task.name=other"], "report=true shows a run of task=generate; "),
        (["trace=true", "task.name=other"], "trace=true shows a run of task=generate; "),
        (["policy._target_=nowhere.Policy"], "_target_=nowhere.Policy cannot be imported"),
        (
            ["policy._target_=os.getcwd"],
            "policy._target_=os.getcwd is a builtin_function_or_method, not a class; name a",
        ),
        (["policy._target_=specsmallkv.policies"], "policy._target_=specsmallkv.policies is a module, not a class; "),
        (
            ["policy._target_=specsmallkv.models.DRAFT_KEY"],
            "policy._target_=specsmallkv.models.DRAFT_KEY is a str, not",
        ),
        (
            ["policy._target_=pathlib.Path"],
            "policy._target_=pathlib.Path is no policy; name a subclass of specsmallkv.Po",
        ),
        (["policy._target_=specsmallkv.Policy"], "policy._target_=specsmallkv.Policy leaves score undefined; "),
        (["policy._target_=Policy"], "policy._target_=Policy names no class; give it as module.Class."),
        (["policy._target_=null"], "policy._target_=None names no class; give it as module.Class."),
        (["policy._target_=3"], "policy._target_=3 names no class; give it as module.Class."),
        (["~policy._target_"], "policy._target_=None names no class; give it as module.Class."),
        (["+policy._partial_=true"], "policy._partial_ is Hydra's own and has no use here; leave it out."),
        (
            ["task._target_=os.getcwd"],
            "task._target_=os.getcwd is a builtin_function_or_method, not a class; name a cla",
        ),
        (["task._target_=json"], "task._target_=json names no class; give it as module.Class."),
        (
            ["task._target_=os.path"],
            "task._target_=os.path is a module, not a class; name a class with a run(config) me",
        ),
        (
            ["task._target_=pathlib.Path"],
            "task._target_=pathlib.Path is no task; name a class with a run(config) method.",
        ),
        (["task._target_=nowhere.Task"], "_target_=nowhere.Task cannot be imported"),
        (["+policy.colour=red"], "colour is not a parameter of "),
        (
            ["policy._target_=test_cli.Narrow"],
            "kv_budget is not a parameter of Narrow; leave it out, or make the class a datacla",
        ),
        (["policy.kv_budget=0"], "policy.kv_budget=0"),
        (["task.fail=disk"], "the disk is full (No space left on device); free some, or write elsewhere"),
        (["task.fail=full"], "policy=full was told to fail; tell another."),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(run, argv, sentence):
    code, out, err = run(*argv, policy=None if any("policy=" in a for a in argv) else "policy=full")
    assert (code, out) == (2, "")
    assert err.startswith(sentence)
    assert len(err.splitlines()) == 1
    assert err.endswith((".\n", "?\n"))


def test_a_mistake_in_a_sweep_names_its_point_and_the_other_points_run(run, tmp_path):
    code, out, err = run("-m", "policy=full,streaming_llm,snapkv", "task.fail=streaming_llm", policy=None)
    assert code == 2
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    sentence = "policy=streaming_llm was told to fail; tell another."
    assert [(record["config"]["policy"]["name"], record.get("error")) for record in found] == [
        ("full", None),
        ("streaming_llm", sentence),
        ("snapkv", None),
    ]
    told = [line for line in err.splitlines() if "[HYDRA]" not in line]
    assert [line.partition(";")[0] for line in told if " points" in line] == [
        "1 of 3 points",
        "2 of 3 points, 1 failed",
        "3 of 3 points, 1 failed",
    ]
    [other] = [line for line in told if " points" not in line]
    assert other.startswith("point 1 (") and other.endswith(f"): {sentence}")
    assert len(records(tmp_path)) == 3


def test_a_point_that_cannot_be_composed_leaves_a_record_too(run, tmp_path):
    code, _, _ = run("-m", "prompt=a", "temperature=0,${nope}", "seed=1")
    assert code == 2
    errors = [record.get("error") for record in records(tmp_path)]
    assert errors == [None, "temperature: Interpolation key 'nope' not found; give it a value."]


def test_a_value_that_a_policy_refuses_fails_its_point_alone(run, tmp_path):
    code, _, err = run("-m", "policy=full", "policy.kv_budget=2,0.5", policy=None)
    assert (code, [record["config"]["policy"]["kv_budget"] for record in records(tmp_path)]) == (2, [2, 0.5])
    assert "point 0 (" in err and "): policy.kv_budget=2 is outside (0, 1]; " in err


def test_a_bug_keeps_its_traceback_and_exits_1(run):
    code, _, err = run("task.fail=bug")
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: a bug" in err


@pytest.mark.parametrize("told", ["task.fail=ctrl-c", "+task.interrupted=true"])
def test_ctrl_c_exits_130_with_a_record_whether_or_not_the_task_made_one(run, tmp_path, told):
    code, out, _ = run(told)
    assert code == 130
    assert json.loads(out.splitlines()[-1])["interrupted"] is True
    assert len(records(tmp_path)) == 1


def test_ctrl_c_ends_a_sweep(run, tmp_path):
    code, _, _ = run("-m", "policy=full,snapkv", "task.fail=ctrl-c", policy=None)
    assert (code, len(records(tmp_path))) == (130, 1)


# The record


def test_the_last_line_of_stdout_is_the_record_in_the_run_directory(run, tmp_path):
    code, out, err = run("prompt=naïve 日本語", "seed=7")
    text, line = out.splitlines()
    assert (code, text, err) == (0, "the text of full", "")
    assert records(tmp_path) == [json.loads(line)]
    record = json.loads(line)
    assert (record["task"], record["seed"], record["text"], record["loss"]) == (
        "generate",
        7,
        "naïve 日本語",
        None,
    )
    assert record["config"]["policy"]["_target_"] == "specsmallkv.policies.FullCache"
    assert {"schema_version", "versions", "git_hash"} <= record.keys()


def test_runs_go_to_directories_named_after_model_and_policy(run, tmp_path):
    for _ in range(3):  # some of them in the same second
        run("+model=tiny-random")
    names = [path.parent.name for path in tmp_path.glob("outputs/*/record.json")]
    assert len(names) == 3
    assert all(name.startswith("tiny-random-full-") for name in names)


def test_run_dir_says_where_the_record_goes_and_leaves_no_other_directory(run, tmp_path):
    run(f"run_dir={tmp_path}/my, results")
    assert (tmp_path / "my, results" / "record.json").is_file()
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.parametrize("argv", [["temperature=-1"], ["-m", "policy=full,nope"], ["-m", "seed=1,2", "seed=[1"]])
def test_a_run_that_is_refused_leaves_nothing_behind(run, tmp_path, argv):
    code, _, _ = run(*argv, policy=None if "-m" in argv else "policy=full")
    assert code == 2
    assert not list(tmp_path.glob("outputs/*"))


def test_a_bug_leaves_its_configuration(run, tmp_path):
    run("task.fail=bug")
    assert list(tmp_path.glob("outputs/*/.hydra/config.yaml"))


def test_a_record_that_cannot_be_written_is_still_printed(run):
    code, out, err = run("run_dir=/dev/null/x")
    assert code == 2
    assert json.loads(out.splitlines()[-1])["task"] == "generate"
    assert err == "the record cannot be written to /dev/null/x (Not a directory); set run_dir=DIR.\n"


def test_a_failed_write_leaves_the_old_record_and_no_debris(tmp_path, monkeypatch):
    write_record({"a": 1}, tmp_path)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_record({"a": 2}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert json.loads((tmp_path / "record.json").read_text()) == {"a": 1}


def test_files_are_utf8_whatever_the_locale(tmp_path):
    code = "import sys; from specsmallkv.record import write_whole, Path; write_whole(Path(sys.argv[1]), chr(0x65e5))"
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], env=plain, check=True)
    assert (tmp_path / "x").read_text(encoding="utf-8") == "日"


def test_records_hold_plain_finite_data():
    torch = pytest.importorskip("torch")
    value = {
        1: (float("inf"), torch.tensor([1.5, float("nan")])),
        "device": torch.device("cpu"),
        "ids": {3, 2},
    }
    assert plain(value | {"dtype": torch.bfloat16, "path": Path("a")}) == {
        "1": [None, [1.5, None]],
        "device": "cpu",
        "ids": [2, 3],
        "dtype": "bfloat16",
        "path": "a",
    }
    with pytest.raises(TypeError, match="cannot hold"):
        plain(object())


def test_the_environment_names_versions_and_machine():
    found = environment("cpu")
    assert found["versions"]["python"].count(".") == 2
    assert found["versions"]["torch"] is not None
    assert found["device_name"]


# As a process


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "specsmallkv.run", *argv]


def source_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY)}


def test_help_and_cfg_work_from_any_directory(tmp_path):
    for flag, expected in (["--help"], "kv_budget"), (["--cfg", "job"], "kv_budget"):
        result = subprocess.run(command(*flag), cwd=tmp_path, env=source_environment(), capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert expected in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_policy_beside_the_shell_is_found_and_ctrl_c_ends_a_run(tmp_path):
    """In one process, to be quick: both strategies lie in the working directory, and the task waits."""
    (tmp_path / "waiting.py").write_text(
        "import time\n"
        "import specsmallkv.policies\n"
        "class Policy(specsmallkv.policies.Policy):\n"
        "    def __init__(self, **parameters): pass\n"
        "    def score(self, *what): pass\n"
        "class Task:\n"
        "    def __init__(self, **parameters): pass\n"
        "    def run(self, config):\n"
        "        print('started', flush=True)\n"
        "        time.sleep(60)\n"
    )
    script = tmp_path / "bin" / "console_script.py"  # unlike `python -m`, it does not put the directory on the path
    script.parent.mkdir()
    script.write_text("import sys\nfrom specsmallkv.run import main\nsys.exit(main())\n")
    process = subprocess.Popen(
        [sys.executable, str(script), "task._target_=waiting.Task", "policy._target_=waiting.Policy"],
        cwd=tmp_path,
        env=source_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background has it ignored
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert "Traceback" not in process.stderr.read()
    assert json.loads(process.stdout.read().splitlines()[-1])["interrupted"] is True


@pytest.mark.parametrize("argv", [["--cfg", "job"], ["+model=tiny-random", "prompt=hi", "quiet=true"]])
def test_a_closed_pipe_ends_a_run_quietly(tmp_path, argv):
    process = subprocess.Popen(
        command(*argv),
        cwd=tmp_path,
        env=source_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) in (0, 141)
