"""The mathematics of a problem, before any words: dependency graph and numbers.

A *core* is a set of a structure's parameters that all lead to one query, each instance defined from earlier ones, and
the remaining instances as distractors. The procedure is that of GSM-Infinite (arXiv:2502.05252), after iGSM
(arXiv:2407.20311): a random order built from the query backwards, in-degrees raised to a budget, then kept only if its
operations are exactly those asked for. The operations of a problem are the parameters on the path to the query plus
the binary operations between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from random import Random

from sleepify.tasks.gsm_infinite.structure import (
    Kind,
    Parameter,
    Structure,
    draw_structure,
    named_parts,
    written,
)

LARGEST = 1000
"""No parameter on the path may exceed this."""
LITERALS = 4
STATED = 12
"""Largest number in a text that is nothing but stated numbers: so large that guessing gains little."""
MOST_SOURCES = 4
_REDRAWS = 30
"""How often the numbers of a graph are drawn before it is given up for one that is negative, zero or too large."""
_BUDGETS = {
    (2, False): {3: {1: 1}, 4: {2: 1}, 5: {2: 1, 5: 2}, 6: {3: 3, 6: 7}, 7: {4: 2, 5: 1}, 8: {3: 5, 5: 2}},
    (2, True): {3: {1: 1}, 4: {1: 10, 2: 3}, 5: {2: 1, 5: 2}, 6: {4: 1}, 7: {4: 1, 6: 6}, 8: {3: 1, 5: 1}},
    (3, False): {1: {2: 1}, 2: {1: 1, 4: 5}, 3: {1: 15, 2: 1}, 4: {1: 8, 2: 7}, 5: {2: 8, 3: 13, 4: 1}}
    | {6: {3: 27, 4: 3, 6: 2}, 7: {3: 11, 6: 4}, 8: {3: 3, 4: 2, 5: 1}},
    (3, True): {1: {2: 1}, 2: {1: 3, 4: 20}, 3: {1: 6, 4: 1}, 4: {2: 1}, 5: {2: 5, 3: 13, 5: 2}}
    | {6: {3: 13, 5: 1}, 7: {3: 5, 4: 3, 5: 4}, 8: {4: 7, 5: 1, 7: 4}},
}
"""By depth, whether reversed, and operations: in-degrees to try, and how often each. Fitted to the published shares of
binary operations and of kinds of question; one in-degree alone is further from them."""


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


def draw_core(rng: Random, operations: int, depth: int, reverse: bool, size: tuple[int, int]) -> Core:
    """Draw until a problem has exactly these operations.

    Args:
        rng: the stream to draw from.
        operations: 1 or more. 1 at depth 2 is our own: a structure of the full size whose every number is stated.
        depth: 2 (counts and totals) or 3 (also averages and their totals).
        reverse: hide a value and ask for it.
        size: most places and things of a structure, at most (5, 5).

    Raises:
        ValueError: no problem came out of far more attempts than problems of the full size take.
    """
    if (operations, depth, reverse) == (1, 2, False):
        return _draw_stated(rng, size)
    # Half of the operations, and one more from 8 on, where no statistics are published.
    budgets = _BUDGETS[depth, reverse].get(operations, {(operations + 1) // 2 + (operations >= 8): 1})
    attempts = 5000 * operations
    for _ in range(attempts):
        (budget,) = rng.choices(list(budgets), list(budgets.values()))
        structure = draw_structure(rng, budget, depth, reverse, size)
        core = _draw_dependencies(rng, structure, operations, budget, reverse) if structure else None
        if core is not None:
            return core
    raise ValueError(
        f"no {'reverse' if reverse else 'forward'} problem with {operations} operations, depth {depth} and at most "
        f"{size[0]} places x {size[1]} things in {attempts} attempts; ask for fewer operations or a larger size"
    )


def _draw_stated(rng: Random, size: tuple[int, int]) -> Core:
    """Nothing but numbers, one of which is asked for by its name: what must be found before any can be worked with."""
    n_places, n_things = size
    structure = Structure(n_places, n_things, (tuple(range(n_things)),) * n_places, depth=2)
    definitions = {p: Definition((), rng.randint(1, STATED)) for p in structure.instances()}
    query = rng.choice(list(definitions))
    return Core(structure, (query,), definitions, evaluate(structure, [query], definitions), None)


def _draw_dependencies(rng: Random, structure: Structure, operations: int, budget: int, reverse: bool) -> Core | None:
    needs = _select(rng, structure, budget)
    order = _order(rng, needs, reverse) if needs else None
    if order is None:
        return None
    if len(order) == 2 and rng.random() < 0.5:
        _attach(rng, structure, order, needs)
    sources = _raise_degrees(rng, order, needs, budget)
    if sources is None:
        return None
    own = {p: len(drawn) + literal for p, (drawn, literal) in sources.items()}
    if sum(own.get(p, len(needs[p])) for p in order if p.kind is not Kind.MIRROR) != operations:
        return None
    order = [p for p in order if p.kind is not Kind.MIRROR]
    for _ in range(_REDRAWS):
        definitions = {p: _definition(rng, *sources[p]) for p in order if not p.implied}
        values = evaluate(structure, order, definitions)
        if all(_allowed(parameter, value) for parameter, value in values.items()):
            break
    else:
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
            if parameter in needs:
                continue
            closure = structure.closure(parameter)
            cost = sum(len(parts) for member, parts in closure.items() if member not in needs)
            if degree + cost <= most:
                needs = {**closure, **needs}
                degree += cost
            elif level is not hardest:
                # Not the next that would fit: so some problems have no total on the path, as some published ones.
                break
    loose = [p for p in instances if p not in needs]
    # The published problems have sometimes one more than this number less one, by their shares of asked instances.
    number = wanted - degree - (rng.random() < 0.85)
    for parameter in rng.sample(loose, min(len(loose), max(0, number))):
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


def _attach(rng: Random, structure: Structure, order: list[Parameter], needs: dict[Parameter, list[Parameter]]) -> None:
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
        open_to = [p for i, p in enumerate(order) if not p.implied and counts[p] < min(3, i + 1)]
        if not open_to:
            return None
        counts[rng.choice(open_to)] += 1
    result: dict[Parameter, tuple[list[Parameter], bool]] = {}
    for position, parameter in enumerate(order):
        if parameter.implied:
            continue
        linked = needs[parameter]
        number = rng.randint(1, 2) if counts[parameter] == 1 else counts[parameter] + 1
        used = {written(p) for p in linked}
        pool = [p for p in order[:position] if written(p) not in used]
        number = min(number, MOST_SOURCES, position + 1) - len(linked)
        literal = number > 0 and (number == len(pool) + 1 or rng.random() < 0.5)
        drawn = rng.sample(pool, min(len(pool), max(0, number - literal)))
        sources = list(dict.fromkeys(map(written, [*linked, *drawn])))
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
    known = set(order)
    open_totals = [(p, named_parts(structure, p)) for p in structure.totals() if p not in known]
    for parameter in rest:
        if rng.random() < 0.5:
            pool = list(apart)
            apart.append(parameter)
        else:
            pool = present + [total for total, parts in open_totals if known.issuperset(parts)]
        number = 1
        while number < min(MOST_SOURCES, len(pool) + 1) and rng.random() < 0.5:
            number += 1
        literal = not pool or rng.random() < 0.5
        drawn = rng.sample(pool, min(len(pool), number - literal))
        definitions[parameter] = _definition(rng, drawn, literal or not drawn)
        present.append(parameter)
        known.add(parameter)


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
    """Whether every value is of first degree in the unknown and the last one truly depends on it."""
    # A product is the only way to a higher degree, so the first such value is of second degree and shows in its steps.
    runs = [evaluate(structure, order, definitions, {unknown: value}) for value in range(3)]
    steps = [{after[p] - before[p] for before, after in zip(runs, runs[1:], strict=False)} for p in order]
    return all(len(step) == 1 for step in steps) and steps[-1] != {0}
