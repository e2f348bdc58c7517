"""An independent reading of a problem: it sees the text alone, in any theme's words.

It parses every sentence, then follows the question back. In reverse mode the unknown stays a polynomial in x until the
sentence that tells a total closes the equation. What the text leaves open or contradicts is an error, so a problem
that this solver solves to its stated answer is a sound one.

    >>> solve("The number of ketch in Tern Bay equals 2. The number of dory in Tern Bay equals 3 times "
    ...       "the number of ketch in Tern Bay. ", "How many dory does Tern Bay have?").answer
    6
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

from sleepify.tasks.gsm_infinite.names import Cuts

_QUESTION = re.compile(r"(?:How many (?P<thing>.+) does (?P<place>.+) have|What is the (?P<name>.+))\?\s*")
_UNKNOWN = re.compile(r"The (?P<name>.+?)(?: exists, and its number)? is greater than 0")
_SENTENCE = re.compile(r"The (?P<name>.+?) equals (?P<right>.+)")
_NUMBER = r"(?:average |total )?number of "
_NAME = re.compile(r"(?:(?P<kind>average |total )?number of )(?P<body>.+ in .+)")
# Names may contain full stops ("St. Ives"), commas and "and", so a sentence or a name ends only where the next begins.
_NEXT_SENTENCE = re.compile(rf"\.\s+(?=The {_NUMBER})")
_NEXT_NAME = re.compile(rf",? and (?=the {_NUMBER})|, (?=the {_NUMBER})")
_FACTOR = re.compile(r"(?P<constant>\d+)(?: (?P<verb>plus|times) (?P<rest>.+))?")

Polynomial = tuple[Fraction, ...]
"""Coefficients of 1, x, x^2 ..., without trailing zeros."""


class UnsolvableError(ValueError):
    """The text does not determine the answer: not of the family, underdetermined, circular or contradictory."""


class Name(NamedTuple):
    """A quantity as the text writes it: kind "" (a count), "average " or "total "; for averages ``noun`` is
    "<what> per <thing>". Not cut yet: thing and place together are ``noun``, and ``place`` is empty."""

    kind: str
    noun: str
    place: str

    def body(self) -> str:
        """Thing and place together, as written."""
        return f"{self.noun} in {self.place}" if self.place else self.noun

    def cut(self, cuts: Cuts) -> Name:
        """Thing and place apart."""
        return self if self.place else Name(self.kind, *cuts(self.noun))

    def question(self) -> str:
        """What asks for it; thing and place must be apart."""
        if not self.kind:
            return f"How many {self.noun} does {self.place} have?"
        return f"What is the {self.kind}number of {self.noun} in {self.place}?"


@dataclass(frozen=True, slots=True)
class Statement:
    """One sentence's right-hand side: ``constant (+ or *) (sum or difference of sources)``."""

    sources: tuple[Name, ...]
    constant: int | None
    times: bool
    difference: bool


@dataclass(frozen=True, slots=True)
class Parsed:
    """Every sentence of a problem.

    Args:
        statements: per quantity its sentences, in the order of the text (more than one where its value is told too).
        unknowns: quantities said to be greater than 0, nothing more.
        query: what the question asks for.
    """

    statements: dict[Name, list[Statement]]
    unknowns: list[Name]
    query: Name

    def names(self) -> Iterator[Name]:
        """Every quantity that is written anywhere, repeats included."""
        yield self.query
        yield from self.unknowns
        for name, statements in self.statements.items():
            yield name
            for statement in statements:
                yield from statement.sources

    def cut(self, cuts: Cuts) -> Parsed:
        """The same with things and places apart in every name."""
        statements = {
            name.cut(cuts): [replace(said, sources=tuple(source.cut(cuts) for source in said.sources)) for said in each]
            for name, each in self.statements.items()
        }
        return Parsed(statements, [name.cut(cuts) for name in self.unknowns], self.query.cut(cuts))


@dataclass(frozen=True, slots=True)
class Solution:
    """What the text says.

    Args:
        answer: the number asked for.
        operations: parameters on the path plus binary operations between them.
        arithmetic: the binary operations alone.
        path: the quantities used, each after what it needs.
        reverse: whether an unknown had to be found.
        chain: sentences in the longest chain of them, each of which needs the one before, that the answer ends.
    """

    answer: int
    operations: int
    arithmetic: int
    path: tuple[Name, ...]
    reverse: bool
    chain: int


def parse(problem: str, question: str) -> Parsed:
    """Read all sentences and the question.

    Raises:
        UnsolvableError: a sentence that is not of the family.
    """
    parsed = parse_uncut(problem, question)
    return parsed.cut(Cuts(map(Name.body, parsed.names())))


