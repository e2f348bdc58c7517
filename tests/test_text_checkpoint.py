"""`sleepify evaluate` on one's own data: the rows that a recipe held out, or all of a dataset in any format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import tiny_base
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from sleepify import CheckpointError, cli
from sleepify.training import DatasetArguments, evaluate_text, load_text
from sleepify.training import recipe as recipes
from sleepify.training.evaluate_checkpoint import run

TINY = Path(__file__).resolve().parent.parent / "recipes" / "configs" / "sft_tiny.yaml"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
FACT = "The ferry leaves at nine. " * 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the tiny recipe leaves, and what it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        folder = tmp_path_factory.mktemp("run") / "out"
        result = recipes.run(None, [str(TINY), "--output_dir", str(folder), "--disable_tqdm"])
        yield folder, result.results


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_checkpoint_is_tested_on_the_rows_that_its_recipe_held_out(trained, tmp_path, monkeypatch):
    folder, then = trained
    monkeypatch.chdir(tmp_path)
    argv = [str(folder), "--n_loops", "1", "2", "--batch_size", "8", "--device", "cpu", "--output", "found.json"]
    assert cli.main(["evaluate", *argv]) == 0
    found = json.loads(Path("found.json").read_text())["text"]
    assert [(each["n_loops"], each["window_size"]) for each in found] == [(1, 64), (2, 64)]
    for each in found:
        before = then["by_n_loops"][str(each["n_loops"])]
        assert each["perplexity"] == pytest.approx(before["perplexity"], rel=1e-4)
        assert each["exact_match_by_distance"] == before["exact_match_by_distance"]
        assert each["perplexity_by_distance"].keys() == before["perplexity_by_distance"].keys()


def test_a_run_is_not_resumed_on_other_rows(tmp_path, monkeypatch):
    """Rows that were trained on would be held out, and tested as new ones."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    argv = [str(TINY), "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "--save_strategy", "steps"]
    recipes.run(None, [*argv, "--max_steps", "1"])
    for changed in (["--held_out", "5"], ["--question_first"], ["--dataset_split", "train[:12]"]):
        for resumed in ([], ["--resume_from_checkpoint", "latest"]):
            with pytest.raises(CheckpointError, match="got one of another .rows: '.*' there, '.*' here"):
                recipes.run(None, [*argv, "--max_steps", "2", *changed, *resumed])
    noted = tmp_path / "out" / "checkpoint-1" / "sleep_run.json"
    assert recipes.run(None, [*argv, "--max_steps", "2", "--resume_from_checkpoint", "latest"]).spent.train_steps == 2
    # A checkpoint of before rows were noted is taken.
    old = json.loads(noted.read_text())
    del old["run"]["rows"]
    noted.write_text(json.dumps(old))
    recipes.run(None, [*argv, "--max_steps", "3", "--resume_from_checkpoint", str(noted.parent)])


