"""The published scorers, on cases worked out by hand from their definitions."""

import pytest

from specsmallkv.benchmarks import scorers
from specsmallkv.intervals import bootstrap, score_interval, wilson

# GSM8K and BBH


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", None),
        ("no number at all", None),
        ("The answer is 18.", "18"),
        ("She pays $1,250.00.", "1250"),
        ("so 1,234,567 km", "1234567"),
        ("pick 3,4", "4"),  # a comma groups three digits or none
        ("It is -7 degrees.", "-7"),
        ("He loses -$3.50 a day", "-3.5"),
        ("balance: $-20", "-20"),
        ("16-3", "3"),  # a difference, not a negative number
        ("16 - 3 = 13", "13"),
        ("-0.00", "0"),
        ("0.50", "0.5"),
        ("007", "7"),
        ("100", "100"),
        (r"\boxed{\text{\$42}}", "42"),
        ("**72**", "72"),
        ("50%", "50"),
        ("15kg", "15"),
        ("gpt4 says 9 apples", "9"),
        ("gpt4", None),  # part of a name
        ("= 3.", "3"),
        ("\u22125", "-5"),  # the typographic minus
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert scorers.last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", None),
        ("So the answer is (B).", "(B)"),
        ("So the answer is True.\n\nQ: next. So the answer is False.", "True"),
        ("the answer is } ] >.", "} ] >"),
        ("the answer is -219.", "-219"),
        ("The answer is: yes", "yes"),
        ("the answer is .", None),
        ("the answer is", None),
        ("I do not know.", None),
    ],
)
def test_the_answer_behind_the_phrase(text, answer):
    assert scorers.answer_after(text) == answer


# LongBench: score, worked out by hand


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("", "Paris", 0),
        ("Paris", "paris", 1),
        ("The Paris!", "Paris", 1),  # case, article, punctuation
        ("a the an", "Paris", 0),
        ("...", "Paris", 0),
        ("in Paris", "Paris", 2 / 3),  # precision 1/2, recall 1
        ("Paris Paris", "Paris", 2 / 3),  # bags, not sets
        ("it's", "its", 1),  # punctuation goes, nothing takes its place
        ("well-known", "well known", 0),
        ("Anna", "Ann", 0),  # an article is a word of its own
        ("red green blue", "blue green", 0.8),  # 2/3 and 1
        ("the 41 metres deep", "41 metres", 0.8),
        ("London", "Paris", 0),
    ],
)
def test_qa_f1(prediction, truth, score):
    assert scorers.qa_f1(prediction, truth) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("", "the cat sat", 0),
        (".", "the cat sat", 0),  # no sentence
        ("the cat sat", "", 0),
        ("the cat sat", "the cat sat", 1),
        ("the cat", "the cat sat", 0.8),  # LCS 2: precision 1, recall 2/3
        ("sat cat the", "the cat sat", 1 / 3),  # order counts: LCS 1
        ("The cat", "the cat", 0.5),  # case counts
        ("the the the", "the", 1),  # equal words count once, in both
        ("the cat", "the the cat", 1),
        ("dog. the cat", "the cat. dog", 1),  # each reference sentence takes from all of ours
        ("a b c d", "b d x", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("the  cat\nsat", "the cat sat", 1),  # white space
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 2 * (4 / 8) * (4 / 5) / (4 / 8 + 4 / 5)),  # Lin's example
    ],
)
def test_rouge_l(prediction, truth, score):
    assert scorers.rouge_l(prediction, truth) == pytest.approx(score, abs=1e-7)


CLASSES = ["Number", "Person", "Place", "Number of days"]


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("", "Number", 0),
        ("Type: Person", "Person", 1),
        ("Person or Place", "Person", 0.5),
        ("Place", "Person", 0),
        ("person", "Person", 0),  # case counts
        ("Number of days", "Number of days", 1),  # "Number" is part of the right name: struck out
        ("Number of days", "Number", 0.5),  # the longer one is not part of the right name
        ("Number Person Place", "Place", 1 / 3),
    ],
)
def test_classification(prediction, truth, score):
    assert scorers.classification(prediction, truth, CLASSES) == pytest.approx(score)


