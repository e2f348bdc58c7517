"""The command line: every subcommand, from the recipes' names to the exit codes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Program, in_a_fork
from small import sleeping
from training_runs import Die, build_trainer
from transformers import TrainerCallback

from sleepify import cli
from sleepify.cli import recipes
from sleepify.training import processes
from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.recipe import parse

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--test_examples", "2", "--use_cpu", "--disable_tqdm"]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "out"
    assert cli.main(["train", "rule110_tiny", "--output_dir", str(folder), "--max_steps", "1", *TINY]) == 0
    return folder


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `sleepify train rule110_tiny` leaves."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained_once, tmp_path / "out"))


def test_every_command_is_listed_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, summary in cli.COMMANDS.items():
        assert f"{name} {summary}" in shown
        with pytest.raises(SystemExit) as stopped:
            cli.main([name, "--help"])
        assert stopped.value.code == 0
        assert f"sleepify {name}" in capsys.readouterr().out


def test_train_evaluate_and_generate_in_turn(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"report.json", "task.json", "model.safetensors"} <= {path.name for path in trained.iterdir()}
    assert cli.main(["evaluate", str(trained), "--n_examples", "2", "--n_loops", "1", "3"]) == 0
    assert "N = 3" in capsys.readouterr().out
    assert cli.main(["generate", str(trained), "--ids", "1", "0", "1", "1", "--max_new_tokens", "9"]) == 0
    assert re.fullmatch(r"\d+( \d+){8}", capsys.readouterr().out.strip())


def test_generate_sleeps_as_it_is_told(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Inserted layers add nothing at their start, so other weights must do: then N and L change what is written."""
    model = sleeping(dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.save_pretrained(trained)
    (trained / "task.json").unlink()
    prompt = [str(number) for number in range(3, 23)]

    def made(*options: str) -> str:
        assert cli.main(["generate", str(trained), "--ids", *prompt, "--max_new_tokens", "12", *options]) == 0
        return capsys.readouterr().out

    ids = torch.tensor([[*range(3, 23)]])
    for n_loops, options in ((3, []), (1, ["--n_loops", "1"])):
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, n_loops=n_loops)[0, 20:].tolist()
        assert [int(word) for word in made(*options).split()] == expected
    assert made("--window_size", "50") != made()
    assert made("--temperature", "0") == made()
    assert made("--temperature", "3", "--seed", "1") == made("--temperature", "3", "--seed", "1") != made()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "rule110_tinny"], "got 'rule110_tinny' (did you mean 'rule110_tiny'?)"),
        (["train", "rule110_tiny", "--n_lops", "2", *TINY], "did you mean 'n_loops'?"),
        (["train", "rule110_tiny", "--accelerate", "dpp"], "got 'dpp' (did you mean 'ddp'?)"),
        (["train", "rule110_tiny", "--accelerate", "ddp", "--n_lops", "2"], "did you mean 'n_loops'?"),
        (["train", "rule110_tiny", "--num_processes", "2"], "expected --num_processes beside --accelerate FILE only"),
        (
            ["generate", "OUT", "--prompt", "1011"],
            "expected a tokenizer in OUT, found none; give --tokenizer, or --ids",
        ),
        (["generate", "OUT", "--ids", "1", "--question", "Why?"], "expected --question and --chat beside a text"),
        (["generate", "OUT", "--ids", "1", "--chat"], "expected --question and --chat beside a text, got --ids"),
        (["recipes", "copy", "sft_tinny"], "got 'sft_tinny'"),
        (["evaluate", "nowhere"], "expected a task, a dataset or a text_file"),
        (["train", "rule110_tiny", "--lora_r", "-1", *TINY], "expected lora_r to be a rank of 1 or more, or 0"),
        (["train", "rule110_tiny", "--lora_r", "2", "--lora_targets", "q_prog", *TINY], "No modules were targeted"),
        (
            ["train", "rule110_tiny", "--architecture", '{"model_type": "qwen3", "hidden_sise": 32}', *TINY],
            "architecture: a qwen3 has no field 'hidden_sise' (did you mean 'hidden_size'?)",
        ),
        (
            ["train", "rule110_tiny", "--architecture", '{"model_type": "qwenn3"}', *TINY],
            "architecture: expected a model_type of transformers, got 'qwenn3' (did you mean 'qwen3'?)",
        ),
        (
            ["train", "rule110_tiny", "--architecture", '{"model_type": "qwen3", "hidden_size": "x"}', *TINY],
            "'hidden_size' expected int, got str",
        ),
        (
            ["train", "rule110_tiny", "--resume_from_checkpoint", "nowhere", *TINY],
            "expected a checkpoint of SleepTrainer in nowhere, found no sleep_run.json",
        ),
        (["generate", "OUT", "--ids", "1", "--device", "qpu"], "expected a device that PyTorch has here (cpu alone)"),
        (["evaluate", "OUT", "--device", "meta:x"], "expected a device that PyTorch has here (cpu alone)"),
        (["evaluate", "OUT", "--plot", "accuracy.pgn"], "expected an image's name that ends in one of"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(
    argv: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main([word.replace("OUT", str(trained)) for word in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert message.replace("OUT", str(trained)) in error and error.startswith(f"sleepify {argv[0]}: ")
    assert "\n" not in error


def test_notes_that_no_recipe_wrote_are_told_from_ours(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "task.json").write_text('{"name": "another"}', encoding="utf-8")
    assert cli.main(["evaluate", str(trained)]) == 2
    said = f"expected {trained / 'task.json'} to be what a recipe wrote, got another file; move it away"
    assert capsys.readouterr().err.strip() == f"sleepify evaluate: {said}"


def test_a_misspelt_change_of_a_model_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = trained.parent / "mine.yaml"
    recipe.write_text(
        f"recipe: rule110\nmodel: {trained}\nmodel_config: {{n_lops: 2}}\nuse_cpu: true\n", encoding="utf-8"
    )
    assert cli.main(["train", str(recipe)]) == 2
    assert "model_config: a sleepify has no field 'n_lops' (did you mean 'n_loops'?)" in capsys.readouterr().err


def test_a_recipe_is_taken_by_its_path_whatever_it_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("recipe: rule110\nn_lops: 2\n", encoding="utf-8")
    assert cli.main(["train", str(tmp_path / "mine")]) == 2
    assert "unknown field 'n_lops'" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["serve"], ["calibrate", "--text_file", "a.txt", "--mean_n_loops", "3"]])
def test_an_adapter_is_told_from_a_model(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "merged").mkdir()
    assert cli.main([*argv, str(tmp_path)]) == 2
    said = f"sleepify {argv[0]}: expected a whole model, found an adapter in {tmp_path}; give {tmp_path / 'merged'}"
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize("argv", [["serve"], ["calibrate", "--text_file", "a.txt", "--mean_n_loops", "3"]])
def test_a_base_is_told_from_a_model_that_sleeps(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    assert cli.main([*argv, str(tmp_path)]) == 2
    said = f"sleepify {argv[0]}: expected a model that sleeps, got {tmp_path}, a qwen3"
    assert capsys.readouterr().err.strip().startswith(said)


def test_recipes_are_listed_and_copied_with_what_they_extend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    for path in (ROOT / "recipes").rglob("*.yaml"):
        (line,) = re.findall(rf"^  {re.escape(path.stem)}  +(.*)$", listed, re.MULTILINE)
        assert line.split(": ")[-1], "the first line of a file says what it is for"
    assert cli.main(["recipes", "copy", "rule110_tiny", "accelerate/ddp", "--to", str(tmp_path / "mine")]) == 0
    copied = {path.name for path in (tmp_path / "mine").iterdir()}
    assert copied == {"rule110_tiny.yaml", "rule110_small.yaml", "ddp.yaml"}
    again = parse(None, [str(tmp_path / "mine" / "rule110_tiny.yaml"), *TINY])
    assert again.sleep == parse(None, [str(recipes.find("rule110_tiny")), *TINY]).sleep
    # What is there stays, and nothing is copied beside it.
    assert cli.main(["recipes", "copy", "depo_tiny", "rule110_tiny", "--to", str(tmp_path / "mine")]) == 2
    assert {path.name for path in (tmp_path / "mine").iterdir()} == copied


def test_help_has_a_heading_per_topic_and_every_field_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "rule110_tiny", "--help"])
    page = capsys.readouterr().out
    headings = re.findall(r"^(\S.*):$", page, re.MULTILINE)
    assert len(headings) >= 12 and headings.index("The test after training") < headings.index("Saving")
    shown = re.findall(r"^  --(\w+)", page, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert set(SleepTrainingArguments.__dataclass_fields__) - set(shown) <= {"_n_gpu"} | {
        name for name, field in SleepTrainingArguments.__dataclass_fields__.items() if not field.init
    }
    assert shown.index("n_loops") < shown.index("output_dir") < shown.index("adam_beta1") < shown.index("hub_token")


def test_the_launcher_runs_the_recipe_in_processes_of_its_own(tmp_path: Path) -> None:
    words = ["train", "rule110_tiny", "--accelerate", "cpu", "--output_dir", "out", "--max_steps", "1", *TINY]
    run = Program(lambda: cli.main(words), tmp_path / "log", tmp_path)
    assert run.wait() == 0, run.said()
    assert (tmp_path / "out" / "report.json").exists()
    assert "accelerate launch started one process, on cpu" in run.said()


@pytest.mark.parametrize("world_size, by_accelerate, said", [(1, True, True), (1, False, False), (2, True, False)])
def test_one_process_is_noted_where_more_may_have_been_meant(
    world_size: int, by_accelerate: bool, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if by_accelerate:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(SleepTrainingArguments, "world_size", world_size)
    assert processes.note_single_process(SleepTrainingArguments(use_cpu=True)) is said


@pytest.mark.parametrize(
    "numbers, code, saved",
    [
        ([signal.SIGINT], 130, ["checkpoint-2", "checkpoint-3"]),
        ([signal.SIGTERM], 143, ["checkpoint-2", "checkpoint-3"]),
        # torchrun answers Ctrl-C with SIGTERM to its workers, which the terminal has told already.
        ([signal.SIGINT, signal.SIGTERM], 130, ["checkpoint-2", "checkpoint-3"]),
        # The fork ends with 70 where Python would show a KeyboardInterrupt.
        ([signal.SIGINT, signal.SIGINT], 70, ["checkpoint-2"]),
    ],
)
def test_ctrl_c_saves_as_sigterm_does(
    numbers: list[signal.Signals], code: int, saved: list[str], tmp_path: Path
) -> None:
    deaths: list[TrainerCallback] = [Die("on_step_begin", 2, number) for number in numbers]
    assert in_a_fork(lambda: build_trainer(tmp_path, deaths).train()) == code
    assert sorted(path.name for path in tmp_path.iterdir()) == saved


def test_latest_begins_a_run_and_goes_on_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = build_trainer(tmp_path, max_steps=2, save_steps=1)
    first.train(resume_from_checkpoint="latest")
    assert first.state.global_step == 2 and "a new run begins" in caplog.text
    caplog.clear()
    again = build_trainer(tmp_path, max_steps=3, save_steps=1)
    again.train(resume_from_checkpoint="latest")
    assert again.state.global_step == 3 and "a new run begins" not in caplog.text
    assert [line["step"] for line in again.state.log_history if "loss" in line] == [3]


def test_ctrl_c_reaches_the_training_behind_the_launcher_which_waits_for_it(tmp_path: Path) -> None:
    """A terminal tells everyone in the foreground: the command, the launcher and the training."""
    words = ["train", "rule110_tiny", "--accelerate", "cpu", "--output_dir", "out", "--max_steps", "100000", *TINY]
    run = Program(lambda: cli.main(words), tmp_path / "log", tmp_path)
    try:
        end = time.monotonic() + 300
        while "'loss'" not in run.said():
            assert time.monotonic() < end, run.said()
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGINT)
        assert run.wait() != 0
    finally:
        run.kill()
    said = run.said()
    assert "stopping after this step, with a checkpoint" in said and "Traceback" not in said, said
    # The command comes back when all is saved, not before.
    (saved,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"checkpoint-\d+", saved.name) and (saved / "sleep_run.json").exists()
