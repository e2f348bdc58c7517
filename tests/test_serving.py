"""The server: what it answers is what the model says alone, and what is somebody's stays theirs."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="the server needs the extra 'serve'")
httpx = pytest.importorskip("httpx", reason="requests as no client library would send them")
openai = pytest.importorskip("openai", reason="the server is tried with its real client")

import uvicorn  # noqa: E402
from hostile import HOSTILE, assistant, body, user  # noqa: E402
from served import WINDOW, alone, tiny  # noqa: E402

from sleepify import SleepCache  # noqa: E402
from sleepify.cli import serve  # noqa: E402
from sleepify.serving.api import create_app  # noqa: E402
from sleepify.serving.engine import Limits, key_hash  # noqa: E402
from sleepify.serving.metrics import Metrics  # noqa: E402
from sleepify.serving.sampling import Sampling, choose  # noqa: E402
from sleepify.serving.scheduler import Ended, Job, Scheduler  # noqa: E402
from sleepify.serving.spoken import Spoken  # noqa: E402
from sleepify.serving.store import Store  # noqa: E402

LIMIT = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"))


@contextmanager
def running(made, **keywords):
    """The server in a thread: (its address, its engine)."""
    limits = keywords.pop("limits", Limits(body=100_000, prompt=2000, tokens=64))
    app = create_app(*made, "tiny", keys=("alice", "bob"), limits=limits, **keywords)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", app.state.engine
    finally:
        server.should_exit = True
        thread.join(60)
        made[0].watch = None


@pytest.fixture(scope="module")
def server(made, tmp_path_factory):
    with running(made, folder=tmp_path_factory.mktemp("sessions")) as (address, engine):
        yield address, engine


def client(address, key="alice"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def say(address, messages, key="alice", stream=False, session=None, limit=LIMIT, **keywords):
    """One answer by OpenAI's client: its text and the session's id."""
    headers = {} if session is None else {"X-Session-Id": session}
    raw = client(address, key).chat.completions.with_raw_response.create(
        model="tiny",
        messages=messages,
        max_tokens=limit,
        stream=stream,
        extra_headers=headers,
        **({"temperature": 0} | keywords),
    )
    parsed = raw.parse()
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in parsed)
    else:
        text = parsed.choices[0].message.content
    return text, raw.headers["x-session-id"]


def post(address, path="/v1/chat/completions", key="alice", **keywords):
    headers = {"Authorization": f"Bearer {key}"} | keywords.pop("headers", {})
    return httpx.post(f"{address}{path}", headers=headers, timeout=60, **keywords)


def test_conversations_at_once_say_what_each_says_alone(server, made):
    address, _ = server

    def converse(number):
        key, stream = ("alice", "bob")[number % 2], number % 3 == 0
        messages, session = [], None
        for turn in range(2):
            new = [user(f"{number} asks " * (1 + number % 4) + str(turn))]
            sent = new if number % 4 == 1 and turn else messages + new
            named = session if number % 4 == 1 else None
            answer, session = say(address, sent, key, stream, named)
            messages = messages + new
            assert answer == alone(*made, messages, LIMIT), (number, turn)
            messages = [*messages, assistant(answer)]

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(converse, range(8)))) == 8


def test_a_session_takes_new_turns_and_knows_its_prefix(server, made):
    address, _ = server
    long = "the quick brown fox " * 4
    first, session = say(address, [user(long)])
    used = post(address, json=body(messages=[user("and then?")]), headers={"X-Session-Id": session}).json()["usage"]
    assert used["prompt_tokens_details"]["cached_tokens"] >= len(long) // WINDOW * WINDOW
    # Without the header it is the whole conversation, of which the same is known; a session that was named stays.
    whole = [user(long), assistant(first), user("what else?")]
    answered = post(address, json=body(messages=whole))
    assert answered.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(long) // WINDOW * WINDOW
    assert answered.headers["x-session-id"] != session
    assert answered.json()["choices"][0]["message"]["content"] == alone(*made, whole, 4)
    # Nothing is known to another key.
    other = post(address, json=body(messages=whole), key="bob").json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_an_answer_that_its_text_does_not_give_back_costs_only_itself(server, made):
    """It has special tokens, which are not text, in a window that was slept on."""
    address, _ = server
    messages = [user("hello there")]
    messages += [assistant(alone(*made, messages, 30)), user("go on 0")]
    answer = post(address, json=body(messages=messages, max_tokens=30)).json()
    text, prompt = answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 30 > len(text)
    messages += [assistant(text), user("go on 1")]
    after = post(address, json=body(messages=messages, max_tokens=30)).json()
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] >= prompt // WINDOW * WINDOW
    assert after["choices"][0]["message"]["content"] == alone(*made, messages, 30)


def test_a_response_goes_on_as_the_whole_conversation(server, made):
    address, _ = server
    create = client(address).responses.create
    asked = {"model": "tiny", "temperature": 0, "max_output_tokens": LIMIT}
    first = create(input="tell me of owls", **asked)
    assert first.output_text == alone(*made, [user("tell me of owls")], LIMIT)
    assert first.status == "incomplete"
    conversation = [user("tell me of owls"), assistant(first.output_text), user("more")]
    second = create(input="more", previous_response_id=first.id, **asked)
    assert second.output_text == alone(*made, conversation, LIMIT)
    events = list(create(input="more", previous_response_id=first.id, stream=True, **asked))
    assert events[-1].response.output_text == second.output_text
    assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == second.output_text
    system = {"role": "system", "content": "be brief"}
    told = create(input=[user("more")], previous_response_id=first.id, instructions="be brief", **asked)
    assert told.output_text == alone(*made, [system, *conversation], LIMIT)
    client(address).responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        create(input="more", previous_response_id=first.id, **asked)
    # What went on from it stays.
    assert create(input="x", previous_response_id=second.id, **asked).output_text
    unkept = create(input="no trace", store=False, **asked)
    with pytest.raises(openai.NotFoundError):
        create(input="more", previous_response_id=unkept.id, **asked)


def test_sessions_are_listed_forked_and_erased(server):
    address, engine = server
    _, session = say(address, [user("remember this")])

    def listed(key="alice"):
        found = httpx.get(f"{address}/v1/sessions", headers={"Authorization": f"Bearer {key}"}).json()["data"]
        return {each["id"]: each for each in found}

    assert session in listed() and session not in listed("bob")
    fork = post(address, f"/v1/sessions/{session}/fork").json()["id"]
    one, _ = say(address, [user("go on")], session=session)
    two, _ = say(address, [user("go on")], session=fork)
    assert one == two and fork in listed()
    assert post(address, f"/v1/sessions/{session}/save").json()["saved"]
    files = engine.store.folder
    assert sorted(path.suffix for path in files.glob(f"{session}*")) == [".json", ".safetensors"]
    gone = httpx.delete(f"{address}/v1/sessions/{session}", headers={"Authorization": "Bearer alice"})
    assert gone.status_code == 200 and session not in listed() and fork in listed()
    assert not [path for path in files.iterdir() if session in path.name]
    assert all(each.id != session for each in engine.store._sessions.values())
    assert not any(session in ids for ids in engine.store._by_start.values())
    assert post(address, json=body(), headers={"X-Session-Id": session}).status_code == 404


def test_what_is_foreign_is_as_what_is_not_there(server):
    address, _ = server
    _, session = say(address, [user("a secret")])
    response = client(address).responses.create(model="tiny", input="a secret", max_output_tokens=2).id

    def answers(key, name, response_id):
        headers = {"Authorization": f"Bearer {key}"}
        yield post(address, json=body(), key=key, headers={"X-Session-Id": name})
        yield post(address, f"/v1/sessions/{name}/fork", key)
        yield post(address, f"/v1/sessions/{name}/save", key)
        yield httpx.delete(f"{address}/v1/sessions/{name}", headers=headers)
        yield httpx.delete(f"{address}/v1/responses/{response_id}", headers=headers)
        asked = {"model": "tiny", "input": "x", "previous_response_id": response_id}
        yield post(address, "/v1/responses", key, json=asked)

    nobodys, nothing = session[:-4] + "AAAA", response[:-4] + "AAAA"
    pairs = zip(answers("bob", session, response), answers("bob", nobodys, nothing), strict=True)
    for foreign, absent in pairs:
        assert foreign.status_code == absent.status_code == 404
        told = foreign.text.replace(session, nobodys).replace(response, nothing)
        assert told == absent.text
    assert say(address, [user("go on")], session=session)[0]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_malformed_is_refused_in_openais_form(server, name):
    address, engine = server
    status, keywords = HOSTILE[name]
    answer = post(address, **keywords)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert engine.scheduler.unfinished == 0


def test_a_wrong_method_is_refused(server):
    address, _ = server
    assert httpx.get(f"{address}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{address}/v1/models").status_code == 401


def test_who_goes_away_ends_the_answer_and_moves_nothing(server, monkeypatch):
    address, engine = server
    _, session = say(address, [user("stay")])
    before = engine.store.get(session, key_hash("alice")).turn
    spoken, forward = engine.metrics._tokens_spoken, engine.scheduler._forward

    def slow(*arguments):
        # So that an answer is not over before it is known that nobody hears it, however busy the machine is.
        time.sleep(0.03)
        return forward(*arguments)

    monkeypatch.setattr(engine.scheduler, "_forward", slow)
    headers = {"Authorization": "Bearer alice", "X-Session-Id": session}
    for stream in (True, False):
        with httpx.Client() as http:
            request = http.build_request(
                "POST", f"{address}/v1/chat/completions", headers=headers, json=body(max_tokens=64, stream=stream)
            )
            if stream:
                answer = http.send(request, stream=True)
                assert next(answer.iter_lines()).startswith("data: ")
                answer.close()
            else:
                with pytest.raises(httpx.TimeoutException):
                    http.send(http.build_request("POST", request.url, headers=headers, content=request.content,
                                                 extensions={"timeout": {"read": 0.03}}))  # fmt: skip
    deadline = time.monotonic() + 30
    while engine.scheduler.unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.scheduler.unfinished == 0
    assert engine.metrics._tokens_spoken - spoken < 64
    assert engine.store.get(session, key_hash("alice")).turn == before
    assert say(address, [user("go on")], session=session)[0]


def test_stop_and_seed_and_usage(server, made):
    address, _ = server
    whole = alone(*made, [user("hello there")], 30)
    stop = whole[8:10]
    wanted = whole[: whole.index(stop)]
    for stream in (False, True):
        assert say(address, [user("hello there")], stream=stream, limit=30, stop=stop)[0] == wanted
    answer = post(address, json=body(messages=[user("hello there")], max_tokens=30, stop=[stop])).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    ids = made[1].apply_chat_template([user("hello there")], add_generation_prompt=True, return_dict=False)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    drawn = [say(address, [user("x")], temperature=1.5, seed=seed)[0] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    chunks = list(
        client(address).chat.completions.create(
            model="tiny", messages=[user("x")], max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens == 3 and not chunks[-1].choices


def test_health_models_and_metrics(server):
    address, _ = server
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert [each.id for each in client(address).models.list()] == ["tiny"]
    text = httpx.get(f"{address}/metrics").text
    for name in ("windows_slept_total", "pause_seconds_sum", "tokens_generated_total", "sessions", "session_bytes"):
        assert f"\nsleepify_{name} " in f"\n{text}"


def test_under_a_limit_of_bytes_idle_sessions_go_to_disk_and_come_back(made, tmp_path):
    with running(made, folder=tmp_path, limits=Limits(bytes=30_000)) as (address, engine):
        sessions = [say(address, [user(f"number {place} " * 3)])[1] for place in range(5)]
        assert engine.store.bytes <= 30_000
        assert any(each.cache is None for each in engine.store.of(key_hash("alice")))
        for place, session in enumerate(sessions):
            kept = engine.store.get(session, key_hash("alice")).messages
            answer, _ = say(address, [user("go on")], session=session)
            assert answer == alone(*made, [*kept, user("go on")], LIMIT), place
    # Another process finds them; a file that is damaged costs a second reading and nothing else.
    next(tmp_path.glob(f"{sessions[0]}*.safetensors")).write_bytes(b"damaged")
    with running(made, folder=tmp_path) as (address, engine):
        for session in sessions[:2]:
            kept = list(engine.store.get(session, key_hash("alice")).messages)
            assert say(address, [user("on")], session=session)[0] == alone(*made, [*kept, user("on")], LIMIT)


def test_without_a_folder_the_longest_idle_are_forgotten(made):
    with running(made, limits=Limits(bytes=30_000)) as (address, engine):
        first = say(address, [user("number one " * 3)])[1]
        for place in range(4):
            say(address, [user(f"number {place} " * 3)])
        assert engine.store.bytes <= 30_000
        assert post(address, json=body(), headers={"X-Session-Id": first}).status_code == 404
        assert post(address, f"/v1/sessions/{first}/save").status_code == 404


def test_a_key_has_so_many_sessions_and_a_request_so_much_time(made):
    with running(made, limits=Limits(sessions=2, seconds=0.02)) as (address, engine):
        slow = post(address, json=body(max_tokens=1000))
        assert slow.status_code == 504 and slow.json()["error"]["type"] == "timeout_error"
        engine.limits = Limits(sessions=2)
        ids = [say(address, [user(str(place))])[1] for place in range(4)]
        assert [each.id for each in engine.store.of(key_hash("alice"))] == ids[-2:]
        assert post(address, f"/v1/sessions/{ids[-1]}/fork").status_code == 200
        say(address, [user("mine")], session=ids[-1])
        assert post(address, json=body(messages=[user("one more")])).status_code == 429
        engine.limits = Limits(waiting=0)
        assert post(address, json=body()).status_code == 429


def test_an_idle_session_sleeps_and_goes_on(made, tmp_path):
    with running(made, folder=tmp_path, idle_sleep=0.1) as (address, engine):
        _, session = say(address, [user("good night")])
        kept = engine.store.get(session, key_hash("alice"))
        deadline = time.monotonic() + 30
        while kept.open_ids and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not kept.open_ids and kept.windows == 2
        answer = post(address, json=body(messages=[user("go on")]), headers={"X-Session-Id": session}).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == kept.start > WINDOW


def trained_on(model):
    with torch.no_grad():
        for each in model.fast_weights.parameters():
            each.mul_(1.5)


def with_other_loops(model):
    model.config.n_loops = 5


@pytest.mark.parametrize("change", [trained_on, with_other_loops])
def test_what_another_state_was_made_of_is_read_anew_after_a_restart(tmp_path, change):
    made = tiny(tmp_path / "model")
    whole = [user("hello there you who read this long text")]
    with running(made, folder=tmp_path / "kept") as (address, _):
        text, session = say(address, whole)
    whole += [assistant(text), user("second")]
    change(made[0])
    with running(made, folder=tmp_path / "kept") as (address, engine):
        assert say(address, whole)[0] == alone(*made, whole, LIMIT)
        fork = post(address, f"/v1/sessions/{session}/fork").json()["id"]
        for name in (session, fork):
            assert [each["content"] for each in engine.store.get(name, key_hash("alice")).messages][-1] == text
            assert say(address, whole[-1:], session=name)[0] == alone(*made, whole, LIMIT)
    # A restart without a change reads nothing anew, and one memory is kept of each.
    with running(made, folder=tmp_path / "kept") as (address, _):
        sent = body(messages=[user("and?")])
        used = post(address, json=sent, headers={"X-Session-Id": session}).json()["usage"]
        assert used["prompt_tokens_details"]["cached_tokens"] > WINDOW
        assert len(list((tmp_path / "kept").glob(f"{session}.*.safetensors"))) == 1


@pytest.mark.parametrize("key", ["", " \n", "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel"])
def test_a_key_that_nobody_can_bring_is_refused(made, key):
    with pytest.raises(ValueError, match="expected an API key of ASCII characters, got .* as number 2; give another"):
        create_app(*made, "tiny", keys=["alice", key])


def test_a_key_is_the_same_with_space_around_it(made):
    app = create_app(*made, "tiny", keys=["alice\n"])

    async def models(key):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return (await http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})).status_code

    assert [asyncio.run(models(key)) for key in ("alice", "bob", "")] == [200, 401, 401]


def test_a_model_in_the_working_directory_is_named_as_its_folder(tmp_path, monkeypatch):
    tiny(tmp_path / "notes")
    monkeypatch.chdir(tmp_path / "notes")
    taken = []
    monkeypatch.setattr("sleepify.serving.api.create_app", lambda model, tokens, name, **_: taken.append(name))
    for arguments in (["."], [".", "--name", "mine"]):
        serve._app(serve._parser().parse_args([*arguments, "--device", "cpu"]))
    assert taken == ["notes", "mine"]


# --- the parts -----------------------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_only_those_in_it(made):
    model, _ = made
    scheduler = Scheduler(model, set(), Metrics())
    ends = {}
    done = threading.Semaphore(0)

    def job(ids, name):
        def deliver(event):
            if isinstance(event, Ended):
                ends[name] = event.reason
                done.release()

        return Job(None, ids, Sampling(temperature=0, max_tokens=20), Spoken(lambda ids: "x" * len(ids)), deliver)

    scheduler.submit(job([7, 8, 9], "good"))
    time.sleep(0.2)
    scheduler.submit(job([10**6], "bad"))
    for _ in range(2):
        assert done.acquire(timeout=60)
    scheduler.close()
    model.watch = None
    assert ends == {"good": "length", "bad": "error"}


@pytest.mark.parametrize("what", ["to", "join", "batch_select_indices"])
def test_where_there_is_no_room_for_sessions_the_thread_goes_on(made, monkeypatch, what):
    """Between the steps, too: what a session takes is moved to the device, joined with others and taken out again."""
    model, _ = made
    session = SleepCache()
    with torch.no_grad():
        model(torch.tensor([[7, 8]]), past_key_values=session)
    scheduler, ends = Scheduler(model, set(), Metrics()), []
    begun, done = threading.Semaphore(0), threading.Semaphore(0)
    real, failed = getattr(SleepCache, what), []

    def broken(*arguments, **keywords):
        joins = what != "join" or arguments[0][0] is scheduler._together
        if joins and not failed and threading.current_thread() is scheduler._thread:
            failed.append(what)
            raise torch.OutOfMemoryError("no room")
        return real(*arguments, **keywords)

    monkeypatch.setattr(SleepCache, what, staticmethod(broken) if what == "join" else broken)

    def deliver(event):
        begun.release()
        if isinstance(event, Ended):
            ends.append(event.reason)
            done.release()

    def submit(ids, cache=None, windows=3):
        spoken = Spoken(lambda ids: "x" * len(ids))
        scheduler.submit(Job(cache, ids, Sampling(temperature=0, max_tokens=windows * WINDOW), spoken, deliver))

    # Long enough for the other to come and go beside it.
    submit([7, 8, 9], windows=60)
    assert begun.acquire(timeout=60)
    submit([7, 8, 9, 10], session.clone())
    for _ in range(2):
        assert done.acquire(timeout=60)
    submit([7, 8])
    assert done.acquire(timeout=60)
    alive = scheduler.alive
    scheduler.close()
    model.watch = None
    assert alive and failed == [what] and "error" in ends and ends[2:] == ["length"]


def test_an_answer_that_has_ended_stays_so_where_the_others_cannot_go_on(made, monkeypatch):
    model, _ = made
    scheduler, done, ends = Scheduler(model, set(), Metrics()), threading.Semaphore(0), []

    def no_room(caches):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(SleepCache, "join", staticmethod(no_room))

    def deliver(name):
        def take(event):
            if isinstance(event, Ended):
                ends.append((name, event.reason, jobs[name].cache is not None))
                done.release()

        return take

    def job(name, n):
        spoken = Spoken(lambda ids: "x" * len(ids))
        return Job(None, [7, 8, 9], Sampling(temperature=0, max_tokens=n), spoken, deliver(name))

    jobs = {name: job(name, n) for name, n in (("short", 1), ("long", 5), ("longer", 6))}
    # In one step: what reads is taken in together.
    with scheduler._wake:
        scheduler._arrived.extend(jobs.values())
        scheduler._wake.notify()
    for _ in jobs:
        assert done.acquire(timeout=60)
    alive = scheduler.alive
    scheduler.close()
    model.watch = None
    assert alive and sorted(ends) == [("long", "error", False), ("longer", "error", False), ("short", "length", True)]
    assert jobs["short"].cache is not None


def test_rows_draw_for_themselves():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    kinds = [Sampling(temperature=0), Sampling(temperature=1.3, seed=5), Sampling(temperature=0.7, top_p=0.4, seed=6)]
    together = [each.generator() for each in kinds]
    apart = [each.generator() for each in kinds]
    for _ in range(5):
        rows = choose(scores, kinds, together)
        singles = [choose(scores[r : r + 1], kinds[r : r + 1], apart[r : r + 1])[0] for r in range(3)]
        assert rows == singles and rows[0] == int(scores[0].argmax())
    nucleus = Sampling(temperature=1.0, top_p=0.01, seed=1)
    generator = nucleus.generator()
    assert {choose(scores[:1], [nucleus], [generator])[0] for _ in range(20)} == {int(scores[0].argmax())}
    scores[1, 3] = float("nan")
    assert choose(scores, kinds, together)[1] is None


@pytest.mark.parametrize("stop", [(), ("ab",), ("b\N{EURO SIGN}", "zz"), ("c",)])
def test_text_comes_whole_and_stops_in_time(stop):
    text = "aab\N{EURO SIGN}cz\N{OWL}z zab"

    def decode(ids):
        return bytes(ids).decode("utf-8", errors="replace")

    spoken, pieces = Spoken(decode, stop), []
    for each in text.encode():
        if spoken.stopped:
            break
        pieces.append(spoken.add(each))
    pieces.append(spoken.finish())
    ends = [text.index(each) for each in stop if each in text]
    assert "".join(pieces) == spoken.text == text[: min(ends, default=len(text))]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert spoken.stopped == bool(ends)


def test_what_was_begun_when_the_process_died_is_removed_and_the_rest_found(made, tmp_path):
    model, _ = made
    ids = list(range(6, 6 + 2 * WINDOW + 5))

    async def keep():
        cache = SleepCache()
        with torch.no_grad():
            model(torch.tensor([ids]), past_key_values=cache)
        store = Store(cache.owner, tmp_path, 1 << 30, 10)
        session = store.new("a key")
        assert await store.keep(session, cache, [user("x")], ids)
        await store.close()
        return session

    kept = asyncio.run(keep())
    orphan = tmp_path / f"{kept.id}.7.safetensors"
    draft = tmp_path / f".{kept.id}.8.draft.safetensors"
    own = tmp_path / "notes_of_mine.json"
    for path in (orphan, draft, own):
        path.write_text("{}", encoding="utf-8")

    async def find():
        store = Store(kept.owner, tmp_path, 1 << 30, 10)
        assert store.longest_prefix("another key", ids) == (None, 0)
        found, common = store.longest_prefix("a key", [*ids[:-2], 1, 2])
        cache = await store.cache_of(found)
        assert (found.id, common, cache.seen) == (kept.id, len(ids) - 2, [len(ids)])
        # What was slept on is there as a whole or not at all.
        assert store.longest_prefix("a key", [1, *ids[1:]]) == (None, 0)
        assert len(Store("another model", tmp_path, 1 << 30, 10)) == 0

    asyncio.run(find())
    assert own.exists() and not orphan.exists() and not draft.exists()
    assert "a key" not in "".join(path.name for path in tmp_path.iterdir())
