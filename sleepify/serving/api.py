"""The server: OpenAI's endpoints and those of sessions, as a FastAPI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from sleepify.modeling import SleepForCausalLM
from sleepify.serving import asked as asking
from sleepify.serving.engine import Engine, Limits, Outcome, Turn, key_hash
from sleepify.serving.kept import Session
from sleepify.serving.refusals import Refusal, unknown
from sleepify.serving.replies import ChatReply, Reply, ResponseReply
from sleepify.serving.store import TooManySessionsError

log = logging.getLogger("sleepify.serve")

_JSON = "application/json"
# How much of a body that is too long is read, so that its sender gets to see the answer.
_DRAINED = 64 << 20
# Seconds beyond its own that a stream has to be fetched.
_TO_FETCH = 10.0


def create_app(
    model: SleepForCausalLM,
    tokenizer: Any,
    name: str,
    *,
    keys: Sequence[str] = (),
    folder: Path | None = None,
    idle_sleep: float | None = None,
    limits: Limits | None = None,
    shared: bool = False,
) -> FastAPI:
    """A server of one model.

    Args:
        model: which sleeps.
        tokenizer: with a chat template.
        name: the model's, for clients.
        keys: API keys of which a request must bring one; without any, all requests share their sessions.
        folder: where sessions are kept, None for memory only.
        idle_sleep: a session that was idle for so many seconds sleeps on its open window; None for never.
        limits: of requests.
        shared: whether other servers of the same model keep sessions in the folder, too. Each session is then whole
            on each of them, as long as its turns come one after the other.

    Raises:
        ValueError: for a tokenizer that does not fit the model, or a key that no request can bring.
    """
    keys = [key.strip() for key in keys]
    for place, key in enumerate(keys, 1):
        if not key or not key.isascii():
            # The key itself is for no log.
            what = "letters beyond ASCII" if key else "an empty one"
            raise ValueError(f"expected an API key of ASCII characters, got {what} as number {place}; give another one")
    engine = Engine(model, tokenizer, limits or Limits(), folder, idle_sleep, shared)
    server = _Server(engine, name, frozenset(map(key_hash, keys)))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.close()

    app = FastAPI(title="sleepify", openapi_url=None, lifespan=lifespan)
    app.state.engine = engine
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("GET", "/health", server.health),
        ("GET", "/metrics", server.metrics),
        ("GET", "/v1/models", server.models),
        ("GET", "/v1/models/{id:path}", server.models),
        ("POST", "/v1/chat/completions", server.chat),
        ("POST", "/v1/responses", server.respond),
        ("DELETE", "/v1/responses/{id}", server.erase_response),
        ("GET", "/v1/sessions", server.sessions),
        ("POST", "/v1/sessions/{id}/fork", server.fork),
        ("POST", "/v1/sessions/{id}/save", server.save),
        ("DELETE", "/v1/sessions/{id}", server.erase_session),
    ]
    for method, path, endpoint in routes:
        app.router.add_route(path, server.counted(endpoint), methods=[method])
    for status in (404, 405):
        app.add_exception_handler(status, server.no_route)
    return app


class _Server:
    """The endpoints."""

    def __init__(self, engine: Engine, name: str, keys: frozenset[str]) -> None:
        self._engine, self._name, self._keys = engine, name, keys

    # --- every request ---------------------------------------------------------------------------------------------

    def counted(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint whose refusals are answers, and whose answers are counted."""

        async def answer(request: Request) -> Response:
            try:
                response = await endpoint(request)
            except Refusal as refusal:
                response = _refused(refusal)
            except Exception:
                log.exception("a request failed")
                response = _refused(Refusal(500, "the server failed; its log says why", code="internal_error"))
            self._engine.metrics.answered(response.status_code)
            return response

        return answer

    async def no_route(self, request: Request, error: Any) -> Response:
        """What no endpoint takes."""
        asked = f"{request.method[:20]} {request.url.path[:80]}"
        refusal = Refusal(error.status_code, f"expected one of the endpoints of the server, got {asked}")
        self._engine.metrics.answered(error.status_code)
        return _refused(refusal, error.headers)

    def _key(self, request: Request) -> str:
        """The hash of the key that a request brings; all have the same where none is asked for.

        Raises:
            Refusal: 401 without a known one.
        """
        if not self._keys:
            return key_hash("")
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        # Hashes are compared, so that the time it takes says nothing of the key.
        if kind.lower() != "bearer" or (hashed := key_hash(key.strip())) not in self._keys:
            raise Refusal(401, "expected a known API key as 'Authorization: Bearer KEY', got none",
                          code="invalid_api_key")  # fmt: skip
        return hashed

    async def _body(self, request: Request) -> dict[str, Any]:
        limits = self._engine.limits
        limit = limits.body
        try:
            size, parts = await asyncio.wait_for(_received(request.receive, limit), limits.seconds)
        except asyncio.TimeoutError:
            raise Refusal(408, f"expected a whole body within {limits.seconds:g} s, got a part of one") from None
        if size > limit:
            raise Refusal(413, f"expected a body of at most {limit} bytes, got more", code="request_too_large")
        kind = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
        if kind != _JSON:
            raise Refusal(415, f"expected a body of the type {_JSON}, got {kind[:80]!r}", code="invalid_content_type")
        return asking.parse(b"".join(parts))

    # --- answers ---------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        key = self._key(request)
        asked = asking.chat(await self._body(request), self._name, self._engine.limits.tokens)
        session_id = request.headers.get("x-session-id")
        turn = await self._engine.turn(asked, key, session_id, "sess")
        headers = {"x-session-id": turn.kept[0].id}
        return await self._answer(request, turn, ChatReply(self._name, asked.usage), asked.stream, headers)

    async def respond(self, request: Request) -> Response:
        """``POST /v1/responses``."""
        key = self._key(request)
        asked = asking.response(await self._body(request), self._name, self._engine.limits.tokens)
        session_id = request.headers.get("x-session-id")
        if session_id is not None and asked.before is not None:
            raise Refusal(400, "expected X-Session-Id or previous_response_id, got both", "previous_response_id")
        turn = await self._engine.turn(asked, key, session_id, "resp")
        assert turn.answer is not None
        repeated: dict[str, Any] = {
            "previous_response_id": asked.before,
            "instructions": asked.instructions,
            "temperature": asked.sampling.temperature,
            "top_p": asked.sampling.top_p,
            "max_output_tokens": asked.sampling.max_tokens,
            "store": asked.store,
            "metadata": dict(asked.metadata),
        }
        headers = {} if session_id is None else {"x-session-id": session_id}
        reply = ResponseReply(self._name, turn.answer.id, repeated)
        return await self._answer(request, turn, reply, asked.stream, headers)

    async def _answer(
        self, request: Request, turn: Turn, reply: Reply, stream: bool, headers: dict[str, str]
    ) -> Response:
        if stream:
            return _Stream(turn, reply, headers)
        try:
            outcome = await _unless_gone(request.receive, _whole(turn))
        finally:
            turn.close()
        if outcome is None:
            raise _gone()
        return JSONResponse(reply.whole(outcome), headers=headers)

    # --- sessions --------------------------------------------------------------------------------------------------

    def _session(self, request: Request, kind: str = "session", also_begun: bool = False) -> Session:
        name, key, store = request.path_params["id"], self._key(request), self._engine.store
        found = store.get(name, key) or (store.begun(name, key) if also_begun else None)
        if found is None or found.is_response != (kind == "response"):
            raise unknown(kind, name)
        return found

    async def sessions(self, request: Request) -> Response:
        """``GET /v1/sessions``: those of the key."""
        mine = self._engine.store.of(self._key(request))
        return JSONResponse({"object": "list", "data": [self._described(each) for each in mine]})

    async def fork(self, request: Request) -> Response:
        """``POST /v1/sessions/{id}/fork``: another one that has read the same."""
        try:
            session = self._session(request)
            other = await self._engine.store.fork(session)
        except TooManySessionsError as error:
            raise Refusal(429, str(error), code="too_many_sessions") from error
        if other is None:
            raise unknown("session", session.id)
        return JSONResponse(self._described(other), headers={"x-session-id": other.id})

    async def save(self, request: Request) -> Response:
        """``POST /v1/sessions/{id}/save``: see that it is on disk, where every turn is written as it ends."""
        session = self._session(request)
        if self._engine.store.folder is None:
            raise Refusal(400, "expected a server with a folder for sessions (--sessions DIR), this one has none",
                          code="no_folder")  # fmt: skip
        async with session.busy:
            if session.erased:
                raise unknown("session", session.id)
            await self._engine.store.name(session)
            return JSONResponse(self._described(session))

    async def erase_session(self, request: Request) -> Response:
        """``DELETE /v1/sessions/{id}``: nothing of it is left."""
        session = self._session(request, also_begun=True)
        await self._engine.store.erase(session)
        return JSONResponse({"id": session.id, "object": "session.deleted", "deleted": True})

    async def erase_response(self, request: Request) -> Response:
        """``DELETE /v1/responses/{id}``: nothing of it is left."""
        response = self._session(request, "response", also_begun=True)
        await self._engine.store.erase(response)
        return JSONResponse({"id": response.id, "object": "response", "deleted": True})

    def _described(self, session: Session) -> dict[str, Any]:
        return {
            "id": session.id,
            "object": "session",
            "created": int(session.created),
            "used": int(session.used),
            "turns": sum(each["role"] == "assistant" for each in session.messages),
            "tokens": session.tokens,
            "windows": session.windows,
            "bytes": session.bytes,
            "in_memory": session.cache is not None,
            "saved": self._engine.store.folder is not None,
        }

    # --- the server ------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """``GET /v1/models`` and one of them."""
        self._key(request)
        model = {"id": self._name, "object": "model", "created": 0, "owned_by": "sleepify"}
        name = request.path_params.get("id")
        if name not in (None, self._name):
            raise Refusal(404, f"expected the model {self._name!r}, got {name[:80]!r}", "model", "model_not_found")
        return JSONResponse({"object": "list", "data": [model]} if name is None else model)

    async def health(self, _: Request) -> Response:
        """``GET /health``: 200 while the model's thread runs."""
        alive = self._engine.scheduler.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(self, _: Request) -> Response:
        """``GET /metrics``, in the text form of Prometheus."""
        store = self._engine.store
        gauges = {
            "sessions": ("sessions and responses, in memory or on disk", float(len(store))),
            "session_bytes": ("bytes of sessions in memory", float(store.bytes)),
            "requests_running": ("requests that are being answered", float(len(self._engine.answering))),
        }
        return PlainTextResponse(self._engine.metrics.text(gauges), media_type="text/plain; version=0.0.4")


