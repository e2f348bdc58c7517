"""Session: text in, text out. Read once, ask many times, talk, fork, take back, keep in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, overload

from transformers import PreTrainedTokenizerBase

from sleepify.cache import SleepCache
from sleepify.conversation import Conversation, in_common, render, settled, vocabulary_digest
from sleepify.errors import CheckpointError
from sleepify.generation import answer_keywords
from sleepify.idle import IdleTimer
from sleepify.modeling import SleepForCausalLM
from sleepify.progress import Progress
from sleepify.session_file import NOTES, read_with_notes, write_session
from sleepify.session_model import Boundary, SessionModel, check_parts, tokens_of
from sleepify.settings import Loops
from sleepify.snapshot import Snapshot

# Steps that can be taken back; each keeps a state.
_STEPS = 16


class _Moment(NamedTuple):
    """What a session is at one moment."""

    now: Snapshot | None
    talk: Conversation


class Session(SessionModel):
    """What a model has read, and a way to ask it.

    A call that fails, or is interrupted, leaves the session as it was. Sessions of one model are independent; use one
    in one thread at a time.

    Args:
        model: it sleeps.
        tokenizer: the model's.
        sleep_at: where it sleeps at once, whether the window is full or not: after each "document" (`read`), or after
            each "turn" too (`say`, and what `ask` keeps); None for full windows alone.
        idle_sleep: sleep on what is awake after so many seconds without a call, in a thread of its own, for which calls
            wait; None for never. `close` ends it, as does leaving ``with Session(...) as session``.
        background: do not wait for the sleep at such a boundary, nor in `read` for that on the last window that it
            fills, which then begins at once; `ask` and `say` wait for it, so that their answers are the same. See
            ``model.sleep``.

    Attributes:
        cache: the `SleepCache` with what was read.

    Raises:
        TypeError: for a model that does not sleep, or what is no tokenizer.
        ValueError: for another boundary, seconds that are not above 0, or a model that cannot sleep in the background.

    Example:
        >>> session = Session(model, tokenizer)
        >>> session.read(book)
        >>> session.ask("Who wrote the letter?")
    """

    def __init__(
        self,
        model: SleepForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sleep_at: Boundary | None = None,
        idle_sleep: float | None = None,
        background: bool = False,
    ) -> None:
        check_parts(model, tokenizer, sleep_at, background)
        self.model, self.tokenizer, self.sleep_at, self.background = model, tokenizer, sleep_at, background
        self._idle = IdleTimer(idle_sleep, self._sleep_idle)
        self.cache = SleepCache()
        self._known = _Moment(None, Conversation())
        self._steps: list[_Moment] = []

    # --- reading and sleeping --------------------------------------------------------------------------------------

    def read(
        self, text: str, progress: Progress | None = None, n_loops: Loops | None = None, ephemeral: bool = False
    ) -> Session:
        """Read on; windows that fill are slept on. Two texts in two calls need not have the ids of one text in one.

        Args:
            text: of any length. BOS stands before the first text of a session only.
            progress: called every few windows with tokens read and to be read; by default a long text has a bar.
            n_loops: another N for the sleeps that this takes, or "auto".
            ephemeral: read it awake until the next sleep, and keep it in no state and no file; what is asked and said
                meanwhile sees it. After that sleep it is as if it had not been read. It ends no document.

        Returns:
            The session itself.

        Raises:
            ValueError: for a text without a token.
        """
        with self._step():
            self._settle()
            self._read(self._ids(text, "text"), progress, n_loops, ephemeral, self.background)
            if self.sleep_at is not None and not ephemeral:
                self._doze(n_loops, self.background)
        return self

    def sleep(self, n_loops: Loops | None = None, background: bool = False) -> Session:
        """Sleep now on what is awake, also where the window is only part full.

        Args:
            n_loops: another N for this sleep, or "auto".
            background: do not wait for it, see ``model.sleep``.

        Returns:
            The session itself.

        Raises:
            ValueError: for a session that has read nothing.
        """
        with self._step():
            self._settle()
            self._doze(n_loops, background)
        return self

    # --- asking and talking ----------------------------------------------------------------------------------------

    @overload
    def ask(self, question: str, keep: bool = False, **generate: Any) -> str: ...

    @overload
    def ask(self, question: Sequence[str], keep: bool = False, **generate: Any) -> list[str]: ...

    def ask(self, question: str | Sequence[str], keep: bool = False, **generate: Any) -> str | list[str]:
        """What the model writes after the text and a question, which is read as it stands, without a template.

        Args:
            question: one, or several, which are answered in one batch, each as if it were the only one.
            keep: whether question and answer become part of what was read. By default asking leaves no trace.
            generate: keywords of ``model.generate`` (``max_new_tokens``, 256 where nothing says otherwise,
                ``do_sample``, ``streamer``, ``n_loops`` ...).

        Returns:
            The answer, or one answer per question, without special tokens.

        Raises:
            ValueError: for a question without a token, several that are to be kept, or a keyword that is the
                session's own.
        """
        questions = [question] if isinstance(question, str) else list(question)
        if keep and not isinstance(question, str):
            raise ValueError(f"expected one question with keep=True, got a list of {len(questions)}; keep one of them")
        if not questions:
            raise ValueError("expected a question or several, got an empty list")
        arguments = answer_keywords(generate, self.model.generation_config, self.tokenizer.pad_token_id)
        with self._idle.busy():
            session = self if keep else self._copy()
            with session._step():
                session._awaited()
                session._settle()
                made = session._generate([session._ids(each, "question") for each in questions], arguments)
                if keep:
                    self._end_turn(arguments)
        answers = [self._text(ids) for ids in made]
        return answers[0] if isinstance(question, str) else answers

    def say(self, text: str, **generate: Any) -> str:
        """The model's answer to the next turn of a conversation, by the tokenizer's chat template.

        It is what ``generate`` gives on the whole conversation as the template renders it now, behind the text that
        was read before the conversation. Only what is new of it is read. Where the template has rewritten earlier
        turns (without their reasoning, for example), the session goes back to where they differ and reads on from
        there.

        Args:
            text: the user's turn.
            generate: as in `ask`.

        Returns:
            The answer, without special tokens.

        Raises:
            ValueError: for a tokenizer without a chat template, a keyword that is the session's own, or a template
                that rewrites what was slept on and cannot be read again.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected text, got {type(text).__name__}")
        arguments = answer_keywords(generate, self.model.generation_config, self.tokenizer.pad_token_id)
        with self._step():
            self._awaited()
            if not self._known.talk.messages:
                self._known = _Moment(None, Conversation(opens=not tokens_of(self.cache)[0]))
            talk = self._known.talk
            messages = (*talk.messages, {"role": "user", "content": text})
            ids = render(self.tokenizer, messages, talk.opens)
            self._read(ids[self._go_back(ids[:-1]) : -1], n_loops=arguments.get("n_loops"))
            mark = None if self.cache.now is None else (self.cache.now.at_rest(), len(ids) - 1)
            # Where there is nothing but the conversation, generate is shown all of it (its penalties look at that).
            whole = tokens_of(self.cache)[0] == len(ids) - 1
            made = self._generate([ids if whole else ids[-1:]], arguments, new_tokens=not whole)[0]
            answer = self._text(made)
            messages = (*messages, {"role": "assistant", "content": answer})
            self._known = _Moment(None, Conversation(messages, (*ids, *made), talk.fixed, talk.opens, mark))
            self._end_turn(arguments)
        return answer

    # --- a session as a thing --------------------------------------------------------------------------------------

    def fork(self) -> Session:
        """An independent session that has read the same, at no cost, and sleeps when this one would."""
        with self._idle.busy():
            return self._copy(self._idle.seconds)

    def _copy(self, idle_sleep: float | None = None) -> Session:
        when: dict[str, Any] = {"sleep_at": self.sleep_at, "idle_sleep": idle_sleep, "background": self.background}
        other = Session(self.model, self.tokenizer, **when)
        # Its seconds are counted from now on.
        with other._idle.busy():
            other.cache = self.cache.clone()
            other._known, other._steps = self._known, list(self._steps)
        return other

    def close(self) -> None:
        """Sleep no more when idle; a sleep that is under way is waited for. The session can be used on."""
        self._idle.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def undo(self) -> Session:
        """Take back the latest read, say, kept ask or sleep; up to the last 16, one after the other.

        What was slept on when idle since, or at the end of it, is taken back with it.

        Returns:
            The session itself.

        Raises:
            ValueError: if there is nothing to take back.
        """
        with self._idle.busy():
            if not self._steps:
                raise ValueError(f"expected a step to take back, of the {_STEPS} since load or forget none is left")
            self._put(self._steps.pop())
        return self

    def forget(self) -> Session:
        """Forget everything, also what `undo` would bring back; the session is as new."""
        with self._idle.busy():
            self._steps = []
            self._put(_Moment(None, Conversation()))
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file with a digest: what was read, and the turns of the conversation.

        It is written beside and renamed. `undo` cannot go back beyond it.

        Raises:
            ValueError: for a session that has read nothing.
        """
        with self._idle.busy():
            self._notice()
            now, talk = self.cache.now, self._known.talk
        if now is None:
            raise ValueError("expected a session that has read something, got an empty one")
        notes = {"tokenizer": vocabulary_digest(self.tokenizer), **talk.notes()}
        rows = [now] if talk.mark is None else [now, talk.mark[0]]
        write_session(path, Snapshot.join(rows) if len(rows) > 1 else now, {NOTES: json.dumps(notes)})

    @classmethod
    def load(
        cls, path: str | os.PathLike, model: SleepForCausalLM, tokenizer: PreTrainedTokenizerBase, **when: Any
    ) -> Session:
        """A session that `save` wrote.

        Args:
            path: the file.
            model: the model that it belongs to; its weights may have been trained on.
            tokenizer: the one that it was read with.
            when: ``sleep_at``, ``idle_sleep`` and ``background``, which the file does not keep.

        Raises:
            CheckpointError: for a file that is damaged, altered, no session with text, or of another tokenizer.
            CacheMismatchError: for a session of another model.
        """
        session = cls(model, tokenizer, **when)
        snapshot, metadata = read_with_notes(path)
        if NOTES not in metadata:
            raise CheckpointError(f"expected a Session in {path}, got a bare SleepCache; SleepCache.load reads it")
        notes = json.loads(metadata[NOTES])
        if notes["tokenizer"] != vocabulary_digest(tokenizer):
            raise CheckpointError(f"expected the tokenizer that {path} was read with, got one of another vocabulary")
        whole = SleepCache(snapshot.fixed_shapes)
        whole.now = snapshot
        whole.begin(model.owner_of(model.options()), snapshot.batch_size, model.config.window_size, model.device)
        now, *marks = [part.now for part in whole.to(model.device).split()]
        with session._idle.busy():
            session._put(_Moment(now, Conversation.noted(notes, *marks)))
        return session

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns so far, as chat templates take them."""
        return [dict(message) for message in self._known.talk.messages]

    def __repr__(self) -> str:
        windows, awake = sum(self.cache.windows), sum(self.cache.open_lengths)
        n_bytes = self.cache.state_bytes + self.cache.kv_bytes
        sleeping = ", sleeping" if self.cache.is_sleeping else ""
        return (
            f"Session({tokens_of(self.cache)[0]:,} tokens, {windows:,} windows slept on, {awake:,} of "
            f"{self.model.config.window_size:,} tokens awake, {n_bytes:,} bytes{sleeping})"
        )

    # --- steps -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self) -> Iterator[None]:
        """What is done within is one step that `undo` takes back; if it fails it did not happen."""
        with self._idle.busy():
            with self._whole() as before:
                yield
            # The latest is kept whole; those before it without keys, so that each weighs a state and no window.
            rest = [_Moment(step.now and step.now.at_rest(), step.talk) for step in self._steps[-(_STEPS - 1) :]]
            self._steps = [*rest, before]

    @contextmanager
    def _whole(self) -> Iterator[_Moment]:
        """What is done within is done as a whole, or did not happen; gives what was before."""
        self._notice()
        before = _Moment(self.cache.now, self._known.talk)
        try:
            yield before
        except BaseException:
            self._put(before)
            raise
        self._known = _Moment(self.cache.now, self._known.talk)

    def _end_turn(self, arguments: dict[str, Any]) -> None:
        if self.sleep_at == "turn":
            self._settle()
            self._doze(arguments.get("n_loops"), self.background)

    def _sleep_idle(self) -> None:
        """Called by the timer: part of the latest step, no step of its own."""
        if any(self.cache.open_lengths) or any(self.cache.pending):
            with self._whole():
                self._settle()
                self._doze()

    def _put(self, moment: _Moment) -> None:
        self.cache.now, self._known = moment.now, moment

    def _notice(self) -> None:
        """See whether somebody else has moved the cache since the latest step: it is text that stands as it stands."""
        known, now = self._known, self.cache.now
        if now is known.now:
            return
        if len(self.cache.seen) > 1:
            raise ValueError(f"expected the session's cache to have one row, found {len(self.cache.seen)}")
        shorter = now is None or (known.now is not None and tokens_of(self.cache)[0] < known.now.seen[0])
        goes_on = replace(known.talk, fixed=len(known.talk.ids), mark=None)
        self._known = _Moment(now, Conversation() if shorter else goes_on)

    # --- the conversation ------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Bring a conversation into the form in which the template will write it from now on, before other things."""
        talk = self._known.talk
        if talk.fixed == len(talk.ids):
            return
        ids = settled(self.tokenizer, talk)
        self._read(ids[self._go_back(ids) :])
        self._known = _Moment(None, replace(talk, ids=tuple(ids), fixed=len(ids), mark=None))

    def _go_back(self, ids: Sequence[int]) -> int:
        """Go to where nothing was read of the conversation but a beginning of these ids; how many that is."""
        talk = self._known.talk
        for now, read in ((self.cache.now, len(talk.ids)), *([talk.mark] if talk.mark else [])):
            same = in_common(talk.ids[:read], ids)
            back = read - same
            if back and (now is None or same < talk.fixed or back > now.open_lengths[0] + sum(map(len, now.pending))):
                continue
            self.cache.now = now if now is None or not back else now.rewind([back])
            return same
        if talk.opens and not talk.fixed:
            self.cache.now = None
            return 0
        raise ValueError(
            f"expected a template that leaves earlier turns as they are once text was read or slept on after them, got "
            f"one that now writes the {len(talk.ids)} ids of the conversation differently from id "
            f"{in_common(talk.ids, ids)} on; undo() the last steps, or forget() and begin anew"
        )
