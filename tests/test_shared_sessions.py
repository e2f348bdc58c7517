"""Servers that share a folder of sessions: whichever is asked, a session is what the latest of them has made of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from served import alone, tiny

from sleepify import SleepForCausalLM

httpx = pytest.importorskip("httpx", reason="pip install httpx")
uvicorn = pytest.importorskip("uvicorn", reason="pip install 'sleepify[serve]'")
pytest.importorskip("fastapi", reason="pip install 'sleepify[serve]'")
from sleepify.serving.api import create_app  # noqa: E402
from sleepify.serving.engine import Limits, key_hash  # noqa: E402

LIMIT = 10


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return folder, *tiny(folder)


@contextmanager
def running(made, folder, **keywords) -> Iterator[tuple[str, object]]:
    """A server in a thread, with a model of its own: (its address, its engine)."""
    model = SleepForCausalLM.from_pretrained(made[0])
    app = create_app(model, made[2], "tiny", keys=("alice", "bob"), folder=folder, shared=True, **keywords)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app.state.engine
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture
def pair(made, tmp_path):
    with running(made, tmp_path) as one, running(made, tmp_path) as other:
        yield one, other


def post(address: str, messages, session: str | None = None, key: str = "alice"):
    headers = {"Authorization": f"Bearer {key}"} | ({} if session is None else {"X-Session-Id": session})
    body = {"model": "tiny", "messages": messages, "max_tokens": LIMIT, "temperature": 0}
    return httpx.post(f"{address}/v1/chat/completions", json=body, headers=headers, timeout=60)


def said(answer) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_session_goes_on_wherever_it_is_asked(made, pair) -> None:
    first = post(pair[0][0], [user("who was it?")])
    session, messages = first.headers["x-session-id"], [user("who was it?"), assistant(said(first))]
    for turn, place in enumerate((1, 1, 0, 1, 0, 0, 1)):
        new = user(f"and what came after number {turn}?")
        answer = said(post(pair[place][0], [new], session))
        messages += [new, assistant(answer)]
        assert answer == alone(*made[1:], messages[:-1], LIMIT), (turn, place)
    cached = post(pair[0][0], [user("so?")], session).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0, "it is taken over, not read anew"


def test_a_memory_that_is_lost_is_read_anew_wherever_it_is_asked(made, pair, tmp_path) -> None:
    first = post(pair[0][0], [user("who was it?")])
    messages = [user("who was it?"), assistant(said(first)), user("and then?")]
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    for address, _ in pair:
        assert said(post(address, messages)) == alone(*made[1:], messages, LIMIT)


def test_whole_conversations_never_go_on_from_an_older_turn(made, pair) -> None:
    """Each server knows a part of the turns; the files of one id are never those of two conversations."""
    messages = [user("who was it?")]
    for turn, place in enumerate((0, 1, 0, 0, 1, 1, 0)):
        answer = said(post(pair[place][0], messages))
        assert answer == alone(*made[1:], messages, LIMIT), turn
        messages += [assistant(answer), user(f"and number {turn}?")]


def test_what_one_erases_is_gone_for_the_other(pair) -> None:
    (one, _), (other, engine) = pair
    session = post(one, [user("a secret")]).headers["x-session-id"]
    assert said(post(other, [user("say it")], session))
    gone = httpx.delete(f"{one}/v1/sessions/{session}", headers={"Authorization": "Bearer alice"}, timeout=60)
    assert gone.status_code == 200
    assert post(other, [user("say it")], session).status_code == 404
    assert session not in engine.store._sessions and not any(session in ids for ids in engine.store._by_start.values())


def test_a_session_belongs_to_its_key_wherever_it_is_asked(pair) -> None:
    session = post(pair[0][0], [user("a secret")]).headers["x-session-id"]
    assert post(pair[1][0], [user("say it")], session, key="bob").status_code == 404
    for guess in ("../" * 3 + "etc/passwd", "sess_" + "a" * 32, "sess_" + "." * 32, session + "/../" + session):
        assert post(pair[1][0], [user("say it")], guess).status_code == 404


def test_a_server_that_starts_leaves_the_files_of_others_alone(made, tmp_path) -> None:
    with running(made, tmp_path) as (one, _):
        session = post(one, [user("who was it?")]).headers["x-session-id"]
        half = tmp_path / f"sess_{'b' * 32}.1.safetensors"
        half.write_bytes(b"being written")
        with running(made, tmp_path) as (other, engine):
            assert half.exists() and engine.store.get(session, key_hash("alice")) is not None
            said(post(other, [user("and then?")], session))


def test_an_idle_server_does_not_put_back_an_old_turn(made, tmp_path) -> None:
    with running(made, tmp_path, idle_sleep=0.3) as (one, engine), running(made, tmp_path) as (other, _):
        first = post(one, [user("who?")])
        session, messages = first.headers["x-session-id"], [user("who?"), assistant(said(first))]
        known = engine.store._sessions[session]
        # Gone on elsewhere before it has slept here.
        known.used = time.time() + 3600
        answer = said(post(other, [user("and then?")], session))
        messages += [user("and then?"), assistant(answer)]
        known.used = 0.0
        assert not engine.store.idle(time.time())
        time.sleep(1.0)
        answer = said(post(other, [user("so?")], session))
        assert answer == alone(*made[1:], [*messages, user("so?")], LIMIT)


def test_limits_hold(made, tmp_path) -> None:
    """Sessions that leave the memory of one come back from the folder, also when the other has moved them."""
    few = {"limits": Limits(bytes=20_000)}
    with running(made, tmp_path, **few) as (one, _), running(made, tmp_path, **few) as (other, _):
        talks = {}
        for count in range(4):
            new = user(f"number {count} " * 3)
            answer = post((one, other)[count % 2], [new])
            talks[answer.headers["x-session-id"]] = [new, assistant(said(answer))]
        for address in (one, other, one):
            for session, messages in talks.items():
                answer = said(post(address, [user("go on")], session))
                assert answer == alone(*made[1:], [*messages, user("go on")], LIMIT)
                messages += [user("go on"), assistant(answer)]
