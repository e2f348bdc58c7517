"""Texts whose facts come back windows later: who is called what, told once, named again after sentences about nothing.

A document is one paragraph. It begins with people, each a first name with a surname drawn for this document; then come
sentences that tell nothing, and among them every person is named three times more, at places drawn at random. The first
name is given; that the right surname follows can be known from the document alone. Pure in seed and index.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

FIRST = "Ada Bela Carl Dora Emil Fay Gus Hana Ivo Jana Kurt Lena Max Nora Otto Pia".split()
SURNAMES = "Adler Berg Conti Dahl Evers Frost Grau Holm Iversen Jung Kern Lund Moser Nagel Orban Prins".split()
DEEDS = ("came", "left", "waited", "slept", "sang", "sat", "spoke", "read")
FILLER = (
    ("old", "small", "dark", "wide", "quiet", "green", "cold", "far"),
    ("house", "river", "road", "garden", "tower", "field", "bridge", "wood"),
    ("lay", "stood", "loomed", "shone", "rested", "remained"),
)
PEOPLE, MENTIONS, SENTENCES = 3, 3, 4


def document(seed: int, index: int) -> str:
    """One paragraph of 64 words, the people in its first 12."""
    draw = Random(f"{seed}/{index}")
    names = list(zip(draw.sample(FIRST, PEOPLE), draw.sample(SURNAMES, PEOPLE), strict=True))

    def person(name: tuple[str, str]) -> str:
        return f"{name[0]} {name[1]} {draw.choice(DEEDS)} ."

    again = [person(name) for name in names for _ in range(MENTIONS)]
    rest = [" ".join(draw.choice(words) for words in FILLER) + " ." for _ in range(SENTENCES)] + again
    draw.shuffle(rest)
    return " ".join([*map(person, names), *rest])


def write_documents(path: Path, seed: int, count: int) -> None:
    """A text file of paragraphs."""
    path.write_text("\n\n".join(document(seed, index) for index in range(count)) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Every word a token."""
    said = [*FIRST, *SURNAMES, *DEEDS, *(word for words in FILLER for word in words), "."]
    words = ["<end>", *dict.fromkeys(said)]
    plain = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<end>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<end>", eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer
