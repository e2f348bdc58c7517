"""House rules that a reviewer would otherwise have to watch: who imports whom, sizes, docstrings, no pickle."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import families
import pytest

import sleepify

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sleepify"
MAX_LINES = 400

# A room is a module or folder of sleepify/. What each may import of ours when it is itself imported; nothing else may.
EDGES: dict[str, set[str]] = {
    "version": set(),
    "devices": set(),
    "errors": set(),
    "arena": set(),
    "memory": {"arena"},
    "config": {"loader", "settings"},
    "loader": set(),
    "ops": set(),
    "tasks": set(),
    "schedule": set(),
    "settings": set(),
    "ephemeral": set(),
    "snapshot": {"ephemeral", "memory", "schedule", "settings"},
    "files": {"errors"},
    "fingerprint": {"errors"},
    "session_file": {"errors", "files", "memory", "snapshot"},
    "cache": {"errors", "memory", "session_file", "settings", "snapshot"},
    "convergence": {"memory", "schedule", "settings"},
    "sleep": {"convergence", "errors", "memory", "recompute", "schedule", "settings", "snapshot"},
    "graphs": {"arena", "errors", "hosts", "memory", "precision"},
    "ended": set(),
    "generation": {"cache", "ended", "packing", "precision", "rows"},
    "conversation": {"snapshot"},
    "progress": set(),
    "idle": set(),
    "session_model": {"cache", "conversation", "generation", "modeling", "progress", "rows", "settings"},
    "session": {
        *("cache", "conversation", "errors", "generation", "idle", "modeling", "progress", "session_file"),
        *("session_model", "settings", "snapshot"),
    },
    "loss": {"rows"},
    "background": {"memory", "snapshot"},
    "on_demand": {"background", "cache", "rows", "schedule", "settings", "sleep", "snapshot"},
    "hosts": {"arena", "errors", "memory"},
    "packing": set(),
    "rows": {"packing"},
    "keywords": {"errors"},
    "recompute": {"memory", "settings", "snapshot"},
    "reading": {"cache", "hosts", "loss", "packing", "rows", "schedule", "settings", "snapshot"},
    "backbone": {"keywords", "packing", "reading"},
    "fast_weights": {"ops", "config"},
    "models": {"fast_weights"},
    "defaults": {"config", "hosts", "settings"},
    "card": {"config", "files"},
    "precision": {"fast_weights", "ops"},
    "manifest": {"config", "errors", "files"},
    "modeling": {
        *("backbone", "cache", "checkpoints", "config", "defaults", "fast_weights", "generation", "graphs", "hosts"),
        *("keywords", "loss", "memory", "on_demand", "packing", "precision", "reading", "recompute", "rows"),
        *("schedule", "settings", "sleep", "snapshot"),
    },
    "checkpoints": {"card", "config", "errors", "files", "fingerprint", "loader", "manifest", "peft", "settings"},
    "recording": {"memory", "modeling", "schedule"},
    "probes": {
        *("convergence", "files", "generation", "memory", "modeling", "recording", "rows", "settings", "tasks"),
    },
    "calibration": {"convergence", "generation", "modeling", "recording", "rows", "settings"},
    "retrofit": {"config", "defaults", "fingerprint", "hosts", "modeling", "settings"},
    "training": {
        *(
            "card",
            "config",
            "conversation",
            "defaults",
            "devices",
            "errors",
            "fast_weights",
            "files",
            "hosts",
            "loader",
            "loss",
        ),
        *("manifest", "memory", "modeling", "packing", "peft", "recompute", "retrofit", "rows", "schedule", "settings"),
        *("sleep", "snapshot", "tasks"),
    },
    "peft": {"errors"},
    "serving": {"cache", "errors", "files", "fingerprint", "generation", "memory", "modeling", "precision"},
    "__init__": {
        "cache",
        "calibration",
        "config",
        "errors",
        "modeling",
        "models",
        "peft",
        "retrofit",
        "session",
        "version",
    },
    "cli": {
        *(
            "calibration",
            "config",
            "conversation",
            "devices",
            "errors",
            "files",
            "hosts",
            "modeling",
            "ops",
            "retrofit",
            "serving",
            "session",
            "training",
            "version",
        ),
    },
    "__main__": {"cli"},
}

# Modules that are loaded where a package beyond the base dependencies is at hand, and the package.
OPTIONAL = {
    f"sleepify.ops.{name}": "triton"
    for name in ("triton_chunks", "triton_chunks_backward", "triton_conv", "triton_rules")
} | {"sleepify.serving.api": "fastapi"}

# Words that stand for code from strangers; written apart, so that this file may be searched too.
FORBIDDEN = {
    "remote code": re.compile(r"trust_remote_code\s*=\s*True"),
    "pickle": re.compile(
        r"\btorch\s*\.\s*load\b|\b(?:import|from)\s+(?:pickle|dill|joblib|cloudpickle)\b|allow_pickle"
    ),
}


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def modules() -> list[str]:
    """Every module that can be imported here."""
    found = sorted(module.name for module in pkgutil.walk_packages(sleepify.__path__, "sleepify."))
    return [name for name in found if name not in OPTIONAL or importlib.util.find_spec(OPTIONAL[name])]


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """(what is imported, "now" | "late" | "types", line) of every import statement in a file."""

    def walk(node: ast.AST, when: str) -> Iterator[tuple[str, str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, when, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: import by full name, not relatively"
                if child.module == "sleepify":
                    yield from ((f"sleepify.{alias.name}", when, child.lineno) for alias in child.names)
                else:
                    yield str(child.module), when, child.lineno
            elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
                yield from walk(child, "types")
            else:
                late = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield from walk(child, "late" if late else when)

    yield from walk(parse(path), "now")


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room in EDGES, f"{room} is a new room: say in EDGES what it may import"
    for name, when, line in imports(path):
        if name.split(".")[0] != "sleepify":
            continue
        target = name.split(".")[1] if "." in name else "__init__"
        assert target == room or target in EDGES[room], f"{path}:{line}: {room} may not import {name}"
        # In a function it would hide a circle of files; only what is optional may wait.
        assert when != "late" or name in OPTIONAL, f"{path}:{line}: import {name} at the top of the file"


def test_the_rooms_have_an_order():
    order = list(TopologicalSorter(EDGES).static_order())
    assert order.index("ops") < order.index("fast_weights") < order.index("modeling") < order.index("retrofit")


def test_every_edge_is_used():
    used = {(room_of(path), name) for path in sources(PACKAGE) for name, _, _ in imports(path)}
    for room, targets in EDGES.items():
        for target in targets:
            reached = any(r == room and f"{name}.".startswith(f"sleepify.{target}.") for r, name in used)
            assert reached, f"{room} no longer imports {target}: take it out of the table"


def test_what_can_be_configured_exists():
    """What is listed in two places, because one of them must not import the other, is the same in both."""
    assert set(sleepify.config.RULES) == set(sleepify.fast_weights.LAYERS)
    assert set(families.FAMILIES) == set(sleepify.hosts.FAMILIES)


@pytest.mark.parametrize("path", sources(PACKAGE / "tasks"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_tasks_need_nothing_but_python(path):
    for name, when, line in imports(path):
        top = name.split(".")[0]
        assert top not in ("torch", "transformers"), f"{path}:{line}: tasks know nothing of models"
        if when == "now":
            assert top == "sleepify" or top in sys.stdlib_module_names, f"{path}:{line}: import {name} where it is used"


def test_importing_the_package_needs_its_base_dependencies_only():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = (\[.*?\])", pyproject, re.MULTILINE | re.DOTALL)
    base = {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in ast.literal_eval(listed[1])}
    assert {"torch", "transformers"} <= base
    for path in sources(PACKAGE):
        for name, when, line in imports(path):
            top = name.split(".")[0]
            if when == "now":
                optional = OPTIONAL.get(".".join(path.relative_to(ROOT).with_suffix("").parts))
                known = top in sys.stdlib_module_names or top in base | {"sleepify", optional}
                assert known, f"{path}:{line}: {name} is no base dependency; import it where it is used"


@pytest.mark.parametrize("name", modules())
def test_every_module_can_be_imported(name):
    importlib.import_module(name)


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_can_be_read_in_one_sitting(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, (
        f"{path.name} has {lines} lines, {lines - MAX_LINES} too many: find the second subject in it"
    )
    assert path.stem != "utils", "name a module by what it does"


@pytest.mark.parametrize("name", ["sleepify", *modules()])
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        return
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isroutine(value):  # constants and type aliases cannot have one
            documentation = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
            # dataclass writes a signature where there is no docstring.
            assert documentation and not documentation.startswith(f"{public}("), f"{name}.{public} has no docstring"


@pytest.mark.parametrize("kind", FORBIDDEN)
def test_no_code_from_strangers_is_run(kind):
    searched = [path for folder in ("sleepify", "recipes", "examples", "benchmarks") for path in sources(ROOT / folder)]
    assert PACKAGE / "checkpoints.py" in searched
    for path in searched:
        found = FORBIDDEN[kind].search(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found[0]!r}; weights are safetensors, architectures are in sleepify/models"


def test_all_files_tell_the_same_version():
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == sleepify.__version__
    assert re.search(r"^## \[(.*?)\]", changes, re.MULTILINE)[1] == sleepify.__version__


def snippets() -> list:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    cases = []
    for document in documents:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(r"^```python[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start(1)].count("\n")
            where = f"{document.relative_to(ROOT)}:{line + 1}"
            # The empty lines make an error's line number that of the document.
            cases.append(pytest.param(where, "\n" * line + match[1], id=where))
    assert cases, "found no snippet in the documentation"
    return cases


@pytest.mark.parametrize("where, code", snippets())
def test_snippets_compile(where, code):
    compile(code, where, "exec")


def test_nobody_edits_the_path_that_modules_are_found_on():
    """What is shared is in the package; tests and examples find each other by the settings of pytest."""
    edits = re.compile(r"sys\s*\.\s*path(?:\.(?:insert|append|extend)|\[[^]]*\]\s*=|\s*\+?=[^=])|setattr\(sys, .path.")
    folders = ("sleepify", "recipes", "examples", "benchmarks", "tests")
    searched = [path for folder in folders for path in sources(ROOT / folder)]
    assert ROOT / "recipes" / "rule110.py" in searched
    for path in searched:
        found = edits.search(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: {found[0]!r}; import from the package"
