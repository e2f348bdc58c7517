"""Where a written name is cut into thing and place: "film about rain in spring in Lost in Light Gala".

The benchmark's distractors have names that hold " in " themselves, so one name alone does not say which of them stands
before the place. All names of a text (or of many texts) together do: things come up in several places, and places with
several things.

    >>> cuts = Cuts(["opera in Lost in Light Gala", "opera in Oak Hall", "film set in spring in Oak Hall"])
    >>> cuts("opera in Lost in Light Gala"), cuts("film set in spring in Oak Hall")
    (('opera', 'Lost in Light Gala'), ('film set in spring', 'Oak Hall'))
"""

from __future__ import annotations

from collections.abc import Iterable

_IN = " in "


class Cuts:
    """Cuts names as the most others are cut.

    Args:
        bodies: names without their "number of", such as "nominations per opera in Oak Hall".
    """

    def __init__(self, bodies: Iterable[str]) -> None:
        self._things: dict[str, set[str]] = {}
        self._places: dict[str, set[str]] = {}
        for body in set(bodies):
            for noun, place in _candidates(body):
                thing = _thing(noun)
                self._places.setdefault(place, set()).add(thing)
                self._things.setdefault(thing, set()).add(place)

    def __call__(self, body: str) -> tuple[str, str]:
        """The noun and the place of a name.

        Raises:
            ValueError: there is no " in " in it.
        """
        candidates = _candidates(body)
        if not candidates:
            raise ValueError(f"expected '... in ...', got {body!r}")
        return candidates[0] if len(candidates) == 1 else max(candidates, key=self._support)

    def _support(self, cut: tuple[str, str]) -> tuple[int, bool, int]:
        """How well others support a cut; where that says nothing, things are written small and places are not."""
        noun, place = cut
        thing = _thing(noun)
        partners = len(self._things.get(thing, ())) * len(self._places.get(place, ()))
        return partners, noun == noun.lower() and place[:1].isupper(), len(noun)


def _candidates(body: str) -> list[tuple[str, str]]:
    parts = body.split(_IN)
    return [(_IN.join(parts[:i]), _IN.join(parts[i:])) for i in range(1, len(parts))]


def _thing(noun: str) -> str:
    """Counts and averages of a thing are evidence for the same thing."""
    return noun.split(" per ", 1)[-1]
