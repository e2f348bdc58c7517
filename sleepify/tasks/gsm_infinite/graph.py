"""The mathematics of a problem, before any words: structure graph, dependency graph, numbers.

A *structure* says which things exist in which places. Its *parameters* are the counts "thing in place", with depth 3
also the averages "per thing in place" (instances: each gets a sentence), and the totals of a place, implied by them
(never given a sentence). A *core* is a set of parameters that all lead to one query, each instance defined from
earlier ones, and the remaining instances as distractors. The procedure is that of GSM-Infinite (arXiv:2502.05252),
after iGSM (arXiv:2407.20311): a random order built from the query backwards, in-degrees raised to a budget, then
kept only if its operations are exactly those asked for.

The operations of a problem are the parameters on the path to the query plus the binary operations between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import exp
from random import Random
from typing import NamedTuple

LARGEST = 1000
"""No parameter on the path may exceed this."""
LITERALS = 4
"""Literals are 1..4, factors 2..4."""
MOST_SOURCES = 4


class Kind(IntEnum):
    """What a parameter counts. A mirror stands between an average and what is implied by it, and is never written."""

    COUNT = 0
    AVERAGE = 1
    TOTAL = 2
    GRAND_TOTAL = 3
    MIRROR = 4


class Parameter(NamedTuple):
    """One quantity: ``place`` and ``thing`` index the structure's layers; totals have ``thing == -1``."""

    kind: Kind
    place: int
    thing: int = -1

    @property
    def implied(self) -> bool:
        return self.kind >= Kind.TOTAL


@dataclass(frozen=True, slots=True)
class Definition:
    """The right-hand side of a sentence: ``constant (+ or *) (copy, sum or difference of sources)``.

    Args:
        sources: up to four parameters.
        constant: the literal, None for none; always there if there are no sources.
        times: the constant multiplies (else it is added).
        difference: of exactly two sources (else they are added).
    """

    sources: tuple[Parameter, ...]
    constant: int | None = None
    times: bool = False
    difference: bool = False

    @property
    def degree(self) -> int:
        return len(self.sources) + (self.constant is not None)


@dataclass(frozen=True, slots=True)
class Structure:
    """Which things are in which places: ``things_in[place]`` lists thing indices."""

    n_places: int
    n_things: int
    things_in: tuple[tuple[int, ...], ...]
    depth: int

    def instances(self) -> list[Parameter]:
        """Every parameter that must get a sentence."""
        pairs = [(place, thing) for place, things in enumerate(self.things_in) for thing in things]
        counts = [Parameter(Kind.COUNT, *pair) for pair in pairs]
        return counts + [Parameter(Kind.AVERAGE, *pair) for pair in pairs] if self.depth == 3 else counts

    def parts(self, parameter: Parameter) -> list[Parameter]:
        """What an implied parameter is made of (nothing for an instance)."""
        kind, place, thing = parameter
        if kind is Kind.MIRROR:
            return [Parameter(Kind.AVERAGE, place, thing)]
        if kind is Kind.TOTAL:
            return [Parameter(Kind.COUNT, place, thing) for thing in self.things_in[place]]
        if kind is Kind.GRAND_TOTAL:
            return [
                Parameter(part, place, thing) for thing in self.things_in[place] for part in (Kind.COUNT, Kind.MIRROR)
            ]
        return []

    def totals(self) -> list[Parameter]:
        """The totals of every place, hardest first."""
        kinds = (Kind.GRAND_TOTAL, Kind.TOTAL) if self.depth == 3 else (Kind.TOTAL,)
        return [Parameter(kind, place) for kind in kinds for place in range(self.n_places)]


@dataclass(frozen=True, slots=True)
class Core:
    """A solved problem without words.

    Args:
        structure: the places and things.
        order: the parameters on the path, each after all it needs; the last is what the equations end in.
        definitions: of every instance, distractors included.
        values: of every parameter on the path.
        unknown: in reverse mode the instance to find; its value is hidden and that of ``order[-1]`` told instead.
    """

    structure: Structure
    order: tuple[Parameter, ...]
    definitions: dict[Parameter, Definition]
    values: dict[Parameter, int]
    unknown: Parameter | None

    @property
    def query(self) -> Parameter:
        return self.order[-1] if self.unknown is None else self.unknown

    @property
    def answer(self) -> int:
        return self.values[self.query]


