"""A distilled draft: losses, exact resume, what is saved, and the target's own answers."""

import dataclasses
import json
import os
from signal import SIGINT
from xml.etree import ElementTree

import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open

from specsmallkv import load_policy
from specsmallkv.decode import Decoder
from specsmallkv.distill import Trainer, export, own_parameters, train
from specsmallkv.distill_build import build_draft, busiest_layers, even_layers
from specsmallkv.distill_curriculum import Curriculum, Settings
from specsmallkv.distill_data import Lessons, cut_conversations, cut_text
from specsmallkv.distill_loss import (
    NAME,
    LogitDivergence,
    RowRecorder,
    attention_divergence,
    attention_recall,
    initial_mixture,
)
from specsmallkv.distill_report import agreed_tokens, agreement, attention_recalls, curve_svg, speculate
from specsmallkv.distill_text import sample_batch, sample_tokens
from specsmallkv.errors import UserError
from specsmallkv.tasks.distill import read_curve

SETTINGS = Settings(
    layers=[0, 2], tokens=6 * 64, batch_size=4, long_every=4, checkpoint_minutes=0.0, average=0.9, seed=3
)
ARCHITECTURES = ("llama", "qwen2", "qwen3")
HEAD = torch.arange(0, 96, 2)  # token ids of a trimmed head


def token_ids(count: int = 500) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def curriculum(target, settings: Settings, directory=None) -> Curriculum:
    ids = token_ids()
    talks = [ids[i : i + 11] for i in range(0, 200, 11)]
    cut = (cut_text(ids, 16, 9), cut_conversations(talks, 16), cut_text(ids, 64, 3))
    text, answers, long = (Lessons(part, target, directory, settings.attention_loss_weight > 0) for part in cut)
    return Curriculum(text, answers, long, settings)


def trainer(architecture: str = "llama", directory=None, head=None, device="cpu", **changes) -> Trainer:
    settings, target = dataclasses.replace(SETTINGS, **changes), tiny_model(architecture, seed=1).to(device)
    draft = build_draft(target, settings.layers, head)
    return Trainer(target, draft, curriculum(target, settings, directory), settings)


def measured(a_trainer: Trainer) -> dict[str, float]:
    lessons = a_trainer.curriculum.text
    ids, wanted = lessons.read([0, 1, 2])
    return {name: value.item() for name, value in a_trainer.losses(ids, lessons.positions, wanted).items()}


def run(a_trainer: Trainer, steps: int) -> Trainer:
    for _ in range(steps):
        a_trainer.train_step()
    return a_trainer


def assert_equal_state(left: Trainer, right: Trainer) -> None:
    assert left.step == right.step
    for name, parameter in left.parameters.items():
        assert torch.equal(parameter, right.parameters[name]), name
    for name, mean in left.averages.items():
        assert torch.equal(mean, right.averages[name]), name


@pytest.mark.parametrize(("kept", "steps"), [(False, 3), (True, 1), (True, 3), (True, 5)])
def test_killed_and_resumed_training_ends_with_the_same_weights(tmp_path, kept, steps):
    straight = run(trainer(directory=tmp_path / "straight" if kept else None, head=HEAD), 6)
    killed = tmp_path / "killed" if kept else None
    run(trainer(directory=killed, head=HEAD), steps).save(tmp_path / "checkpoint.safetensors")
    resumed = trainer(directory=killed, head=HEAD)
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert_equal_state(straight, run(resumed, 6 - steps))


def test_ctrl_c_waits_for_the_step_and_its_checkpoint_goes_on(tmp_path):
    stopped = trainer(checkpoint_minutes=60.0)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path, lambda step, _: os.kill(os.getpid(), SIGINT) if step == 2 else None, lambda: None)
    resumed = trainer()
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert resumed.step == stopped.step == 2
    assert_equal_state(run(trainer(), 6), run(resumed, 4))


@pytest.mark.gpu
def test_training_on_a_gpu_does_what_training_on_a_cpu_does():
    losses = [measured(run(trainer(device=device, head=HEAD), 6)) for device in ("cpu", "cuda")]
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=0.05), name


