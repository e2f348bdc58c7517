"""The server as a process of its own, with many at once, killed, stopped and ill-treated. Minutes on a CPU."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="the server needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="requests as no client library would send them")
openai = pytest.importorskip("openai", reason="the server is tried with its real client")

from hostile import HOSTILE, assistant, body, user  # noqa: E402
from served import alone, serving, tiny  # noqa: E402

pytestmark = pytest.mark.slow

LIMIT = 10
CONVERSATIONS = 200
KEYS = [f"key-{number}" for number in range(20)]
GROWTH = 48 << 20
"""Bytes that the process may grow by between waves: what allocators keep, and records of sessions."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return folder, *tiny(folder)


def keyed():
    return [argument for key in KEYS for argument in ("--api-key", key)]


async def converse(client, number, wave):
    """Two turns; every second conversation streams, every second pair goes by its session: (session, messages)."""
    messages, session = [], None
    for turn in range(2):
        new = [user(f"wave {wave} number {number} " + "tell me " * (number % 5) + f"of {turn}")]
        named = session if number % 4 < 2 else None
        raw = await client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=new if named else messages + new,
            max_tokens=LIMIT,
            temperature=0,
            stream=number % 2 == 0,
            extra_headers={"X-Session-Id": named} if named else {},
        )
        parsed = raw.parse()
        if number % 2 == 0:
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in parsed])
        else:
            text = parsed.choices[0].message.content
        session = raw.headers["x-session-id"]
        messages = [*messages, *new, assistant(text)]
    return session, messages


async def wave_of(served, wave):
    clients = [openai.AsyncOpenAI(base_url=served.base_url, api_key=key, max_retries=0, timeout=600) for key in KEYS]
    ended = await asyncio.gather(
        *(converse(clients[number % len(KEYS)], number, wave) for number in range(CONVERSATIONS))
    )
    for client in clients:
        await client.close()
    return ended


async def go_on(served, ended):
    """One more turn of every session by its id."""

    async def one(number, session):
        client = clients[number % len(KEYS)]
        answer = await client.chat.completions.create(
            model="tiny", messages=[user("go on")], max_tokens=LIMIT, temperature=0,
            extra_headers={"X-Session-Id": session},
        )  # fmt: skip
        return answer.choices[0].message.content

    clients = [openai.AsyncOpenAI(base_url=served.base_url, api_key=key, max_retries=0, timeout=600) for key in KEYS]
    texts = await asyncio.gather(*(one(number, session) for number, (session, _) in enumerate(ended)))
    for client in clients:
        await client.close()
    return texts


def test_two_hundred_conversations_then_a_kill(made, tmp_path):
    folder, model, tokens = made
    arguments = [*keyed(), "--sessions", str(tmp_path), "--session-bytes", "1000000", "--max-sessions", "60"]
    memory, seconds = [], []
    with serving(folder, *arguments) as served:
        waves = []
        for wave in range(3):
            begun = time.monotonic()
            waves.append(asyncio.run(wave_of(served, wave)))
            seconds.append(time.monotonic() - begun)
            memory.append(served.memory())
            assert served.metrics()["sleepify_requests_running"] == 0
        counted = served.metrics()
        assert counted["sleepify_session_bytes"] <= 1_000_000
        assert served.end(signal.SIGKILL) == -signal.SIGKILL
    for ended in waves:
        for _, messages in ended:
            for turn in (1, 3):
                assert messages[turn]["content"] == alone(model, tokens, messages[:turn], LIMIT)
    assert max(memory) - memory[0] <= GROWTH, memory
    with serving(folder, *arguments) as served:
        for ended in (waves[0], waves[2]):
            for text, (_, messages) in zip(asyncio.run(go_on(served, ended)), ended, strict=True):
                assert text == alone(model, tokens, [*messages, user("go on")], LIMIT)
        assert served.end() == 0
    print(f"seconds per wave: {seconds}, memory after each: {[each >> 20 for each in memory]} MiB, {counted}")


