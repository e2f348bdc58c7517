"""Structures: which things are in which places, and the parameters that follow from it.

A structure's *parameters* are the counts "thing in place", with depth 3 also the averages "per thing in place"
(instances: each gets a sentence), and the totals of a place, which are implied by them and never get one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import exp
from random import Random
from typing import NamedTuple


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

    def closure(self, parameter: Parameter) -> dict[Parameter, list[Parameter]]:
        """The parts of a parameter, of its parts and so on; itself last."""
        below = {p: parts for part in self.parts(parameter) for p, parts in self.closure(part).items()}
        return {**below, parameter: self.parts(parameter)}

    def totals(self) -> list[Parameter]:
        """The totals of every place, hardest first."""
        kinds = (Kind.GRAND_TOTAL, Kind.TOTAL) if self.depth == 3 else (Kind.TOTAL,)
        return [Parameter(kind, place) for kind in kinds for place in range(self.n_places)]


def named_parts(structure: Structure, parameter: Parameter) -> list[Parameter]:
    """The written parameters that a total is made of: counts, or counts and averages in turn."""
    return [written(p) for p in structure.parts(parameter)]


def written(parameter: Parameter) -> Parameter:
    """The parameter under whose name this one appears: a mirror's average, else itself."""
    return Parameter(Kind.AVERAGE, *parameter[1:]) if parameter.kind is Kind.MIRROR else parameter


def draw_structure(rng: Random, budget: int, depth: int, reverse: bool, size: tuple[int, int]) -> Structure | None:
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
