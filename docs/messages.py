"""All messages of sleepify's errors, read from its source, at the end of troubleshooting.md: python docs/messages.py

What the tables of that page quote is not repeated. A message stands under the subject of its file; a new file goes into
`SUBJECTS`, or into `INTERNAL` if only who writes code against it can cause its errors.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).with_name("troubleshooting.md")
PACKAGE = Path(__file__).resolve().parent.parent / "sleepify"
MARK = "<!-- what follows is written by docs/messages.py -->\n"
SUBJECTS: dict[str, str] = {
    "Giving a model sleep": "retrofit config settings defaults hosts/ fast_weights/ peft",
    "Reading and generating": "modeling rows packing keywords loss reading generation on_demand cache snapshot sleep "
    "recompute ephemeral background convergence calibration recording graphs",
    "Probes": "probes/",
    "Sessions": "session.py session_model conversation idle",
    "Checkpoints and sessions in files": "checkpoints manifest fingerprint files session_file loader",
    "Data of one's own": "training/text_ training/sft",
    "Training": "training/",
    "Tasks": "tasks/",
    "The server": "serving/",
    "The command": "cli/ __main__ devices",
    "Jet-Nemotron and Ouro": "models/",
}
"""Headings, and the beginnings of the names of the files whose messages they have; the first that fits."""
INTERNAL = (
    # Tensor functions, by the shapes of their arguments.
    "ops/",
    # Making themes and reading problems of GSM-Infinite: wrong only where our own tables are.
    *(f"tasks/gsm_infinite/{name}" for name in ("solver", "vocabulary", "text", "names", "graph")),
    # Calls between our own parts.
    *("serving/scheduler", "tasks/base", "tasks/split"),
)
VALUE = "..."


def raised(path: Path) -> Iterator[str]:
    """The messages that a file raises, with `VALUE` for what is filled in; those that others make are not its own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            said = [_text(argument) for argument in node.exc.args]
            message = max(said, key=len, default="")
            # A message begins with words; what is all values is another's.
            if len(re.findall(r"[a-z]{2,}", message)) > 2:
                # A function that makes the error puts something before the words.
                before = f"{VALUE} " if ast.unparse(node.exc.func).lstrip("_").islower() else ""
                yield before + " ".join(message.split())


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return re.sub(rf"(?:{re.escape(VALUE)})+", VALUE, "".join(map(_text, node.values)))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else VALUE


def quoted(text: str) -> list[re.Pattern[str]]:
    """What the page's tables quote, as patterns."""
    found = re.findall(r"^\| `(.*?)` \|", text, re.M)
    return [re.compile(re.escape(each.replace("``", "`")).replace(re.escape(VALUE), ".*?")) for each in found]


def subject(name: str) -> str | None:
    """The heading of a file's messages; None for internal ones.

    Raises:
        ValueError: for a file that is nowhere listed.
    """
    if name.startswith(INTERNAL):
        return None
    for heading, beginnings in SUBJECTS.items():
        if name.startswith(tuple(beginnings.split())):
            return heading
    raise ValueError(f"expected {name} in SUBJECTS or INTERNAL of docs/messages.py, found it in neither")


def listing(tables: str) -> str:
    """The list, without what ``tables`` quote."""
    there, found = quoted(tables), {heading: {} for heading in SUBJECTS}
    for path in sorted(PACKAGE.rglob("*.py")):
        for message in raised(path):
            heading = subject(path.relative_to(PACKAGE).as_posix())
            if heading is not None and not any(pattern.search(message) for pattern in there):
                found[heading][message] = None
    lines = []
    for heading, messages in found.items():
        lines += [f"### {heading}: all other messages", ""] if messages else []
        lines += [f"- {_code(message)}" for message in sorted(messages)]
        lines += [""] if messages else []
    return "\n".join(lines)


def _code(message: str) -> str:
    ticks = "``" if "`" in message else "`"
    # A tick at the end needs room to its closing ones.
    return f"{ticks}{message}{' ' if message.endswith('`') else ''}{ticks}"


def page(text: str) -> str:
    """The page with the list as it should be."""
    tables = text.partition(MARK)[0]
    return f"{tables}{MARK}\n{listing(tables)}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
