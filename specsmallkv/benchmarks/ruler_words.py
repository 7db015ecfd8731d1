"""Words that RULER's needles and lists are made of: common English ones, and invented ones where these do not suffice.

The benchmark draws from the word lists of a package; ours are shorter and written for this project.
"""

import random

from .data import SAMPLES

ADJECTIVES, NOUNS = (line.split() for line in (SAMPLES / "words.txt").read_text(encoding="utf-8").splitlines())


def compound(rng: random.Random) -> str:
    """A key of a needle: adjective-noun."""
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def distinct(count: int, rng: random.Random) -> list[str]:
    """So many different words in random order, invented ones if there are not enough others."""
    known = list(dict.fromkeys(ADJECTIVES + NOUNS))
    words = dict.fromkeys(rng.sample(known, min(count, len(known))))
    while len(words) < count:
        syllables = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        words.setdefault(syllables + rng.choice("lnrst"))
    return list(words)
