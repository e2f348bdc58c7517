"""One turn of a conversation: what of it is known, what is read and answered, and what is kept of it."""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleepify.cache import SleepCache
from sleepify.modeling import SleepForCausalLM
from sleepify.serving.asked import Asked
from sleepify.serving.kept import Message, Session
from sleepify.serving.metrics import Metrics
from sleepify.serving.origin import made_by, owner_of
from sleepify.serving.refusals import Refusal, unknown
from sleepify.serving.scheduler import Ended, Job, Scheduler, stop_ids_of
from sleepify.serving.spoken import Spoken
from sleepify.serving.store import Store, TooManySessionsError

log = logging.getLogger("sleepify.serve")


@dataclass(frozen=True)
class Limits:
    """What one request or key may use.

    Attributes:
        body: bytes of a request.
        prompt: tokens of a conversation.
        tokens: tokens of an answer.
        seconds: of a request.
        waiting: requests at the same time; more are refused.
        sessions: of one key.
        bytes: of all sessions in memory.
    """

    body: int = 4 << 20
    prompt: int = 1 << 20
    tokens: int = 4096
    seconds: float = 600.0
    waiting: int = 1024
    sessions: int = 1000
    bytes: int = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """How a turn ended.

    Attributes:
        text: the answer.
        reason: "stop" or "length".
        prompt, cached, made: tokens of the conversation, of these not read again, and of the answer.
    """

    text: str
    reason: str
    prompt: int
    cached: int
    made: int


def key_hash(key: str) -> str:
    """What is kept of an API key."""
    return hashlib.sha256(b"sleepify api key\0" + key.encode()).hexdigest()


