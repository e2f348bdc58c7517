"""Every message that a user can cause is on the page of troubleshooting."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(DOCS / "messages.py"))


def test_every_message_is_on_the_page(script):
    text = script["PAGE"].read_text(encoding="utf-8")
    wanted, there = script["page"](text).splitlines(), text.splitlines()
    assert len(there) > 300 and sum(line.startswith("- `") for line in there) > 200
    missing, gone = sorted(set(wanted) - set(there)), sorted(set(there) - set(wanted))
    assert wanted == there, f"run `python docs/messages.py`: the page lacks {missing}, and nothing says {gone}"


def test_messages_are_read_with_what_is_filled_in_left_out(script, tmp_path):
    source = tmp_path / "some.py"
    source.write_text(
        'raise ValueError(f"expected {a}{b} of `x`, " f"got {c!r}")\n'
        'raise Refusal(400, "expected a body in JSON" + ", got none")\n'
        'raise _wrong(path, "its counts lack words")\n'
        "raise ValueError(message)\n"
        "raise\n"
    )
    assert list(script["raised"](source)) == [
        "expected ... of `x`, got ...",
        "expected a body in JSON, got none",
        "... its counts lack words",
    ]
    assert script["_code"]("of `x`") == "``of `x` ``"


def test_what_the_tables_quote_is_not_listed_again(script):
    tables = "| `expected rows ..., got` | why |\n"
    (pattern,) = script["quoted"](tables)
    assert pattern.search("...: expected rows of text, got none")
    whole, without = (
        script["listing"](""),
        script["listing"]("| `expected held_out to leave rows to train on` | why |\n"),
    )
    assert len(whole.splitlines()) == len(without.splitlines()) + 1


def test_a_new_file_has_a_subject(script):
    names = [path.relative_to(script["PACKAGE"]).as_posix() for path in script["PACKAGE"].rglob("*.py")]
    assert {script["subject"](name) for name in names if list(script["raised"](script["PACKAGE"] / name))} >= {None}
    with pytest.raises(ValueError, match="expected dreams.py in SUBJECTS or INTERNAL"):
        script["subject"]("dreams.py")
    # Nothing is listed that is not there.
    listed = [part for beginnings in script["SUBJECTS"].values() for part in beginnings.split()]
    for beginning in [*listed, *script["INTERNAL"]]:
        assert any(name.startswith(beginning) for name in names), beginning
