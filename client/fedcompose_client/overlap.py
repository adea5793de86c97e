"""Which runs of words two collections of texts share, and whether rows that were trained on are repeated more often.

Texts become words without case, accents and punctuation; a run of n words becomes a number of 64 bits. Nothing is
stored: the numbers live as long as the review. A text of fewer than n words has no run, and is not found this way.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from math import comb

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.uint64]  # of n words each

# Scripts that write syllables or words give a word for every character: kana, Chinese characters, Hangul.
SYLLABIC = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{SYLLABIC}]|[^\W_{SYLLABIC}]+")
# Letters that Unicode does not take apart, as they are written without their strokes and ligatures.
_LETTERS = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th"})
_STEP = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


def words(text: str) -> list[str]:
    """The words of a text, in the form in which they are compared."""
    plain = unicodedata.normalize("NFKD", text).casefold().translate(_LETTERS)
    seen = "".join(each for each in plain if not unicodedata.combining(each) and unicodedata.category(each) != "Cf")
    return _WORD.findall(unicodedata.normalize("NFC", seen))


def runs(text: str, n: int) -> Runs:
    """Every run of `n` words of a text, in order."""
    hashed = np.array([_hash(word) for word in words(text)], dtype=np.uint64)
    found = np.zeros(max(0, len(hashed) - n + 1), dtype=np.uint64)
    for offset in range(n):
        found = found * _STEP + hashed[offset : offset + len(found)]
    return found


def all_runs(texts: Iterable[str], n: int) -> Runs:
    """The distinct runs of many texts, sorted."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *(runs(text, n) for text in texts)]))


def shares_a_run(found: Runs, among: Runs) -> bool:
    """Whether one of the runs is among others, which are sorted."""
    if not len(found) or not len(among):
        return False
    places = np.searchsorted(among, found).clip(max=len(among) - 1)
    return bool((among[places] == found).any())


def repeated_rows(rows: Sequence[Sequence[str]], shown: Runs, public: Runs, n: int) -> int:
    """How many rows, each of several texts, have a run in `shown` that is not `public`."""
    secret = np.setdiff1d(shown, public)
    return sum(any(shares_a_run(runs(text, n), secret) for text in row) for row in rows)


def excess_p(train_hits: int, train: int, held_out_hits: int, held_out: int) -> float:
    """Fisher's exact test, one-sided: how likely so many of the hits fall on trained rows if training had no part."""
    hits, total = train_hits + held_out_hits, train + held_out
    more = range(train_hits, min(hits, train) + 1)
    return sum(comb(train, k) * comb(held_out, hits - k) for k in more) / comb(total, hits)


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
