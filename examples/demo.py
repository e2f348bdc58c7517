"""What sleep is for, shown on a CPU in minutes: `make demo`.

A small Qwen3 learns to look one pair up in a list of pairs, with full attention: the pretrained base. Then the recipe
(`accelerate launch recipes/hops.py`) fine-tunes it to walk one or two steps from pair to pair, four times on the same
rows: with sleep at N = 4 and at N = 1, reading the list four times instead, and as it is, with its whole cache. The
three first answer when the list is evicted. Shown are a table, a figure, one problem, and what a session costs. What
it leaves (models, figure, numbers, logs) goes to outputs/demo, at once at the end.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"
RESULTS = "demo.json"
# Everything is on this machine, and what libraries have to say to their developers is not for the reader of a demo.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",
    "DS_ACCELERATOR": "cpu",
}
os.environ.update(QUIET)
# So small a model is fastest on one thread; two are trained at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.getLogger("matplotlib").setLevel(logging.ERROR)

import torch  # noqa: E402
from measures import WithoutText, accuracy_table, answers, cost_table, costs, plot  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markup import escape  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers import logging as transformers_logging  # noqa: E402

from sleepify import SleepForCausalLM  # noqa: E402
from sleepify.tasks.hops import Hops  # noqa: E402
from sleepify.training import recipe as recipes  # noqa: E402
from sleepify.training.evaluate import Report, evaluate  # noqa: E402

transformers_logging.disable_progress_bar()
console = Console(highlight=False)


@dataclass(frozen=True)
class Scale:
    """How much is done; no overrides: as the YAML files say."""

    overrides: Mapping[str, int] = field(default_factory=dict)
    windows: int = 64
    timed_tokens: int = 200


@dataclass(frozen=True)
class Run:
    """One run of the recipe: the folder of its model, its name for people, its YAML file and what it changes."""

    name: str
    label: str
    changes: Mapping[str, Any]
    config: str = "hops_demo"


BASE = Run("base", "the base learns to look up", {}, "hops_demo_base")
OURS, ONCE, AGAIN, FULL = (
    Run("n4", "sleep, N = 4", {"n_loops": 4}),
    Run("n1", "sleep, N = 1", {"n_loops": 1}),
    Run("reread", "read 4 times, N = 1", {"n_loops": 1, "n_reads": 4}),
    Run("full", "the base, its whole cache kept", {"sleep": False}),
)
# The longest first, so that two cores end together.
ARMS = (OURS, AGAIN, ONCE, FULL)
SHOWN = (OURS, ONCE, AGAIN, FULL)
DROPPED = "the base, its cache dropped"


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


# --- training ---------------------------------------------------------------------------------------------------------


def train(draft: Path, runs: Sequence[Run], scale: Scale) -> None:
    """Run the recipe once per run, two at a time, into folders of ``draft``, with a live bar each.

    Raises:
        SystemExit: if one failed, with its last lines.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    waiting, going = list(runs), dict[str, subprocess.Popen[bytes]]()
    with ExitStack() as stack, Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        tasks = {run.name: bar.add_task(run.label, total=logs_of(run, scale), state="waiting") for run in runs}
        while waiting or going:
            while waiting and len(going) < 2:
                run = waiting.pop(0)
                process = recipe(command(run, scale), draft, draft / f"{run.name}.log")
                going[run.name] = stack.enter_context(process)
            time.sleep(0.2)
            for name, process in list(going.items()):
                ended = process.poll() is not None
                text = (draft / f"{name}.log").read_text(encoding="utf-8", errors="replace")
                show(bar, tasks[name], text, ended)
                if process.poll():
                    tail = "".join(text.splitlines(keepends=True)[-20:])
                    raise SystemExit(f"expected the recipe to run, it ended with {process.returncode}:\n{tail}")
                if ended:
                    del going[name]
                    if not console.is_terminal:
                        console.print(f"done: {name}")


