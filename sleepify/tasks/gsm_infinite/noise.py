"""Distractor sentences that bring a problem to a wanted length.

They speak of places that no problem uses, are defined from the problem's parameters (never from numbers, and never the
other way round) and so change no answer. A few places get forty things each, the others one.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from sleepify.tasks.gsm_infinite.graph import Core
from sleepify.tasks.gsm_infinite.structure import Kind, Parameter
from sleepify.tasks.gsm_infinite.text import Words, combine

_PER_PLACE = 20
"""Sentences to a new place."""
_AT_A_PLACE = 40
"""Most things of a place before the next one fills up."""


def noise(rng: Random, core: Core, words: Words, expected: int) -> Iterator[str]:
    """Distractor sentences, each about another place and thing, until the theme's noise names are used up.

    Args:
        rng: the stream to draw from.
        core: whose parameters they are defined from.
        words: their names; the theme's noise names are used for the rest.
        expected: about how many will be taken, which decides how many places there are.
    """
    theme = words.theme
    places = rng.sample(theme.noise_places, len(theme.noise_places))
    n_places = min(len(places), expected // _PER_PLACE + 1)
    things = {place: rng.sample(theme.noise_things, len(theme.noise_things)) for place in places[:n_places]}
    unused_totals = places[:n_places]
    pools = _pools(core)
    for place in _turns(places, n_places, len(theme.noise_things)):
        if place not in things:
            things[place] = rng.sample(theme.noise_things, len(theme.noise_things))
        thing = things[place].pop()
        average = core.structure.depth == 3 and rng.random() < 0.5
        subject = (
            f"average number of {theme.each} per {thing} in {place}" if average else f"number of {thing} in {place}"
        )
        references = [words.reference(p) for p in _draw(rng, pools, 2 if rng.random() < 0.5 else 1)]
        if len(references) == 1 and len(unused_totals) > 1 and rng.random() < 0.1:
            other = rng.choice([other for other in unused_totals if other != place])
            unused_totals.remove(other)
            references.append(f"the total number of {theme.things_total} in {other}")
            rng.shuffle(references)
        yield f"The {subject} equals {combine(references, rng.random() < 0.5)}."


def _turns(places: list[str], n_places: int, n_things: int) -> Iterator[str]:
    """The place of each sentence: one for each of the first, then some places full after the other."""
    yield from places[:n_places]
    for number, place in enumerate(places):
        for _ in range(min(n_things, _AT_A_PLACE) - (number < n_places)):
            yield place
    for place in places:
        for _ in range(n_things - _AT_A_PLACE):
            yield place


def _pools(core: Core) -> list[tuple[float, list[Parameter]]]:
    """Parameters of the problem by kind, with the share of each kind among the sources of noise."""
    instances = list(core.definitions)
    shares = {
        Kind.COUNT: 0.78 if core.structure.depth == 2 else 0.38,
        Kind.AVERAGE: 0.52,
        Kind.TOTAL: 0.22 if core.structure.depth == 2 else 0.10,
    }
    totals = [p for p in core.structure.totals() if p.kind is Kind.TOTAL]
    pools = [(share, [p for p in [*instances, *totals] if p.kind is kind]) for kind, share in shares.items()]
    return [(share, pool) for share, pool in pools if pool]


def _draw(rng: Random, pools: list[tuple[float, list[Parameter]]], number: int) -> list[Parameter]:
    drawn: list[Parameter] = []
    for pool in rng.choices([pool for _, pool in pools], [share for share, _ in pools], k=number):
        parameter = rng.choice(pool)
        if parameter not in drawn:
            drawn.append(parameter)
    return drawn
