"""What works with which versions: docs/compatibility.md, from what runs of the tests recorded.

    python -m benchmarks.compatibility newest             # walk all flows in this environment, and write the page
    python -m benchmarks.compatibility newest -k dpo      # some; what was recorded of the others stays
    python -m benchmarks.compatibility                    # the page alone

The table of flows is in `benchmarks.flows`; a test says which of them it walks by ``@pytest.mark.flow``. A run leaves
one JSON file in docs/results/compatibility, named as its environment is called.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.flows import FLOWS, PACKAGES

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "results" / "compatibility"
PAGE = ROOT / "docs" / "compatibility.md"
ORDER = ("newest", "oldest")
HEAD = """# Compatibility

Every row is a way in that users take, walked by tests of the suite with tiny models on a CPU. "works" means that they
passed with these versions; "refused" that the test saw the message, which says what to do; "-" is not tried: the
package is not there, or the run was not made. `python -m benchmarks.compatibility NAME` runs the tests and makes the
page.
"""


def verdict(name: str, outcome: Mapping[str, int] | None) -> str:
    """One cell."""
    if outcome is None:
        return "-"
    if outcome["failed"]:
        return "**fails**"
    return "works" if FLOWS[name].refused is None else "refused"


def render(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The page.

    Args:
        records: what runs left, by the name of their environment.
    """
    names = [*(name for name in ORDER if name in records), *sorted(records.keys() - set(ORDER))]
    line = "|---" * (len(names) + 2) + "|"
    text = [HEAD, f"| | {' | '.join(names)} |", line.replace("|---", "", 1)]
    for package in ("python", *PACKAGES):
        versions = [records[name]["versions"].get(package, "-") for name in names]
        if set(versions) != {"-"}:
            text.append(f"| {package} | {' | '.join(versions)} |")
    for subject in dict.fromkeys(flow.subject for flow in FLOWS.values()):
        text += ["", f"## {subject[0].upper()}{subject[1:]}", "", f"| | what is seen | {' | '.join(names)} |", line]
        for name, flow in FLOWS.items():
            if flow.subject == subject:
                cells = [verdict(name, records[each]["flows"].get(name)) for each in names]
                seen = flow.shown if flow.refused is None else f"the message: {flow.refused}"
                text.append(f"| {name} | {seen} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def read_records(folder: Path = RECORDS) -> dict[str, Any]:
    """What runs left, by the name of their environment."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def main(argv: Sequence[str]) -> int:
    """Run the flows, if an environment is named, and write the page; the exit code of the tests."""
    code = 0
    if argv:
        RECORDS.mkdir(parents=True, exist_ok=True)
        options = ["--flows", str(RECORDS / f"{argv[0]}.json"), "-m", "flow and not gpu", *argv[1:]]
        code = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT).returncode
    draft = PAGE.with_name(f".{PAGE.name}.draft")
    draft.write_text(render(read_records()), encoding="utf-8")
    draft.replace(PAGE)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
