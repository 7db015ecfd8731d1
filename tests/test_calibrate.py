"""task=calibrate and saved head maps: fitted on some texts, judged on others, refused for other models."""

import math
import os

import pytest
import torch
from conftest import run_task
from safetensors.torch import save_file

from specsmallkv import SpecSmallKV
from specsmallkv.display import Display
from specsmallkv.errors import UserError
from specsmallkv.matching import HeadMap, HeadMapFit
from specsmallkv.metrics import mass_caught
from specsmallkv.presets import load_policy
from specsmallkv.saved_map import load_head_map, save_head_map
from specsmallkv.tasks.calibrate import Fold, mixture_of, quality

TARGET = "random:llama?layers=2&hidden=64&heads=4&kv_heads=2&vocab=320&context=32768&seed=0"
DRAFT = "random:llama?layers=2&hidden=32&heads=4&kv_heads=2&vocab=320&context=32768&seed=1"
SETTINGS = ["+model=tiny-random", f'model.draft="{DRAFT}"', "quiet=true"]
SMALL = ["task.context_tokens=160", "task.window_size=32", "task.num_windows=2"]
POLICY = {"kv_budget": 0.3, "window_size": 8, "evict_block": 16}
M = 8


def run(*overrides):
    """The record of a task on the tiny random pair."""
    return run_task(*SETTINGS, *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, step in (("a.txt", 7), ("b.txt", 11), ("c.txt", 5)):
        (folder / name).write_text("".join(chr(97 + (step * i * i + i // 5) % 26) for i in range(600)))
    return folder


@pytest.fixture(scope="module")
def record(folder):
    files = ",".join(f"{folder}/{name}.txt" for name in "abc")
    return run("task=calibrate", *SMALL, f"task.text_files=[{files}]", f"task.output={folder}/map.safetensors")


def spec(folder=None, name="specsmallkv", map_rows=128, **options):
    policy = load_policy(name, **POLICY, map_rows=map_rows)
    head_map = None if folder is None else str(folder / "map.safetensors")
    options = {"draft": DRAFT, "dtype": "float32", "head_map": head_map} | options
    return SpecSmallKV.from_pretrained(TARGET, policy=policy, **options)


def head_map_of(generator, prompt):
    return generator.generate(prompt, max_new_tokens=20).sequence.evidence.oracle.head_map


def random_rows(heads, seed, rows=8, length=40):
    return (4 * torch.randn(heads, rows, length, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def test_the_file_holds_the_best_measured_mixture_and_says_what_it_was_made_of(record, folder):
    saved = load_head_map(record["output"])
    chosen = max(record["results"], key=lambda row: row["cosine"])
    assert [row["chosen"] for row in record["results"]] == [row is chosen for row in record["results"]]
    assert int((saved.head_map.weights > 0).sum(-1).max()) <= chosen["num_draft_heads"]
    assert float(saved.head_map.similarity.mean()) == pytest.approx(chosen["cosine"], abs=1e-3)
    assert [text["name"] for text in saved.facts["texts"]] == ["a.txt", "b.txt", "c.txt"]
    assert saved.facts["num_rows"] == record["num_rows"] == 3 * 2 * 32
    assert saved.facts["results"] == record["results"]
    pair = spec().pair
    assert saved.head_map.weights.shape == (2, 4, pair.draft.config.num_hidden_layers * 4)
    for row in record["results"]:
        assert 0 < row["mass_at_0.05"] <= row["mass_at_0.05_oracle"] < row["mass_at_0.1_oracle"] <= 1


def test_means_lie_in_their_intervals_over_heads(record):
    measured = [*record["results"], *record["controls"], *record["sparsity"]]
    for row in measured:
        keys = [key.removesuffix("_interval") for key in row if key.endswith("_interval")]
        assert {"cosine", "mass_at_0.1", "mass_at_0.1_oracle"} <= set(keys) or keys == ["mass"]
        assert all(row[f"{key}_interval"][0] < row[key] < row[f"{key}_interval"][1] for key in keys)
    for row in measured[: -len(record["sparsity"])]:
        per_layer = zip(row["cosine_per_layer"], row["cosine_interval_per_layer"], strict=True)
        assert all(low <= mean <= high for mean, (low, high) in per_layer)


def test_controls_know_less_than_the_best_single_head_and_mass_grows_with_the_share_of_tokens(record):
    (control,) = record["controls"]
    assert control["control"] == "random_heads" and control["cosine"] < record["results"][0]["cosine"]
    for row, cosine in ((control, control["cosine"]), (record, max(r["cosine"] for r in record["results"]))):
        cosines = torch.tensor(row["cosine_per_head"])
        assert cosines.shape == (2, 4) and float(cosines.mean()) == pytest.approx(cosine, abs=1e-3)
    masses = [row["mass"] for row in record["sparsity"]]
    assert masses == sorted(masses) and 0 < masses[0] < masses[-1] <= 1
    assert all(len(row["mass_per_layer"]) == 2 for row in record["sparsity"])
    at_a_tenth = next(row["mass"] for row in record["sparsity"] if row["share"] == 0.1)
    assert at_a_tenth == pytest.approx(record["results"][0]["mass_at_0.1_oracle"], abs=0.02)


def test_an_untrained_draft_is_another_one_of_the_same_shape(record, folder):
    options = ["task=calibrate", *SMALL, f"task.text_files=[{folder}/a.txt,{folder}/b.txt]", "task.untrained=true"]
    found = run(*options, f"task.output={folder}/untrained.safetensors")
    assert found["draft_weights"] == "random weights" and found["target_fingerprint"] == record["target_fingerprint"]
    assert found["draft_fingerprint"] != record["draft_fingerprint"]


def test_one_text_is_judged_window_by_window(folder):
    figures = run("task=calibrate", *SMALL, f"task.text_file={folder}/a.txt", f"task.output={folder}/one.safetensors")
    assert figures["num_rows"] == 64 and all(math.isfinite(row["cosine"]) for row in figures["results"])


def test_figures_are_of_what_was_left_out():
    """Two texts in which the target's heads follow different draft heads: each predicts itself, not the other."""
    folds, order = [Fold(HeadMapFit(4, 1)) for _ in range(2)], torch.arange(M)
    for seed, fold in enumerate(folds):
        draft = random_rows(M, seed)
        fold.add(draft, iter([draft[order.roll(seed)]]))
    figures, similarity = quality(folds, mixture_of(1))
    assert similarity.max() < 0.5 and figures["cosine"] < 0.3
    assert figures["mass_at_0.1"] < 0.7 * figures["mass_at_0.1_oracle"]
    same, _ = quality([folds[0], Fold(folds[0].fit, folds[0].samples)], mixture_of(1))
    assert same["cosine"] == pytest.approx(1, abs=1e-3)
    assert same["mass_at_0.1"] == pytest.approx(same["mass_at_0.1_oracle"], abs=1e-3)


def test_nobody_catches_more_mass_than_the_true_ranks_and_all_tokens_catch_all():
    true, other = random_rows(3, 0), random_rows(3, 1)
    best = mass_caught(true, true, 0.1)
    assert (mass_caught(other, true, 0.1) <= best).all() and (best > 0.3).all() and (best < 1).all()
    torch.testing.assert_close(mass_caught(other, true, 1.0), torch.ones(3, 8))


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_table_has_a_line_for_each_mixture_and_no_lists(record, capsys):
    Display().calibration(record["results"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 + len(record["results"]) and not any("[" in line for line in lines)


def test_a_map_comes_back_from_a_small_file_as_it_went_in(tmp_path):
    weights = torch.zeros(28, 12, 336)
    index = torch.rand(28, 12, 336).topk(16).indices
    weights.scatter_(-1, index, torch.rand(28, 12, 16) + 0.1)
    head_map = HeadMap(weights / weights.sum(-1, keepdim=True), torch.rand(28, 12))
    save_head_map(tmp_path / "map.safetensors", head_map, {"target_fingerprint": "t"})
    saved = load_head_map(str(tmp_path / "map.safetensors"))
    assert (tmp_path / "map.safetensors").stat().st_size < 50_000
    assert [path.name for path in tmp_path.iterdir()] == ["map.safetensors"]
    assert (tmp_path / "map.safetensors").stat().st_mode & 0o077 == 0o066 & ~umask()  # others may read it as any file
    assert saved.facts == {"target_fingerprint": "t"}
    torch.testing.assert_close(saved.head_map.weights, head_map.weights, atol=1e-3, rtol=0)
    torch.testing.assert_close(saved.head_map.weights.sum(-1), torch.ones(28, 12))
    torch.testing.assert_close(saved.head_map.similarity, head_map.similarity, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["specsmallkv", "smallkv"])
def test_a_saved_map_alone_serves_prompts_of_any_length(record, folder, name):
    saved, alone = load_head_map(record["output"]).head_map, spec(folder, name, map_rows=math.inf)
    for length in (11, 200):  # the first evicts nothing at first and leaves no window
        head_map = head_map_of(alone, list(range(1, length)))
        torch.testing.assert_close(head_map.weights, saved.weights)
        torch.testing.assert_close(head_map.similarity, saved.similarity)


def test_beside_the_window_a_saved_map_counts_as_rows(record, folder):
    saved = load_head_map(record["output"]).head_map
    own, both = (head_map_of(spec(f), list(range(1, 200))) for f in (None, folder))
    torch.testing.assert_close(both.weights, (own.weights + saved.weights) / 2)
    unused = head_map_of(spec(folder, map_rows=0), list(range(1, 200)))
    assert torch.equal(unused.weights, own.weights) and torch.equal(unused.similarity, own.similarity)


def test_trials_of_one_run_trust_the_map_each_as_its_policy_says(record, folder):
    options = ["task=fidelity", "task.context_tokens=160", "task.eval_tokens=24", "task.kv_budgets=[0.3]"]
    options += [f"task.text_file={folder}/a.txt", f"model.head_map={folder}/map.safetensors"]
    prompt, saved = "specsmallkv:map_rows=0", "specsmallkv:map_rows=.inf"
    rows = run(*options, f"task.policies=['{prompt}','{saved}']")["results"]
    together = {row["policy"]: row["kl_mean"] for row in rows}
    without = run(*options[:-1], "task.policies=[specsmallkv]")["results"][0]["kl_mean"]
    alone = run(*options, f"task.policies=['{saved}']")["results"][0]["kl_mean"]
    assert together[prompt] == pytest.approx(without, rel=1e-4)
    assert together[saved] == pytest.approx(alone, rel=1e-4)
    assert alone != pytest.approx(without, rel=1e-3)


def test_a_map_of_other_weights_is_refused_unless_the_user_insists(record, folder):
    other = DRAFT.replace("seed=1", "seed=2")
    with pytest.raises(UserError, match=r"made for another draft \(fingerprint .*head_map_check=false"):
        spec(folder, draft=other)
    assert spec(folder, draft=other, head_map_check=False).pair.head_map is not None
    with pytest.raises(UserError, match=r"maps 2 x 4 target heads to 8 .* have 2 x 4 target heads to 4 draft heads"):
        spec(folder, draft=DRAFT.replace("layers=2", "layers=1"), head_map_check=False)


def test_what_is_no_head_map_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "text").write_text("no map")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    for name, reason in (("none", "is no file"), ("text", "cannot be read"), ("other", "is not a head map")):
        with pytest.raises(UserError, match=f"{reason}.*task=calibrate"):
            load_head_map(str(tmp_path / name))
    with pytest.raises(UserError, match="is no file"):
        load_head_map("package:maps/none.safetensors")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ([], "task=calibrate needs a text"),
        (["task.text_file={0}/a.txt", "task.num_windows=1"], "leaves nothing to measure"),
        (["task.text_file={0}/a.txt", "task.num_windows=6"], "are more than task.context_tokens=160"),
        (["task.text_file={0}/a.txt", "task.mixtures=[]"], "names no numbers of draft heads"),
        (["task.text_file={0}/a.txt", "task.context_tokens=1000"], "lower task.context_tokens"),
        (["task.text_file={0}/a.txt", "model.draft=null"], "names no draft"),
    ],
)
def test_settings_that_cannot_serve_are_refused(folder, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        run("task=calibrate", *SMALL, *(x.format(folder) for x in overrides))
