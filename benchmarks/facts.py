"""Texts whose facts come back windows later: who is called what, told once, named again after sentences about nothing.

A document is one paragraph. It begins with people, each a first name with a surname drawn for this document; then come
sentences that tell nothing, and among them every person is named four times more, at places drawn at random. The first
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
FILLER = ("rain fell all day .", "nobody came by here .", "two dogs barked far .", "then night was long .")
PEOPLE, MENTIONS, SENTENCES = 3, 4, 4


def document(seed: int, index: int) -> str:
    """One paragraph of 65 words, the people in its first 9."""
    draw = Random(f"{seed}/{index}")
    names = list(zip(draw.sample(FIRST, PEOPLE), draw.sample(SURNAMES, PEOPLE), strict=True))
    told = [f"{first} {last} ." for first, last in names]
    rest = [*(draw.choice(FILLER) for _ in range(SENTENCES)), *told * MENTIONS]
    draw.shuffle(rest)
    return " ".join([*told, *rest])


def write_documents(path: Path, seed: int, count: int) -> None:
    """A text file of paragraphs."""
    path.write_text("\n\n".join(document(seed, index) for index in range(count)) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Every word a token."""
    said = " ".join([*FIRST, *SURNAMES, *FILLER]).split()
    words = ["<end>", *dict.fromkeys(said)]
    plain = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="<end>"))
    plain.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<end>", eos_token="<end>", pad_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer
