"""A tokenizer of whole words, for small models and tests: a vocabulary's words, digits and punctuation."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable

from sleepify.tasks.gsm_infinite.vocabulary import Theme

_PIECES = re.compile(r"\d|[^\W\d]+(?:['-][^\W\d]+)*|[^\w\s]")
_FORMS = """The the number average total of per in equals plus times sum difference between and exists its is
    greater than How many does have What Question Problem Answer Solution Define as so One value not given we call it
    x an equation solve look for what text says that Then"""


class WordTokenizer:
    """Splits text into words, single digits and punctuation; spaces are not kept.

    Args:
        themes: whose names must be known, besides the words of all sentence forms.
    """

    eos_token_id = 0

    def __init__(self, themes: Iterable[Theme]) -> None:
        names = [piece for theme in themes for name in theme.names() for piece in _PIECES.findall(name)]
        known = [*_FORMS.split(), *string.digits, *string.punctuation, *string.ascii_letters, *names]
        self.tokens = ["<end>", *dict.fromkeys(known)]
        self.ids = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids; ``add_special_tokens`` appends the end token.

        Raises:
            ValueError: a word that is in no theme.
        """
        pieces = _PIECES.findall(text)
        unknown = sorted({piece for piece in pieces if piece not in self.ids})
        if unknown:
            raise ValueError(f"expected words of the tokenizer's themes, got {unknown[:5]}")
        return [self.ids[piece] for piece in pieces] + [self.eos_token_id] * add_special_tokens

    def decode(self, ids: Iterable[int]) -> str:
        """The words, joined by spaces."""
        return " ".join(self.tokens[number] for number in ids)
