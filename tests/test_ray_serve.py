"""Two replicas behind Ray Serve: sessions stay where they are, and outlive the replica that has them. Takes minutes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import served

pytest.importorskip("ray", reason="pip install 'ray[serve]'")
httpx = pytest.importorskip("httpx", reason="pip install httpx")

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray") / "model"
    return folder, *served.tiny(folder)


@pytest.fixture(scope="module")
def address(made, tmp_path_factory) -> Iterator[str]:
    """Of the example, with two replicas and one API key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(made[0]), "--sessions", str(tmp_path_factory.mktemp("sessions")), "--port", str(port)]
    log = (tmp_path_factory.mktemp("log") / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "ray_serve.py"), *words, "--replicas", "2", "--api-key", "sesame"],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1",
                          "RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip
    try:
        end = time.monotonic() + 600
        while "serving" not in Path(log.name).read_text():
            assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(120) == 0, Path(log.name).read_text()[-4000:]
        finally:
            # Ray starts a dozen processes, which outlive one that did not come up.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def say(address: str, text: str, session: str | None = None, key: str = "sesame") -> tuple[str, str, str]:
    """The answer, its session, and the replica that made it."""
    headers = {"Authorization": f"Bearer {key}"}
    if session is not None:
        headers |= {"X-Session-Id": session, "serve_multiplexed_model_id": session}
    body = {"model": "model", "messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}
    end = time.monotonic() + 180
    while True:
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=180)
        # While Ray finds out that a replica is gone it may say so.
        if answer.status_code < 500 or time.monotonic() > end:
            break
        time.sleep(0.5)
    assert answer.status_code == 200, answer.text
    made = answer.json()["choices"][0]["message"]["content"]
    return made, answer.headers["x-session-id"], answer.headers["x-replica"]


def until_the_router_knows(address: str) -> None:
    """What the router remembers travels to it. Sessions that came later are all found: so are those before them."""
    pause = 1.0
    while True:
        later = [say(address, f"where is number {count}?") for count in range(8)]
        time.sleep(pause)
        found = []
        for _, session, replica in later:
            # A request that moves no session; sent anywhere else, it would make that replica remember it, too.
            headers = {"Authorization": "Bearer sesame", "serve_multiplexed_model_id": session}
            answer = httpx.get(f"{address}/v1/sessions", headers=headers, timeout=180)
            found.append(answer.headers["x-replica"] == replica)
        if all(found):
            return
        assert pause < 120, found
        pause *= 2


def test_a_session_stays_and_outlives_its_replica(made, address) -> None:
    _, model, tokens = made
    first: list[tuple[str, str, str]] = []
    # Idle replicas are chosen by chance.
    while len(first) < 8 or len({replica for _, _, replica in first}) < 2:
        assert len(first) < 64, "both work"
        first.append(say(address, f"who is number {len(first)}?"))
    replicas = {replica for _, _, replica in first}
    until_the_router_knows(address)
    talks = []
    for count, (text, session, _) in enumerate(first):
        messages = [{"role": "user", "content": f"who is number {count}?"}, {"role": "assistant", "content": text}]
        where = []
        for question in ("and then?", "why so, and where did they go after that?", "yes"):
            answer, same, replica = say(address, question, session)
            messages.append({"role": "user", "content": question})
            assert same == session and answer == served.alone(model, tokens, messages, 12)
            messages.append({"role": "assistant", "content": answer})
            where.append(replica)
        assert len(set(where)) == 1, "it stays where it is"
        talks.append((session, messages, where[-1]))
    assert {replica for _, _, replica in talks} == replicas
    # The replica that has the first one dies without a word.
    gone = talks[0][2]
    os.kill(int(gone.rpartition(":")[2]), signal.SIGKILL)
    for session, messages, _ in talks:
        answer, same, replica = say(address, "are you still there?", session)
        messages.append({"role": "user", "content": "are you still there?"})
        assert same == session and replica != gone
        assert answer == served.alone(model, tokens, messages, 12)


def test_a_session_belongs_to_its_key_on_every_replica(address) -> None:
    _, session, _ = say(address, "a secret")
    headers = {"Authorization": "Bearer other", "X-Session-Id": session, "serve_multiplexed_model_id": session}
    for _ in range(4):
        answer = httpx.get(f"{address}/v1/sessions", headers=headers, timeout=60)
        assert answer.status_code == 401
