"""A distilled draft: losses, exact resume, what is saved, and the target's own answers."""

import dataclasses

import pytest
import torch
from conftest import tiny_model
from safetensors import safe_open

from specsmallkv.distill import Settings, Trainer, agreement, build_draft, export, own_parameters, train
from specsmallkv.distill_loss import (
    LogitDivergence,
    RowRecorder,
    attention_divergence,
    attention_recall,
    initial_mixture,
)
from specsmallkv.distill_text import TokenStream, sample_batch, sample_tokens
from specsmallkv.errors import UserError

SETTINGS = Settings(layers=[0, 2], tokens=6 * 64, seq_len=16, batch_size=4, checkpoint_minutes=0.0, seed=3)
ARCHITECTURES = ("llama", "qwen2", "qwen3")


def streams() -> list[TokenStream]:
    ids = torch.randint(0, 96, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    return [TokenStream([ids], aligned=False), TokenStream([ids[:40], ids[60:90]], aligned=True)]


def trainer(architecture: str = "llama", **changes) -> Trainer:
    return Trainer(tiny_model(architecture, seed=1), streams(), dataclasses.replace(SETTINGS, **changes))


def run(a_trainer: Trainer, steps: int) -> Trainer:
    for _ in range(steps):
        a_trainer.train_step()
    return a_trainer


def assert_equal_state(left: Trainer, right: Trainer) -> None:
    assert left.step == right.step
    for name, parameter in left.parameters.items():
        assert torch.equal(parameter, right.parameters[name]), name


def test_killed_and_resumed_training_ends_with_the_same_weights(tmp_path):
    straight = run(trainer(), 6)
    run(trainer(), 3).save(tmp_path / "checkpoint.safetensors")
    resumed = trainer()
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert_equal_state(straight, run(resumed, 3))


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
    with pytest.raises(UserError, match="other settings"):
        trainer(lr=1e-4).load(tmp_path / "checkpoint.safetensors")


def test_training_to_the_end_checkpoints_and_reports_every_step(tmp_path):
    seen, checkpoints = [], []
    train(trainer(), tmp_path, lambda step, losses: seen.append(step), lambda: checkpoints.append(1))
    assert seen == list(range(1, 7)) and checkpoints
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 6


def test_training_brings_both_losses_down():
    a_trainer = trainer(tokens=80 * 64, lr=3e-3)
    ids, positions = streams()[0].ids[:64].long().view(4, 16), torch.arange(4, 15)
    before = {name: value.item() for name, value in a_trainer.losses(ids, positions).items()}
    run(a_trainer, 80)
    after = {name: value.item() for name, value in a_trainer.losses(ids, positions).items()}
    assert after["kl"] < 0.7 * before["kl"] and after["attention"] < 0.9 * before["attention"]


def test_a_higher_attention_weight_gives_a_better_oracle():
    ids, positions = streams()[0].ids[:64].long().view(4, 16), torch.arange(4, 15)
    results = []
    for weight in (1e-6, 5.0):
        a_trainer = run(trainer(tokens=60 * 64, lr=3e-3, attention_loss_weight=weight), 60)
        results.append(a_trainer.losses(ids, positions)["attention"].item())
    assert results[1] < results[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_draft_of_all_layers_is_the_target(architecture):
    target = tiny_model(architecture, seed=1)
    assert agreement(target, build_draft(target, [0, 1, 2]), torch.arange(32).view(2, 16)) == 1.0


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


def test_chunked_divergence_equals_the_plain_one(monkeypatch):
    monkeypatch.setattr("specsmallkv.distill_loss.CHUNK", 3)
    torch.manual_seed(0)
    hidden, target_hidden, head = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5), torch.randn(11, 5)
    kl, same = LogitDivergence.apply(hidden, target_hidden, head)
    kl.backward()
    copied = hidden.detach().clone().requires_grad_()
    drafted, wanted = (copied @ head.T).log_softmax(-1), (target_hidden @ head.T).log_softmax(-1)
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


def test_conversations_start_at_their_beginning_and_batches_follow_the_seed():
    a_trainer, aligned = trainer(), streams()[1]
    firsts = {int(aligned.sequence(5, torch.Generator().manual_seed(i))[0]) for i in range(20)}
    assert firsts <= {int(aligned.ids[0]), int(aligned.ids[40])}
    first, again = (a_trainer.batch(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (4, 16)
    a_trainer.step = 3
    assert a_trainer.batch(torch.Generator().manual_seed(7)).shape == (1, 64)


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
