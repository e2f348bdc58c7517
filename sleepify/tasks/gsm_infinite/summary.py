"""Reading with a running summary instead of a memory: of all sentences so far, those that say most of what is said."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from fractions import Fraction

_WORD = re.compile(r"\w+")


def summarise(sentences: Iterable[str], tokens: int, cost: Callable[[str], int]) -> list[str]:
    """A running extract in SumBasic's measure (Nenkova and Vanderwende, 2005), which knows no question.

    Sentence after sentence is read and kept; as long as there is no room, the one is dropped whose words are, on
    average, the least frequent in all that was read. What was dropped does not come back.

    Args:
        sentences: of the text, in order.
        tokens: room.
        cost: tokens of a sentence.
    """
    counts: Counter[str] = Counter()
    kept: list[tuple[str, list[str]]] = []
    for sentence in sentences:
        words = _WORD.findall(sentence.lower())
        counts.update(words)
        kept.append((sentence, words))
        while sum(cost(each) for each, _ in kept) > tokens:
            # Sums of counts over numbers of words, compared without rounding; of equal ones the older goes.
            kept.remove(min(kept, key=lambda each: Fraction(sum(counts[word] for word in each[1]), len(each[1]) or 1)))
    return [sentence for sentence, _ in kept]