def test_classification_steps_over_the_class_behind_one_that_it_strikes_out():
    """The published loop removes from the list that it walks over: "B" stays, and halves the score."""
    assert scorers.classification("ABC", "ABC", ["A", "B", "ABC"]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("", "Paragraph 7", 0),
        ("Paragraph 7", "Paragraph 7", 1),
        ("7", "Paragraph 7", 1),
        ("Paragraph 7 or 12", "Paragraph 7", 0.5),
        ("Paragraph 17", "Paragraph 7", 0),
        ("Paragraph 07", "Paragraph 7", 0),  # as it is written
        ("7 7 8", "Paragraph 7", 2 / 3),
    ],
)
def test_paragraph_retrieval(prediction, truth, score):
    assert scorers.paragraph_number(prediction, truth) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [("", "6", 0), ("6", "6", 1), ("six", "6", 0), ("6 of 8", "6", 0.5), ("6.0", "6", 0.5), ("-6", "6", 1)],
)
def test_counting(prediction, truth, score):
    assert scorers.count(prediction, truth) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "truth", "score"),
    [
        ("", "return x", 0),
        ("return x", "return x", 1),
        ("\n\nreturn x\nmore", "return x", 1),
        ("# comment\n```python\nreturn x", "return x", 1),
        ("x = 1  # no code\nreturn x", "return x", 1),  # a line with a comment is none
        ("// a\nreturn x", "return x", 1),
        ("# only comments", "return x", 0),
        ("abcd", "bcde", 0.75),  # 2 * 3 / 8
        ("ab", "b", 0.67),  # in hundredths
        ("x", "y", 0),
    ],
)
def test_code_similarity(prediction, truth, score):
    assert scorers.code_similarity(prediction, truth) == pytest.approx(score)


def test_only_the_first_line_of_few_shot_answers_counts():
    assert scorers.first_line("\n\nNumber\nQuestion: more") == "Number"
    assert scorers.first_line("") == ""


# RULER


@pytest.mark.parametrize(
    ("prediction", "references", "every", "some"),
    [
        ("", ["1234567"], 0, 0),
        ("1234567", ["1234567"], 1, 1),
        (" is 1234567.", ["1234567"], 1, 1),
        ("12345678", ["1234567"], 1, 1),  # a substring
        ("123456", ["1234567"], 0, 0),
        ("1234567 and 7654321", ["1234567", "7654321"], 1, 1),
        ("1234567", ["1234567", "7654321"], 0.5, 1),
        ("7654321, 1234567", ["1234567", "7654321"], 1, 1),
        ("1 2 3", ["1", "2", "3", "4"], 0.75, 1),
        ("none", ["1", "2"], 0, 0),
        ("ABCDE FGHIJ", ["abcde", "FGHIJ"], 1, 1),  # any case
        ("VAR abcde", ["ABCDE"], 1, 1),
        ("c31edbbc-F36C", ["C31EDBBC-f36c"], 1, 1),
        ("blue-\nharp", ["blue-harp"], 0, 0),
        ("a\x00b", ["a\nb"], 1, 1),  # control characters are line breaks
        ("\x00\x01", ["x"], 0, 0),
        ("1. apple 2. harp", ["apple", "harp", "moon", "oak"], 0.5, 1),
        ("apple apple", ["apple", "harp"], 0.5, 1),
        ("xyzabc", ["abc", "xyz", "zab"], 1, 1),
        ("   42   ", ["42"], 1, 1),
    ],
)
def test_string_matches(prediction, references, every, some):
    assert scorers.string_match_all(prediction, references) == pytest.approx(every)
    assert scorers.string_match_part(prediction, references) == some


# Intervals


def test_wilson_equals_the_published_values_and_is_not_empty_at_the_ends():
    assert wilson(8, 10) == pytest.approx((0.490, 0.943), abs=5e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.278), abs=5e-4)
    assert wilson(10, 10) == pytest.approx((0.722, 1.0), abs=5e-4)


def test_graded_scores_get_a_bootstrap_interval_around_their_mean():
    scores = [0.2, 0.4, 0.6, 0.8] * 25
    low, high = score_interval(scores)
    assert 0.43 < low < 0.48 and 0.52 < high < 0.57  # 0.5 +- 1.96 * 0.2236 / 10
    assert score_interval([1.0, 0.0]) == wilson(1, 2) and score_interval([]) is None
    assert bootstrap([0.3]) == (0.3, 0.3)
