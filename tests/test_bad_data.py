"""Bad datasets: one clear line on the command line, before a model is loaded."""

from __future__ import annotations

import json

import pytest

from sleepify import cli
from sleepify.training import DatasetArguments
from sleepify.training.text_data import read_dataset

SAID = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
FORMATS = "expected columns of one of the formats (messages; context, question, answer; prompt, completion; text), got"
LEFT_OUT = "expected a chat template that writes what the assistant says"


@pytest.fixture(autouse=True)
def no_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("sleepify.training.sft.build_model", lambda *_: pytest.fail("loaded a model"))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"title": "a", "body": "b"}] * 2, [], f"{FORMATS} ['body', 'title']: rename them with dataset_columns"),
        ([{"prompt": "a"}] * 2, [], f"{FORMATS} ['prompt']: rename them with dataset_columns"),
        ([{"text": "fine"}, {"text": 3}], [], "row 1: expected text to be text, got int 3"),
        ([{"text": "fine"}, {"text": ["a"]}], [], "row 1: expected text to be text, got list ['a']"),
        ([{"text": 1}, {"text": 2}], [], "row 0: expected text to be text, got int 1"),
        (
            [{"messages": SAID}, {"messages": "hello"}],
            ["--chat_template", TEMPLATE],
            "row 1: expected messages as a list, got str 'hello'",
        ),
        (
            [{"messages": SAID}, {"messages": [{"role": "user", "text": "a"}]}],
            ["--chat_template", TEMPLATE],
            "row 1: expected the content of a message of user to be text, got NoneType None",
        ),
        ([{"text": "fine"}, {"text": ""}], [], "row 1: expected text to say something, got str ''; take the row out"),
        ([{"text": "fine"}, {}], [], "row 1: expected text to be text, got NoneType None"),
        (
            [{"text": "fine"}, {"text": "word " * 300}],
            ["--eviction", "sliding"],
            "row 1: expected at most 1024 tokens, the positions that the base supports, got 1501: split the row, or "
            "sleep with eviction=hard, where positions begin anew in every window",
        ),
        ([{"messages": SAID}] * 2, [], "expected a chat template for messages, the tokenizer has none"),
        ([{"messages": SAID}] * 2, ["--chat_template", "{{ raise_exception('no') }}"], "got TemplateError: no;"),
        ([{"messages": SAID}] * 2, ["--chat_template", "{% for m in"], "got TemplateSyntaxError: "),
        ([{"messages": SAID}] * 2, ["--chat_template", "{{ messages[0]['content'] }}"], LEFT_OUT),
        ([{"messages": SAID}] * 2, ["--chat_template", "{% for m in messages %}{{ m.text }}{% endfor %}"], LEFT_OUT),
        (
            [{"messages": SAID}] * 2,
            ["--chat_template", "no_such.jinja"],
            "expected chat_template to be a template or a file with one, got 'no_such.jinja'",
        ),
    ],
)
def test_bad_data_is_one_clear_line_before_a_model_is_loaded(rows, options, message, tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["train", "sft_tiny", "--dataset", "data.jsonl", "--held_out", "1", "--output_dir", "out", *options]
    assert cli.main(words) == 2
    said = capsys.readouterr()
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("sleepify train: data.jsonl: ") and message in line
    assert "Traceback" not in said.err and not said.out and not (tmp_path / "out").exists()


def test_a_file_is_the_one_of_that_name_and_not_one_that_its_name_fits(tmp_path):
    """datasets takes names for patterns."""
    for name, text in (("notes1.jsonl", "another"), ("notes[1].jsonl", "this")):
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    (tmp_path / "a [b]*").mkdir()
    (tmp_path / "a [b]*" / "c?.txt").write_text("this", encoding="utf-8")
    for name in ("notes[1].jsonl", "a [b]*/c?.txt"):
        assert read_dataset(DatasetArguments(name))["text"] == ["this"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_stands_in_a_csv_file_is_text(streaming, tmp_path):
    values = ["007", "N/A", "True", "1e3", "two, with a comma", "None"]
    lines = ["\ufeffprompt,completion", *(f'How many?,"{value}"' for value in values)]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = read_dataset(DatasetArguments("data.csv", streaming=streaming))
    assert [row["completion"] for row in rows] == values