def logs_of(run: Run, scale: Scale) -> int:
    """How often a run logs its loss."""
    training = recipes.parse(None, words(run, scale)).training
    return max(1, training.max_steps // int(training.logging_steps))


def words(run: Run, scale: Scale) -> list[str]:
    """A run's command line after the script's name."""
    changes = {
        "output_dir": run.name,
        **({} if run is BASE else {"model": BASE.name}),
        **run.changes,
        **scale.overrides,
    }
    given = [str(word) for name, value in changes.items() for word in (f"--{name}", value)]
    return [str(RECIPES / "configs" / f"{run.config}.yaml"), *given]


def command(run: Run, scale: Scale) -> list[str]:
    """What `accelerate launch` is given."""
    return ["--config_file", str(RECIPES / "accelerate" / "cpu.yaml"), str(RECIPES / "hops.py"), *words(run, scale)]


def show(bar: Progress, task: TaskID, log: str, ended: bool) -> None:
    """Bring a run's bar up to its log."""
    logged = [ast.literal_eval(line) for line in re.findall(r"^\{'loss'.*\}\s*$", log, re.MULTILINE)]
    if ended:
        total = max(1, len(logged))
        bar.update(task, total=total, completed=total, state="done")
    elif logged:
        bar.update(task, completed=len(logged), state=f"loss {float(logged[-1]['loss']):.3f}")


@contextmanager
def recipe(arguments: list[str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`accelerate launch` that writes into a log, stopped together with all that it started."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *arguments],
            # Paths in what it saves are then relative, and hold after the folder is renamed.
            cwd=folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


# --- what it can do ---------------------------------------------------------------------------------------------------


def problem(models: Mapping[str, Any], task: Hops, index: int) -> list[str]:
    """Show what one row's model reads, what is gone when the questions come, and what each model says."""
    example = task.example(index, "test")
    pairs, asked = task.decode(example.input_ids).split(" | ")
    questions, right = zip(*(each.split("? ") for each in asked.split(", ")), strict=True)
    console.print(f"[dim]slept on, then gone: {escape(pairs)}[/]", soft_wrap=True)
    table = Table("asked", *questions)
    for name, model in models.items():
        said = answers(model, task, example)
        table.add_row(name, *(f"{s}" if s == r else f"[red]{s}[/]" for s, r in zip(said, right, strict=True)))
    table.add_row("right", *right)
    console.print(table)
    return list(right)


# --- the demo ---------------------------------------------------------------------------------------------------------


def demo(draft: Path, scale: Scale) -> None:
    """All of it, writing into ``draft``.

    Raises:
        SystemExit: if a part of it fails.
    """
    clock = Clock()
    console.rule("1  a base, pretrained on the spot", align="left")
    console.print(f"[dim]accelerate launch {' '.join(shown(command(BASE, scale)))}[/]", soft_wrap=True)
    with clock.phase("pretrain"):
        train(draft, [BASE], scale)

    console.rule("2  four ways to answer, fine-tuned on the same rows", align="left")
    console.print(f"[dim]accelerate launch {' '.join(shown(command(OURS, scale)))}[/]", soft_wrap=True)
    with clock.phase("fine-tune"):
        train(draft, ARMS, scale)

    console.rule("3  held-out questions", align="left")
    with clock.phase("test"):
        models = {run.label: AutoModelForCausalLM.from_pretrained(draft / run.name).eval() for run in SHOWN}
        reports = {run.label: read_report(draft / run.name) for run in SHOWN}
        task = task_of(OURS, scale)
        n_rows = reports[FULL.label].n_examples
        reports[DROPPED] = evaluate(models[FULL.label], WithoutText(task), n_examples=n_rows, batch_size=250)
        guess = 1 / task.n_nodes
        console.print(accuracy_table(reports, guess))
        plot(reports, guess, draft / "accuracy.png")
        ours = models[OURS.label]
        is_same = survives_saving(ours, draft / "again", task.example(0, "test").input_ids)
        console.print(f"saved, loaded, logits equal bit for bit: {is_same}")

    console.rule("4  one row that it has not seen", align="left")
    with clock.phase("one row"):
        shown_models = {name: model for name, model in models.items() if name != AGAIN.label}
        problem(shown_models, task, 0)

    console.rule("5  memory and time, before and after sleep", align="left")
    with clock.phase("memory and time"):
        rows = [task.example(index, "test").input_ids for index in range(scale.windows)]
        text = [token for row in rows for token in row[: task.text_length]]
        found = costs(ours, text, scale.windows, scale.timed_tokens)
        console.print(cost_table(found))

    console.rule("in short", align="left")
    hardest = max(reports[OURS.label].difficulties)
    rows = {
        "shown": f"how much of a text that is gone can still be reasoned with, at {hardest} steps: "
        + ", ".join(f"{100 * at_hardest(report):.0f}% by {name}" for name, report in reports.items()),
        "not shown": "language, large models, what more layers or steps would do, or pairs with a token between them, "
        "of which N = 1 learns two steps as well: docs/results/worth.md, docs/choosing.md",
        "saved and loaded": "the same, bit for bit" if is_same else "NOT the same",
        "keys and values": f"{found[0].kv_bytes:,} bytes before sleep, {found[1].kv_bytes:,} after; "
        f"base after {found[-1].tokens:,} tokens: {found[-1].kv_bytes:,}",
        "state": f"{found[0].state_bytes:,} bytes, after {found[-2].tokens:,} tokens {found[-2].state_bytes:,}",
        "one more token": f"{found[0].seconds * 1e3:.2f} ms before sleep, {found[1].seconds * 1e3:.2f} after, "
        f"{found[-2].seconds * 1e3:.2f} after {scale.windows} sleeps; base {found[2].seconds * 1e3:.2f}",
        "time": ", ".join(f"{name} {seconds:.0f} s" for name, seconds in clock.wall.items()),
    }
    table = Table(show_header=False)
    for row in rows.items():
        table.add_row(*map(escape, row))
    console.print(table)
    numbers = {
        "reports": {name: json.loads(report.to_json()) for name, report in reports.items()},
        "costs": [asdict(cost) for cost in found],
        "wall_seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "in_short": rows,
    }
    (draft / RESULTS).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if not is_same:
        raise SystemExit("expected the loaded model to give the saved one's logits, got others")


def shown(arguments: Sequence[str]) -> list[str]:
    """A command line with the checkout's files as a reader would type them."""
    return [word.removeprefix(f"{ROOT}{os.sep}") for word in arguments]


def at_hardest(report: Report) -> float:
    """Share of the hardest questions that were answered."""
    return report.of(*report.settings[0])[report.difficulties[-1]].accuracy


def read_report(folder: Path) -> Report:
    """Of a run."""
    return Report.from_json((folder / "report.json").read_text(encoding="utf-8"))


def task_of(run: Run, scale: Scale) -> Hops:
    """What a run was asked."""
    arguments = recipes.parse(None, words(run, scale)).task
    assert not isinstance(arguments, recipes.DatasetArguments)
    task = arguments.build(test=True)
    assert isinstance(task, Hops)
    return task


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
    quick = Scale({"max_steps": 2, "logging_steps": 1, "test_examples": 16}, windows=4, timed_tokens=5)
    scale = quick if arguments.quick else Scale()
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
    console.print(f"models, figure, numbers and logs: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
