"""The pages in a browser: drawn, silent, as wide as the window, in light and dark, on a desk and on a phone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from browser import COMMAND, Browser
from conftest import run_task, tiny_model
from test_trace import watched

from specsmallkv.models import ModelPair
from specsmallkv.page import read, run_page
from specsmallkv.tokenizer import byte_tokenizer
from specsmallkv.trace import TierSets

MOST_BYTES = 5_000_000
DESK, PHONE = 1200, 390
# What is asked of the loop; `smallkv` has marginal tiers, whatever the map's quality.
RUNS = {
    "specsmallkv": ("specsmallkv", 3, {}),
    "smallkv": ("smallkv", 3, {"marginal_share": 0.3, "marginal_similarity": 0.0}),
    "full": ("full", 3, {}),
    "plain": ("specsmallkv", 0, {}),
}

needs_browser = pytest.mark.skipif(COMMAND is None, reason="no chromium: nothing that the pages draw was tested")


def written(generation, trace) -> str:
    policy, drafts = trace.spec.policy, trace.spec.num_draft_tokens
    record = {"model": "tiny", "policy": policy.name, "kv_budget": policy.kv_budget, "num_draft_tokens": drafts}
    surroundings = {"dtype": "float32", "device": "cpu", "config": {"prompt": "</script>"}}
    return run_page(record | generation.figures() | surroundings, trace, generation.prompt_ids)


def study(directory: Path) -> Path:
    """The report of this repository's own records: hundreds of rows, variants with long names."""
    records = Path(__file__).parents[1] / "experiments" / "records"
    run_task("task=report", f"task.dir={records}", f"run_dir={directory}", "quiet=true")
    return directory / "report.html"


@pytest.fixture(scope="module")
def pair(target, draft):
    return ModelPair(target, draft, byte_tokenizer(), "random weights", "random weights")