def parse_uncut(problem: str, question: str) -> Parsed:
    """The same without telling things from places, for a reader who does that with more than one text.

    Raises:
        UnsolvableError: a sentence that is not of the family.
    """
    asked = _QUESTION.fullmatch(question.strip())
    if asked is None:
        raise UnsolvableError(f"expected 'How many ... does ... have?' or 'What is the ...?', got {question!r}")
    query = _parse_name(asked["name"]) if asked["name"] else Name("", asked["thing"], asked["place"])
    statements, unknowns = _parse_sentences(problem)
    return Parsed(statements, unknowns, query)


def _parse_sentences(problem: str) -> tuple[dict[Name, list[Statement]], list[Name]]:
    statements: dict[Name, list[Statement]] = {}
    unknowns: list[Name] = []
    for sentence in split_sentences(problem):
        if unknown := _UNKNOWN.fullmatch(sentence):
            unknowns.append(_parse_name(unknown["name"]))
        elif match := _SENTENCE.fullmatch(sentence):
            statements.setdefault(_parse_name(match["name"]), []).append(_parse_right(match["right"]))
        else:
            raise UnsolvableError(f"expected 'The ... equals ...' or '... is greater than 0', got {sentence!r}")
    return statements, unknowns


def split_sentences(problem: str) -> list[str]:
    """The sentences of a problem's text, without the full stops that end them (a name may hold others)."""
    return _NEXT_SENTENCE.split(problem.strip().removesuffix("."))


def _parse_name(text: str) -> Name:
    match = _NAME.fullmatch(text.removeprefix("the ").strip())
    if match is None:
        raise UnsolvableError(f"expected '[average|total] number of ... in ...', got {text!r}")
    return Name(match["kind"] or "", match["body"], "")


def _parse_right(text: str) -> Statement:
    constant, times, rest = None, False, text
    if match := _FACTOR.fullmatch(text):
        constant, times, rest = int(match["constant"]), match["verb"] == "times", match["rest"]
        if rest is None:
            return Statement((), constant, False, False)
    difference = rest.startswith("the difference between ")
    if difference or rest.startswith("the sum of "):
        listed = rest.removeprefix("the difference between ").removeprefix("the sum of ")
        sources = _NEXT_NAME.split(listed)
        if len(sources) < 2 or difference and len(sources) != 2:
            raise UnsolvableError(f"expected two quantities or more, got {rest!r}")
    else:
        sources = [rest]
    return Statement(tuple(map(_parse_name, sources)), constant, times, difference)


def solve(problem: str, question: str) -> Solution:
    """Solve from the text.

    Args:
        problem: the sentences, in any order.
        question: "How many X does L have?" or "What is the ...?".

    Raises:
        UnsolvableError: with the reason, if the text is not of the family or does not determine an integer.
    """
    parsed = parse(problem, question)
    reader = _Reader(parsed)
    if not parsed.unknowns:
        value = reader.value(parsed.query)
        answer = value[0] if value else Fraction(0)
        return _solution(reader, answer, reverse=False)
    unknowns = set(parsed.unknowns)
    if len(unknowns) > 1:
        raise UnsolvableError(f"expected one unknown, got {sorted(unknowns)}")
    found = {reader.root(name, told) for name, told in reader.told.items()} - {None}
    if len(found) != 1:
        raise UnsolvableError(f"expected the told values to determine the unknown, got {sorted(map(str, found))}")
    x = next(iter(found))
    assert x is not None
    if x <= 0:
        raise UnsolvableError(f"the unknown is said to be greater than 0 but the equation gives {x}")
    value = reader.value(parsed.query)
    return _solution(reader, sum((c * x**power for power, c in enumerate(value)), Fraction(0)), reverse=True)


def questions_of(problem: str) -> list[str]:
    """A question about every quantity that a sentence defines, in the order of the text.

    Raises:
        UnsolvableError: a sentence that is not of the family.
    """
    statements = _parse_sentences(problem)[0]
    named = [name for each in statements for name in (each, *(s for said in statements[each] for s in said.sources))]
    cuts = Cuts(map(Name.body, named))
    return [name.cut(cuts).question() for name in statements]


def _solution(reader: _Reader, answer: Fraction, reverse: bool) -> Solution:
    if answer.denominator != 1:
        raise UnsolvableError(f"expected an integer, the text gives {answer}")
    operations = reader.arithmetic + len(reader.values)
    chain = max(reader.chains.values())
    return Solution(int(answer), operations, reader.arithmetic, tuple(reader.values), reverse, chain)


