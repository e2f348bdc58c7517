"""What the documentation shows runs, and what it names exists."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from families import tiny_base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sleepify import cli
from sleepify.cli import recipes

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The names that snippets give to models of others; tiny ones take their place.
BIG = ("Qwen/Qwen3-1.7B",)
# A line before a block that must not run, with the reason: <!-- not run: it needs a GPU -->
# Before one that runs where a package is installed, which is no dependency: <!-- needs trl -->
REMARK = r"(?:^<!-- (?:not run: (?P<reason>[^\n]+)|needs (?P<package>\w+)) -->\n+)?"
BLOCK = re.compile(REMARK + r"^```python[^\n]*\n(?P<code>.*?)^```", re.M | re.S)


def with_python() -> list[Path]:
    found = [path for path in DOCUMENTS if "```python" in path.read_text(encoding="utf-8")]
    assert len(found) >= 6
    return found


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    tokenizer = Tokenizer(
        models.WordLevel({piece: number for number, piece in enumerate(["<end>", *alphabet])}, "<end>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<end>", eos_token="<end>", pad_token="<end>")


@pytest.fixture
def small_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of billions of weights by name are tiny here, and files go where nothing is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    load_model, load_tokenizer = AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained

    def model(name, *args, **kwargs):
        return tiny_base("qwen3", max_position_embeddings=4096) if name in BIG else load_model(name, *args, **kwargs)

    def tokenizer(name, *args, **kwargs):
        return tiny_tokenizer() if name in BIG else load_tokenizer(name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)


@pytest.mark.parametrize("document", with_python(), ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run_from_first_to_last(document: Path, small_models: None) -> None:
    text = document.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python"), "a block that is not found is not run"
    names: dict = {"__name__": "snippet"}
    for block in blocks:
        if block["reason"] is None and (block["package"] is None or find_spec(block["package"])):
            # The empty lines make an error's line number that of the document.
            lines = "\n" * text[: block.start("code")].count("\n")
            exec(compile(lines + block["code"], str(document), "exec"), names)


def commands() -> list:
    """Every call of the command in a block of the shell, in one line each."""
    cases = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("sleepify "):
                    where = str(document.relative_to(ROOT))
                    cases.append(pytest.param(line.split("#")[0].split(), id=f"{where}: {line[:40]}"))
    assert len(cases) >= 8
    return cases


@pytest.mark.parametrize("words", commands())
def test_shell_blocks_call_commands_and_recipes_that_there_are(words: list[str]) -> None:
    assert words[1] in cli.COMMANDS
    if words[1] == "train" and not words[2].startswith("mine"):
        recipes.find(words[2])
    if "--accelerate" in words:
        recipes.find(words[words.index("--accelerate") + 1], recipes.LAUNCH)


def messages() -> str:
    """The text of all strings of the package, what is filled in left out."""

    def written(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(written(value) for value in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "\N{SECTION SIGN}"

    found = []
    for path in sorted((ROOT / "sleepify").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.JoinedStr, ast.Constant)):
                found.append(re.sub(r"%[sd]", "\N{SECTION SIGN}", written(node)))
    return "\n".join(found)


def test_troubleshooting_quotes_messages_that_there_are() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| (`.*?`) \|", text, re.M)
    assert len(quoted) >= 40
    said = messages()
    for message in quoted:
        pattern = re.escape(message[1:-1].replace("``", "`")).replace(re.escape("..."), "[^\n]*?")
        assert re.search(pattern, said), f"nothing says {message}"


def test_the_menu_has_every_page_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    menu = pages(yaml.safe_load(text)["nav"])
    there = [*DOCUMENTS[2:], *(ROOT / "docs").rglob("*.ipynb")]
    assert sorted(menu) == sorted(str(path.relative_to(ROOT / "docs")) for path in there)
    assert menu[0] == "index.md"


def test_the_timeline_is_what_its_script_draws() -> None:
    script = ROOT / "docs" / "timeline.py"
    names: dict = {"__name__": "timeline"}
    exec(compile(script.read_text(encoding="utf-8"), str(script), "exec"), names)
    assert names["draw"]() == script.with_suffix(".svg").read_text(encoding="utf-8")
