"""The scorers against their published definitions on random pairs: formulas written anew here, and the packages.

The packages are those of the extras `peers` (what LongBench calls, SQuAD's F1 in transformers 5.2) and `eval`.
"""

import random
import re
import string
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from specsmallkv.benchmarks import scorers

PAIRS = 2000
WORDS = [
    "the",
    "The",
    "a",
    "an",
    "cat",
    "cats",
    "sat.",
    "x.y",
    "..",
    "\n",
    "it's",
    "well-known",
    "É",
    "7",
    "07",
    "12,",
    "3.5",
]
MARKS = [
    "Paragraph 7",
    "Number",
    "Number of days",
    "Person",
    "Place",
    "`x`",
    "# note",
    "//",
    "return x",
    "\x00",
    "  ",
    "",
]
CLASSES = ["Number", "Number of", "Person", "Pers", "Place", "Number of days"]


def random_text(rng, pieces=(*WORDS, *MARKS), longest=24):
    return "".join(rng.choice(pieces) + rng.choice(("", " ", " ", " ", "\n")) for _ in range(rng.randrange(longest)))


def random_pairs(count=PAIRS):
    """Two texts that share words; in one of ten they are equal."""
    rng = random.Random(0)
    for _ in range(count):
        ours = random_text(rng)
        yield ours, ours if rng.random() < 0.1 else random_text(rng)


def numbers_in(text):
    return "".join(character if character.isdecimal() else " " for character in text).split()


# Written anew


def test_f1_is_the_harmonic_mean_of_precision_and_recall_of_the_words():
    def words(text):
        kept = text.lower().translate(str.maketrans("", "", string.punctuation))
        return re.sub(r"(?<!\w)(?:an?|the)(?!\w)", " ", kept).split()

    def f1(ours, theirs):
        shared = sum(min(ours.count(word), theirs.count(word)) for word in set(ours))
        if not shared:
            return 0.0
        precision, recall = shared / len(ours), shared / len(theirs)
        return 2 / (1 / precision + 1 / recall)

    scores = [(scorers.qa_f1(ours, theirs), f1(words(ours), words(theirs))) for ours, theirs in random_pairs()]
    check(scores)


def test_counting_and_paragraph_retrieval_are_the_share_of_right_numbers():
    counted, retrieved = [], []
    for ours, theirs in random_pairs():
        numbers, wanted = numbers_in(ours), random.Random(theirs).choice(["7", "07", "12", "3"])
        share = sum(number == wanted for number in numbers) / max(1, len(numbers))
        counted.append((scorers.count(ours, wanted), share))
        retrieved.append((scorers.paragraph_number(ours, f"Paragraph {wanted}"), share))
    check(counted)
    check(retrieved)


def test_classification_strikes_out_parts_of_the_right_name_while_it_walks_the_list():
    def published(prediction, truth):
        named = [name for name in CLASSES if name in prediction]
        for name in named:
            if name in truth and name != truth:
                named.remove(name)
        return 1 / len(named) if truth in named else 0.0

    rng, scores = random.Random(1), []
    for ours, _ in random_pairs():
        truth = rng.choice(CLASSES)
        scores.append((scorers.classification(ours, truth, CLASSES), published(ours, truth)))
    check(scores)
    assert {score for score, _ in scores} >= {0, 1, 1 / 2, 1 / 3}


def test_rulers_string_matches_are_the_mean_and_the_maximum_over_the_references():
    rng, every, some = random.Random(2), [], []
    for ours, _ in random_pairs():
        references = [
            rng.choice([random_text(rng, longest=3).strip() or "cat", "CAT", "7", "zebra"]) for _ in range(4)
        ]
        read = re.sub("[\x00-\x1f]", "\n", ours.strip()).strip().lower()
        hits = [1.0 if reference.lower() in read else 0.0 for reference in references]
        every.append((scorers.string_match_all(ours, references), sum(hits) / len(hits)))
        some.append((scorers.string_match_part(ours, references), max(hits)))
    check(every)
    check(some)


def check(scores):
    """Every pair agrees, and not because all are 0 or all are 1."""
    ours, theirs = zip(*scores, strict=True)
    assert len(scores) == PAIRS and list(ours) == pytest.approx(list(theirs), abs=1e-6)
    assert 0 in ours and 1 in ours and len(set(ours)) >= 2


# The packages, where they are installed


@pytest.mark.peers
def test_rouge_l_equals_the_package_that_longbench_calls():
    official, scores = pytest.importorskip("rouge").Rouge(), []
    for ours, theirs in random_pairs():
        if scorers._sentences(ours) and scorers._sentences(theirs):
            expected = official.get_scores([ours], [theirs], avg=True)["rouge-l"]["f"]
        else:
            expected = 0.0  # the package raises, and LongBench takes that for 0
        scores.append((scorers.rouge_l(ours, theirs), expected))
    ours, theirs = zip(*scores, strict=True)
    assert list(ours) == pytest.approx(list(theirs), abs=1e-7) and len(set(ours)) > 100


@pytest.mark.peers
def test_edit_similarity_equals_the_package_that_longbench_calls():
    fuzz, scores = pytest.importorskip("fuzzywuzzy.fuzz"), []
    for ours, theirs in random_pairs():
        lines = [line for line in ours.lstrip("\n").split("\n") if not re.search("`|#|//", line)]
        truth = theirs.partition("\n")[0]
        scores.append((scorers.code_similarity(ours, truth), fuzz.ratio((lines or [""])[0], truth) / 100))
    check(scores)


@pytest.mark.peers
def test_f1_equals_squads_in_transformers():
    """Where both have words; without any, SQuAD counts no answer as right, LongBench does not."""
    squad = pytest.importorskip("transformers.data.metrics.squad_metrics", reason="transformers 5.2 has it")
    texts = [
        (ours, theirs) for ours, theirs in random_pairs() if scorers.normalized(ours) and scorers.normalized(theirs)
    ]
    expected = [squad.compute_f1(theirs, ours) for ours, theirs in texts]
    assert [scorers.qa_f1(ours, theirs) for ours, theirs in texts] == pytest.approx(expected)
    assert len(texts) > PAIRS * 0.8


@pytest.fixture
def harness(monkeypatch):
    """LongBench's and RULER's scorers as lm-evaluation-harness has them; what they import but do not call may lack."""
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    for name in ("jieba", "fuzzywuzzy", "rouge"):
        if find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(fuzz=None, Rouge=None))
    from lm_eval.tasks.longbench import metrics
    from lm_eval.tasks.ruler import common_utils

    return SimpleNamespace(longbench=metrics, ruler=common_utils)


def test_scorers_equal_those_of_lm_evaluation_harness(harness):
    rng, official = random.Random(3), harness.longbench
    for ours, theirs in random_pairs():
        number, truth = rng.choice(["7", "07", "12"]), rng.choice(CLASSES)
        assert scorers.qa_f1(ours, theirs) == pytest.approx(official.qa_f1_score(ours, theirs))
        assert scorers.count(ours, number) == official.count_score(ours, number)
        paragraph = f"Paragraph {number}"
        assert scorers.paragraph_number(ours, paragraph) == official.retrieval_score(ours, paragraph)
        expected = official.classification_score(ours, truth, all_classes=CLASSES)
        assert scorers.classification(ours, truth, CLASSES) == expected
        references = theirs.split()[:4] or ["cat"]
        read = harness.ruler.postprocess_pred([ours])
        assert scorers.string_match_all(ours, references) == harness.ruler.string_match_all(read, [references])
