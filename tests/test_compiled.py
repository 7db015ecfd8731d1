"""Compiled drafting steps and verify passes: the eager text, two graphs a model, nothing compiled later."""

from copy import deepcopy

import pytest
import torch
from conftest import ARCHITECTURES, VOCAB, compose_run, tiny_model
from test_windows import build, small

from specsmallkv import SpecSmallKV, UserError, compiled
from specsmallkv.batch import BatchDecoder, Job
from specsmallkv.compiled import MAX_TOKENS, NUM_GRAPHS, check_compile, compile_layers, compile_pair
from specsmallkv.config import COMPILES, check
from specsmallkv.decode import Decoder
from specsmallkv.models import ModelPair, load_pair
from specsmallkv.presets import load_policy
from specsmallkv.tokenizer import byte_tokenizer

CPU, NEW = torch.device("cpu"), 12  # behind each prompt an eviction event of 16 tokens
POLICIES = ("full", "snapkv", "h2o", "smallkv", "specsmallkv")
RANDOM = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(1, VOCAB, (length,), generator=RANDOM).tolist() for length in (MAX_TOKENS + 22, 40, 75)]


class Watched:
    """A backend that runs graphs as they are and notes each of them, and of every call how many tokens it was over."""

    def __init__(self):
        self.graphs, self.widths = 0, []

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.widths.append(next(x.shape[1] for x in args if isinstance(x, torch.Tensor) and x.dim() == 3))
            return graph(*args)

        return run


@pytest.fixture(scope="module", autouse=True)
def afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def watched():
    return Watched()


@pytest.fixture(scope="module")
def pair(target, draft, watched):
    """Copies of both models, compiled and run once."""
    pair = ModelPair(deepcopy(target), deepcopy(draft), byte_tokenizer(), "", "")
    compile_pair(pair, "default", watched)
    return pair


def policy(name):
    settings = {} if name == "full" else {"kv_budget": 0.4, "window_size": 8, "evict_block": 16}
    return load_policy(name, **settings)


def decoded(target, draft, name, num_draft_tokens, prompts):
    """The new tokens of each prompt; several are answered in one batch."""
    decoder = Decoder(target, draft, policy(name), num_draft_tokens)
    if len(prompts) == 1:
        return [[token for round_, _ in decoder.generate(prompts[0], NEW) for token in round_.tokens]]
    jobs, texts = [Job(prompt, NEW) for prompt in prompts], [[] for _ in prompts]
    for row, round_ in BatchDecoder(decoder, len(jobs)).generate(jobs):
        texts[row.number] += round_.tokens
    return texts


