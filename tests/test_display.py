"""What a person reads on stderr: everything the run is about, nothing when asked to be quiet, no colours in a pipe."""

import pytest

from specsmallkv.display import rows, size
from specsmallkv.run import main

PROMPT = "prompt=" + "The harpooneer said nothing, and looked at the sea. " * 4


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[str, str]:
        assert main(["+model=tiny-random", "max_new_tokens=12", "ignore_eos=true", PROMPT, *argv]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_the_table_tells_speed_acceptance_bytes_and_tiers_on_stderr_alone(run):
    out, err = run("policy=smallkv")
    table = {line.split("  ")[0]: line for line in err.splitlines()}
    assert list(table)[1:] == [
        "tokens",
        "speed",
        "speculation",
        "target KV",
        "host store",
        "draft KV",
        "tiers per head",
    ]
    for name, words in {
        "speed": ("tokens/s", "first token after"),
        "speculation": ("drafts accepted", "tokens per verify pass"),
        "target KV": ("KiB of ", " full ("),
        "host store": ("0 B (0.0% of full)",),
        "draft KV": ("% of full)", "of weights"),
        "tiers per head": ("critical", "marginal of"),
    }.items():
        assert all(word in table[name] for word in words), table[name]
    assert "\x1b" not in err and "drafts accepted" not in out


def test_the_title_tells_in_how_many_bits_tokens_are_held(run):
    assert "specsmallkv, kv_budget" in run("policy=specsmallkv")[1]
    packed = run("policy=specsmallkv_packed", "policy.value_bits=null")[1]
    assert "specsmallkv_packed, keys in 8 bits, kv_budget" in packed


def test_the_host_store_and_the_draft_are_measured_against_the_full_cache():
    kept = [{"critical": 10, "marginal": 0, "total": 50}]
    record = {
        "prompt_tokens": 40, "new_tokens": 10, "tokens_per_second": 1.0, "decode_tokens_per_second": None,
        "ttft_seconds": 1.0, "target_kv_bytes": 2048, "target_kv_bytes_full": 10240, "kv_budget_effective": 0.2,
        "target_kv_host_bytes": 9216, "recall_bytes": 512, "draft_kv_bytes": 5120, "draft_weight_bytes": 3 << 20,
        "kept_per_layer": kept,
    }  # fmt: skip
    told = dict(rows(record))
    assert told["target KV"] == "2.0 KiB of 10.0 KiB full (20.0%)"
    assert told["host store"] == "9.0 KiB (90.0% of full), 512 B recalled"
    assert told["draft KV"] == "5.0 KiB (50.0% of full), and 3.0 MiB of weights"


def test_quiet_says_nothing_on_stderr(run):
    assert run("quiet=true")[1] == ""


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes_are_given_in_the_largest_unit_that_fits(count, text):
    assert size(count) == text
