"""``sleepify chat MODEL``: talk in the terminal with a model that sleeps, and see what it holds."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from sleepify.devices import device_of
from sleepify.modeling import SleepForCausalLM
from sleepify.retrofit import sleepify
from sleepify.session import Session
from sleepify.training.evaluate_checkpoint import check_whole

COMMANDS = {
    "/read FILE": "read a text file",
    "/sleep [N]": "sleep now, in N passes",
    "/ask QUESTION": "ask without a trace, and without the template",
    "/fork": "go on with a copy",
    "/back": "go back to what /fork left, and drop the copy",
    "/undo": "take back the latest step",
    "/save FILE": "keep the session",
    "/load FILE": "go on with one that was kept",
    "/forget": "begin anew",
    "/help": "this list",
    "/quit": "leave (Ctrl-D does, too)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat until the user leaves; the exit code."""
    arguments = _arguments(argv)
    try:
        from rich.console import Console
    except ImportError:
        print('expected the package rich, found none; pip install "sleepify[train]"', file=sys.stderr)
        return 1
    with contextlib.suppress(ImportError):  # not on every system; with it, lines can be edited and called up again
        importlib.import_module("readline")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Bytes that are no text would take the lines after them along.
        sys.stdin.reconfigure(errors="surrogateescape")
    console = Console(highlight=False)
    try:
        model = load(arguments)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        session = Session(model, tokenizer)
        if arguments.load is not None:
            session = Session.load(arguments.load, model, tokenizer)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    generate: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens}
    if arguments.temperature is not None:
        generate |= {"do_sample": arguments.temperature > 0}
        generate |= {"temperature": arguments.temperature} if arguments.temperature > 0 else {}
    return Chat(session, console, generate).run()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sleepify chat", description=__doc__)
    parser.add_argument("model", help="name or path of a model that sleeps, or of a base to give sleep to")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a session that was kept")
    parser.add_argument("--n_loops", "--n-loops", type=int, metavar="N", help="passes of a sleep")
    parser.add_argument("--window_size", "--window-size", type=int, metavar="L", help="tokens of a window")
    parser.add_argument(
        "--max_new_tokens",
        "--max-new-tokens",
        type=int,
        default=512,
        metavar="N",
        help="most tokens of an answer (512)",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="sample at T; 0 for greedy answers")
    parser.add_argument("--device", help="by default an accelerator if there is one")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="auto: as it was saved")
    return parser.parse_args(argv)


def load(arguments: argparse.Namespace) -> SleepForCausalLM:
    """The model that is named; a base is given sleep.

    Raises:
        ValueError, OSError: if there is none, or it cannot have these settings.
    """
    check_whole(arguments.model)
    device = device_of(arguments.device)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype)
    given = {name: getattr(arguments, name) for name in ("n_loops", "window_size")}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(model, SleepForCausalLM):
        for name, value in given.items():
            setattr(model.config, name, value)
        model.options()
    else:
        print("a base without sleep: what is inserted is untrained and adds nothing", file=sys.stderr)
        model = sleepify(model, **given)
    return model.to(device).eval()


class Chat:
    """One user at a terminal.

    Args:
        session: to go on with.
        console: of rich.
        generate: keywords of every answer.
    """

    def __init__(self, session: Session, console: Any, generate: dict[str, Any]) -> None:
        self.session, self.console, self.generate = session, console, generate
        self.left: list[Session] = []
        self.commands: dict[str, Callable[[str], object]] = {
            "/read": self._read,
            "/sleep": self._sleep,
            "/ask": lambda words: self._answer(self.session.ask, words),
            "/fork": lambda words: self._fork(),
            "/back": lambda words: self._back(),
            "/undo": lambda words: self.session.undo(),
            "/save": lambda words: self.session.save(_path(words)),
            "/load": self._load,
            "/forget": lambda words: self.session.forget(),
            "/help": lambda words: self._help(),
        }

    def run(self) -> int:
        """Until the user leaves."""
        self.console.print("[dim]/help lists the commands[/dim]")
        self._status()
        while True:
            try:
                # Not the console's own: line editing must know the prompt, and the terminal be ready when it shows.
                line = input("> ").strip()
                line.encode()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                self.console.print("\n[dim]/quit or Ctrl-D leaves[/dim]")
                continue
            except UnicodeError:
                self.console.print("expected a line of text, got bytes that are none; say it again", style="red")
                continue
            if line == "/quit":
                return 0
            if line:
                self._do(line)

    def _do(self, line: str) -> None:
        """One line of the user's; whatever goes wrong, the session is what it was."""
        word, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                self._answer(self.session.say, line)
            elif word in self.commands:
                self.commands[word](rest.strip())
            else:
                raise ValueError(f"expected one of {', '.join([*self.commands, '/quit'])}, got {word}")
        except KeyboardInterrupt:
            self.console.print("\n[yellow]stopped; it did not happen[/yellow]")
        except Exception as error:  # a template, a file or a full memory: nothing of it may cost the session
            self.console.print(f"\n{error}", style="red", markup=False)
        self._status()

    # --- commands --------------------------------------------------------------------------------------------------

    def _answer(self, ask: Callable[..., object], words: str) -> None:
        streamer = TextStreamer(self.session.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ask(words, streamer=streamer, **self.generate)

    def _read(self, words: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        text = _path(words).read_text(encoding="utf-8")
        columns = ("reading", BarColumn(), MofNCompleteColumn(), "tokens", TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task("reading", total=None)
            self.session.read(text, progress=lambda read, whole: bar.update(task, completed=read, total=whole))

    def _sleep(self, words: str) -> None:
        if words and not words.isdecimal():
            raise ValueError(f"expected a number of passes after /sleep, or nothing, got {words}")
        self.session.sleep(int(words) if words else None)

    def _fork(self) -> None:
        self.left.append(self.session)
        self.session = self.session.fork()

    def _back(self) -> None:
        if not self.left:
            raise ValueError("expected a fork to go back from, got the session itself; /fork makes one")
        self.session = self.left.pop()

    def _load(self, words: str) -> None:
        self.session = Session.load(_path(words), self.session.model, self.session.tokenizer)

    def _help(self) -> None:
        for command, what in COMMANDS.items():
            self.console.print(f"{command:<15}{what}", markup=False)

    def _status(self) -> None:
        """What the session holds: the open window, what was slept on, in how many passes, bytes."""
        cache = self.session.cache
        awake, windows, passes = (sum(values) for values in (cache.open_lengths, cache.windows, cache.passes))
        fork = f"fork {len(self.left)} · " if self.left else ""
        self.console.print(
            f"[dim]{fork}window {awake:,} of {self.session.model.config.window_size:,} · slept on {windows:,} · "
            f"passes {passes} · {_size(cache.state_bytes + cache.kv_bytes)}[/dim]"
        )


def _path(words: str) -> Path:
    if not words:
        raise ValueError("expected the name of a file after the command, got nothing")
    return Path(words).expanduser()


def _size(n_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:,.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:,.1f} GiB"
