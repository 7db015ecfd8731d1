"""Composition: every option and experiment composes, impossible values are refused, prompts are read."""

import json
import math
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import compose_run
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import OmegaConf

from specsmallkv.config import CONFIG_DIR, ModelConfig, RunConfig, SpeculationConfig, check, option
from specsmallkv.errors import UserError
from specsmallkv.presets import build, load_policy
from specsmallkv.prompts import Request, default_prompt, read_requests, read_text
from specsmallkv.record import config_hash, finite
from specsmallkv.tasks.grid import policy_grid


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def config_of(*overrides: str) -> RunConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_object(compose("config", list(overrides)))


def config_with(**values) -> RunConfig:
    model = ModelConfig("tiny", "org/target", None, "float32", "cpu", "auto")
    return RunConfig(model, {}, SpeculationConfig("draft"), {}, **values)


def test_a_plain_run_composes_the_embedded_pair_and_our_policy():
    config = config_of()
    check(config)
    assert (config.model.name, config.policy["name"]) == ("smollm2-135m", "specsmallkv")
    assert (config.speculation.name, config.task["name"]) == ("draft", "generate")


@pytest.mark.parametrize("name", options("model"))
def test_every_model_is_appended_and_named_after_its_file(name):
    config = config_of(f"+model={name}")
    check(config)
    assert config.model.name == name


@pytest.mark.parametrize("name", options("model"))
def test_every_model_file_is_complete(name):
    """`+model=` merges over the default: what a file leaves out would leak from there."""
    assert set(OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml")) == {f.name for f in fields(ModelConfig)}


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in ("policy", "speculation", "task") for n in options(g)])
def test_every_option_composes_and_is_named_after_its_file(group, name):
    node = getattr(config_of(f"{group}={name}"), group)
    assert (node["name"] if isinstance(node, dict) else node.name) == name


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in ("policy", "task") for n in options(g)])
def test_every_target_is_a_class_that_takes_exactly_the_keys_of_its_file(group, name):
    node = option(CONFIG_DIR / group / f"{name}.yaml")
    pytest.importorskip(node._target_.rpartition(".")[0])
    accepted = {field.name for field in fields(get_class(node._target_)) if field.init}
    assert accepted == set(node) - {"_target_"}


@pytest.mark.parametrize("name", options("policy"))
def test_a_preset_loaded_from_python_is_what_hydra_composes(name):
    assert OmegaConf.to_container(option(CONFIG_DIR / "policy" / f"{name}.yaml")) == config_of(f"policy={name}").policy


@pytest.mark.parametrize("word", ["inf", ".inf"])
def test_a_setting_without_limit_is_understood_in_both_spellings_and_told_apart_from_null(word):
    config = config_of(f"policy.tail_limit={word}")
    assert build(OmegaConf.create(config.policy), "policy").tail_limit == math.inf
    assert load_policy("specsmallkv").tail_limit == 1.0
    (variant,) = policy_grid(load_policy("specsmallkv"), [f"specsmallkv:tail_limit={word}"], [0.1])
    assert variant.tail_limit == math.inf
    assert finite({"policy": {"tail_limit": math.inf}}) == {"policy": {"tail_limit": "inf"}}
    hashes = [config_hash({"policy": {"tail_limit": value}}) for value in (math.inf, word, None)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_preset_on_top_of_another_says_only_what_it_changes():
    base, packed = (load_policy(name) for name in ("specsmallkv", "specsmallkv_packed"))
    assert (packed.key_bits, packed.value_bits) == (8, 4)
    assert replace(packed, name=base.name, key_bits=None, value_bits=None) == base


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_on_any_pair_and_sweeps_over_known_keys(name):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        hydra = compose("config", [f"+experiment={name}"], return_hydra_config=True).hydra
    swept = [f"{key}={str(values).split(',')[0]}" for key, values in (hydra.sweeper.params or {}).items()]
    assert bool(swept) == (hydra.mode is not None and hydra.mode.name == "MULTIRUN")
    for pair in ([], ["+model=qwen2.5-coder-1.5b"]):
        config = config_of(f"+experiment={name}", *pair, *swept)
        check(config)
        build(OmegaConf.create(config.task), "task"), build(OmegaConf.create(config.policy), "policy")


@pytest.mark.parametrize("file", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_key_has_a_comment_above_it(file):
    lines = file.read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if line and not line.startswith((" ", "#", "defaults:", "hydra:"))]
    assert [lines[i] for i in keys if not lines[i - 1].lstrip().startswith("#")] == []


def test_the_draft_option_repeats_the_schemas_defaults():
    assert config_of("speculation=draft").speculation == SpeculationConfig("draft")


IMPOSSIBLE = {
    "max_new_tokens": (0, -1),
    "batch_size": (0,),
    "temperature": (-0.1, float("nan"), float("inf")),
    "top_p": (0.0, -0.5, 1.1, float("nan")),
    "top_k": (-1,),
    "seed": (-1, 2**63),
    "stop": (["", "a"],),
    "prompt": ("", " \n", "\udcff"),
    "report": (True,),
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in IMPOSSIBLE.items() for v in values])
def test_impossible_values_are_refused_with_key_and_remedy(key, value):
    check(config_with())
    with pytest.raises(UserError, match=rf"^{key}=.*; .*\.$"):
        check(config_with(**{key: value}))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model", "name", " "),
        ("model", "target", ""),
        ("model", "dtype", "int8"),
        ("model", "device", "gpu"),
        ("model", "attention", "eager"),
        ("model", "draft_vocab_size", -1),
        ("speculation", "name", "tree"),
        ("speculation", "num_draft_tokens", 0),
        ("speculation", "oracle_every", 0),
        ("speculation", "draft_view_size", 5),
        ("speculation", "cost_table", "record.json"),
    ],
)
def test_impossible_model_and_speculation_values_are_refused(part, key, value):
    config = config_with()
    setattr(getattr(config, part), key, value)
    with pytest.raises(UserError, match=rf"^{part}\.{key}="):
        check(config)


