"""The published scorers as pure functions: a prediction and what is right, to a score from 0 to 1.

They know no models and no files. Sources: GSM8K and BBH as in docs/benchmarks.md; LongBench's `metrics.py` with the
`rouge` and `fuzzywuzzy` packages that it calls; RULER's `eval/synthetic/constants.py`. Where published code has a
quirk that changes numbers, we have it too and say so.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

NUMBER = re.compile(r"(?<![\w)])([-−]?)\$?([-−]?)(\d{1,3}(?:,\d{3})+(?!\d)|\d+)(\.\d+)?")
DIGITS = re.compile(r"\d+")
CONTROL = re.compile(r"[\x00-\x1f]")
ROUGE_EPSILON = 1e-8  # in the denominator of the rouge package's F


# --- GSM8K, BBH ----------------------------------------------------------------------------------------------------


def last_number(text: str) -> str | None:
    """The last number, with commas, currency signs and closing zeros left out: "$1,250.00." is "1250"; else None.

    A minus counts unless a digit, letter or bracket stands before it: "16-3" ends with 3.
    """
    found = list(NUMBER.finditer(text))
    if not found:
        return None
    before, after, whole, fraction = found[-1].groups()
    value = Decimal(whole.replace(",", "") + (fraction or ""))
    plain = f"{value.normalize():f}"
    return f"-{plain}" if (before or after) and value else plain


def answer_after(text: str, phrase: str = "answer is") -> str | None:
    """What stands in the first line behind the phrase, without a closing full stop; None without the phrase."""
    _, found, rest = text.partition(phrase)
    answer = rest.lstrip(" :").partition("\n")[0].strip()
    return (answer.removesuffix(".").strip() or None) if found else None


# --- LongBench -----------------------------------------------------------------------------------------------------


def normalized(text: str) -> str:
    """Lowercase, then without ASCII punctuation, then without articles, then with single spaces; in that order."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def qa_f1(prediction: str, truth: str) -> float:
    """F1 of the bags of normalised words."""
    ours, theirs = normalized(prediction).split(), normalized(truth).split()
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def rouge_l(prediction: str, truth: str) -> float:
    """Summary-level ROUGE-L F of the `rouge` package 1.0.1, with its default of counting equal words once.

    Sentences end at full stops; numerator: distinct words in the longest common subsequences of any pair of
    sentences. (The package recurses over a sentence and LongBench scores 0 where that overflows; we do not.)
    """
    ours, theirs = _sentences(prediction), _sentences(truth)
    if not ours or not theirs:
        return 0.0
    common = {word for their in theirs for our in ours for word in common_subsequence(their, our)}
    recall = len(common) / len({word for words in theirs for word in words})
    precision = len(common) / len({word for words in ours for word in words})
    return 2 * precision * recall / (precision + recall + ROUGE_EPSILON)


def _sentences(text: str) -> list[list[str]]:
    """Words of each piece between full stops; a piece of blanks has one empty word, as in the package."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """A longest common subsequence; of several, the one that shortens `right` first from the end."""
    lengths = [[0] * (len(right) + 1)]
    for word in left:
        above, row = lengths[-1], [0]
        for j, other in enumerate(right):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    i, j, words = len(left), len(right), []
    while i and j:
        if left[i - 1] == right[j - 1]:
            words.append(left[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words[::-1]


def classification(prediction: str, truth: str, classes: Sequence[str]) -> float:
    """1 / number of classes named in the prediction, if the right one is among them.

    Classes that are parts of the right one's name do not count; the published loop steps over the class behind each
    that it strikes out, and so do we.
    """
    named, index = [name for name in classes if name in prediction], 0
    while index < len(named):
        if named[index] in truth and named[index] != truth:
            del named[index]
        index += 1
    return 1 / len(named) if truth in named else 0.0


def paragraph_number(prediction: str, truth: str) -> float:
    """Share of the prediction's numbers that are the N of the truth's "Paragraph N"."""
    right = re.search(r"Paragraph (\d+)", truth)
    return count(prediction, right[1]) if right else 0.0


def count(prediction: str, truth: str) -> float:
    """Share of the prediction's numbers that are the right one, compared as they are written."""
    numbers = DIGITS.findall(prediction)
    return numbers.count(str(truth)) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, truth: str) -> float:
    """fuzzywuzzy's ratio, in hundredths, of the first line of code and the right one.

    A line with a backtick, # or // is none. The ratio is difflib's, which the package falls back on.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == truth:
        return 1.0
    return round(100 * difflib.SequenceMatcher(None, line, truth).ratio()) / 100 if line and truth else 0.0


def first_line(prediction: str) -> str:
    """What LongBench judges of trec, triviaqa and samsum."""
    return prediction.lstrip("\n").split("\n")[0]


# --- RULER ---------------------------------------------------------------------------------------------------------


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the prediction, in any case; control characters are line breaks."""
    text = CONTROL.sub("\n", prediction.strip()).strip().lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 if any reference occurs in the prediction."""
    text = CONTROL.sub("\n", prediction.strip()).strip().lower()
    return float(any(reference.lower() in text for reference in references))
