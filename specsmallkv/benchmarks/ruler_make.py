"""RULER's synthetic families (Hsieh et al., 2024), made on the spot: needles, variable tracking, word extraction.

Templates are quoted from the benchmark's `data/synthetic/constants.py` and its needle and noise sentences from the
generators beside it. Every maker takes a size (of the haystack, in units of its own) and a generator of random
numbers. What differs from the benchmark stands in docs/benchmarks.md.
"""

import random
import re
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from .ruler_words import compound, distinct

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NEEDLE_HEAD = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
NEEDLE_QUESTION = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
NEEDLE_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
CHAIN_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
CHAIN_QUESTION = "\nQuestion: Find all variables that are assigned the value {query} in the text above."
CHAIN_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {query}, they are: "
)
COMMON_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
COMMON_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FREQUENT_HEAD = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
FREQUENT_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FREQUENT_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
DEPTHS = [round(100 * i / 39) for i in range(40)]  # where needles lie in an essay, in percent of its sentences
ZETA_2 = 1.6449340668482264  # makes the frequencies k**-2 of coded words sum to 1
LONG = 4096  # tokens from which the word lists repeat their words more often


@dataclass(frozen=True)
class Made:
    """The prompt's text in parts, and all the answers that a full score names."""

    context: str
    question: str
    prefix: str
    outputs: list[str]


@dataclass(frozen=True)
class Needles:
    """num_keys needles with num_values values each; num_queries of the keys are asked for."""

    haystack: str  # noise, essay or needle
    keys: str  # words or uuids
    values: str  # numbers or uuids
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def make(self, size: int, rng: random.Random, essay: list[str]) -> Made:
        """size: words of an essay, else sentences of the haystack."""
        keys = [RANDOM[self.keys](rng) for _ in range(max(self.num_keys, self.num_queries))]
        values = {key: [RANDOM[self.values](rng) for _ in range(self.num_values)] for key in keys}
        needles = [self._needle(key, value) for key, own in values.items() for value in own]
        rng.shuffle(needles)
        if self.haystack == "essay":
            text = among_sentences(needles, words_of(essay, size), rng)
        else:
            distractor = partial(self._distractor, rng) if self.haystack == "needle" else lambda: NOISE
            text = "\n".join(inserted(needles, [distractor() for _ in range(max(size, len(needles)))], rng))
        asked = rng.sample(keys, self.num_queries)
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        parts = [self._worded(part, query) for part in (NEEDLE_HEAD, NEEDLE_QUESTION, NEEDLE_PREFIX)]
        return Made(parts[0] + text, parts[1], parts[2], [value for key in asked for value in values[key]])

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)

    def _distractor(self, rng: random.Random) -> str:
        return self._needle(RANDOM[self.keys](rng), RANDOM[self.values](rng))

    def _worded(self, part: str, query: str) -> str:
        """In the singular if there is one answer, by the benchmark's own replacements."""
        if self.num_queries * self.num_values > 1:
            return part.format(kind=self.values, query=query)
        singular = part.replace("Some", "A").replace("are all", "is").replace("are", "is")
        return singular.format(kind=self.values[:-1], query=query)


def number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def identifier(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


RANDOM: dict[str, Callable[[random.Random], str]] = {"numbers": number, "words": compound, "uuids": identifier}


def words_of(essay: list[str], size: int) -> str:
    """The first `size` words, from the start again after the last."""
    return " ".join((essay * (size // len(essay) + 1))[:size])


def among_sentences(needles: list[str], text: str, rng: random.Random) -> str:
    """Needles between the text's sentences, at different depths."""
    sentences, parts, last = re.split(r"(?<=[.!?])\s+", text), [], 0
    depths = sorted(rng.sample(DEPTHS, len(needles)))
    for depth, needle in zip(depths, needles, strict=True):
        border = int(len(sentences) * depth / 100)
        parts += [*sentences[last:border], needle]
        last = border
    return " ".join(parts + sentences[last:])


def inserted(items: list[str], sentences: list[str], rng: random.Random) -> list[str]:
    """The items in their order, each before another one of the sentences."""
    places = dict(zip(sorted(rng.sample(range(len(sentences)), len(items))), items, strict=True))
    return [line for i, sentence in enumerate(sentences) for line in ([places[i]] if i in places else []) + [sentence]]


def variable_tracking(size: int, rng: random.Random, essay: list[str], num_hops: int = 4) -> Made:
    """One chain of num_hops + 1 variables among `size` noise sentences, after a short solved example."""
    shown = _chain(10, rng, num_hops, letters=3)
    solved = "".join((shown.context, shown.question, shown.prefix, " ", " ".join(shown.outputs)))
    made = _chain(size, rng, num_hops, letters=5)
    return Made(f"{solved}\n\n{made.context}", made.question, made.prefix, made.outputs)


def _chain(size: int, rng: random.Random, num_hops: int, letters: int) -> Made:
    names: dict[str, None] = {}
    while len(names) <= num_hops:
        names.setdefault("".join(rng.choices(string.ascii_uppercase, k=letters)))
    variables, value = list(names), str(rng.randint(10000, 99998))
    links = [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    lines = inserted([f"VAR {variables[0]} = {value}", *links], [NOISE] * max(size, len(variables)), rng)
    prefix = CHAIN_PREFIX.format(count=num_hops + 1, query=value)
    return Made(CHAIN_HEAD + "\n".join(lines), CHAIN_QUESTION.format(query=value), prefix, variables)


def common_words(size: int, rng: random.Random, essay: list[str], length: int) -> Made:
    """`size` different words, ten of them more often than the others, after a solved example."""
    shown, repeats = ((20, 3, 1), (6, 1)) if length < LONG else ((40, 10, 3), (30, 3))
    context, answers = _word_list(*shown, rng)
    solved = " ".join(f"{i}. {word}" for i, word in enumerate(answers, start=1))
    example = f"{COMMON_HEAD}{context}{COMMON_QUESTION}{COMMON_PREFIX} {solved}\n"
    context, answers = _word_list(max(size, 11), *repeats, rng)
    return Made(example + COMMON_HEAD + context, COMMON_QUESTION, COMMON_PREFIX, answers)


def _word_list(count: int, often: int, seldom: int, rng: random.Random) -> tuple[str, list[str]]:
    words = distinct(count, rng)
    listed = words[:10] * often + words[10:] * seldom
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1)), words[:10]


def frequent_words(size: int, rng: random.Random, essay: list[str], length: int) -> Made:
    """About `size` coded words whose frequencies fall with the square of their rank; the first is noise, `...`."""
    size, vocabulary = max(size, 30), {"...": None}
    while len(vocabulary) < max(length // 50, 8):
        vocabulary.setdefault("".join(rng.choices(string.ascii_lowercase, k=6)))
    while _times(size, 4) == _times(size, 5):  # else the third place would be shared
        size += 1
    words = list(vocabulary)
    listed = [word for rank, word in enumerate(words, start=1) for _ in range(_times(size, rank))]
    rng.shuffle(listed)
    return Made(FREQUENT_HEAD + " ".join(listed), FREQUENT_QUESTION, FREQUENT_PREFIX, words[1:4])


def _times(size: int, rank: int) -> int:
    return int(size / rank**2 / ZETA_2)
