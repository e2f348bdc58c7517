"""Programs in processes of their own, forked from this one: it has loaded what they would take seconds to load."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.state import AcceleratorState, GradientState


def in_a_fork(work: Callable[[], Any]) -> int:
    """Do something in a process of its own; what it ended with, negative for a signal."""
    child = os.fork()
    if child == 0:
        end_with(work)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def end_with(work: Callable[[], Any]) -> NoReturn:
    """Do something and end this process: with what the work returns or exits with, or 70 for an error."""
    code = 70
    try:
        code = int(work() or 0)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def at_home(folder: Path, variables: Mapping[str, str] | None = None) -> None:
    """In a fork: work in ``folder``, with these variables beside the others, and speak by this process's own files."""
    os.chdir(folder)
    os.environ.update(variables or {})
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, closefd=False) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
    sys.stdout.reconfigure(line_buffering=True)


class Program:
    """A program that runs in a session of its own.

    Args:
        work: what it does.
        output: the file that it writes to.
        folder: where it works.
    """

    code: int | None

    def __init__(self, work: Callable[[], Any], output: Path, folder: Path) -> None:
        self.output, self.code = output, None
        sys.stdout.flush()
        # Opened here, so that it is there as soon as somebody looks.
        with open(output, "wb") as file:
            self.pid = os.fork()
            if self.pid == 0:
                os.setsid()
                for fd in (1, 2):
                    os.dup2(file.fileno(), fd)
                at_home(folder)
                end_with(work)

    @classmethod
    def script(cls, path: Path, words: list[str], output: Path, folder: Path) -> Program:
        """A script with the words behind it on its command line."""

        def run() -> None:
            sys.argv = [str(path), *words]
            runpy.run_path(str(path), run_name="__main__")

        return cls(run, output, folder)

    def said(self) -> str:
        """All so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def poll(self) -> int | None:
        """What it ended with; None while it runs."""
        if self.code is None:
            self.code = _ended(self.pid)
        return self.code

    def wait(self, seconds: float = 300) -> int:
        """What it ended with."""
        if self.code is None:
            self.code = ended(self.pid, seconds)
        return self.code

    def kill(self) -> None:
        """At once, with all that it started, if it has not ended."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait()


def ended(pid: int, seconds: float) -> int:
    """What a process ends with, negative for a signal.

    Raises:
        TimeoutError: if it does not end.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (code := _ended(pid)) is not None:
            return code
        time.sleep(0.02)
    raise TimeoutError(f"process {pid} has not ended in {seconds} s")


def _ended(pid: int) -> int | None:
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def on_two_ranks(work: Callable[[], Any], folder: Path, seconds: float = 1500) -> None:
    """Do something in two processes that torch.distributed and Accelerate take for the ranks of a run.

    When one fails, the other is not waited for.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}

    def of(rank: int) -> Callable[[], None]:
        def run() -> None:
            os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            torch.set_num_threads(1)
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            work()

        return run

    ranks, end = [Program(of(rank), folder / f"{rank}.log", folder) for rank in range(2)], time.monotonic() + seconds
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes) and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0, 0], "\n".join(rank.said()[-3000:] for rank in ranks)
