"""The words of a problem: three themes of our own, and a reader that takes a theme from published problems.

A :class:`Theme` names places and things and the nouns of what is counted. Layer-1 totals add things up
("total number of moored boats in Tern Bay"), averages say what each thing has ("average number of deck hands per iron
tug in Tern Bay"), layer-2 totals multiply and add these ("total number of deck hands aboard moored boats in Tern Bay").
The noun of a layer-2 total must hold all words of the average's noun and that of a layer-1 total must not: that is how
a reader who has only the text tells the two apart, in the published problems as in ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sleepify.tasks.gsm_infinite.dataset import published_text
from sleepify.tasks.gsm_infinite.names import Cuts
from sleepify.tasks.gsm_infinite.solver import Name, parse_uncut

_NOISE_BREAKS = (" number of ", " equals ", " exists, ", "?")
"""What no name may hold."""
_BREAKS = (*_NOISE_BREAKS, " in ", " per ", ", ", " and the ", ". The ", " exists", " does ")
"""What no name that is asked about may hold."""


@dataclass(frozen=True, slots=True)
class Theme:
    """The words of one family of problems.

    Args:
        name: of the theme.
        places: groups of place names; a problem takes its places from one group.
        things: groups of thing names, singular.
        things_total: noun of a layer-1 total.
        each: noun of an average; None for a theme without averages (depth 2 only).
        each_total: noun of a layer-2 total.
        noise_places: places of distractor sentences, none of them in ``places``.
        noise_things: things of distractor sentences.

    Raises:
        ValueError: an empty list, a name twice, or a name with words that hold sentences together.
    """

    name: str
    places: tuple[tuple[str, ...], ...]
    things: tuple[tuple[str, ...], ...]
    things_total: str
    each: str | None = None
    each_total: str | None = None
    noise_places: tuple[str, ...] = field(default=(), repr=False)
    noise_things: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for kind, groups, noise in (
            ("places", self.places, self.noise_places),
            ("things", self.things, self.noise_things),
        ):
            if not groups or not all(groups):
                raise ValueError(
                    f"theme {self.name!r}: expected groups of {kind}, each with a name or more, got {groups}"
                )
            for names in (*groups, noise):
                repeated = sorted({name for name in names if names.count(name) > 1})
                if repeated:
                    raise ValueError(f"theme {self.name!r}: expected distinct {kind}, got {repeated} more than once")
        shared = {name for group in self.places for name in group}.intersection(self.noise_places)
        if shared:
            raise ValueError(f"theme {self.name!r}: noise places must not be places of problems, got {sorted(shared)}")
        noise_names = {*self.noise_places, *self.noise_things}
        for name in self.names():
            broken = [part for part in (_NOISE_BREAKS if name in noise_names else _BREAKS) if part in f" {name} "]
            if broken or not name.strip() or name != name.strip():
                raise ValueError(f"theme {self.name!r}: the name {name!r} cannot stand in a sentence ({broken})")
        if (self.each is None) != (self.each_total is None):
            raise ValueError(f"theme {self.name!r}: give both each and each_total or neither")
        if self.each is not None and self.each_total is not None:
            words = set(self.each.split())
            if not words <= set(self.each_total.split()) or words <= set(self.things_total.split()):
                raise ValueError(
                    f"theme {self.name!r}: each_total {self.each_total!r} must hold all words of each {self.each!r}, "
                    f"and things_total {self.things_total!r} must not: a reader could not tell the totals apart"
                )

    def names(self) -> list[str]:
        """Every name and noun of the theme."""
        groups = [*self.places, *self.things, self.noise_places, self.noise_things]
        nouns = [noun for noun in (self.things_total, self.each, self.each_total) if noun is not None]
        return [name for group in groups for name in group] + nouns


def _pairs(first: str, second: str) -> tuple[str, ...]:
    return tuple(f"{one} {other}" for one in first.split() for other in second.split())


HARBOURS = Theme(
    name="harbours",
    places=(
        ("Larkspur Cove", "Tern Bay", "Mirefield Sound", "Osprey Inlet", "Cinder Reach"),
        ("Port Hallow", "Dunmere Quay", "Kestrel Docks", "Port Avenel", "Stonewick Pier"),
    ),
    things=(
        ("wooden sloop", "wooden ketch", "wooden dory", "wooden barge", "wooden schooner"),
        ("iron tug", "iron dredger", "iron ferry", "iron trawler", "iron tanker"),
    ),
    things_total="moored boats",
    each="deck hands",
    each_total="deck hands aboard moored boats",
    noise_places=_pairs(
        "Amber Birch Copper Dusty Ember Foggy Granite Hazel Ivory Juniper Lonely Mossy Northern Opal Quiet Russet",
        "Channel Shoal Lagoon Narrows Harbour Strait Landing Estuary Breakwater Roads",
    ),
    noise_things=_pairs(
        "painted rusty salvaged armoured varnished leaking chartered borrowed retired gilded",
        "canoe kayak catamaran cutter yawl lugger clipper frigate galley punt raft skiff steamer wherry yacht "
        "lighter pinnace gondola brigantine hovercraft",
    ),
)

ORCHARDS = Theme(
    name="orchards",
    places=(
        ("Ashcombe Farm", "Brindle Hill", "Coldwater Grange", "Deepford Acres", "Elmstead Croft"),
        ("Fallow Ridge", "Greywell Farm", "Hollins Bank", "Iverley Meadow", "Juniper Slope"),
    ),
    things=(("dwarf plum tree", "red apple tree", "old quince tree", "weeping cherry tree", "winter pear tree"),),
    things_total="fruit trees",
    each="baskets",
    each_total="baskets from all fruit trees",
    noise_places=_pairs(
        "Upper Lower Nether Great Little Bishop's Miller's Saint Sandy Stony Barrow Carter's Drover's Eastern Western "
        "Old",
        "Marling Thornby Wexcombe Appleford Cranmere Eldersley Fernhurst Godwick Hatherop Kingsley",
    ),
    noise_things=_pairs(
        "grafted young wild potted espaliered ancient fenced flowering pruned mulched",
        "olive almond walnut hazelnut fig mulberry medlar apricot peach nectarine lemon lime orange mandarin "
        "pomegranate persimmon chestnut elderberry damson loquat",
    ),
)

GALLERIES = Theme(
    name="galleries",
    places=(
        (
            "Northgate Sculpture Hall",
            "Wren Street Gallery",
            "Old Mint Exhibition Rooms",
            "Lantern Hill Gallery",
            "Quayside Art Hall",
        ),
        (
            "Musée de Valbrune",
            "Galerie Saint-Armel",
            "Pavillon des Érables",
            "Atelier de Montfleury",
            "Maison Bérénice",
        ),
    ),
    things=(
        (
            "moonlit harbour landscape",
            "sombre charcoal portrait",
            "cheerful village panorama",
            "abstract copper mosaic",
            "delicate floral still-life",
        ),
    ),
    things_total="paintings",
    each="visitors",
    each_total="painting visitors",
    noise_places=_pairs(
        "Alabaster Boulevard Cathedral Damask Emerald Fountain Guildhall Hawthorn Imperial Jubilee Kingfisher "
        "Lighthouse Meridian Nightingale Orchid Porcelain",
        "Showroom Museum Arcade Conservatory Academy Rotunda Cloister Institute Gallery Pavilion",
    ),
    noise_things=_pairs(
        "faded enormous unfinished celebrated anonymous miniature borrowed restored controversial luminous",
        "watercolour etching lithograph woodcut triptych fresco engraving silhouette caricature tapestry sketchbook "
        "daguerreotype collage pastel monochrome seascape nocturne self-portrait altarpiece allegory",
    ),
)

THEMES = (HARBOURS, ORCHARDS, GALLERIES)
"""The default vocabulary."""

PETS = Theme(
    name="pets",
    places=(("Ash", "Birch", "Cedar"),),
    things=(("cat", "dog", "hen"),),
    things_total="pets",
    each="toys",
    each_total="pet toys",
    noise_places=("Dale", "Elm", "Fern"),
    noise_things=("cow", "fox", "owl"),
)
"""Few, short names: for models and tokenizers of a few dozen words."""

TREES = Theme(
    name="trees",
    places=(("Ash", "Birch", "Cedar"),),
    things=(("apple", "cherry", "fig", "lemon", "olive", "peach", "pear", "plum"),),
    things_total="trees",
    each="baskets",
    each_total="tree baskets",
    noise_places=("Dale", "Elm", "Fern"),
    noise_things=("almond", "lime", "walnut"),
)
"""As short, and enough things for problems of one place, ``size`` (1, 5), whose quantities one word tells apart."""


@dataclass(slots=True)
class _Row:
    """The names of one problem, not cut yet: all of them, and those by which its own places are known."""

    names: set[Name]
    core: set[Name]


@dataclass(slots=True)
class _Gathered:
    """What the rows of one theme have shown."""

    places: list[set[str]] = field(default_factory=list)
    things: list[set[str]] = field(default_factory=list)
    all_places: set[str] = field(default_factory=set)
    all_things: set[str] = field(default_factory=set)
    totals: set[str] = field(default_factory=set)
    averages: set[str] = field(default_factory=set)


def read_vocabulary(rows: Iterable[Mapping[str, object]]) -> tuple[Theme, ...]:
    """Take the themes from published problems.

    A place belongs to the problems (and not to their noise) if a sentence with a number is about it or another sentence
    uses one of its things. Names seen together in a problem form a group. Which " in " of a name stands before its
    place is told from all names of the theme.

    Args:
        rows: with ``template`` (the theme's name), and ``problem`` and ``question`` or the ``messages`` that hold them.

    Returns:
        One theme per template, names in alphabetical order. Without noise in the rows its noise lists are empty.

    Raises:
        ValueError: no rows, a missing field, or a template without totals or with more than two kinds of them.
    """
    templates: dict[str, list[_Row]] = {}
    # Every name once, for the published sets of many tokens.
    known: dict[Name, Name] = {}
    for number, row in enumerate(rows):
        fields = {"template": row.get("template"), **published_text(row)}
        missing = [name for name in ("problem", "question", "template") if not isinstance(fields.get(name), str)]
        if missing:
            raise ValueError(f"row {number}: expected text in {missing}, got {[fields.get(name) for name in missing]}")
        read = _read(str(fields["problem"]), str(fields["question"]))
        shared = _Row(*({known.setdefault(name, name) for name in names} for names in (read.names, read.core)))
        templates.setdefault(str(fields["template"]), []).append(shared)
    if not templates:
        raise ValueError("expected problems to read a vocabulary from, got none")
    return tuple(_theme(name, _gather(read)) for name, read in sorted(templates.items()))


def _read(problem: str, question: str) -> _Row:
    parsed = parse_uncut(problem, question)
    core = {parsed.query}
    for name, statements in parsed.statements.items():
        if any(statement.constant is not None for statement in statements):
            core.add(name)
        core.update(s for statement in statements for s in statement.sources if s.kind != "total ")
    return _Row(set(parsed.names()), core)


def _thing(name: Name) -> str:
    return name.noun.split(" per ", 1)[1] if name.kind == "average " else name.noun


def _gather(rows: list[_Row]) -> _Gathered:
    seen = _Gathered()
    cuts = Cuts(name.body() for row in rows for name in row.names)
    for row in rows:
        names = {name.cut(cuts) for name in row.names}
        core = {name.cut(cuts).place for name in row.core}
        for name in names:
            seen.all_places.add(name.place)
            if name.kind == "total ":
                seen.totals.add(name.noun)
                continue
            seen.all_things.add(_thing(name))
            if name.kind == "average ":
                seen.averages.add(name.noun.split(" per ", 1)[0])
        seen.places.append(core)
        seen.things.append({_thing(name) for name in names if name.kind != "total " and name.place in core})
    return seen


def _theme(name: str, seen: _Gathered) -> Theme:
    places, things = _groups(seen.places), _groups(seen.things)
    each = sorted(seen.averages)
    if len(each) > 1:
        raise ValueError(f"template {name!r}: expected one noun of averages, got {each}")
    per_each = [noun for noun in sorted(seen.totals) if each and set(each[0].split()) <= set(noun.split())]
    per_thing = [noun for noun in sorted(seen.totals) if noun not in per_each]
    if len(per_thing) != 1 or len(per_each) > 1:
        raise ValueError(
            f"template {name!r}: expected one noun of layer-1 totals and at most one of layer-2 totals, "
            f"got {per_thing} and {per_each}; read from more rows of the template"
        )
    with_averages = bool(each and per_each)
    return Theme(
        name,
        places,
        things,
        per_thing[0],
        each[0] if with_averages else None,
        per_each[0] if with_averages else None,
        tuple(sorted(seen.all_places.difference(*places))),
        tuple(sorted(seen.all_things.difference(*things))),
    )


def _groups(sets: Sequence[set[str]]) -> tuple[tuple[str, ...], ...]:
    """Connected components of names seen together."""
    groups: list[set[str]] = []
    for names in sets:
        touching = [group for group in groups if group & names]
        groups = [group for group in groups if not group & names] + [names.union(*touching)]
    return tuple(sorted(tuple(sorted(group)) for group in groups if group))