def test_a_stream_is_not_resumed_with_other_rows_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    argv = [str(TINY), "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "--save_strategy", "steps"]
    argv += ["--streaming", "--test_n_loops", "1", "--resume_from_checkpoint", "latest", "--max_steps"]
    recipes.run(None, [*argv, "1", "--held_out", "4"])
    with pytest.raises(CheckpointError, match="held_out: 4 there, 2 here"):
        recipes.run(None, [*argv, "2", "--held_out", "2"])
    # A checkpoint of before this was noted is taken.
    noted = tmp_path / "out" / "checkpoint-1" / "sleep_run.json"
    old = json.loads(noted.read_text())
    del old["run"]["held_out"], old["run"]["train_sampling_strategy"]
    noted.write_text(json.dumps(old))
    assert recipes.run(None, [*argv, "2", "--held_out", "4"]).spent.train_steps == 2


@pytest.mark.parametrize(
    ("row", "options", "matched"),
    [
        ({"text": FACT}, [], False),
        ({"messages": [{"role": "user", "content": FACT}, {"role": "assistant", "content": "nine"}]}, [], False),
        ({"prompt": FACT, "completion": "At nine."}, [], True),
        ({"context": FACT, "question": "When?", "answer": "nine"}, ["--question_first"], True),
        ({"body": FACT}, ["--dataset_columns", '{"text": "body"}'], False),
    ],
    ids=["text", "messages", "prompt_completion", "question_answer", "renamed"],
)
def test_any_dataset_in_every_format(trained, row, options, matched, tmp_path, capsys):
    path = write(tmp_path / "other.jsonl", row, row, row)
    if "messages" in row:
        options = ["--chat_template", TEMPLATE]
    results = run(["--model", str(trained[0]), "--dataset", path, "--window_sizes", "32", "64", *options])
    assert [each["window_size"] for each in results["text"]] == [32, 64]
    # All rows, and what the library itself finds.
    tokenizer = ByT5Tokenizer(extra_ids=0)
    given = {
        "question_first": "--question_first" in options,
        "dataset_columns": {"text": "body"} if "body" in row else None,
    }
    data = DatasetArguments(path, held_out=0, chat_template=TEMPLATE, **given)
    model = AutoModelForCausalLM.from_pretrained(trained[0])
    wanted = evaluate_text(model, load_text(data, tokenizer, window_size=64).train, window_size=64, batch_size=2)
    assert results["text"][1]["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-4)
    assert ("exact_match" in wanted) == matched
    if matched:
        assert results["text"][1]["exact_match"] == wanted["exact_match"] and wanted["exact_match"]["total"] == 3
    assert "L = 32" in capsys.readouterr().out


def test_a_plain_model_is_tested_by_the_windows_that_are_given(tmp_path):
    tiny_base("qwen3", torch.float32, vocab_size=259).save_pretrained(tmp_path / "plain")
    path = write(tmp_path / "rows.jsonl", {"text": "abcdefgh" * 12})
    argv = ["--model", str(tmp_path / "plain"), "--tokenizer", "bytes", "--dataset", path]
    with pytest.raises(ValueError, match="expected window_sizes, by which to tell distances"):
        run(argv)
    (found,) = run([*argv, "--window_sizes", "8"])["text"]
    assert found["n_loops"] is None and {"0", "1-8"} < found["perplexity_by_distance"].keys()
    with pytest.raises(ValueError, match="expected a sleeping model to choose n_loops"):
        run([*argv, "--window_sizes", "8", "--n_loops", "2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "BAD"], "bad.jsonl: expected columns of one of the formats"),
        (["--dataset", "GOOD", "--held_out", "2"], "all rows of a dataset are tested"),
        (["--dataset", "GOOD", "--streaming"], "all rows of a dataset are tested"),
        (["--question_first"], "expected dataset beside what says how its rows are written"),
        (["--dataset", "GOOD", "--plot", "a.png"], "expected plot with a task"),
    ],
)
def test_what_cannot_be_is_one_line_before_the_model_is_loaded(
    trained, options, message, tmp_path, monkeypatch, capsys
):
    files = {"BAD": write(tmp_path / "bad.jsonl", {"txt": "a"}), "GOOD": write(tmp_path / "good.jsonl", {"text": "ab"})}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    assert cli.main(["evaluate", str(trained[0]), *(files.get(word, word) for word in options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sleepify evaluate: ") and message in error


def copied(trained: Path, to: Path):
    """A checkpoint of one's own, and what it notes of its task."""
    folder = to / "out"
    folder.mkdir()
    for path in trained.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder, json.loads((folder / "task.json").read_text())


def test_a_run_on_all_rows_has_none_to_test_on(trained, tmp_path, monkeypatch):
    folder, noted = copied(trained[0], tmp_path)
    noted["task"]["held_out"] = 0
    (folder / "task.json").write_text(json.dumps(noted))
    with pytest.raises(ValueError, match="expected rows that were held out, .* give --dataset"):
        run(["--model", str(folder)])


def test_rows_that_were_trained_on_are_not_tested_as_held_out(trained, tmp_path, capsys):
    """The choice of held-out rows goes by the number of rows: with one more, others would be taken for them."""
    folder, noted = copied(trained[0], tmp_path)
    rows = Path(noted["task"]["dataset"]).read_text(encoding="utf-8").splitlines(keepends=True)
    noted["task"]["dataset"] = str(tmp_path / "grown.jsonl")
    Path(noted["task"]["dataset"]).write_text("".join([*rows, rows[0]]), encoding="utf-8")
    (folder / "task.json").write_text(json.dumps(noted))
    assert cli.main(["evaluate", str(folder)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "grown.jsonl to hold out the rows that it held out in training" in error and "give --dataset" in error


@pytest.mark.parametrize("base", [None, "mine"])
def test_an_adapter_points_to_the_merged_model(base, tmp_path, capsys):
    """Which sleeps as it was trained; the base, by whatever name, may sleep otherwise."""
    (tmp_path / "merged").mkdir()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "a.txt").write_text("a")
    for words in (
        ["evaluate", str(tmp_path), "--text_file", str(tmp_path / "a.txt")],
        ["generate", str(tmp_path), "--prompt", "a"],
    ):
        assert cli.main(words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"expected a whole model, found an adapter in {tmp_path}" in error
        assert f"give {tmp_path / 'merged'}" in error
