"""A small model learns to sleep, on a CPU, in minutes: `make demo`.

A Qwen3-style model and its tokenizer are made on the spot, retrofitted with fast weights and trained by the recipe of
GSM-Infinite (`accelerate launch recipes/gsm_inf.py`) on problems of a few sentences, most of which is evicted before
the answer is asked for. One checkpoint is tested at N = 1 and N = 3, saved, loaded, compared, asked a problem, and
timed before and after sleep. What it leaves (model, plot, numbers, log) goes to outputs/demo, at once at the end.

    python examples/demo.py            # some minutes on two cores
    python examples/demo.py --quick    # two steps, to see that everything runs
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
CONFIG = RECIPES / "configs" / "gsm_inf_demo.yaml"
RESULTS = "demo.json"
# Everything is on this machine, and what libraries have to say to their developers is not for the reader of a demo.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
}
os.environ.update(QUIET)
# So small a model is fastest on one thread; the rows are made on the other core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.getLogger("matplotlib").setLevel(logging.ERROR)

import torch  # noqa: E402
import yaml  # noqa: E402
from measures import (  # noqa: E402
    OpenWindowOnly,
    accuracy_table,
    cost_table,
    costs,
    guesses,
    plot,
    share,
    write_on,
)
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table  # noqa: E402
from tokenizers import Regex, Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import logging as transformers_logging  # noqa: E402

from sleepify import SleepForCausalLM  # noqa: E402
from sleepify.tasks.gsm_infinite import PETS, GsmInfinite, Problem, WordTokenizer  # noqa: E402
from sleepify.training.evaluate import Report, evaluate  # noqa: E402
from sleepify.training.task_arguments import GsmInfiniteArguments  # noqa: E402

transformers_logging.disable_progress_bar()
console = Console(highlight=False)


@dataclass(frozen=True)
class Scale:
    """How much is done; None: as the YAML file says."""

    steps: int | None = None
    test_examples: int | None = None
    windows: int = 64
    timed_tokens: int = 200


@dataclass
class Clock:
    """Seconds per phase: of the wall, and of processors, child processes included."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        yield
        self.wall[name], self.cpu[name] = time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


# --- model and data ---------------------------------------------------------------------------------------------------


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, single digits and punctuation of the problems."""
    words = WordTokenizer([PETS]).tokens
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pieces = Regex(r"\d|[^\W\d]+(?:['-][^\W\d]+)*|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=words[0], padding_side="left"
    )


def make_base(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Two layers of 64 channels, random weights."""
    torch.manual_seed(0)
    width = 64
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        # With the usual 0.02 so narrow a model starts to learn much later.
        initializer_range=width**-0.5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def make_task(settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> GsmInfinite:
    """The recipe's task, from the recipe's YAML file."""
    names = {f.name for f in fields(GsmInfiniteArguments)}
    return GsmInfiniteArguments(**{k: v for k, v in settings.items() if k in names}).build(tokenizer=tokenizer)


# --- training ---------------------------------------------------------------------------------------------------------


def train(draft: Path, settings: dict[str, Any]) -> list[tuple[int, float]]:
    """Run the recipe in processes of its own, from draft/base to draft/model; (step, loss) as it logged them.

    Raises:
        SystemExit: if the recipe failed, with its last lines.
    """
    files = [RECIPES / "accelerate" / "cpu.yaml", RECIPES / "gsm_inf.py", CONFIG]
    overrides = {"model": "base", "output_dir": "model"}
    overrides |= {name: settings[name] for name in ("max_steps", "logging_steps", "test_examples")}
    words = [str(word) for name, value in overrides.items() for word in (f"--{name}", value)]
    shown = ["--config_file", *(str(file.relative_to(ROOT)) for file in files), *words]
    console.print(f"[dim]accelerate launch {' '.join(shown)}[/]", soft_wrap=True)
    log = draft / "train.log"
    losses: list[tuple[int, float]] = []
    text = TextColumn("{task.description}")
    bar = Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console)
    command = ["--config_file", *map(str, files), *words]
    with log.open("w", encoding="utf-8", buffering=1) as kept, bar, recipe(command, draft) as process:
        training = bar.add_task("starting", total=settings["max_steps"])
        testing = bar.add_task("testing on held-out problems", total=None, visible=False)
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            found = ast.literal_eval(line) if re.fullmatch(r"\{'.*\}\s*", line) else {}
            if "loss" in found:
                step = min((len(losses) + 1) * settings["logging_steps"], settings["max_steps"])
                losses.append((step, float(found["loss"])))
                bar.update(training, completed=step, description=f"loss {losses[-1][1]:.3f}")
                if not console.is_terminal and len(losses) % 10 == 0:
                    console.print(f"step {step} of {settings['max_steps']}: loss {losses[-1][1]:.3f}")
            elif "train_runtime" in found:
                bar.update(training, completed=settings["max_steps"])
                bar.update(testing, visible=True)
        if process.wait():
            tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-20:])
            raise SystemExit(f"expected the recipe to run, it ended with status {process.returncode}:\n{tail}")
        bar.update(testing, total=1, completed=1)
    return losses