def test_what_the_target_said_is_read_from_disk_and_not_computed_again(tmp_path, monkeypatch):
    first = run(trainer(directory=tmp_path), 6)
    again = trainer(directory=tmp_path)
    monkeypatch.setattr(Lessons, "_ask", lambda *_: pytest.fail("the target was asked again"))
    assert_equal_state(first, run(again, 6))


def test_the_same_tokens_cut_otherwise_are_other_lessons(tmp_path):
    target, ids = tiny_model("llama", seed=1), torch.tensor(token_ids(64), dtype=torch.int32)
    target.set_attn_implementation(NAME)
    short, long = (Lessons(ids.view(-1, length), target, tmp_path, True) for length in (16, 64))
    assert short.digest != long.digest
    short.read([0, 1, 2, 3])
    assert torch.equal(long.read([0])[1]["hidden"], Lessons(ids[None], target, None, True).read([0])[1]["hidden"])


def test_what_was_kept_without_rows_is_not_taken_for_rows(tmp_path):
    run(trainer(directory=tmp_path, attention_loss_weight=0.0), 6)
    assert_equal_state(run(trainer(directory=tmp_path), 6), run(trainer(), 6))


def test_gradient_checkpointing_changes_no_weight():
    assert_equal_state(run(trainer(), 4), run(trainer(gradient_checkpointing=True), 4))


def test_every_sequence_is_read_before_any_comes_again_and_shares_are_kept():
    a_trainer = trainer(answers_share=0.25)
    lessons = a_trainer.curriculum
    short = [group for step in range(16) if step % 4 != 3 for group in lessons.lesson(step)]
    plain = [i for kind, picks in short if kind is lessons.text for i in picks]
    assert sorted(plain[:9]) == sorted(plain[9:18]) == list(range(9))
    assert plain[:9] != plain[9:18], "each reading has an order of its own"
    assert sum(len(picks) for kind, picks in short if kind is lessons.answers) == 12
    assert [len(ids) for ids in (lessons.read(step)[0] for step in (0, 3))] == [4, 1]
    assert lessons.tokens(4) == 4 * 64


def test_conversations_are_cut_where_they_begin():
    talks = [[1, 0, 0], [2, 0, 0, 0], [3, 0], [4, 0, 0, 0, 0, 0, 0]]
    assert cut_conversations(talks, 5).tolist() == [[1, 0, 0, 2, 0], [2, 0, 0, 0, 3], [3, 0, 4, 0, 0], [4, 0, 0, 0, 0]]
    assert cut_conversations(talks, 50).shape == (0, 50)