class Engine:
    """The model, its thread, and the sessions. Made and used in the thread of the event loop.

    Args:
        model: which sleeps.
        tokenizer: with a chat template.
        limits: of requests.
        folder: where sessions are kept, None for memory only.
        idle_sleep: a session that was idle for so many seconds sleeps on its open window; None for never.
        shared: whether other servers of the same model keep sessions in the folder, too, see `Store`.

    Raises:
        ValueError: for a tokenizer that does not fit.
    """

    def __init__(
        self,
        model: SleepForCausalLM,
        tokenizer: Any,
        limits: Limits,
        folder: Path | None,
        idle_sleep: float | None,
        shared: bool = False,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("expected a tokenizer with a chat template, got one without; set tokenizer.chat_template")
        vocabulary = model.config.text_config.vocab_size
        if len(tokenizer) > vocabulary:
            raise ValueError(f"expected a tokenizer of at most {vocabulary} tokens, as the model, got {len(tokenizer)}")
        self.limits, self.metrics, self.answering = limits, Metrics(), set[Turn]()
        # A tokenizer is not to be called by two threads at once, and no long text may keep tokens waiting:
        # the model's thread has one, and the thread that writes templates another.
        self._tokenizer, self._idle_sleep = tokenizer, idle_sleep
        self._template_tokenizer = copy.deepcopy(tokenizer)
        self._renderer = ThreadPoolExecutor(1, thread_name_prefix="sleepify-template")
        self.store = Store(owner_of(model), folder, limits.bytes, limits.sessions, shared, made_by(model))
        self.scheduler = Scheduler(model, stop_ids_of(model, tokenizer), self.metrics)
        self._naps: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for idle sessions."""
        if self._idle_sleep is not None:
            self._naps = asyncio.get_running_loop().create_task(self._sleep_when_idle(self._idle_sleep))

    async def close(self) -> None:
        """Write what is to be written and end the model's thread."""
        if self._naps is not None:
            # Again where a write that failed at that moment was heard of instead.
            while not self._naps.done():
                self._naps.cancel()
                await asyncio.wait([self._naps], timeout=1.0)
        await asyncio.get_running_loop().run_in_executor(None, self.scheduler.close)
        self._renderer.shutdown()
        await self.store.close()

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; in the model's thread."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    # --- a turn ----------------------------------------------------------------------------------------------------

    async def turn(self, asked: Asked, key: str, session_id: str | None, answers_as: str) -> Turn:
        """Begin to answer.

        Args:
            asked: what.
            key: hash of the API key.
            session_id: the session that goes on with these messages, None if they are the whole conversation.
            answers_as: "sess" if the conversation is to be a session, "resp" if a response.

        Raises:
            Refusal: if it cannot be.
        """
        if len(self.answering) >= self.limits.waiting:
            raise Refusal(429, f"expected at most {self.limits.waiting} requests at once, got one more; try again",
                          code="too_many_requests")  # fmt: skip
        turn = Turn(self, time.monotonic() + self.limits.seconds)
        try:
            before: list[Message] = []
            if session_id is not None:
                named = self._own(session_id, key, "session")
                await turn.hold(named)
                if named.erased:
                    raise unknown("session", session_id)
                named.named = True
                before = named.messages
            elif asked.before is not None:
                before = self._own(asked.before, key, "response").messages
            turn.messages = before + asked.messages
            if asked.instructions is not None:
                turn.system = [{"role": "system", "content": asked.instructions}]
            turn.ids = await self._render(turn.system + turn.messages)
            cache, base, is_tip = await self._known(key, turn.ids)
            turn.cached = 0 if cache is None else cache.seen[0]
            if answers_as == "resp":
                turn.answer = self.store.new(key, "resp")
                # Before the session, which moves only with all else in place.
                turn.kept = [turn.answer, *turn.kept] if asked.store else turn.kept
            elif session_id is None:
                # The same conversation in a later turn is the same session.
                same = base is not None and is_tip and not (base.is_response or base.named or base.busy.locked())
                session = base if base is not None and same else self.store.new(key)
                await turn.hold(session)
            turn.begin(Job(cache, turn.ids[turn.cached :], asked.sampling, Spoken(self.decode, asked.sampling.stop),
                           turn.deliver))  # fmt: skip
        except BaseException:
            turn.close()
            raise
        return turn

    def _own(self, name: str, key: str, kind: str) -> Session:
        found = self.store.get(name, key)
        if found is None or found.is_response != (kind == "response"):
            raise unknown(kind, name)
        return found

    async def _render(self, messages: list[Message]) -> list[int]:
        """The whole conversation as tokens, up to where the answer begins.

        Raises:
            Refusal: for one that the template cannot write, or that is too long.
        """
        try:
            ids = await self._template(messages, True)
        except Exception as error:
            raise Refusal(400, f"expected messages that the model's template can write, got an error: {error}",
                          "messages", "invalid_messages") from error  # fmt: skip
        if not 0 < len(ids) <= self.limits.prompt:
            raise Refusal(400, f"expected a conversation of 1 to {self.limits.prompt} tokens, got {len(ids)}",
                          "messages", "context_length_exceeded")  # fmt: skip
        return ids

    async def _template(self, messages: list[Message], opens_answer: bool) -> list[int]:
        def render() -> list[int]:
            ids = self._template_tokenizer.apply_chat_template(
                messages, add_generation_prompt=opens_answer, return_dict=False
            )
            return [int(each) for each in ids]

        return await asyncio.get_running_loop().run_in_executor(self._renderer, render)

    async def memory_of(self, job: Job, ids: list[int], closed: list[Message]) -> tuple[SleepCache, list[int]]:
        """The memory of a turn that a later one can go on from, and the ids that it has read.

        An answer that is written otherwise than it was made (special tokens are not text, and a text may have several
        tokenizations) and was slept on cannot be taken back; then it is the memory before the answer.
        """
        assert job.cache is not None and job.heard is not None
        read = (ids + job.spoken.ids)[: job.cache.seen[0]]
        slept = len(read) - job.cache.open_lengths[0]
        if slept > len(ids):
            try:
                written = await self._template(closed, False)
            except Exception:
                # A template may refuse a conversation that ends with an answer; the next turn will show.
                written = read
            if written[:slept] != read[:slept]:
                return job.heard, ids
        return job.cache, read

    async def _known(self, key: str, ids: list[int]) -> tuple[SleepCache | None, Session | None, bool]:
        """A session's memory of the longest known prefix of a conversation, whose it is, and if it is all it has."""
        while True:
            base, common = self.store.longest_prefix(key, ids)
            if base is None:
                return None, None, False
            turn, tokens, opened = base.turn, base.tokens, len(base.open_ids)
            cache = await self.store.cache_of(base)
            if base.turn == turn:
                break
        if cache is None or base.erased:
            return None, None, False
        cache = cache.clone()
        if common == tokens < len(ids):
            return cache, base, True
        # What it has read beyond is in its open window, which is read anew from its start.
        cache.rewind(opened)
        return (cache, base, False) if cache.seen[0] else (None, None, False)

    # --- idle ------------------------------------------------------------------------------------------------------

    async def _sleep_when_idle(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(min(1.0, seconds / 4))
            await self._sleep_idle_ones(seconds)

    async def _sleep_idle_ones(self, seconds: float) -> None:
        for session in self.store.idle(time.time() - seconds):
            async with session.busy:
                # Others slept before it, and it may have been called meanwhile.
                if not self.store.is_idle(session, time.time() - seconds):
                    continue
                try:
                    await self._nap(session)
                except Exception:
                    log.exception("sleeping while idle failed; the session is as it was")
                    session.used = time.time()

    async def _nap(self, session: Session) -> None:
        cache = await self.store.cache_of(session)
        if cache is None or session.erased:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        reasons: list[str | Ended] = []

        def deliver(event: str | Ended) -> None:
            reasons.append(event)
            loop.call_soon_threadsafe(ended.set)

        job = Job(cache.clone(), (), None, Spoken(self.decode), deliver)
        self.scheduler.submit(job)
        await ended.wait()
        for reason in reasons:
            if isinstance(reason, Ended) and reason.error is not None:
                raise reason.error
        if job.cache is not None and reasons == [Ended("slept")]:
            await self.store.keep_slept(session, job.cache)


class Turn:
    """An answer that is being made, and counts as one from now until it is closed; `close` it whatever happens.

    Attributes:
        messages: the conversation up to the answer.
        system: what is shown before it, in this turn only.
        ids: the same as tokens.
        cached: how many of them are not read again.
        kept: what it will be kept as.
        answer: the response that it is, None for a session.
    """

    def __init__(self, engine: Engine, deadline: float) -> None:
        self.messages: list[Message] = []
        self.system: list[Message] = []
        self.ids: list[int] = []
        self.cached = 0
        self.kept: list[Session] = []
        self.answer: Session | None = None
        self._engine, self._deadline = engine, deadline
        self._held: list[Session] = []
        self._job: Job | None = None
        self._ended: Ended | None = None
        self._events: asyncio.Queue[str | Ended] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        engine.answering.add(self)

    def deliver(self, event: str | Ended) -> None:
        """Take in what the model's thread has."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def hold(self, session: Session) -> None:
        """Wait until no other turn of the session is under way; it is kept as this session."""
        if session.busy.locked():
            await self._in_time(session.busy.acquire())
        else:
            # At once: nobody else may come between the look and the lock.
            await session.busy.acquire()
        self._held.append(session)
        self.kept.append(session)

    def begin(self, job: Job) -> None:
        """Hand it over to the model."""
        self._job = job
        self._engine.scheduler.submit(job)

    def close(self) -> None:
        """No more is wanted of it."""
        if self._job is not None:
            self._job.cancelled.set()
        for session in self._held:
            session.busy.release()
        self._held = []
        self._engine.answering.discard(self)

    async def pieces(self) -> AsyncIterator[str]:
        """The answer as it comes.

        Raises:
            Refusal: 504 when its time is over, 500 if the model fails.
        """
        while True:
            event = await self._in_time(self._events.get())
            if isinstance(event, str):
                yield event
            elif event.reason == "error":
                raise Refusal(500, f"the model failed: {event.error}", code="model_error")
            else:
                self._ended = event
                return

    async def finish(self) -> Outcome:
        """Keep what there is to keep, when all pieces have come.

        Raises:
            Refusal: 429 if the key has too many sessions.
        """
        job, ended = self._job, self._ended
        assert job is not None and ended is not None and job.cache is not None
        text = job.spoken.text
        conversation = [*self.messages, {"role": "assistant", "content": text}]
        try:
            if self.kept:
                cache, read = await self._engine.memory_of(job, self.ids, self.system + conversation)
            for session in self.kept:
                await self._engine.store.keep(session, cache.clone(), conversation, read)
        except BaseException as error:
            if self.answer is not None:
                # It goes on from a turn that the session has not had.
                await self._engine.store.erase(self.answer)
            if isinstance(error, TooManySessionsError):
                raise Refusal(429, str(error), code="too_many_sessions") from error
            raise
        return Outcome(text, ended.reason, len(self.ids), self.cached, job.made)

    @property
    def left(self) -> float:
        """Seconds that it still has."""
        return max(0.0, self._deadline - time.monotonic())

    async def _in_time(self, coming: Any) -> Any:
        try:
            return await asyncio.wait_for(coming, self.left)
        except asyncio.TimeoutError:
            seconds = self._engine.limits.seconds
            raise Refusal(504, f"expected an answer within {seconds:g} s, it takes longer; ask for fewer tokens",
                          code="timeout") from None  # fmt: skip
