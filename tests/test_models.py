"""Pairs that fit are loaded as they are; everything else is refused in one sentence with its value and a remedy."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from specsmallkv import models, random_model, sources
from specsmallkv.attention_form import layer_windows
from specsmallkv.config import ModelConfig
from specsmallkv.errors import UserError
from specsmallkv.models import ModelPair, load_draft, load_pair, load_target, refuse_cut
from specsmallkv.tokenizer import BYTE_VOCAB_SIZE, byte_tokenizer
from specsmallkv.trimmed_head import IDS_KEY
from specsmallkv.weights import fingerprint

CPU = torch.device("cpu")
TARGET = "random:llama?layers=3&hidden=64&heads=4&kv_heads=2&seed=0"
DRAFT = "random:llama?layers=1&hidden=32&heads=2&kv_heads=1&seed=1"
FAMILIES = ["llama", "qwen2", "qwen3"]
TEXT = "In 2024, naïve café: 1,299€\n\n\t日本語 🙂\r\n"


def pair_config(target=TARGET, draft=DRAFT, dtype="float32", device="cpu") -> ModelConfig:
    return ModelConfig(
        "tiny", str(target), None if draft is None else str(draft), dtype, device, "auto", linear="torch"
    )


def sentence(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    return text


def load(source) -> ModelPair:
    return load_pair(pair_config(source, None), need_draft=False)


def edit_json(path: Path, **values) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


@pytest.fixture
def checkpoint(tmp_path):
    """Write the model of a `random:` source, in bfloat16, as a directory."""

    def write(source: str = TARGET, name: str = "checkpoint", tokenizer=None) -> Path:
        directory = tmp_path / name
        random_model.build(source, torch.bfloat16).save_pretrained(directory)
        (tokenizer or byte_tokenizer()).save_pretrained(directory)
        return directory

    return write


# ---- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_directory_gives_the_saved_model(family, checkpoint):
    source = TARGET.replace("llama", family)
    model, tokenizer, origin = load_target(str(checkpoint(source)), torch.float32, CPU)
    reference = random_model.build(source, torch.bfloat16)
    assert origin == "safetensors" and not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float32 and tokenizer.encode(TEXT) == byte_tokenizer().encode(TEXT)
    state = model.state_dict()
    assert all(torch.equal(state[name], weight.float()) for name, weight in reference.state_dict().items())


def test_pair_of_different_sizes_shares_one_tokenizer():
    pair = load_pair(pair_config(dtype="bfloat16"), need_draft=True)
    assert (pair.target_origin, pair.draft_origin) == ("random weights", "random weights")
    assert pair.target.dtype == pair.draft.dtype == torch.bfloat16
    assert pair.target_weight_bytes == 2 * sum(p.numel() for p in pair.target.parameters())
    assert 0 < pair.draft_weight_bytes < pair.target_weight_bytes


def test_draft_that_is_not_needed_is_not_loaded():
    pair = load_pair(pair_config(draft="does/not-exist"), need_draft=False)
    assert (pair.draft, pair.draft_origin, pair.draft_weight_bytes) == (None, None, 0)


def test_needed_draft_must_be_named():
    assert "model.draft" in sentence(load_pair, pair_config(draft=None), True)


@pytest.mark.parametrize(
    ("in_generation_config", "in_config", "expected"),
    [([5, 7], 3, {5, 7}), (5, 3, {5}), (None, 3, {3}), (None, [3, 4], {3, 4}), (None, None, {258})],
)
def test_eos_ids_come_from_the_generation_config_first(in_generation_config, in_config, expected):
    pair = load(TARGET)
    pair.target.generation_config.eos_token_id = in_generation_config
    pair.target.config.eos_token_id = in_config
    assert pair.eos_token_ids == expected


def test_loading_is_silent_when_quiet(checkpoint, capfd):
    config = pair_config(checkpoint(), None)
    capfd.readouterr()  # what saving has printed
    load_pair(config, need_draft=False, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_draft_larger_than_its_target_is_a_warning():
    with pytest.warns(UserWarning, match=r"larger than target .*swapped"):
        load_pair(pair_config(DRAFT, TARGET), need_draft=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pair(pair_config(TARGET, DRAFT), need_draft=True)


# ---- dtype and device


def test_auto_device_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert models.resolve_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.resolve_device("auto").type == "cpu"


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda:2", 2), ("tpu0", 0), ("xpu", 0)])
def test_absent_device_is_refused(device, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    text = sentence(load_pair, pair_config(device=device), True)
    assert device in text and "auto" in text and "cpu" in text


@pytest.mark.parametrize(
    ("capability", "device", "expected"),
    [
        ("AVX2", "cpu", torch.float32),
        ("DEFAULT", "cpu", torch.float32),
        ("AVX512", "cpu", torch.bfloat16),
        ("AVX2", "cuda", torch.bfloat16),
    ],
)
def test_auto_dtype_is_bfloat16_only_where_the_device_computes_in_it(capability, device, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert models.resolve_dtype("auto", torch.device(device)) == expected
    assert models.resolve_dtype("float16", torch.device(device)) == torch.float16


def test_unknown_dtype_is_refused():
    text = sentence(load_pair, pair_config(dtype="int8"), True)
    assert "'int8'" in text and "auto, bfloat16, float16, float32" in text


# ---- sources that are refused


def remove(*names):
    return lambda directory: [(directory / name).unlink() for name in names]


def pickles_only(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def missing_shard(directory):
    edit_json(
        directory / "model.safetensors.index.json",
        weight_map={"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"},
    )


def truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def missing_weight(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def config(**values):
    return lambda directory: edit_json(directory / "config.json", **values)


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (remove("config.json"), "no config.json"),
        (remove("tokenizer.json"), "no tokenizer.json"),
        (remove("model.safetensors"), "no *.safetensors"),
        (pickles_only, "pickled weights (pytorch_model.bin)"),
        (missing_shard, "lacks 1 of 2 weight files (model-00002-of-00002.safetensors)"),
        (truncated, "cannot be loaded"),
        (missing_weight, "lacks 1 weights such as model.layers.1.mlp.up_proj.weight"),
        (config(intermediate_size=130), "cannot be loaded"),
        (config(architectures=["GPT2LMHeadModel"], model_type="gpt2"), "GPT2LMHeadModel"),
        (config(architectures=["PhiForCausalLM"], model_type="phi"), "PhiForCausalLM"),
        (config(architectures=None, model_type="mamba"), "architecture mamba"),
        (lambda directory: (directory / "config.json").write_text("{"), "not valid JSON"),
        (lambda directory: (directory / "tokenizer.json").write_text("{"), "tokenizer.json"),
    ],
)
def test_incomplete_or_unsupported_directory_is_refused(damage, fragment, checkpoint):
    directory = checkpoint()
    damage(directory)
    text = sentence(load, directory)
    assert fragment in text and str(directory) in text


def test_absent_architectures_field_falls_back_to_the_model_type(checkpoint):
    directory = checkpoint()
    config(architectures=None)(directory)
    assert type(load(directory).target).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_window_layers_are_those_of_the_checkpoint(family, checkpoint):
    directory = checkpoint(TARGET.replace("llama", family))
    config(use_sliding_window=True, sliding_window=16, max_window_layers=1, layer_types=None)(directory)
    assert layer_windows(load(directory).target.config) == [None, 16, 16]
    config(use_sliding_window=False)(directory)
    assert layer_windows(load(directory).target.config) == [None] * 3


def test_a_model_that_attends_in_both_directions_is_refused(checkpoint):
    directory = checkpoint(TARGET.replace("llama", "gemma2"))
    config(use_bidirectional_attention=True)(directory)
    assert "both directions" in sentence(load, directory)


def test_code_in_a_checkpoint_is_never_run(checkpoint, tmp_path):
    directory = checkpoint()
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nLlamaConfig = Model = None\n")
    auto_map = {"AutoConfig": "evil.LlamaConfig", "AutoModelForCausalLM": "evil.Model"}
    config(auto_map=auto_map)(directory)
    edit_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", "evil.Model"]})
    load(directory)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["no/such/directory", "./nowhere", "~/nowhere-at-all", "gpt2", "../x"])
def test_source_that_is_nothing_is_refused_without_asking_the_hub(source, monkeypatch):
    monkeypatch.setattr(sources, "snapshot_download", None)
    assert repr(source) in sentence(load, source)


def test_unshipped_draft_is_refused():
    assert "'package:drafts/unknown'" in sentence(load, "package:drafts/unknown")


@pytest.mark.parametrize(
    ("error", "fragments"),
    [
        (LocalEntryNotFoundError, ["the hub cannot be reached"]),
        (RepositoryNotFoundError, ["not on the hub"]),
        (GatedRepoError, ["gated", "hf auth login"]),
        (OSError, ["could not be fetched"]),
    ],
)
def test_hub_failure_names_the_local_remedy(error, fragments, monkeypatch):
    def fail(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(sources, "snapshot_download", fail)
    text = sentence(load, "org/name")
    assert all(fragment in text for fragment in ["org/name", "model.target=DIR model.draft=DIR", *fragments])


def test_hub_is_asked_for_neither_pickles_nor_code(checkpoint, monkeypatch):
    directory, asked = checkpoint(), {}
    monkeypatch.setattr(sources, "snapshot_download", lambda source, **kwargs: asked.update(kwargs) or directory)
    load("org/name")
    assert set(asked["allow_patterns"]) == {"*.json", "*.safetensors", "*.jinja"}


# ---- vocabularies


def test_other_vocabulary_is_refused(checkpoint):
    directory = checkpoint(DRAFT)
    content = json.loads((directory / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    text = sentence(load_pair, pair_config(draft=directory), True)
    assert "'a' has id 97 in the one and 98" in text or "'b' has id 98 in the one and 97" in text
    assert TARGET in text and str(directory) in text and "model.draft" in text


def test_missing_token_is_refused(checkpoint):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    directory = checkpoint(DRAFT + f"&vocab={BYTE_VOCAB_SIZE + 1}", tokenizer=tokenizer)
    assert "'<extra>' has id None" in sentence(load_pair, pair_config(draft=directory), True)


def test_other_splitting_of_the_same_vocabulary_is_refused(checkpoint):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    text = sentence(load_pair, pair_config(draft=checkpoint(DRAFT, tokenizer=tokenizer)), True)
    assert "split" in text


def test_chat_template_and_filler_tokens_may_differ(checkpoint):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.add_tokens(["[PAD259]"])
    directory = checkpoint(DRAFT + "&vocab=264", tokenizer=tokenizer)
    pair = load_pair(pair_config(draft=directory), need_draft=True)
    assert pair.tokenizer.chat_template == byte_tokenizer().chat_template


@pytest.mark.parametrize(("target_rows", "draft_rows"), [(272, 264), (264, 272)])
def test_differently_padded_vocabularies_are_accepted(target_rows, draft_rows):
    pair = load_pair(pair_config(f"{TARGET}&vocab={target_rows}", f"{DRAFT}&vocab={draft_rows}"), need_draft=True)
    assert (pair.target.config.vocab_size, pair.draft.config.vocab_size) == (target_rows, draft_rows)


def test_live_token_beyond_the_smaller_vocabulary_is_refused(checkpoint):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    target = checkpoint(TARGET + "&vocab=260", "target", tokenizer)
    draft = checkpoint(DRAFT, "draft", tokenizer)
    text = sentence(load_pair, pair_config(target, draft), True)
    assert "token id 259" in text and "(260)" in text and "(259)" in text


# ---- a distilled draft, which shares the target's embeddings

SHARED = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def distilled(tmp_path):
    """Layers 0 and 2 of the target, stored as `task=distill` does."""

    def write(tied: bool, leave_out=SHARED, **facts) -> tuple[Path, Path]:
        target, draft = tmp_path / "target", tmp_path / "draft"
        model = random_model.build(TARGET, torch.bfloat16)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(target)
        byte_tokenizer().save_pretrained(target)
        weights = {n: w for n, w in model.state_dict().items() if n not in leave_out and ".layers.1." not in n}
        weights = {name.replace("layers.2.", "layers.1."): weight for name, weight in weights.items()}
        draft.mkdir()
        save_file(weights, draft / "model.safetensors", {"format": "pt"})
        shutil.copy(target / "config.json", draft)
        facts = {"shares_embeddings": True, "target": str(target), "target_layers": [0, 2]} | facts
        changed = {"num_hidden_layers": 2, "layer_types": None, models.DRAFT_KEY: facts}
        edit_json(draft / "config.json", **changed)
        return target, draft

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_distilled_draft_uses_the_targets_own_embeddings(tied, distilled):
    pair = load_pair(pair_config(*distilled(tied)), need_draft=True)
    assert pair.draft_origin == "distilled draft" and not pair.draft.training
    for name in ("get_input_embeddings", "get_output_embeddings"):
        ours, theirs = (getattr(model, name)().weight for model in (pair.draft, pair.target))
        assert ours.data_ptr() == theirs.data_ptr() and ours.shape == theirs.shape
    own = [p for name, p in pair.draft.named_parameters() if name not in SHARED]
    assert pair.draft_weight_bytes == 4 * sum(p.numel() for p in own)
    assert not any(t.is_meta for t in (*pair.draft.parameters(), *pair.draft.buffers()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distilled_draft_computes_what_its_layers_say(dtype, distilled):
    """Including the rotary frequencies, which no file holds."""
    pair = load_pair(pair_config(*distilled(tied=False), dtype=dtype), need_draft=True)
    ids = torch.arange(97, 130)[None]
    drafted = pair.draft(ids).logits
    del pair.target.model.layers[1]
    pair.target.model.layers[1].self_attn.layer_idx = pair.target.config.num_hidden_layers = 1
    pair.target.config.num_hidden_layers = 2
    assert torch.equal(drafted, pair.target(ids).logits)


def test_an_untrained_draft_has_random_layers_always_the_same_and_the_embeddings_of_the_source(distilled):
    target, draft = distilled(tied=True)
    trained, *untrained = (
        load_pair(pair_config(target, source), need_draft=True) for source in (draft, *[f"untrained:{draft}"] * 2)
    )
    first, second = (dict(pair.draft.named_parameters()) for pair in untrained)
    for name, weight in trained.draft.named_parameters():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], weight) == (".layers." not in name or weight.dim() == 1), name
    assert untrained[0].draft_origin == "random weights"


def test_distilled_draft_with_a_trimmed_head_proposes_the_tokens_that_it_lists(distilled):
    target, draft = distilled(tied=True)
    whole = load_pair(pair_config(target, draft), need_draft=True)
    ids = torch.arange(97, 130)
    path = draft / "model.safetensors"
    save_file(load_file(path) | {IDS_KEY: ids.int()}, path, {"format": "pt"})
    trimmed = load_pair(pair_config(target, draft), need_draft=True)
    expected, found = (pair.draft(ids[None]).logits for pair in (whole, trimmed))
    assert torch.isfinite(found).sum(-1).eq(len(ids)).all()
    torch.testing.assert_close(found[..., ids], expected[..., ids])
    assert trimmed.draft_weight_bytes == whole.draft_weight_bytes + 4 * len(ids) * 64


def test_distilled_draft_is_refused_for_another_target(distilled):
    _, draft = distilled(True)
    text = sentence(load_pair, pair_config(TARGET, draft), True)
    assert str(draft) in text and f"model.target={draft.parent / 'target'}" in text


def test_distilled_draft_is_refused_for_another_width(distilled):
    target, draft = distilled(True, target=TARGET.replace("hidden=64", "hidden=32"))
    assert str(draft) in sentence(load_pair, pair_config(TARGET.replace("hidden=64", "hidden=32"), draft), True)
    assert target.exists()


def test_distilled_draft_knows_its_target_under_another_name(distilled):
    target, draft = distilled(True)
    moved = target.rename(target.with_name("moved"))
    facts = json.loads((draft / "config.json").read_text())[models.DRAFT_KEY]
    facts["target_fingerprint"] = fingerprint(load(moved).target)
    edit_json(draft / "config.json", **{models.DRAFT_KEY: facts})
    assert load_pair(pair_config(moved, draft), need_draft=True).draft_origin == "distilled draft"
    assert str(draft) in sentence(load_pair, pair_config(TARGET, draft), True)


def test_incomplete_distilled_draft_is_refused(distilled):
    target, draft = distilled(True, leave_out=(*SHARED, "model.norm.weight"))
    text = sentence(load_pair, pair_config(target, draft), True)
    assert "lacks 1 weights such as model.norm.weight" in text


def test_draft_that_shares_nothing_is_an_ordinary_model(checkpoint):
    directory = checkpoint(DRAFT)
    config(**{models.DRAFT_KEY: {"shares_embeddings": False, "target": "elsewhere"}})(directory)
    target = load(TARGET)
    draft, _, origin = load_draft(str(directory), target.target, torch.float32, CPU, TARGET, target.tokenizer)
    assert origin == "safetensors" and draft.config.hidden_size == 32


# ---- random models and the byte tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_random_model_is_its_source_string(family):
    source = TARGET.replace("llama", family)
    before = torch.get_rng_state()
    one, same, other = (random_model.build(s) for s in (source, source, source.replace("seed=0", "seed=7")))
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    assert type(one).__name__.lower().startswith(family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hidden", [32, 128])
def test_random_model_is_not_degenerate(family, hidden):
    pair = load(f"random:{family}?layers=2&hidden={hidden}&heads=4&kv_heads=2&vocab=320&seed=3")
    prompts = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        texts = pair.target.generate(prompts, max_new_tokens=32, do_sample=False, eos_token_id=None)[:, 24:]
        pair.target.set_attn_implementation("eager")
        rows = pair.target(prompts, output_attentions=True).attentions[-1][:, :, -1]
    assert len({tuple(text) for text in texts.tolist()}) == 4
    assert all(len(set(text)) > 8 for text in texts.tolist())
    assert texts.max() < BYTE_VOCAB_SIZE  # ids without a token are never the likeliest
    assert rows.max(-1).values.mean() > 2.5 / rows.shape[-1]  # attention is not uniform


def test_random_models_keep_their_rotary_frequencies_in_float32():
    exact, rounded = (random_model.build(TARGET, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(exact.model.rotary_emb.inv_freq, rounded.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("random:gpt2?layers=1", "'gpt2'"),
        ("random:llama?layer=1", "'layer'"),
        ("random:llama?layers=two", "'two'"),
        ("random:llama?layers", "layers"),
        ("random:llama?layers=0", "layers must be positive"),
        ("random:llama?hidden=60&heads=8", "hidden"),
        ("random:llama?heads=4&kv_heads=3", "kv_heads"),
        ("random:llama?vocab=100", f"at least {BYTE_VOCAB_SIZE}"),
    ],
)
def test_malformed_random_source_is_refused(source, fragment):
    text = sentence(load, source)
    assert repr(source) in text and fragment in text


def test_byte_tokenizer_ids_are_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    every = bytes(range(256)).decode("latin-1")
    assert tokenizer.decode(tokenizer.encode(every)) == every
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"  # an unfinished character


def test_byte_tokenizer_has_a_chat_template():
    tokenizer = byte_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 257 and ids.count(258) == 1 and tokenizer.eos_token_id == 258


# ---- fingerprints


def test_fingerprint_survives_the_dtype_and_sees_the_weights(checkpoint):
    directory = str(checkpoint())
    full, half = (load_target(directory, dtype, CPU)[0] for dtype in (torch.float32, torch.bfloat16))
    assert fingerprint(full) == fingerprint(half) and len(fingerprint(full)) == 16
    full.model.layers[2].mlp.down_proj.weight.mul_(1.5)
    assert fingerprint(full) != fingerprint(half)


def cut_config(draft, size) -> ModelConfig:
    return ModelConfig("cut", TARGET, draft, "float32", "cpu", "auto", linear="torch", draft_vocab_size=size)


def test_a_draft_vocabulary_keeps_special_and_frequent_tokens_and_the_fingerprint(caplog):
    full, cut = (load_pair(cut_config(DRAFT, size), need_draft=True) for size in (0, 100))
    head = cut.draft.get_output_embeddings()
    assert head.head_token_ids.tolist() == [*range(97), *sorted(cut.special_token_ids)]
    assert fingerprint(cut.draft) == fingerprint(full.draft), "a saved head map still fits"
    everything = load_pair(cut_config(DRAFT, 10**6), need_draft=True).draft.get_output_embeddings()
    assert type(everything) is torch.nn.Linear


def test_a_draft_vocabulary_that_cannot_be_is_refused():
    assert "below the 3 special tokens" in sentence(load_pair, cut_config(DRAFT, 2), True)


def test_a_draft_whose_head_was_trained_small_is_not_cut_again():
    assert "has 16384 tokens by training" in sentence(refuse_cut, cut_config("package:drafts/x", 100), 16384)
    refuse_cut(cut_config("package:drafts/x", 0), 16384)