@pytest.mark.smoke
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["alone", "batch"])
@pytest.mark.parametrize("num_draft_tokens", [0, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_compiled_passes_decode_the_eager_text(name, num_draft_tokens, prompts, target, draft, pair):
    expected = decoded(target, draft, name, num_draft_tokens, prompts)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert decoded(pair.target, pair.draft, name, num_draft_tokens, prompts) == expected


@pytest.mark.smoke
def test_two_graphs_without_a_break_are_all_while_the_context_grows(pair, watched):
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    before = watched.graphs
    for length in (20, 61, 110):
        for name in ("full", "specsmallkv"):
            decoded(pair.target, pair.draft, name, 3, [PROMPTS[0][:length]])
    decoded(pair.target, pair.draft, "snapkv", 2, PROMPTS)
    # target and draft have layers of one shape here
    assert watched.graphs == before == 2 and not breaks


def test_no_cache_outlives_its_sequence_in_the_running_pass(pair):
    decoded(pair.target, pair.draft, "specsmallkv", 3, PROMPTS[:1])
    assert compiled._running.cache is compiled._running.call is compiled._running.attention is None


def test_models_of_other_sizes_and_later_ones_are_compiled_too():
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    assert NUM_GRAPHS > 8  # torch's own limit; a lower one takes fewer models to reach
    with config.patch({limit: 1}):
        for layers, heads in ((2, 2), (1, 6)):
            backend, model = Watched(), tiny_model(layers=layers, heads=heads)
            expected = decoded(deepcopy(model), None, "full", 0, PROMPTS[:1])
            compile_pair(ModelPair(model, None, byte_tokenizer(), "", None), "default", backend)
            assert decoded(model, None, "full", 0, PROMPTS[:1]) == expected
            assert backend.graphs == 2 and len(backend.widths) >= layers * NEW


def test_prefill_runs_as_it_is_and_short_passes_do_not(pair, watched):
    watched.widths.clear()
    decoded(pair.target, pair.draft, "full", 3, PROMPTS[:1])
    assert {1, 4} <= set(watched.widths) and max(watched.widths) <= MAX_TOKENS < len(PROMPTS[0])
    layers = len(pair.target.model.layers) + len(pair.draft.model.layers)
    assert len(watched.widths) >= layers * NEW // 4


@pytest.mark.parametrize("family", [*ARCHITECTURES, "gemma2", "mistral with windows"])
def test_every_architecture_is_one_graph_around_attention(family):
    windows = family not in ARCHITECTURES
    model = build(family.split()[0]) if windows else tiny_model(family, layers=2)
    other, name = small(model) if windows else tiny_model(family, layers=1), "full" if windows else "snapkv"
    expected = decoded(deepcopy(model), deepcopy(other), name, 2, PROMPTS[:1])
    torch._dynamo.utils.counters["graph_break"].clear()
    for own in (model, other):
        compile_layers(own, "default", "eager")
    assert decoded(model, other, name, 2, PROMPTS[:1]) == expected
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert decoded(model, other, name, 2, PROMPTS[:1]) == expected


def test_packed_passes_of_a_batch_are_compiled(pair, watched):
    watched.widths.clear()
    decoded(pair.target, pair.draft, "full", 3, PROMPTS)
    assert 3 * 4 in watched.widths  # a verify pass of all rows


def test_another_cache_is_left_to_transformers(target, pair, watched):
    ids, count = torch.tensor(PROMPTS[:1]), len(watched.widths)
    texts = [model.generate(ids, max_new_tokens=8, do_sample=False).tolist() for model in (target, pair.target)]
    assert texts[0] == texts[1] and len(watched.widths) == count


# --- what is refused -----------------------------------------------------------------------------------------------


def load(mode):
    config, _ = compose_run("+model=tiny-random", f"model.compile={mode}")
    return load_pair(config.model, need_draft=True, quiet=True)


def test_nothing_is_compiled_unless_it_is_asked_for():
    pair = load("null")
    assert pair.compile is None and "forward" not in vars(pair.target.model.layers[0])


@pytest.mark.parametrize(
    ("mode", "linear", "told"),
    [
        (
            "default",
            "packed",
            r"model\.compile=default cannot look into model\.linear=packed .*; use model\.linear=torch",
        ),
        ("default", "blocked", r"model\.compile=default cannot look into model\.linear=blocked layers"),
        ("reduce-overhead", "torch", r"records CUDA graphs, which cpu has not; use model\.compile=default"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_loading(mode, linear, told):
    with pytest.raises(UserError, match=told):
        check_compile(mode, CPU, linear)
    check_compile(None, CPU, linear)


def test_a_compiled_pair_is_not_packed(pair):
    with pytest.raises(UserError, match="packed"):
        pair.pack("packed")


def test_models_in_parts_are_refused(target):
    model = deepcopy(target)
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(UserError, match="whole on one device"):
        compile_pair(ModelPair(model, None, byte_tokenizer(), "", None), "default")


def test_a_missing_compiler_is_one_sentence_with_the_remedy(monkeypatch, tmp_path):
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with fresh_cache(dir=str(tmp_path)), pytest.raises(UserError, match=r"fails on cpu .*install a C\+\+ compiler"):
        load("default")


def test_an_unknown_mode_is_refused_with_the_known_ones():
    config, _ = compose_run("model.compile=true")
    with pytest.raises(UserError, match=r"model\.compile=.*use null \(off\), default or reduce-overhead"):
        check(config)


# --- the real backends ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inductor_decodes_the_eager_text():
    torch._dynamo.reset()
    texts = []
    for mode in ("null", "default"):
        pair = load(mode)
        with torch._dynamo.config.patch(error_on_recompile=mode != "null"):
            texts.append([decoded(pair.target, pair.draft, name, 3, PROMPTS) for name in POLICIES])
    assert texts[0] == texts[1]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", COMPILES)
def test_cuda_graphs_decode_the_eager_text(mode):
    torch._dynamo.reset()
    options = {"dtype": "float32", "device": "cuda", "policy": policy("specsmallkv")}
    sources = [f"random:llama?layers={n}&hidden=64&heads=4&kv_heads=2&vocab=320&seed=1" for n in (3, 2)]
    eager, ours = (SpecSmallKV.from_pretrained(*sources, compile=own, **options) for own in (None, mode))
    for name in POLICIES:
        for prompts in (PROMPTS[:1], PROMPTS):
            expected = decoded(eager.pair.target, eager.pair.draft, name, 3, prompts)
            assert decoded(ours.pair.target, ours.pair.draft, name, 3, prompts) == expected
    assert compiled.SPLITS or mode == "default"
