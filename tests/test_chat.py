"""The chat, as a person has it: in a terminal of its own."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import talking
from forked import at_home, end_with, ended

from sleepify import Session
from sleepify.cli import chat

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120.0  # seconds for a start or an answer; a terminal that stays silent longer is broken


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model that sleeps and never ends an answer by itself, and its tokenizer."""
    return talking.saved_talker(tmp_path_factory.mktemp("chat") / "model", eos_token_id=None)


class Terminal:
    """A pseudo-terminal with a program in it."""

    def __init__(self, words: list[str], cwd: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            at_home(cwd, {"TERM": "xterm", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"})
            end_with(lambda: chat.main(words))
        self.shown, self.decoder = "", codecs.getincrementaldecoder("utf-8")()

    def type(self, line: str) -> None:
        os.write(self.fd, f"{line}\n".encode())

    def until(self, pattern: str) -> str:
        """What is shown up to a match of the pattern, which is taken off."""
        end = time.monotonic() + PATIENCE
        while (found := re.search(pattern, self.shown)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown!r}"
            if select.select([self.fd], [], [], 1.0)[0]:
                try:
                    got = os.read(self.fd, 4096)
                except OSError:  # the program has left
                    got = b""
                assert got, f"left without {pattern!r}: {self.shown!r}"
                self.shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", self.shown + self.decoder.decode(got))
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def wait(self) -> int:
        """What the program ends with; somebody must read what it says last, or it waits for that."""
        self.rest()
        code, self.pid = ended(self.pid, PATIENCE), 0
        return code

    def rest(self) -> None:
        """Read until the program has left."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 1.0)[0]:
                try:
                    if not os.read(self.fd, 4096):
                        return
                except OSError:
                    return

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(folder, tmp_path) -> Iterator[Terminal]:
    opened = Terminal([str(folder), "--max-new-tokens", "9"], tmp_path)
    yield opened
    opened.close()


STATUS = r"window (\d+) of 12 · slept on (\d+) · passes (\d+) · [\d,]+ \w+\n"
PROMPT = STATUS + r"> "


def test_a_person_talks_with_it(terminal, folder, tmp_path):
    story = "a cab had a bed, dad fed a hag. bad egg! " * 12
    (tmp_path / "story.txt").write_text(story, encoding="utf-8")
    model, words = chat.load(chat._arguments([str(folder)])), talking.tokenizer()
    session = Session(model, words)

    def status() -> tuple[int, int, int]:
        return tuple(map(int, re.search(STATUS, terminal.until(PROMPT)).groups()))

    def held() -> tuple[int, int, int]:
        return tuple(sum(each) for each in (session.cache.open_lengths, session.cache.windows, session.cache.passes))

    terminal.until("/help")
    assert status() == (0, 0, 0)
    terminal.type("/read story.txt")
    session.read(story, progress=print)
    assert status() == held() and held()[1] > 8
    terminal.type("/sleep 2")
    session.sleep(n_loops=2)
    assert status() == held() and held()[0] == 0 and held()[2] == 2
    turns = ("who had a bed?", "egg", "and dad?", "why, o why?")
    turn = next(turn for turn in turns if len(session.fork().say(turn, max_new_tokens=9)) > 3)
    terminal.type(turn)
    assert session.say(turn, max_new_tokens=9) in terminal.until(STATUS)
    terminal.type("/fork")
    assert "fork 1 ·" in terminal.until(PROMPT)
    terminal.type("/forget")
    assert re.search(STATUS, terminal.until(PROMPT)).groups() == ("0", "0", "0")
    terminal.type("/back")
    assert status() == held()
    terminal.type("/save kept.safetensors")
    assert status() == held()
    terminal.type("/undo")
    session.undo()
    assert status() == held()
    terminal.type("/ask egg?")
    assert session.ask("egg?", max_new_tokens=9) in terminal.until(PROMPT)
    terminal.type("/load kept.safetensors")
    session = Session.load(tmp_path / "kept.safetensors", model, words)
    assert status() == held()
    terminal.type("/read nowhere.txt")
    assert "No such file" in terminal.until(PROMPT)
    terminal.type("/sing")
    assert "expected one of /read" in terminal.until(PROMPT)
    terminal.type("/sleep soon")
    assert "expected a number of passes after /sleep, or nothing, got soon" in terminal.until(PROMPT)
    terminal.type("/quit")
    assert terminal.wait() == 0


def test_an_answer_that_is_stopped_did_not_happen(folder, tmp_path):
    terminal = Terminal([str(folder), "--max-new-tokens", "100000", "--temperature", "9"], tmp_path)
    try:
        before = re.search(STATUS, terminal.until(PROMPT)).groups()
        terminal.type("who had a bed?")
        terminal.until(r"who had a bed\?\n.")  # words are shown as they end
        os.write(terminal.fd, b"\x03")
        assert re.search(STATUS, terminal.until(PROMPT)).groups() == before
        os.write(terminal.fd, b"\x04")
        assert terminal.wait() == 0
    finally:
        terminal.close()


def test_what_cannot_be_opened_is_said_in_a_line(folder, tmp_path, capsys):
    assert chat.main([str(folder), "--load", str(tmp_path / "none.safetensors")]) == 1
    assert "none.safetensors" in capsys.readouterr().err
    assert chat.main([str(folder), "--n-loops", "0"]) == 1
    assert "expected n_loops to be a whole number of at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_bytes_that_are_no_text_cost_nothing(folder, tmp_path, encoding):
    words = [sys.executable, "-m", "sleepify", "chat", str(folder), "--max-new-tokens", "9"]
    typed = b"caf\xe9\nwho had a bed?\n"
    where = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(words, input=typed, capture_output=True, cwd=tmp_path, env=where, timeout=PATIENCE)
    assert ended.returncode == 0
    before, after = ended.stdout.decode().split("expected a line of text, got bytes that are none; say it again")
    assert "window 0 of" in before and re.search(STATUS, after)


def test_every_command_is_listed(folder):
    session = Session(chat.load(chat._arguments([str(folder)])), talking.tokenizer())
    known = {*chat.Chat(session, None, {}).commands, "/quit"}
    assert {command.split()[0] for command in chat.COMMANDS} == known
    page = (ROOT / "docs" / "talk.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(/\w+)[^`]*`", page.split("## In the terminal")[1]))
    assert listed | {"/help"} == known