def at_rest(served) -> dict[str, float]:
    """The metrics once no request runs; one is counted until after its client has the answer."""
    deadline = time.monotonic() + 600
    while (counted := served.metrics())["sleepify_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.1)
    return counted


def test_a_thousand_hostile_requests(made, tmp_path):
    folder, model, tokens = made
    arguments = [*keyed(), "--sessions", str(tmp_path), "--max-body", "100000", "--max-prompt", "2000",
                 "--max-tokens", "2000"]  # fmt: skip
    names = list(HOSTILE)
    with serving(folder, *arguments) as served, httpx.Client(timeout=120) as http:

        def post(json, key, session=None):
            headers = {"Authorization": f"Bearer {key}"} | ({} if session is None else {"X-Session-Id": session})
            return http.post(f"{served.base_url}/chat/completions", json=json, headers=headers)

        session = post(body(messages=[user("a secret")]), KEYS[0]).headers["x-session-id"]

        def gone(number):
            """Half a body, nothing but the head, or a stream that nobody reads to its end."""
            host, port = served.address.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=60) as raw:
                if number % 3 == 2:
                    headers = {"Authorization": f"Bearer {KEYS[1]}"}
                    json = body(max_tokens=1500, stream=True)
                    with http.stream("POST", f"{served.base_url}/chat/completions", json=json, headers=headers) as said:
                        assert said.status_code == 200
                        next(said.iter_lines())
                else:
                    raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n")
                    raw.sendall(f"Authorization: Bearer {KEYS[0]}\r\n\r\n{{".encode() if number % 3 else b"X: y")

        def attack(number):
            if number % 10 == 0:
                gone(number // 10)
            elif number % 10 == 1:
                assert post(body(), KEYS[1 + number % 19], session).status_code == 404
            else:
                status, keywords = HOSTILE[names[number % len(names)]]
                given = dict(keywords)
                path, key = given.pop("path", "/v1/chat/completions"), given.pop("key", KEYS[number % 20])
                headers = {"Authorization": f"Bearer {key}"} | given.pop("headers", {})
                answer = http.post(f"{served.address}{path}", headers=headers, **given)
                assert answer.status_code == status, (names[number % len(names)], answer.text[:200])
                assert answer.json()["error"]["message"]

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(attack, range(200)))
            first = served.memory()
            begun = time.monotonic()
            list(pool.map(attack, range(1000)))
            seconds = time.monotonic() - begun
        at_rest(served)
        # An answer that was whole before its client was seen to go is a turn like any other; most are not.
        headers = {"Authorization": f"Bearer {KEYS[1]}"}
        whole = http.get(f"{served.base_url}/sessions", headers=headers).json()["data"]
        assert len(whole) < 1200 / 10 / 3 / 2 and all(each["turns"] == 1 for each in whole), whole
        for each in whole:
            http.delete(f"{served.base_url}/sessions/{each['id']}", headers=headers).raise_for_status()
        counted = at_rest(served)
        assert counted["sleepify_requests_running"] == 0 and counted["sleepify_sessions"] == 1
        assert not any('status="5' in name for name in counted)
        assert served.memory() - first <= GROWTH
        messages = [user("a secret"), assistant(alone(model, tokens, [user("a secret")], 4)), user("go on")]
        answer = post(body(messages=messages[-1:]), KEYS[0], session).json()
        assert answer["choices"][0]["message"]["content"] == alone(model, tokens, messages, 4)
        assert served.end() == 0
    print(f"{seconds:.1f} s, memory {first >> 20} MiB before, {counted}")


def test_sigterm_finishes_streams_and_exits_0(made, tmp_path):
    folder, model, tokens = made
    asked = [user("a long story")]
    with serving(folder, "--sessions", str(tmp_path)) as served:
        client = openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0)
        raw = client.chat.completions.with_raw_response.create(
            model="tiny", messages=asked, max_tokens=120, temperature=0, stream=True
        )
        chunks = iter(raw.parse())
        next(chunks)
        code = []
        ending = threading.Thread(target=lambda: code.append(served.end()))
        ending.start()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        ending.join()
        assert code == [0]
        assert text == alone(model, tokens, asked, 120)
    with serving(folder, "--sessions", str(tmp_path)) as served:
        client = openai.OpenAI(base_url=served.base_url, api_key="none", max_retries=0)
        answer = client.chat.completions.create(
            model="tiny", messages=[user("and?")], max_tokens=LIMIT, temperature=0,
            extra_headers={"X-Session-Id": raw.headers["x-session-id"]},
        )  # fmt: skip
        conversation = [*asked, assistant(text), user("and?")]
        assert answer.choices[0].message.content == alone(model, tokens, conversation, LIMIT)