@contextmanager
def recipe(arguments: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`accelerate launch`, stopped together with all that it started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments],
        # Paths in what it saves are then relative, and hold after the folder is renamed.
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# --- what it can do ---------------------------------------------------------------------------------------------------


def answer(model: SleepForCausalLM, tokenizer: PreTrainedTokenizerFast, task: GsmInfinite, problem: Problem) -> str:
    """Show how the model reads one problem, and what it says."""
    assert task.prompt is not None
    ids = task.prompt.encode(task.prompt.text(problem)[0])
    window = model.config.window_size
    for first in range(0, len(ids), window):
        last = first + window >= len(ids)
        style, label = ("bold", "awake") if last else ("dim", "slept on, then gone")
        console.print(f"[{style}]{label}: {escape(tokenizer.decode(ids[first : first + window]))}[/]", soft_wrap=True)
    said = {
        n: tokenizer.decode(
            model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, n_loops=n)[0, len(ids) :],
            skip_special_tokens=True,
        )
        for n in (1, 3)
    }
    console.print(f"the model says: {said[1]} (N = 1), {said[3]} (N = 3); right is {problem.answer}", markup=False)
    return said[3]


# --- the demo ---------------------------------------------------------------------------------------------------------


def demo(draft: Path, scale: Scale) -> None:
    """All of it, writing into ``draft``.

    Raises:
        SystemExit: if a part of it fails.
    """
    clock = Clock()
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    for name, value in (("max_steps", scale.steps), ("test_examples", scale.test_examples)):
        settings[name] = value or settings[name]
    settings["logging_steps"] = min(settings["logging_steps"], settings["max_steps"])

    console.rule("1  a base model, its tokenizer and its problems", align="left")
    with clock.phase("make model and problems"):
        tokenizer = make_tokenizer()
        base = make_base(tokenizer)
        base.save_pretrained(draft / "base")
        tokenizer.save_pretrained(draft / "base")
        task = make_task(settings, tokenizer)
        assert task.prompt is not None
        n_parameters = sum(parameter.numel() for parameter in base.parameters())
        console.print(f"Qwen3, {n_parameters:,} parameters, random weights; {len(tokenizer)} words")
        numbers = range(settings["test_examples"])
        bar = track(numbers, "held-out problems", console=console, transient=True)
        problems = [task.problem(number, "test") for number in bar]
        examples = [task.prompt.example(problem) for problem in problems]
        console.print(f"for example: {problems[0].question} {problems[0].problem}", soft_wrap=True)

    console.rule("2  retrofit, fine-tune (accelerate launch), test, save", align="left")
    with clock.phase("train and test"):
        losses = train(draft, settings)

    console.rule("3  load it again, and compare", align="left")
    with clock.phase("load, test, compare"):
        model = AutoModelForCausalLM.from_pretrained(draft / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(draft / "model")
        is_same = survives_saving(model, draft / "again", examples[0].input_ids)
        console.print(f"saved, loaded, logits equal bit for bit: {is_same}")
        report = Report.from_json((draft / "model" / "report.json").read_text(encoding="utf-8"))
        rows = OpenWindowOnly(examples, model.config.window_size)
        control = evaluate(model, rows, n_examples=len(examples), n_loops=[1], batch_size=100)
        guess = guesses(problems)
        console.print(accuracy_table(report, control, guess))
        plot(losses, report, control, guess, draft / "accuracy.png")

    console.rule("4  a problem it has not seen, and writing past the window", align="left")
    with clock.phase("generate"):
        said = answer(model, tokenizer, task, problems[0])
        written = settings["window_size"] * 4
        slept, most = write_on(model, examples[0].input_ids, written)
        console.print(
            f"{written} tokens written on: slept {slept} times meanwhile, never held more than {most} keys "
            "(what it writes after an answer means nothing; it was not trained to)"
        )

    console.rule("5  memory and time, before and after sleep", align="left")
    with clock.phase("memory and time"):
        text = [token for example in examples for token in example.input_ids] * scale.windows
        found = costs(model, text, scale.windows, scale.timed_tokens)
        console.print(cost_table(found))

    console.rule("in short", align="left")
    first, last = losses[0][1], losses[-1][1]
    inserted = sum(parameter.numel() for parameter in model.fast_weights.parameters())
    rows = {
        "parameters": f"{n_parameters:,} of the base, {inserted:,} inserted",
        "training": f"{settings['max_steps']} steps of {settings['per_device_train_batch_size']}, "
        f"loss {first:.3f} in the first {settings['logging_steps']}, {last:.3f} in the last",
    }
    for operations in report.difficulties:
        reached = [report.of(*setting)[operations] for setting in report.settings]
        rows[f"{operations} operations, %"] = (
            ", ".join(f"N = {s.n_loops}: {100 * s.accuracy:.1f}" for s in reached)
            + f"; best constant answer: {share(*guess.constant[operations])}"
        )
    rows |= {
        "saved and loaded": "the same, bit for bit" if is_same else "NOT the same",
        "an answer": f"{said}, right is {problems[0].answer}",
        "written past the window": f"{written} tokens, {slept} sleeps, at most {most} keys",
        "keys and values": f"{found[0].kv_bytes:,} bytes before sleep, {found[1].kv_bytes:,} after; "
        f"base after {found[-1].tokens:,} tokens: {found[-1].kv_bytes:,}",
        "state": f"{found[0].state_bytes:,} bytes, after {found[-2].tokens:,} tokens {found[-2].state_bytes:,}",
        "one more token": f"{found[0].seconds * 1e3:.2f} ms before sleep, {found[1].seconds * 1e3:.2f} after, "
        f"{found[-2].seconds * 1e3:.2f} after {scale.windows} sleeps",
        "time": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.wall.items()),
    }
    table = Table(show_header=False)
    for row in rows.items():
        table.add_row(*map(escape, row))
    console.print(table)
    numbers = {
        "losses": losses,
        "scores": json.loads(report.to_json())["scores"],
        "open_window_only": json.loads(control.to_json())["scores"],
        "guesses": asdict(guess),
        "costs": [asdict(cost) for cost in found],
        "wall_seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "in_short": rows,
    }
    (draft / RESULTS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if not is_same:
        raise SystemExit("expected the loaded model to give the saved one's logits, got others")


def survives_saving(model: SleepForCausalLM, folder: Path, row: list[int]) -> bool:
    """Whether a model saved and loaded gives the very same logits, windows past the first included."""
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    shutil.rmtree(folder)
    ids = torch.tensor([row * 3])
    with torch.no_grad():
        return all(torch.equal(model(ids, n_loops=n).logits, again(ids, n_loops=n).logits) for n in (1, 3))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two steps, to see that everything runs")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo", help="folder for what it leaves")
    arguments = parser.parse_args(argv)
    output = arguments.output.resolve()
    if output.exists() and not (output / RESULTS).is_file():
        parser.error(f"expected --output to be new, or the folder of an earlier demo; {output} is neither")
    output.parent.mkdir(parents=True, exist_ok=True)
    scale = Scale(steps=2, test_examples=16, windows=4, timed_tokens=5) if arguments.quick else Scale()
    # A polite kill cleans up like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        # Beside the output, so that all of it takes its place in one rename.
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
            draft = Path(folder) / output.name
            draft.mkdir()
            demo(draft, scale)
            if output.exists():
                shutil.rmtree(output)
            draft.rename(output)
    except KeyboardInterrupt:
        console.print("stopped; nothing was kept")
        raise SystemExit(128 + signal.SIGINT) from None
    console.print(f"model, plot, numbers and log: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
