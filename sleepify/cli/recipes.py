"""List the recipes that came with sleepify, or copy some to change them.

sleepify recipes list
sleepify recipes copy rule110_tiny accelerate/ddp --to mine
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import sleepify.training
from sleepify.files import written_beside
from sleepify.training.settings import load_config, parents, suggest

CONFIGS, LAUNCH = "configs", "accelerate"


def main(argv: Sequence[str]) -> int:
    """List or copy; the exit code."""
    parser = argparse.ArgumentParser(
        prog="sleepify recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="names and first lines of all of them")
    copying = actions.add_parser("copy", help="copy files, with those that they extend")
    copying.add_argument("names", nargs="+", metavar="NAME", help="as `sleepify recipes list` shows it")
    copying.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="where to; by default here")
    arguments = parser.parse_args(argv)
    try:
        print("\n".join(listing() if arguments.action == "list" else copy(arguments.names, arguments.to)))
    except (ValueError, FileExistsError) as error:
        print(f"sleepify recipes: {error}", file=sys.stderr)
        return 2
    return 0


def folder() -> Path:
    """Where the recipes are: in the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: if they are in neither place.
    """
    package = Path(sleepify.training.__file__).parent.parent
    places = [package / "recipes", package.parent / "recipes"]
    for place in places:
        if (place / CONFIGS).is_dir():
            return place
    raise FileNotFoundError(f"expected recipes in {places[0]} or {places[1]}, found none; install sleepify again")


def find(name: str, kind: str = CONFIGS) -> Path:
    """A file of the user's by its path, or one of ours by its name.

    Args:
        name: ``mine.yaml``, ``rule110_tiny`` or ``accelerate/ddp``.
        kind: the folder in which a bare name is looked for.

    Raises:
        ValueError: if there is neither; the message names what is closest.
    """
    if Path(name).is_file():
        return Path(name)
    group, _, stem = name.removesuffix(".yaml").rpartition("/")
    group = group if group in (CONFIGS, LAUNCH) else kind
    known = {path.stem: path for path in sorted((folder() / group).glob("*.yaml"))}
    if stem in known:
        return known[stem]
    raise ValueError(
        f"expected a file, or a name that `sleepify recipes list` shows, got {name!r}{suggest(stem, known)}"
    )


def listing() -> list[str]:
    """A line for each file: its name, whose recipe it is, and what its first comment says."""
    rows = [("recipes, for `sleepify train NAME`", "")]
    for path in sorted((folder() / CONFIGS).glob("*.yaml")):
        rows.append((f"  {path.stem}", f"{load_config(path)['recipe']}: {_first_comment(path)}"))
    rows.append(("launch files, for `sleepify train NAME --accelerate FILE`", ""))
    for path in sorted((folder() / LAUNCH).glob("*.yaml")):
        rows.append((f"  {path.stem}", _first_comment(path)))
    width = max(len(name) for name, text in rows if text)
    return [f"{name:<{width}}  {text}".rstrip() for name, text in rows]


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("# ") if first.startswith("#") else ""


def copy(names: Sequence[str], target: Path) -> list[str]:
    """Copy files, and what they extend, so that they find each other; what was written, in words.

    Raises:
        ValueError: for a name that there is not.
        FileExistsError: for a file that is there already; then nothing is copied.
    """
    files = dict.fromkeys(file for name in names for file in parents(find(name)))
    sources = list(dict.fromkeys(source for file in files for source in (file, *_data_beside(file))))
    if there := [str(target / source.name) for source in sources if (target / source.name).exists()]:
        raise FileExistsError(f"expected none of these to exist, found {', '.join(there)}; choose another --to")
    for source in sources:
        with written_beside(target / source.name) as draft:
            draft.write_bytes(source.read_bytes())
    return [f"wrote {target / source.name}" for source in sources]


def _data_beside(path: Path) -> list[Path]:
    """The data file that a recipe names and that lies beside it."""
    import yaml

    name = yaml.safe_load(path.read_text(encoding="utf-8")).get("dataset")
    return [path.with_name(name)] if isinstance(name, str) and path.with_name(Path(name).name).is_file() else []
