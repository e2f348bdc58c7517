"""A core in words: sentences, question and worked solution, in the sentence forms of the benchmark."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, product
from random import Random

from sleepify.tasks.gsm_infinite.graph import Core, Definition
from sleepify.tasks.gsm_infinite.structure import Kind, Parameter, named_parts
from sleepify.tasks.gsm_infinite.vocabulary import Theme


@dataclass(frozen=True, slots=True)
class Words:
    """The names that a problem gives to its places and things.

    Args:
        theme: where they come from.
        places: name of place i.
        things: name of thing i.
    """

    theme: Theme
    places: tuple[str, ...]
    things: tuple[str, ...]

    def name(self, parameter: Parameter) -> str:
        """ "iron tug in Tern Bay", "average number of deck hands per iron tug in Tern Bay", "total number of ..."."""
        place = self.places[parameter.place]
        if parameter.kind is Kind.COUNT:
            return f"{self.things[parameter.thing]} in {place}"
        if parameter.kind is Kind.AVERAGE:
            return f"average number of {self.theme.each} per {self.things[parameter.thing]} in {place}"
        noun = self.theme.things_total if parameter.kind is Kind.TOTAL else self.theme.each_total
        return f"total number of {noun} in {place}"

    def reference(self, parameter: Parameter) -> str:
        """The name as sentences use it, with its article."""
        return f"the {'number of ' if parameter.kind is Kind.COUNT else ''}{self.name(parameter)}"

    def question(self, parameter: Parameter) -> str:
        """What is asked about a parameter."""
        if parameter.kind is Kind.COUNT:
            return f"How many {self.things[parameter.thing]} does {self.places[parameter.place]} have?"
        return f"What is the {self.name(parameter)}?"


def draw_words(rng: Random, theme: Theme, n_places: int, n_things: int) -> Words:
    """Names from one group of places and one of things.

    Raises:
        ValueError: no group has as many names.
    """
    drawn = []
    for what, groups, number in (("places", theme.places, n_places), ("things", theme.things, n_things)):
        large = [group for group in groups if len(group) >= number]
        if not large:
            raise ValueError(f"theme {theme.name!r}: expected a group of {number} {what}, got {list(map(len, groups))}")
        drawn.append(tuple(rng.sample(rng.choice(large), number)))
    return Words(theme, *drawn)


def combine(references: list[str], difference: bool) -> str:
    """A copy, a sum, or a difference of references."""
    if len(references) == 1:
        return references[0]
    if len(references) == 2:
        return f"the {'difference between' if difference else 'sum of'} {references[0]} and {references[1]}"
    return f"the sum of {', '.join(references[:-1])}, and {references[-1]}"


def _sentence(words: Words, parameter: Parameter, definition: Definition) -> str:
    parts = [] if definition.constant is None else [str(definition.constant)]
    if definition.sources:
        parts.append(combine([words.reference(source) for source in definition.sources], definition.difference))
    return f"{_start(words, parameter)} equals {(' times ' if definition.times else ' plus ').join(parts)}."


def _start(words: Words, parameter: Parameter) -> str:
    reference = words.reference(parameter)
    return reference[0].upper() + reference[1:]


def sentences(core: Core, words: Words) -> list[str]:
    """The sentences of all instances, and in reverse mode of what is told, each with its full stop; unshuffled."""
    result = [_sentence(words, p, definition) for p, definition in core.definitions.items() if p != core.unknown]
    if core.unknown is not None:
        existence = " exists, and its number" if core.unknown.kind is Kind.COUNT else ""
        result.append(f"{_start(words, core.unknown)}{existence} is greater than 0.")
        result.append(f"{_start(words, core.order[-1])} equals {core.values[core.order[-1]]}.")
    return result


def solution(rng: Random, core: Core, words: Words) -> str:
    """The steps along the path, ending in "Answer: <integer>."; in reverse mode with the unknown as x.

    Args:
        rng: draws the letters.
        core: what is solved.
        words: its names.
    """
    letters = [c for c in string.ascii_letters if c != "x" or core.unknown is None]
    rng.shuffle(letters)
    # Long solutions run out of letters and go on with pairs.
    writer = _Writer(core, chain(letters, ("".join(pair) for pair in product(letters, letters))))
    steps = [f"Define {words.name(p)} as {writer.define(p)}." for p in core.order]
    if core.unknown is None:
        return " ".join([*steps, f"Answer: {core.answer}."])
    last = core.order[-1]
    told, left = core.values[last], writer.values[writer.letters[last]]
    slope, offset = left
    return " ".join(
        [
            "One value is not given, so we call it x and solve an equation.",
            *steps,
            f"The text says that {writer.letters[last]} is {told}, so {_written(left)} = {told}.",
            f"Then {_written((slope, 0))} = {told - offset} and x = {told - offset} / {slope} = {core.answer}.",
            f"Answer: {core.answer}.",
        ]
    )


Affine = tuple[int, int]
"""(slope, offset) of a value in the unknown: graph.py keeps problems whose every value has this form."""


def _written(value: Affine, operand: bool = False) -> str:
    slope, offset = value
    if slope == 0:
        return str(offset) if offset >= 0 or not operand else f"({offset})"
    term = "x" if slope == 1 else f"{slope}*x"
    text = term if offset == 0 else f"{term} {'+' if offset > 0 else '-'} {abs(offset)}"
    return f"({text})" if operand and text != "x" else text


class _Writer:
    """Writes the step of one parameter after the other, remembering letters and values."""

    def __init__(self, core: Core, fresh: Iterator[str]) -> None:
        self.core = core
        self.fresh = fresh
        self.letters: dict[Parameter, str] = {}
        self.values: dict[str, Affine] = {}

    def define(self, parameter: Parameter) -> str:
        """ "a; b = c = 5; so a = 2 + b = 2 + 5 = 7": the letter, then how its value comes about."""
        letter = "x" if parameter == self.core.unknown else next(self.fresh)
        steps = self._steps(parameter, letter)
        self.letters[parameter] = letter
        last = steps[-1] if parameter == self.core.unknown else f"so {steps[-1]}"
        return "; ".join([letter, *steps[:-1], last])

    def _steps(self, parameter: Parameter, letter: str) -> list[str]:
        if parameter == self.core.unknown:
            self.values[letter] = (1, 0)
            return [f"{letter} is what we look for"]
        definition = self.core.definitions.get(parameter)
        sources = definition.sources if definition else named_parts(self.core.structure, parameter)
        operands = [self.letters[source] for source in sources]
        if definition is None:
            if parameter.kind is not Kind.GRAND_TOTAL:
                return self._chain(letter, operands, "+")
            pairs = list(zip(operands[::2], operands[1::2], strict=True))
            if len(pairs) == 1:
                return [self._apply(letter, *pairs[0], "*")]
            products = [next(self.fresh) for _ in pairs]
            steps = [self._apply(name, *pair, "*") for name, pair in zip(products, pairs, strict=True)]
            return steps + self._chain(letter, products, "+")
        sign = "-" if definition.difference else "+"
        if definition.constant is None:
            return self._chain(letter, operands, sign)
        if not operands:
            self.values[letter] = (0, definition.constant)
            return [f"{letter} = {definition.constant}"]
        inner = next(self.fresh)
        constant = str(definition.constant)
        self.values[constant] = (0, definition.constant)
        steps = self._chain(inner, operands, sign)
        return [*steps, self._apply(letter, constant, inner, "*" if definition.times else "+")]

    def _chain(self, letter: str, operands: list[str], sign: str) -> list[str]:
        """Combine from left to right, with a new letter for every result but the last."""
        if len(operands) == 1:
            self.values[letter] = self.values[operands[0]]
            return [f"{letter} = {operands[0]} = {_written(self.values[letter])}"]
        steps, left = [], operands[0]
        for position, right in enumerate(operands[1:], start=2):
            result = letter if position == len(operands) else next(self.fresh)
            steps.append(self._apply(result, left, right, sign))
            left = result
        return steps

    def _apply(self, letter: str, left: str, right: str, sign: str) -> str:
        (a, b), (c, d) = self.values[left], self.values[right]
        value = (a * d + b * c, b * d) if sign == "*" else (a + c, b + d) if sign == "+" else (a - c, b - d)
        self.values[letter] = value
        first = _written((a, b), operand=sign == "*")
        second = _written((c, d), operand=sign != "+" or d < 0)
        return f"{letter} = {left} {sign} {right} = {first} {sign} {second} = {_written(value)}"
