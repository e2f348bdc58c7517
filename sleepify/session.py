"""Session: text in, text out. Read once, ask many times, talk, fork, take back, keep in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, overload

import torch
from transformers import PreTrainedTokenizerBase

from sleepify.cache import SleepCache
from sleepify.conversation import Conversation, front, in_common, render, settled, vocabulary_digest
from sleepify.errors import CheckpointError
from sleepify.generation import answer_keywords, left_padded
from sleepify.modeling import SleepForCausalLM
from sleepify.progress import Progress, bar
from sleepify.session_file import read_with_notes, write_session
from sleepify.snapshot import Snapshot

# Windows that are read between two reports of progress.
_PIECE = 8
# Steps that can be taken back; each keeps a state.
_STEPS = 16
_NOTES = "session"


class _Moment(NamedTuple):
    """What a session is at one moment."""

    now: Snapshot | None
    talk: Conversation


class Session:
    """What a model has read, and a way to ask it.

    A call that fails, or is interrupted, leaves the session as it was. Sessions of one model are independent; use one
    in one thread at a time.

    Args:
        model: it sleeps.
        tokenizer: the model's.

    Attributes:
        cache: the `SleepCache` with what was read.

    Raises:
        TypeError: for a model that does not sleep, or what is no tokenizer.

    Example:
        >>> session = Session(model, tokenizer)
        >>> session.read(book)
        >>> session.ask("Who wrote the letter?")
    """

    def __init__(self, model: SleepForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(model, SleepForCausalLM):
            raise TypeError(
                f"expected a model that sleeps, got {type(model).__name__}; sleepify(model) makes one, and an adapter "
                "of peft goes into it by merge_and_unload()"
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"expected a tokenizer of transformers, got {type(tokenizer).__name__}")
        self.model, self.tokenizer = model, tokenizer
        self.cache = SleepCache()
        self._known = _Moment(None, Conversation())
        self._steps: list[_Moment] = []

    # --- reading and sleeping --------------------------------------------------------------------------------------

    def read(self, text: str, progress: Progress | None = None, ephemeral: bool = False) -> Session:
        """Read on; windows that fill are slept on. Two texts in two calls need not have the ids of one text in one.

        Args:
            text: of any length. BOS stands before the first text of a session only.
            progress: is called with the number of tokens read and to be read, every few windows; by default a long
                text has a progress bar of transformers.
            ephemeral: read it awake, until the next sleep, and keep it in no state and no file; what is asked and said
                meanwhile sees it. From that sleep on the session is as if it had not been read.

        Returns:
            The session itself.

        Raises:
            ValueError: for a text without a token.
        """
        with self._step():
            self._settle()
            self._read(self._ids(text, "text"), progress, ephemeral)
        return self

    def sleep(self, n_loops: int | None = None, background: bool = False) -> Session:
        """Sleep now on what is awake, also where the window is only part full.

        Args:
            n_loops: another N for this sleep.
            background: do not wait for it, see ``model.sleep``.

        Returns:
            The session itself.

        Raises:
            ValueError: for a session that has read nothing.
        """
        with self._step():
            self._settle()
            self.model.sleep(self.cache, n_loops=n_loops, background=background)
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
        session = self if keep else self.fork()
        with session._step():
            session._settle()
            made = session._generate([session._ids(each, "question") for each in questions], arguments)
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
            if not self._known.talk.messages:
                self._known = _Moment(None, Conversation(opens=not _tokens(self.cache)[0]))
            talk = self._known.talk
            messages = (*talk.messages, {"role": "user", "content": text})
            ids = render(self.tokenizer, messages, talk.opens)
            self._read(ids[self._go_back(ids[:-1]) : -1])
            mark = None if self.cache.now is None else (self.cache.now.at_rest(), len(ids) - 1)
            # Where there is nothing but the conversation, generate is shown all of it (its penalties look at that).
            whole = _tokens(self.cache)[0] == len(ids) - 1
            made = self._generate([ids if whole else ids[-1:]], arguments, new_tokens=not whole)[0]
            answer = self._text(made)
            messages = (*messages, {"role": "assistant", "content": answer})
            self._known = _Moment(None, Conversation(messages, (*ids, *made), talk.fixed, talk.opens, mark))
        return answer

    # --- a session as a thing --------------------------------------------------------------------------------------

    def fork(self) -> Session:
        """An independent session that has read the same, at no cost."""
        other = Session(self.model, self.tokenizer)
        other.cache = self.cache.clone()
        other._known, other._steps = self._known, list(self._steps)
        return other

    def undo(self) -> Session:
        """Take back the latest read, say, kept ask or sleep; up to the last 16, one after the other.

        Returns:
            The session itself.

        Raises:
            ValueError: if there is nothing to take back.
        """
        if not self._steps:
            raise ValueError(f"expected a step to take back, of the latest {_STEPS} since load or forget none is left")
        self._put(self._steps.pop())
        return self

    def forget(self) -> Session:
        """Forget everything, also what `undo` would bring back; the session is as new."""
        self._steps = []
        self._put(_Moment(None, Conversation()))
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file with a digest: what was read, and the turns of the conversation.

        It is written beside and renamed. `undo` cannot go back beyond it.

        Raises:
            ValueError: for a session that has read nothing.
        """
        self._notice()
        now, talk = self.cache.now, self._known.talk
        if now is None:
            raise ValueError("expected a session that has read something, got an empty one")
        notes = {
            "tokenizer": vocabulary_digest(self.tokenizer),
            "messages": [dict(message) for message in talk.messages],
            "ids": list(talk.ids),
            "fixed": talk.fixed,
            "opens": talk.opens,
            "mark": None if talk.mark is None else talk.mark[1],
        }
        rows = [now] if talk.mark is None else [now, talk.mark[0]]
        write_session(path, Snapshot.join(rows) if len(rows) > 1 else now, {_NOTES: json.dumps(notes)})

    @classmethod
    def load(cls, path: str | os.PathLike, model: SleepForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Session:
        """A session that `save` wrote.

        Args:
            path: the file.
            model: the model that it belongs to; its weights may have been trained on.
            tokenizer: the one that it was read with.

        Raises:
            CheckpointError: for a file that is damaged, altered, no session with text, or of another tokenizer.
            CacheMismatchError: for a session of another model.
        """
        session = cls(model, tokenizer)
        snapshot, metadata = read_with_notes(path)
        if _NOTES not in metadata:
            raise CheckpointError(f"expected a Session in {path}, got a bare SleepCache; SleepCache.load reads it")
        notes = json.loads(metadata[_NOTES])
        if notes["tokenizer"] != vocabulary_digest(tokenizer):
            raise CheckpointError(f"expected the tokenizer that {path} was read with, got one of another vocabulary")
        whole = SleepCache(snapshot.fixed_shapes)
        whole.now = snapshot
        whole.begin(model.owner_of(model.options()), snapshot.batch_size, model.config.window_size, model.device)
        now, *marks = [part.now for part in whole.to(model.device).split()]
        mark = None if notes["mark"] is None or marks[0] is None else (marks[0], notes["mark"])
        messages = tuple(notes["messages"])
        session._put(_Moment(now, Conversation(messages, tuple(notes["ids"]), notes["fixed"], notes["opens"], mark)))
        return session

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns so far, as chat templates take them."""
        return [dict(message) for message in self._known.talk.messages]

    def __repr__(self) -> str:
        windows, awake = sum(self.cache.windows), sum(self.cache.open_lengths)
        n_bytes = self.cache.state_bytes + self.cache.kv_bytes
        return (
            f"Session({_tokens(self.cache)[0]:,} tokens, {windows:,} windows slept on, {awake:,} of "
            f"{self.model.config.window_size:,} tokens awake, {n_bytes:,} bytes)"
        )

    # --- steps -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _step(self) -> Iterator[None]:
        """What is done within is one step that `undo` takes back; if it fails it did not happen."""
        self._notice()
        before = _Moment(self.cache.now, self._known.talk)
        try:
            yield
        except BaseException:
            self._put(before)
            raise
        self._known = _Moment(self.cache.now, self._known.talk)
        # The latest is kept whole; those before it without keys, so that each weighs a state and no window.
        rest = [_Moment(step.now and step.now.at_rest(), step.talk) for step in self._steps[-(_STEPS - 1) :]]
        self._steps = [*rest, before]

    def _put(self, moment: _Moment) -> None:
        self.cache.now, self._known = moment.now, moment

    def _notice(self) -> None:
        """See whether somebody else has moved the cache since the latest step: it is text that stands as it stands."""
        known, now = self._known, self.cache.now
        if now is known.now:
            return
        if len(self.cache.seen) > 1:
            raise ValueError(f"expected the session's cache to have one row, found {len(self.cache.seen)}")
        shorter = now is None or (known.now is not None and _tokens(self.cache)[0] < known.now.seen[0])
        goes_on = replace(known.talk, fixed=len(known.talk.ids), mark=None)
        self._known = _Moment(now, Conversation() if shorter else goes_on)

    # --- text and ids ----------------------------------------------------------------------------------------------

    def _ids(self, text: str, what: str) -> list[int]:
        """The ids of a text, behind BOS if nothing was read before."""
        if not isinstance(text, str):
            raise TypeError(f"expected a {what} as str, got {type(text).__name__}")
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if not ids:
            raise ValueError(f"expected a {what} of at least one token, got {text!r}")
        return ids if _tokens(self.cache)[0] else [*front(self.tokenizer), *ids]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

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

    # --- the model -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _read(self, ids: Sequence[int], progress: Progress | None = None, ephemeral: bool = False) -> None:
        """Read in pieces that end one token after a window, where next to nothing has to be awake between them."""
        if not ids:
            return
        device, window = self.model.device, int(self.model.config.window_size)
        nothing = torch.zeros(0, dtype=torch.long)
        ends = [*range(window - sum(self.cache.open_lengths) + (_PIECE - 1) * window + 1, len(ids), _PIECE * window)]
        with bar(len(ids) if ends and progress is None else 0) as shown:
            begin = 0
            for end in (*ends, len(ids)):
                piece = torch.tensor([ids[begin:end]], device=device)
                own = torch.ones_like(piece, dtype=torch.bool) if ephemeral else None
                self.model(piece, past_key_values=self.cache, logits_to_keep=nothing, ephemeral=own)
                (progress or shown)(end, len(ids))
                begin = end

    def _generate(
        self, prompts: Sequence[Sequence[int]], arguments: dict[str, Any], new_tokens: bool = True
    ) -> list[list[int]]:
        """The ids that the model makes after each prompt; the cache has a row for each of them afterwards."""
        if len(prompts) > 1:
            self.cache.batch_repeat_interleave(len(prompts))
        before = _tokens(self.cache) if new_tokens else [0]
        ids, mask = left_padded([torch.tensor(prompt, device=self.model.device) for prompt in prompts])
        ours = {"attention_mask": mask, "past_key_values": self.cache, "return_dict_in_generate": False}
        made: Any = self.model.generate(ids, new_tokens=new_tokens, tokenizer=self.tokenizer, **ours, **arguments)
        rows = made[:, ids.shape[1] :].tolist()
        counts = zip(_tokens(self.cache), before * (len(rows) // len(before)), prompts, strict=True)
        return [row[: now - then - len(prompt)] for row, (now, then, prompt) in zip(rows, counts, strict=True)]


def _tokens(cache: SleepCache) -> list[int]:
    """Tokens of each row's text, pending ones too; one row of none for an empty session."""
    return [seen + len(ids) for seen, ids in zip(cache.seen, cache.pending, strict=True)] or [0]
