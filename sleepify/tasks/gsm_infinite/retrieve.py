"""Reading only what a search finds: BM25 over the sentences of a problem, as retrieval-augmented generation does."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

_WORD = re.compile(r"\w+")
_SATURATION, _LENGTH = 1.5, 0.75
"""BM25's k1 and b, at their usual values."""


def scores(sentences: Sequence[str], question: str) -> list[float]:
    """BM25 of every sentence for a question (Robertson and Zaragoza, 2009), with Lucene's idf, which is never negative.

    Over the question's words w: idf(w) f (k1 + 1) / (f + k1 (1 - b + b length / mean length)), f of w in the sentence,
    idf(w) = ln(1 + (n - n_w + 0.5) / (n_w + 0.5)), n_w of n sentences with w.
    """
    counts = [Counter(_words(sentence)) for sentence in sentences]
    lengths = [count.total() for count in counts]
    mean = sum(lengths) / len(lengths)
    found = [0.0] * len(sentences)
    for word in set(_words(question)):
        n_with = sum(word in count for count in counts)
        idf = math.log(1 + (len(sentences) - n_with + 0.5) / (n_with + 0.5))
        for i, count in enumerate(counts):
            f = count[word]
            found[i] += idf * f * (_SATURATION + 1) / (f + _SATURATION * (1 - _LENGTH + _LENGTH * lengths[i] / mean))
    return found


def retrieve(sentences: Sequence[str], question: str, tokens: int, cost: Callable[[str], int]) -> list[str]:
    """The sentences that score best, as many as have room, in the order in which they stand.

    Args:
        sentences: of the text.
        question: what is searched for.
        tokens: room; from the first sentence on that has none, nothing more is taken.
        cost: tokens of a sentence.
    """
    found = scores(sentences, question)
    taken = []
    for i in sorted(range(len(sentences)), key=lambda i: (-found[i], i)):
        tokens -= cost(sentences[i])
        if tokens < 0:
            break
        taken.append(i)
    return [sentences[i] for i in sorted(taken)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