def test_the_extremes_of_possible_values_are_accepted():
    check(
        config_with(
            max_new_tokens=1, batch_size=64, temperature=1e-9, top_p=1e-9, top_k=1, seed=2**63 - 1, stop=["\n"]
        )
    )


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 5}])
def test_sampling_settings_that_greedy_decoding_ignores_are_a_warning(setting):
    with pytest.warns(UserWarning, match=r"^top_.=.* has no effect at temperature=0, which is greedy; set"):
        check(config_with(**setting))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(config_with(**setting, temperature=0.7))
        check(config_with())


def test_two_prompt_sources_are_refused_by_name():
    with pytest.raises(UserError, match="prompt and prompts_file"):
        check(config_with(prompt="a", prompts_file="b"))


def test_a_conversation_needs_its_template(tmp_path):
    with pytest.raises(UserError, match="chat=false"):
        check(config_with(messages_file="m.json", chat=False))
    rows = write(tmp_path, json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    with pytest.raises(UserError, match="chat=false"):
        read_requests(config_with(prompts_file=rows, chat=False))


# Prompt sources


def write(directory: Path, content: str | bytes) -> str:
    path = directory / "file, with = odd name"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_a_prompt_file_is_read_byte_for_byte_without_its_byte_order_mark(tmp_path):
    path = write(tmp_path, "\ufeff  ${X}\r\nlast\u2028line \n")
    assert read_requests(config_with(prompt_file=path)) == [Request(prompt="  ${X}\r\nlast\u2028line \n")]


def test_a_prompt_file_may_lie_in_the_package():
    name = "package:data/default_prompt.txt"
    assert read_requests(config_with(prompt_file=name)) == [Request(prompt=read_text("prompt_file", name))]
    assert read_text("prompt_file", name).rstrip("\n") == default_prompt()


def test_a_messages_file_is_one_conversation(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, wörld"}]
    path = write(tmp_path, json.dumps(messages))
    assert read_requests(config_with(messages_file=path)) == [Request(messages=messages)]


def test_a_prompts_file_is_one_request_per_row_in_order(tmp_path):
    messages = [{"role": "user", "content": "b"}]
    rows = [{"prompt": "a\u2028a", "id": 1}, {"messages": messages}]
    path = write(tmp_path, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert read_requests(config_with(prompts_file=path)) == [
        Request(prompt="a\u2028a"),
        Request(messages=messages),
    ]


def test_without_a_source_the_built_in_document_ends_with_its_question():
    (request,) = read_requests(config_with())
    assert request.prompt == default_prompt()
    assert len(request.prompt.split()) > 1200
    assert "Question:" in request.prompt.splitlines()[-1]


@pytest.mark.parametrize("key", ["prompt_file", "messages_file", "prompts_file"])
@pytest.mark.parametrize(
    ("content", "complaint"), [(None, "does not exist"), (b" \n", "is empty"), (b"caf\xe9", "is not UTF-8")]
)
def test_an_unusable_file_is_refused_with_its_path(tmp_path, key, content, complaint):
    path = str(tmp_path / "missing") if content is None else write(tmp_path, content)
    with pytest.raises(UserError, match=complaint) as error:
        read_requests(config_with(**{key: path}))
    assert f"{key}={path}" in str(error.value)


def test_a_directory_is_refused_as_a_prompt_file(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        read_requests(config_with(prompt_file=str(tmp_path)))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '"text"',
        '[{"role": "user"}]',
        '[{"role": "bot", "content": "a"}]',
        '[{"role": "user", "content": 1}]',
    ],
)
def test_a_malformed_conversation_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"^messages_file="):
        read_requests(config_with(messages_file=write(tmp_path, content)))


@pytest.mark.parametrize(
    "row", ["{", "[]", "{}", '{"prompt": " "}', '{"prompt": 1}', '{"prompt": "a", "messages": []}']
)
def test_a_malformed_row_is_refused_with_its_line(tmp_path, row):
    path = write(tmp_path, '{"prompt": "fine"}\n' + row)
    with pytest.raises(UserError, match="line 2"):
        read_requests(config_with(prompts_file=path))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("task=throughput task.num_prompts=abc", r"task.num_prompts=abc is not a whole number; give .*, or null\."),
        ("task=throughput task.text_file=3", r"task.text_file=3 is not text; give text in quotes, or null\."),
        ("task=fidelity task.kv_budgets=[0.1,abc]", r"task.kv_budgets=\[0.1, 'abc'\]: abc is not a number; give a"),
        ("task=fidelity task.policies=[1]", r"task.policies=\[1\]: 1 is not text; give text in quotes\."),
        ("task=fidelity task.policies=snapkv", r"task.policies=snapkv is not a list; write \[snapkv\]\."),
        ("task=calibrate task.mixtures=[a]", r"task.mixtures=\['a'\]: a is not a whole number"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_one_it_takes(override, sentence):
    with pytest.raises(UserError, match=sentence):
        compose_run(*override.split())


def test_optional_values_and_whole_numbers_for_fractions_are_taken():
    _, task = compose_run("task=throughput", "task.num_prompts=null")
    assert task.num_prompts is None
    _, task = compose_run("task=fidelity", "task.kv_budgets=[1,0.5]")
    assert task.kv_budgets == [1, 0.5]