class _Stream(Response):
    """An answer as server-sent events; a client that goes away ends it."""

    media_type = "text/event-stream"

    def __init__(self, turn: Turn, reply: Reply, headers: dict[str, str]) -> None:
        super().__init__(headers=headers | {"cache-control": "no-cache"})
        # There is no length to tell beforehand.
        del self.headers["content-length"]
        self._turn, self._reply = turn, reply

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await asyncio.wait_for(_unless_gone(receive, self._send(send)), self._turn.left + _TO_FETCH)
        except asyncio.TimeoutError:
            log.warning("a stream was broken off: its client did not read it")
        finally:
            self._turn.close()

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.headers.raw})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[str]:
        try:
            for event in self._reply.opening():
                yield event
            async for text in self._turn.pieces():
                for event in self._reply.piece(text):
                    yield event
            for event in self._reply.closing(await self._turn.finish()):
                yield event
        except Refusal as refusal:
            for event in self._reply.failing(refusal):
                yield event
        except Exception:
            log.exception("a stream failed")
            for event in self._reply.failing(Refusal(500, "the server failed; its log says why")):
                yield event


async def _received(receive: Callable[[], Awaitable[Any]], limit: int) -> tuple[int, list[bytes]]:
    """How long a body is, and its parts if that is within the limit.

    Raises:
        Refusal: if the client goes away.
    """
    parts: list[bytes] = []
    size, more = 0, True
    while more and size <= max(limit, _DRAINED):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _gone()
        more, part = message.get("more_body", False), message.get("body", b"")
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
    return size, parts


def _gone() -> Refusal:
    return Refusal(499, "expected a client that waits for its answer, it has gone")


async def _whole(turn: Turn) -> Outcome:
    async for _ in turn.pieces():
        pass
    return await turn.finish()


async def _unless_gone(receive: Callable[[], Awaitable[Any]], coming: Awaitable[Any]) -> Any:
    """What is coming, or None if the client goes away first."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    gone, said = asyncio.ensure_future(left()), asyncio.ensure_future(coming)
    try:
        await asyncio.wait({gone, said}, return_when=asyncio.FIRST_COMPLETED)
        return said.result() if said.done() else None
    finally:
        for task in (gone, said):
            task.cancel()
        await asyncio.gather(gone, said, return_exceptions=True)


def _refused(refusal: Refusal, headers: Any = None) -> Response:
    # What was not read of a body would be taken for the next request.
    close = {"connection": "close"} if refusal.status == 413 else {}
    return JSONResponse(refusal.body(), refusal.status, {**(headers or {}), **close})