@dataclass(slots=True)
class _Reader:
    """Follows quantities back to literals, remembering what it used."""

    parsed: Parsed
    values: dict[Name, Polynomial] = field(default_factory=dict)
    chains: dict[Name, int] = field(default_factory=dict)
    arithmetic: int = 0
    defined: dict[Name, Statement] = field(default_factory=dict)
    told: dict[Name, int] = field(default_factory=dict)
    _open: set[Name] = field(default_factory=set)
    _twice: set[Name] = field(default_factory=set)
    _things: dict[str, list[str]] = field(default_factory=dict)
    _averages: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        unknowns = set(self.parsed.unknowns)
        for name, statements in self.parsed.statements.items():
            told = name.kind == "total " or name in unknowns
            for statement in statements:
                literal = not statement.sources and statement.constant is not None
                if literal and (told or len(statements) > 1 and name not in self.told):
                    self.told[name] = statement.constant or 0
                elif told or name in self.defined:
                    self._twice.add(name)
                else:
                    self.defined[name] = statement
        for name in self.parsed.names():
            if name.kind == "average ":
                each, thing = name.noun.split(" per ", 1)
                self._averages.add(each)
            elif name.kind == "":
                thing = name.noun
            else:
                continue
            if thing not in self._things.setdefault(name.place, []):
                self._things[name.place].append(thing)

    def root(self, name: Name, told: int) -> Fraction | None:
        """The x at which ``name`` has its told value; None if x does not matter to it."""
        equation = _add(self.value(name), (Fraction(-told),))
        if len(equation) > 2:
            raise UnsolvableError(f"the equation of {' '.join(name)!r} is not of first degree")
        if len(equation) == 1:
            raise UnsolvableError(f"{' '.join(name)!r} is told to be {told}, which contradicts its definition")
        return -equation[0] / equation[1] if equation else None

    def value(self, name: Name) -> Polynomial:
        """A quantity as a polynomial in the unknown."""
        if name not in self.values:
            if name in self._open:
                raise UnsolvableError(f"{' '.join(name)!r} depends on itself")
            self._open.add(name)
            self.values[name] = self._work_out(name)
        return self.values[name]

    def _work_out(self, name: Name) -> Polynomial:
        if name in self._twice:
            raise UnsolvableError(f"{' '.join(name)!r} is defined twice")
        if name in self.parsed.unknowns:
            self.chains[name] = 1
            return (Fraction(0), Fraction(1))
        if name.kind == "total ":
            return self._total(name)
        if name not in self.defined:
            raise UnsolvableError(f"nothing in the text gives {' '.join(name)!r}")
        statement = self.defined[name]
        terms = [self.value(source) for source in statement.sources]
        self.chains[name] = 1 + max((self.chains[source] for source in statement.sources), default=0)
        self.arithmetic += max(0, len(terms) + (statement.constant is not None) - 1)
        inner: Polynomial = ()
        for position, term in enumerate(terms):
            inner = _add(inner, _times((Fraction(-1),), term) if statement.difference and position == 1 else term)
        if statement.constant is None:
            return inner
        constant: Polynomial = (Fraction(statement.constant),)
        return _times(constant, inner) if statement.times else _add(constant, inner)

    def _total(self, name: Name) -> Polynomial:
        things = self._things.get(name.place, [])
        if not things:
            raise UnsolvableError(f"nothing in the text is said to be in {name.place!r}")
        # A total of what each thing has (its words are those of the average) multiplies; a total of things adds.
        words = set(name.noun.split())
        each = next((each for each in sorted(self._averages) if words.issuperset(each.split())), None)
        total: Polynomial = ()
        parts = []
        for thing in things:
            parts.append(Name("", thing, name.place))
            term = self.value(parts[-1])
            if each is not None:
                parts.append(Name("average ", f"{each} per {thing}", name.place))
                term = _times(term, self.value(parts[-1]))
            total = _add(total, term)
        # A total has no sentence of its own.
        self.chains[name] = max(self.chains[part] for part in parts)
        self.arithmetic += len(things) * (1 + (each is not None)) - 1
        return total


def _add(left: Polynomial, right: Polynomial) -> Polynomial:
    length = max(len(left), len(right))
    padded = [side + (Fraction(0),) * (length - len(side)) for side in (left, right)]
    return _trimmed([a + b for a, b in zip(*padded, strict=True)])


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    result = [Fraction(0)] * (len(left) + len(right) - 1) if left and right else []
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            result[i + j] += a * b
    return _trimmed(result)


def _trimmed(coefficients: list[Fraction]) -> Polynomial:
    while coefficients and coefficients[-1] == 0:
        coefficients.pop()
    return tuple(coefficients)