def test_text_is_cut_evenly_over_its_length():
    assert cut_text(list(range(100)), 10, 4).tolist()[0][0] == 0 and cut_text(list(range(100)), 10, 4)[-1, 0] == 90
    assert cut_text(list(range(5)), 10, 4).shape == (0, 10)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    first = run(trainer(), 1)
    first.save(tmp_path / "checkpoint.safetensors")

    def killed(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr("specsmallkv.distill.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run(trainer(), 2).save(tmp_path / "checkpoint.safetensors")
    resumed = trainer()
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert_equal_state(first, resumed)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run(trainer(), 1).save(tmp_path / "checkpoint.safetensors")
    for changes, told in (({"lr": 1e-4}, "lr"), ({"head": HEAD}, "head_tokens"), ({"seed": 4, "lr": 1.0}, "lr, seed")):
        with pytest.raises(UserError, match=rf"belongs to other settings \({told}\); .* task.start_from={tmp_path}"):
            trainer(**changes).load(tmp_path / "checkpoint.safetensors")
    other = trainer()
    other.target = other.target.double()
    with pytest.raises(UserError, match=r"other settings \(dtype\)"):
        other.load(tmp_path / "checkpoint.safetensors")


def test_a_targets_dropout_is_not_trained_with():
    target = tiny_model(seed=1)
    for layer in target.model.layers:
        layer.self_attn.attention_dropout = 0.5
    losses = []
    for _ in range(2):
        draft = build_draft(target, SETTINGS.layers)
        losses.append(run(Trainer(target, draft, curriculum(target, SETTINGS), SETTINGS), 2).mixture.detach().clone())
    assert torch.equal(*losses)


def test_answers_alone_can_be_trained_on():
    target, ids = tiny_model(seed=1), token_ids()
    talks = Lessons(cut_conversations([ids[i : i + 11] for i in range(0, 200, 11)], 16), target, None, True)
    alone = Curriculum(None, talks, None, SETTINGS)
    a_trainer = run(Trainer(target, build_draft(target, SETTINGS.layers), alone, SETTINGS), 3)
    assert [(kind is talks, len(picks)) for kind, picks in alone.lesson(0)] == [(True, SETTINGS.batch_size)]
    assert a_trainer.tokens == 3 * 64 and list(alone.readings) == ["answers"]


def test_how_often_each_kind_is_read_adds_up_to_what_the_steps_read():
    lessons = trainer(answers_share=0.25).curriculum
    read = {"text": 0, "answers": 0, "long": 0}
    kinds = {id(getattr(lessons, kind)): kind for kind in read}
    for step in range(lessons.steps):
        for kind, picks in lessons.lesson(step):
            read[kinds[id(kind)]] += len(picks)
    told = {kind: round(times * len(part.ids)) for kind, (part, times) in lessons.readings.items()}
    assert told == read and sum(read.values()) == 5 * 4 + 1


def test_a_checkpoint_that_started_from_another_draft_is_refused(tmp_path):
    """Else a finished run would answer for a start that it never had."""
    export(run(trainer(), 1), tmp_path / "other", {"shares_embeddings": True})
    run(trainer(), 1).save(tmp_path / "checkpoint.safetensors")
    again = trainer()
    again.start_from(str(tmp_path / "other"))
    with pytest.raises(UserError, match="other settings"):
        again.load(tmp_path / "checkpoint.safetensors")


def test_a_checkpoint_of_another_target_is_refused(tmp_path):
    run(trainer(), 1).save(tmp_path / "checkpoint.safetensors")
    other = trainer()
    other.target = tiny_model("llama", seed=2)
    with pytest.raises(UserError, match="other settings"):
        other.load(tmp_path / "checkpoint.safetensors")


def test_a_run_from_the_start_has_a_curve_of_its_own(tmp_path):
    for _ in range(2):
        train(trainer(), tmp_path, lambda step, losses: None, lambda: None)
    steps = [json.loads(line)["step"] for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert steps == list(range(1, trainer().steps + 1))


def test_a_line_of_the_curve_that_was_cut_spoils_no_other(tmp_path):
    first = trainer()
    train(first, tmp_path, lambda step, losses: None, lambda: None)
    path = tmp_path / "curve.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3])[:-9])
    resumed = trainer()
    resumed.load(tmp_path / "checkpoint.safetensors")
    resumed.step = 2
    train(resumed, tmp_path, lambda step, losses: None, lambda: None)
    assert [point["step"] for point in read_curve(path)] == [1, 2, 3, 4, 5, 6]


def test_training_to_the_end_checkpoints_and_reports_every_step(tmp_path):
    seen, checkpoints = [], []
    train(trainer(), tmp_path, lambda step, losses: seen.append(step), lambda: checkpoints.append(1))
    assert seen == list(range(1, 7)) and checkpoints
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("head", [None, HEAD])
def test_training_brings_both_losses_down(head):
    a_trainer = trainer(tokens=80 * 64, lr=3e-3, head=head)
    before = measured(a_trainer)
    run(a_trainer, 80)
    after = measured(a_trainer)
    assert after["kl"] < 0.7 * before["kl"] and after["attention"] < 0.9 * before["attention"]


def test_a_higher_attention_weight_gives_a_better_oracle():
    results = [
        measured(run(trainer(tokens=60 * 64, lr=3e-3, attention_loss_weight=weight), 60))["attention"]
        for weight in (1e-6, 5.0)
    ]
    assert results[1] < results[0]


def test_the_mean_follows_the_weights_the_closer_the_younger_it_is():
    start, moved = own_parameters(trainer().draft), run(trainer(), 1)
    for name, mean in moved.averages.items():
        torch.testing.assert_close(mean, start[name].detach().lerp(moved.parameters[name].detach(), 0.9))


def test_the_mean_of_the_weights_is_what_is_exported(tmp_path):
    a_trainer = run(trainer(head=HEAD), 5)
    export(a_trainer, tmp_path, {"shares_embeddings": True})
    later = trainer(head=HEAD)
    later.start_from(str(tmp_path))
    for name, mean in a_trainer.averages.items():
        assert torch.equal(later.parameters[name], mean.bfloat16().float())
        assert not torch.equal(mean, a_trainer.parameters[name])
    with pytest.raises(UserError, match="other layers"):
        trainer(layers=[0]).start_from(str(tmp_path))
    facts = {"specsmallkv_draft": {"target_layers": [0, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"other layers than \[0, 2\], .* set task.layers=\[0, 1\]"):
        trainer().start_from(str(tmp_path))


def test_a_later_run_goes_on_from_the_mean_and_the_mixture_of_an_earlier_one(tmp_path):
    earlier = run(trainer(), 5)
    earlier.save(tmp_path / "checkpoint.safetensors")
    later = trainer(lr=1e-4, head=HEAD)
    later.start_from(str(tmp_path))
    assert later.step == 0 and torch.equal(later.mixture, earlier.mixture)
    for name, mean in earlier.averages.items():
        assert torch.equal(later.parameters[name], mean) and torch.equal(later.averages[name], mean)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_draft_of_all_layers_is_the_target(architecture):
    target = tiny_model(architecture, seed=1)
    assert agreement(target, build_draft(target, [0, 1, 2]), torch.arange(32).view(2, 16)) == 1.0


def test_a_draft_agrees_with_the_answers_that_it_would_have_written():
    target, prompts = tiny_model(seed=1), [[5, 6, 7], [8, 9]]
    answers = sample_batch(target, prompts, [0.0, 0.0], 6, {95}, torch.Generator())
    assert all(map(all, agreed_tokens(target, prompts, answers)))
    changed = [[(token + 1) % 96 for token in answer] for answer in answers]
    assert sum(map(sum, agreed_tokens(target, prompts, changed))) < 0.5 * 12


@pytest.mark.parametrize("num_draft_tokens", [1, 3])
def test_speculation_along_an_answer_is_what_the_loop_does(num_draft_tokens):
    target, prompt, limit = tiny_model(seed=1), [5, 6, 7], 40
    draft = build_draft(target, [0, 2])
    (answer,) = sample_batch(target, [prompt], [0.0], limit, {95}, torch.Generator())
    (agreed,) = agreed_tokens(draft, [prompt], [answer])
    decoder = Decoder(target, draft, load_policy("full"), num_draft_tokens)
    *_, (_, sequence) = decoder.generate(prompt, limit)
    counters = sequence.counters
    assert 0.1 < sum(agreed) / len(agreed) < 0.9 and sequence.tokens[3:] == answer, "else nothing is told"
    expected = (counters.drafted, counters.accepted, counters.rounds, limit - 1)
    assert speculate(agreed, num_draft_tokens, limit) == expected


def test_a_draft_of_all_layers_looks_where_its_target_looks_and_any_other_less_well():
    target, ids = tiny_model(seed=1), torch.arange(96).view(2, 48)
    recalls = []
    for layers in ([0, 1, 2], [0]):
        draft = build_draft(target, layers)
        for model in (target, draft):
            model.set_attn_implementation(NAME)
        recalls.append(attention_recalls(target, draft, initial_mixture(layers, 3, 4, bias=50.0), ids))
    assert recalls[0][0] == pytest.approx(recalls[0][1]) and recalls[1][0] < recalls[1][1] == recalls[0][1]


def test_layers_are_spread_evenly_over_any_target():
    assert even_layers(30, 6) == [0, 1, 8, 15, 22, 29], "the shipped draft's"
    assert even_layers(28, 6)[-1] == 27 and even_layers(4, 4) == [0, 1, 2, 3]
    assert even_layers(30, 1) == [0] and even_layers(30, 2) == [0, 29]


def test_a_layer_that_does_nothing_is_not_among_the_busiest():
    target = tiny_model(seed=1)
    for projection in (target.model.layers[1].self_attn.o_proj, target.model.layers[1].mlp.down_proj):
        torch.nn.init.zeros_(projection.weight)
    assert busiest_layers(target, 2, torch.arange(30)[None]) == [0, 2]
    assert not any(layer._forward_hooks for layer in target.model.layers)


def test_the_picture_of_the_curve_is_well_formed():
    svg = curve_svg([64 * step for step in range(1, 200)], [step / 400 for step in range(1, 200)])
    points = ElementTree.fromstring(svg).findall("{*}polyline")[1].get("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 50 and heights == sorted(heights, reverse=True)
    assert "12,736 tokens" in svg


def test_the_target_is_never_trained_and_never_saved(tmp_path):
    a_trainer = trainer()
    before = {name: value.clone() for name, value in a_trainer.target.state_dict().items()}
    run(a_trainer, 3)
    assert all(torch.equal(before[name], value) for name, value in a_trainer.target.state_dict().items())
    export(a_trainer, tmp_path, {"shares_embeddings": True})
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names == set(own_parameters(a_trainer.draft))
    assert not any("embed_tokens" in name or "lm_head" in name for name in names)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_chunked_divergence_equals_the_plain_one(monkeypatch, temperature):
    monkeypatch.setattr("specsmallkv.distill_loss.CHUNK", 3)
    torch.manual_seed(0)
    hidden, target_hidden, head = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5), torch.randn(11, 5)
    kl, same = LogitDivergence.apply(hidden, target_hidden, head, temperature)
    kl.backward()
    copied = hidden.detach().clone().requires_grad_()
    drafted, wanted = ((states @ head.T / temperature).log_softmax(-1) for states in (copied, target_hidden))
    plain = (wanted.exp() * (wanted - drafted)).sum(-1).mean()
    plain.backward()
    assert torch.allclose(kl, plain) and torch.allclose(hidden.grad, copied.grad, atol=1e-6)
    assert same.item() == (drafted.argmax(-1) == wanted.argmax(-1)).float().mean().item()


def test_recorded_rows_are_the_models_own_attention():
    model = tiny_model(seed=1)
    positions, ids = torch.tensor([3, 9]), torch.arange(12)[None]
    model.set_attn_implementation("eager")
    expected = torch.cat(model(ids, output_attentions=True).attentions, dim=1)[:, :, positions]
    model.set_attn_implementation("specsmallkv_distill")
    recorder = RowRecorder(positions)
    model(ids, row_recorder=recorder)
    assert torch.allclose(recorder.rows(), expected, atol=1e-5)


def test_a_perfect_mixture_has_no_divergence_and_the_sink_does_not_count():
    rows = torch.rand(2, 4, 3, 10).softmax(-1)
    one_hot = 50.0 * torch.eye(4)
    assert attention_divergence(one_hot, rows, rows).item() == pytest.approx(0, abs=1e-5)
    sunk = torch.cat([rows[..., :1] + 5, rows[..., 1:]], dim=-1)
    sunk = sunk / sunk.sum(-1, keepdim=True)
    assert attention_divergence(one_hot, sunk, rows).item() == pytest.approx(0, abs=1e-5)
    assert attention_recall(rows, rows, 1.0) == pytest.approx(1.0)
    assert attention_recall(rows, rows, 0.3) > attention_recall(-rows + rows.max(), rows, 0.3)


def test_a_copied_layer_starts_by_predicting_its_own_heads():
    mixture = initial_mixture([0, 2], num_target_layers=3, num_heads=4)
    assert mixture.shape == (12, 8)
    assert mixture.argmax(-1)[[0, 3, 8, 11]].tolist() == [0, 3, 4, 7]


def test_sampled_tokens_follow_the_softmax():
    logits, draws = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)), 60_000
    tokens = sample_tokens(logits.expand(draws, -1), torch.full((draws,), 0.8), torch.Generator().manual_seed(0))
    frequency = torch.bincount(tokens, minlength=300) / draws
    assert (frequency - (logits[0] / 0.8).softmax(-1)).abs().sum() / 2 < 0.04
    assert len(frequency) == 300


def test_a_batch_of_greedy_answers_equals_each_one_alone():
    target = tiny_model(seed=1)
    prompts, eos = [[5, 6, 7], [8, 9, 10, 11, 12], [13]], {int(i) for i in range(40, 70)}
    generator = torch.Generator().manual_seed(0)
    together = sample_batch(target, prompts, [0.0] * 3, 12, eos, generator)
    alone = [sample_batch(target, [p], [0.0], 12, eos, generator)[0] for p in prompts]
    assert together == alone
    assert all(token not in eos for answer in together for token in answer[:-1])