def draw_core(
    rng: Random, operations: int, depth: int, reverse: bool, size: tuple[int, int], attempts: int = 100_000
) -> Core:
    """Draw until a problem has exactly these operations.

    Args:
        rng: the stream to draw from.
        operations: 1 or more (depth 3), 2 or more (depth 2).
        depth: 2 (counts and totals) or 3 (also averages and their totals).
        reverse: hide a value and ask for it.
        size: most places and things of a structure, at most (5, 5).
        attempts: how often to try.

    Raises:
        ValueError: no problem came out of so many attempts.
    """
    for _ in range(attempts):
        structure = _draw_structure(rng, (operations + 1) // 2, depth, reverse, size)
        core = _draw_dependencies(rng, structure, operations, reverse) if structure else None
        if core is not None:
            return core
    raise ValueError(
        f"no {'reverse' if reverse else 'forward'} problem with {operations} operations, depth {depth} and at most "
        f"{size[0]} places x {size[1]} things in {attempts} attempts; ask for fewer operations or a larger size"
    )


def _draw_structure(rng: Random, budget: int, depth: int, reverse: bool, size: tuple[int, int]) -> Structure | None:
    ratio = (budget - 1) / 19
    weights = [exp(-((ratio - centre) ** 2)) for centre in (0.1, 0.3, 0.5, 0.7, 0.9)]
    narrow, wide = sorted(rng.choices((1, 2, 3, 4, 5), weights, k=2))
    if budget <= 5 and reverse:
        narrow, wide = min(narrow, 3), min(wide, 3)
    elif budget <= 5 and depth == 2:
        narrow, wide = max(narrow, 2), max(wide, 2)
    layers, limits = [min(narrow, limit) for limit in size], [min(wide, limit) for limit in size]
    fewest = (depth - 1) * narrow
    most = min(wide * wide + (wide if depth == 3 else 0), size[0] * size[1])
    n_edges = min(rng.randint(fewest, 20), rng.randint(fewest, 20), most)
    go_on = rng.random()
    while layers != limits:
        growing = [layer for layer in (0, 1) if layers[layer] < limits[layer]]
        if layers[0] * layers[1] >= n_edges and (layers[1] == n_edges or rng.random() >= go_on):
            break
        layers[rng.choice(growing)] += 1
    n_places, n_things = layers
    if not n_things <= n_edges <= n_places * n_things:
        return None
    edges = [(rng.randrange(n_places), thing) for thing in range(n_things)]
    empty = [place for place in range(n_places) if all(place != used for used, _ in edges)]
    if len(edges) + len(empty) > n_edges:
        return None
    edges += [(place, rng.randrange(n_things)) for place in empty]
    free = [(place, thing) for place in range(n_places) for thing in range(n_things) if (place, thing) not in edges]
    edges += rng.sample(free, n_edges - len(edges))
    things_in = tuple(tuple(thing for thing in range(n_things) if (place, thing) in edges) for place in range(n_places))
    return Structure(n_places, n_things, things_in, depth)


def _draw_dependencies(rng: Random, structure: Structure, operations: int, reverse: bool) -> Core | None:
    budget = (operations + 1) // 2
    needs = _select(rng, structure, budget)
    order = _order(rng, needs, reverse) if needs else None
    if order is None:
        return None
    if len(order) == 2 and rng.random() < 0.5:
        _attach(rng, structure, order, needs)
    sources = _raise_degrees(rng, order, needs, budget)
    if sources is None:
        return None
    definitions = {p: _definition(rng, *sources[p]) for p in order if not p.implied}
    degree = sum(definitions[p].degree if p in definitions else len(needs[p]) for p in order if p.kind != Kind.MIRROR)
    if degree != operations:
        return None
    order = [p for p in order if p.kind is not Kind.MIRROR]
    values = evaluate(structure, order, definitions)
    if not all(_allowed(parameter, value) for parameter, value in values.items()):
        return None
    unknown = None
    if reverse:
        unknown = next((p for p in reversed(order) if not p.implied and not definitions[p].sources), None)
        if unknown is None or not _is_linear(structure, order, definitions, unknown):
            return None
    _add_distractors(rng, structure, order, definitions)
    return Core(structure, tuple(order), definitions, values, unknown)


def _select(rng: Random, structure: Structure, budget: int) -> dict[Parameter, list[Parameter]]:
    """The parameters on the path and, for each, what it is made of: implied ones first, then loose instances."""
    most = max(rng.randint(1, budget), rng.randint(1, budget))
    wanted = rng.randint(most, budget)
    needs: dict[Parameter, list[Parameter]] = {}
    degree = 0
    instances = structure.instances()
    totals = structure.totals()
    mirrors = [Parameter(Kind.MIRROR, p.place, p.thing) for p in instances if p.kind is Kind.AVERAGE]
    hardest = [p for p in totals if p.kind is Kind.GRAND_TOTAL]
    for level in (hardest, [p for p in totals if p.kind is Kind.TOTAL] + mirrors):
        rng.shuffle(level)
        for parameter in level:
            closure = {parameter: structure.parts(parameter)}
            for part in closure[parameter]:
                closure = {part: structure.parts(part), **closure}
                for inner in structure.parts(part):
                    closure = {inner: [], **closure}
            cost = sum(len(parts) for member, parts in closure.items() if member not in needs)
            if parameter not in needs and degree + cost <= most:
                needs = {**closure, **needs}
                degree += cost
    loose = [p for p in instances if p not in needs]
    for parameter in rng.sample(loose, min(len(loose), max(0, wanted - degree - 1))):
        needs[parameter] = []
    return needs


def _order(rng: Random, needs: dict[Parameter, list[Parameter]], reverse: bool) -> list[Parameter] | None:
    """All parameters in an order in which each follows what it needs and leads to the last (links are added)."""
    needed = {part for parts in needs.values() for part in parts}
    last = [p for p in needs if p not in needed]
    if reverse:
        for kind in (Kind.TOTAL, Kind.GRAND_TOTAL):
            last = [p for p in last if p.kind is kind] or last
    placed = [rng.choice(last)]
    remaining = [p for p in needs if p != placed[0]]
    while remaining:
        head = placed[-1]
        feeding = {part for p in placed for part in needs[p]}
        blocked = {part for p in remaining for part in needs[p]}
        free = [p for p in remaining if p not in blocked]
        ready = [p for p in free if p in feeding]
        if ready:
            if not head.implied and rng.random() < 0.5:
                _link(needs, head, rng.choice(remaining))
            following = rng.choice(ready)
        elif head.implied:
            return None
        else:
            bias = abs(rng.gauss(0.0, 1.0))
            following = rng.choices(free, [exp(bias * p.implied) for p in free])[0]
            _link(needs, head, following)
        placed.append(following)
        remaining.remove(following)
    return placed[::-1]


def _link(needs: dict[Parameter, list[Parameter]], parameter: Parameter, source: Parameter) -> None:
    if source not in needs[parameter]:
        needs[parameter] = [*needs[parameter], source]


def _attach(
    rng: Random, structure: Structure, order: list[Parameter], needs: dict[Parameter, list[Parameter]]
) -> None:
    """A third parameter, before the two or as the new query."""
    # Averages stand in the benchmark's pool twice, as themselves and as their mirrors.
    loose = [p for p in structure.instances() if p not in needs for _ in range(1 + (p.kind is Kind.AVERAGE))]
    if not loose:
        return
    extra = rng.choice(loose)
    needs[extra] = []
    if rng.random() < 0.5 and not order[0].implied:
        _link(needs, order[0], extra)
        order.insert(0, extra)
    else:
        _link(needs, extra, order[-1])
        order.append(extra)


def _raise_degrees(
    rng: Random, order: list[Parameter], needs: dict[Parameter, list[Parameter]], budget: int
) -> dict[Parameter, tuple[list[Parameter], bool]] | None:
    """Sources of every instance, and whether a literal is among them."""
    counts = {p: len(needs[p]) for p in order}
    for _ in range(budget - sum(counts.values())):
        open_to = [p for i, p in enumerate(order) if not p.implied and counts[p] < min(3, max(1, i))]
        if not open_to:
            return None
        counts[rng.choice(open_to)] += 1
    result: dict[Parameter, tuple[list[Parameter], bool]] = {}
    for position, parameter in enumerate(order):
        if parameter.implied:
            continue
        linked = needs[parameter]
        number = rng.randint(1, 2) if counts[parameter] == 1 else counts[parameter] + 1
        used = {_written(p) for p in linked}
        pool = [p for p in order[:position] if _written(p) not in used]
        number = min(number, MOST_SOURCES, position + 1) - len(linked)
        literal = number > 0 and (number == len(pool) + 1 or rng.random() < 0.5)
        drawn = rng.sample(pool, min(len(pool), max(0, number - literal)))
        sources = list(dict.fromkeys(map(_written, [*linked, *drawn])))
        rng.shuffle(sources)
        result[parameter] = (sources, literal or not sources)
    return result


def _definition(rng: Random, sources: list[Parameter], literal: bool) -> Definition:
    if not sources:
        return Definition((), rng.randint(rng.randint(1, 2), LITERALS))
    times = literal and rng.random() < 0.5
    constant = rng.randint(1 + times, LITERALS) if literal else None
    return Definition(tuple(sources), constant, times, len(sources) == 2 and rng.random() < 0.5)


def _add_distractors(
    rng: Random, structure: Structure, order: list[Parameter], definitions: dict[Parameter, Definition]
) -> None:
    present = list(order)
    apart: list[Parameter] = []
    rest = [p for p in structure.instances() if p not in definitions]
    rng.shuffle(rest)
    totals = structure.totals()
    for parameter in rest:
        if rng.random() < 0.5:
            pool = list(apart)
            apart.append(parameter)
        else:
            known = {*present, *apart}
            computable = [p for p in totals if p not in known and known.issuperset(named_parts(structure, p))]
            pool = [p for p in present if p != parameter] + computable
        number = 1
        while number < min(MOST_SOURCES, len(pool) + 1) and rng.random() < 0.5:
            number += 1
        literal = not pool or rng.random() < 0.5
        drawn = rng.sample(pool, min(len(pool), number - literal))
        definitions[parameter] = _definition(rng, drawn, literal or not drawn)
        present.append(parameter)


def named_parts(structure: Structure, parameter: Parameter) -> list[Parameter]:
    """The written parameters that a total is made of: counts, or counts and averages in turn."""
    return [_written(p) for p in structure.parts(parameter)]


def _written(parameter: Parameter) -> Parameter:
    """The parameter under whose name this one appears: a mirror's average, else itself."""
    return Parameter(Kind.AVERAGE, *parameter[1:]) if parameter.kind is Kind.MIRROR else parameter


def evaluate(
    structure: Structure,
    order: list[Parameter],
    definitions: dict[Parameter, Definition],
    given: dict[Parameter, int] | None = None,
) -> dict[Parameter, int]:
    """The values along an order; those in ``given`` are taken as they are."""
    values: dict[Parameter, int] = {}
    for parameter in order:
        how = definitions.get(parameter)
        terms = [values[p] for p in (how.sources if how else named_parts(structure, parameter))]
        if given and parameter in given:
            value = given[parameter]
        elif parameter.kind is Kind.GRAND_TOTAL:
            value = sum(count * average for count, average in zip(terms[::2], terms[1::2], strict=True))
        else:
            value = terms[0] - terms[1] if how and how.difference else sum(terms)
            if how and how.constant is not None:
                value = how.constant * value if how.times else how.constant + value
        values[parameter] = value
    return values


def _allowed(parameter: Parameter, value: int) -> bool:
    """No negative number, no large one, no count of nothing."""
    return (parameter.kind is Kind.COUNT) <= value <= LARGEST


def _is_linear(
    structure: Structure, order: list[Parameter], definitions: dict[Parameter, Definition], unknown: Parameter
) -> bool:
    """Whether the last value is of first degree in the unknown, told by its differences at more points than roots."""
    last = [evaluate(structure, order, definitions, {unknown: value})[order[-1]] for value in range(12)]
    return len({after - before for before, after in zip(last, last[1:], strict=False)} | {0}) == 2 and last[0] != last[1]