@pytest.fixture(scope="module")
def page(pair, prompt, tmp_path_factory):
    """Path of the page with this name, made once."""
    directory, made = tmp_path_factory.mktemp("pages"), {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = study(directory) if name == "study" else directory / f"{name}.html"
            if name in RUNS:
                policy, drafts, parameters = RUNS[name]
                made[name].write_text(written(*watched(pair, prompt, None, policy, drafts, **parameters)))
        return made[name]

    return make


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def overhang(opened, width: int) -> int:
    """By how many pixels the page is wider than its window; a phone's `innerWidth` grows with what overflows."""
    return opened.ask("document.documentElement.scrollWidth") - width


def inks(opened, canvas: str) -> int:
    """How many colours a canvas shows."""
    return opened.ask(f"""(() => {{
        const canvas = document.querySelector("{canvas}"), pen = canvas.getContext("2d");
        const {{ data }} = pen.getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size; }})()""")


def says(opened, selector: str) -> str:
    return opened.ask(f"document.querySelector({json.dumps(selector)}).innerText")


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(DESK, False), (PHONE, True)], ids=["desk-light", "phone-dark"])
@pytest.mark.parametrize("name", [*RUNS, "study"])
def test_a_page_is_drawn_without_complaint_and_fits_its_window(browser, page, name, width, dark):
    """No error, no word on the console, no request; also after the window was turned and folded away."""
    opened = browser.open(page(name), width, dark=dark)
    assert overhang(opened, width) <= 0
    assert opened.ask("document.querySelectorAll('svg rect, svg polyline').length") > 10
    brightness = opened.ask("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(brightness) < 60) == dark
    for other in (844, 60, width):
        opened.resize(other)
    assert overhang(opened, width) <= 0
    assert opened.complaints == []
    opened.close()


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2)."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_from_its_ground_in_light_and_dark():
    """At least 4.5 to 1, as WCAG 2 asks of text."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in read("style.css").split("@media")[:2])
    for palette in (light, dark):
        for text in ("text", "muted"):
            for ground in ("back", "panel"):
                low, high = sorted((luminance(palette[text]), luminance(palette[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


@needs_browser
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_run_can_be_explored_by_pointer_and_by_finger(browser, page, width):
    opened = browser.open(page("smallkv"), width)
    assert len(opened.ask("[...document.querySelectorAll('#text > span')].map((s) => s.innerText)")) == 40
    opened.tap("#text > span:nth-of-type(3)")
    assert "target's probability" in says(opened, "#tip")
    assert inks(opened, "#map canvas") > 4  # tiers, axes
    assert "its value only" in says(opened, "#tiers")
    opened.tap("#map canvas", 0.5, 0.5)
    before = says(opened, "#map-readout")
    assert "with V only" in before
    opened.choose("#layer", 0)
    assert says(opened, "#map-readout") != before
    assert inks(opened, "#profile canvas") > 3
    assert "cosine" in says(opened, "#profile-readout")
    assert opened.complaints == []
    opened.close()


@needs_browser
@pytest.mark.parametrize("name", ["full", "plain"])
def test_a_page_says_what_it_cannot_show(browser, page, name):
    opened = browser.open(page(name))
    said = says(opened, "main")
    assert ("Everything: nothing was evicted" in said) == (name == "full")
    assert ("full did not ask the draft for its attention" in said) == (name == "full")
    opened.close()


@needs_browser
def test_a_line_of_a_study_is_singled_out_by_its_name(browser, page):
    opened = browser.open(page("study"))
    opened.ask("document.querySelector('#figures .legend li').focus()")
    shown = "document.querySelector('#figures svg').querySelectorAll('g:not(.dim)').length"
    assert opened.ask(shown) == 1
    opened.ask("document.activeElement.blur()")
    assert opened.ask(shown) > 1
    opened.close()


# Long prompts


@pytest.fixture(scope="module")
def long_page(tmp_path_factory):
    """Of a run on 4,000 tokens, with tier sets of as many heads as the embedded pair's that change as sets can."""
    target, draft = (tiny_model(layers=layers, seed=1) for layers in (3, 2))
    for model in (target, draft):
        model.config.max_position_embeddings = 8192  # other tests need less
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("long") / "report.html"
    pair = ModelPair(target, draft, byte_tokenizer(), "random weights", "random weights")
    prompt = random.integers(1, 96, 4000).tolist()
    generation, trace = watched(pair, prompt, max_new_tokens=64)
    none = np.zeros((30, 3, 4000), dtype=bool)
    trace.sets = [TierSets(random.random(none.shape, np.float32) < 0.2, none, 4000, x.seen) for x in trace.sets]
    path.write_text(written(generation, trace))
    return path


def test_the_page_of_a_long_prompt_stays_small(long_page):
    assert long_page.stat().st_size < MOST_BYTES
    shown = re.search(r'"heads":(\[\[.*?\]\])', long_page.read_text())[1]
    assert 1 < len(json.loads(shown)) < 90  # the map of so much chance had to leave heads out


@needs_browser
def test_the_page_of_a_long_prompt_opens_soon(browser, long_page):
    """Five times the 2 s that it may take: tests run side by side here. The slow test below holds it to 2 s."""
    opened = browser.open(long_page)
    assert opened.milliseconds < 10_000
    assert opened.complaints == []
    opened.close()


@needs_browser
@pytest.mark.slow
def test_the_page_of_a_real_run_on_4000_tokens_is_small_and_opens_within_two_seconds(browser, tmp_path):
    """The embedded pair; the best of three openings, since the machine may have other work."""
    text = (Path(__file__).parents[1] / "specsmallkv/data/benchmarks/text.txt").read_text()
    (tmp_path / "prompt.txt").write_text(text[:16936])
    record = run_task(
        f"prompt_file={tmp_path}/prompt.txt", "chat=false", "report=true", "quiet=true", f"run_dir={tmp_path}"
    )
    assert record["prompt_tokens"] == 4000
    page = Path(record["report"])
    assert page.stat().st_size < MOST_BYTES
    assert min(browser.open(page).milliseconds for _ in range(3)) < 2000
