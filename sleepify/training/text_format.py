"""Rows of a dataset into tokens and labels: formats are known by their columns.

| format | columns | labels |
|---|---|---|
| `text` | text | every token |
| `messages` | messages: a list of {role, content} | what the assistant says |
| `prompt_completion` | prompt, completion | the completion |
| `question_answer` | context, question, answer | the answer |

Every row is whole, however long: what a model forgets of it is for sleep to keep.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from sleepify.conversation import front
from sleepify.errors import SleepifyError
from sleepify.tasks.base import IGNORE
from sleepify.training.settings import suggest

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "question_answer": ("context", "question", "answer"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
CHATS = ("messages", "prompt_completion")
"""Formats beside which a column ``tools`` says what the assistant may call."""
_GENERATION = re.compile(r"\{%-?\s*generation\b")


class DatasetError(SleepifyError):
    """A dataset that cannot be trained on; the message says which row or column, and what to do."""


def recognise(columns: Sequence[str], renamed: Mapping[str, str], chosen: str | None = None) -> str:
    """The format of a dataset.

    Args:
        columns: that it has.
        renamed: the names of its columns by ours.
        chosen: the format that a user has named.

    Raises:
        DatasetError: if columns are missing.
    """
    if chosen is not None and chosen not in FORMATS:
        raise DatasetError(f"expected dataset_format to be one of {', '.join(FORMATS)}, got {chosen!r}")
    known = {name for names in FORMATS.values() for name in names}
    if strange := sorted(set(renamed) - known):
        raise DatasetError(f"dataset_columns: expected names among {sorted(known)}, got {strange}")
    for ours, theirs in renamed.items():
        if theirs not in columns:
            raise DatasetError(
                f"dataset_columns: expected a column {theirs!r} for {ours}, got {sorted(columns)}"
                f"{suggest(theirs, list(columns))}"
            )
    there = {*columns, *renamed}
    # A column that is renamed is meant to be read.
    fitting = sorted(FORMATS, key=lambda name: not renamed.keys() <= set(FORMATS[name]))
    for name in [chosen] if chosen is not None else fitting:
        missing = [column for column in FORMATS[name] if column not in there]
        if not missing:
            return name
        if chosen is not None:
            raise DatasetError(
                f"expected columns {', '.join(FORMATS[name])} for dataset_format={name}, missing {', '.join(missing)}; "
                f"got {sorted(columns)}: say which they are with dataset_columns"
            )
    wanted = "; ".join(", ".join(names) for names in FORMATS.values())
    raise DatasetError(
        f"expected columns of one of the formats ({wanted}), got {sorted(columns)}: rename them with dataset_columns"
    )


@dataclass(frozen=True)
class Encoder:
    """A row of one format to token ids, labels and where its answer is.

    Args:
        format: of `FORMATS`.
        tokenizer: of transformers.
        columns: the names of the dataset's columns by ours.
        question_first: the question before the context, not after it.
        longest: tokens that a row may have; None for any number.
    """

    format: str
    tokenizer: Any
    columns: Mapping[str, str]
    question_first: bool = False
    longest: int | None = None

    def check(self) -> None:
        """See that the tokenizer can write the format.

        Raises:
            DatasetError: if there is no chat template, or one that cannot write messages or tell who said what.
        """
        if self.format != "messages":
            return
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise DatasetError(
                "expected a chat template for messages, the tokenizer has none: give chat_template, a file or text, or "
                "a tokenizer of a chat model"
            )
        turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
        _, labels, _ = self._messages([{"role": role, "content": said} for role, said in turns], "the chat template")
        if all(label == IGNORE for label in labels):
            raise DatasetError(
                "expected a chat template that writes what the assistant says (within {% generation %}, where it has "
                "that), got one that leaves it out: give another chat_template"
            )

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        """``input_ids``, ``labels``, ``length`` and ``answer``, [start, stop) or empty.

        Raises:
            DatasetError: for a value of another type, an empty one, or a row that is too long.
        """
        where = f"row {number}"
        values = {name: row.get(self.columns.get(name, name)) for name in FORMATS[self.format]}
        told = _tools(row.get("tools"), where) if self.format in CHATS else {}
        ids, labels, answer = getattr(self, f"_{self.format}")(*(values.values()), where, **told)
        if not any(label != IGNORE for label in labels[1:]):
            raise DatasetError(f"{where}: expected at least one token to predict, got none; take the row out")
        if self.longest is not None and len(ids) > self.longest:
            raise DatasetError(
                f"{where}: expected at most {self.longest} tokens, the positions that the base supports, got "
                f"{len(ids)}: split the row, or sleep with eviction=hard, where positions begin anew in every window"
            )
        return {"input_ids": ids, "labels": labels, "length": len(ids), "answer": answer}

    # --- formats ---------------------------------------------------------------------------------------------------

    def _text(self, text: Any, where: str) -> tuple[list[int], list[int], list[int]]:
        ids = self._unended(self._begin(_text(text, "text", where))) + self._end()
        return ids, list(ids), []

    def _prompt_completion(
        self, prompt: Any, completion: Any, where: str, **told: Any
    ) -> tuple[list[int], list[int], list[int]]:
        if isinstance(prompt, list) and isinstance(completion, list):
            ids, labels, _ = self._messages([*prompt, *completion], where, first=len(prompt), **told)
            return ids, labels, []
        return self._asked(_text(prompt, "prompt", where), _text(completion, "completion", where))

    def _question_answer(
        self, context: Any, question: Any, answer: Any, where: str
    ) -> tuple[list[int], list[int], list[int]]:
        context, question = _text(context, "context", where), _text(question, "question", where)
        said = f"{question}\n\n{context}\n" if self.question_first else f"{context}\n\n{question}\n"
        return self._asked(said, _text(answer, "answer", where))

    def _asked(self, before: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        first, said, end = self._begin(before), self._unended(self._encode(answer)), self._end()
        labels = [IGNORE] * len(first) + said + end
        return first + said + end, labels, [len(first), len(first) + len(said)] if said else []

    def _messages(
        self, messages: Any, where: str, first: int = 0, **told: Any
    ) -> tuple[list[int], list[int], list[int]]:
        if not isinstance(messages, list) or not messages:
            raise DatasetError(f"{where}: expected messages as a list, got {_short(messages)}")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise DatasetError(f"{where}: expected messages of role and content, got {_short(message)}")
            _text(message.get("content"), f"the content of a message of {message['role']}", where, may_be_empty=True)
        if not any(message["role"] == "assistant" for message in messages[first:]):
            raise DatasetError(f"{where}: expected a message of the assistant to learn, got none; take the row out")
        template = self.tokenizer.chat_template
        if first == 0 and self.tokenizer.is_fast and isinstance(template, str) and _GENERATION.search(template):
            written = self._written(messages, where, return_assistant_tokens_mask=True, **told)
            mask, ids = written["assistant_masks"], list(written["input_ids"])
            return ids, [t if spoken else IGNORE for t, spoken in zip(ids, mask, strict=True)], []
        ids = self._chat(messages, where, **told)
        labels = [IGNORE] * len(ids)
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or place < first:
                continue
            after = self._chat(messages[: place + 1], where, **told)
            if place:
                before = self._chat(messages[:place], where, add_generation_prompt=True, **told)
            else:
                # Templates write no prompt of nothing: what stands before the content whatever it is, is the header.
                before = _shared(after, self._chat([{**message, "content": ""}], where, **told))
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise DatasetError(
                    f"{where}: expected a chat template that leaves earlier turns as they are, got one that rewrites "
                    "them: give chat_template with {% generation %} around what the assistant says"
                )
            labels[len(before) : len(after)] = after[len(before) :]
        return ids, labels, []

    def _chat(self, messages: Sequence[Any], where: str, **options: Any) -> list[int]:
        return list(self._written(messages, where, **options)["input_ids"])

    def _written(self, messages: Sequence[Any], where: str, **options: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
        # jinja2 comes with transformers' chat templates and has errors of its own, as templates have that raise.
        except Exception as error:
            raise DatasetError(
                f"{where}: expected a chat template that takes these messages, got {type(error).__name__}: {error}; "
                "give another chat_template"
            ) from error

    # --- tokens ----------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _front(self) -> list[int]:
        """What the tokenizer puts before every text, as sessions and prompts have it too."""
        return front(self.tokenizer) if isinstance(self.tokenizer, PreTrainedTokenizerBase) else []

    def _begin(self, text: str) -> list[int]:
        ids = self._encode(text)
        # Text that a chat template has written begins and ends with its own.
        return ids if ids[: len(self._front)] == self._front else [*self._front, *ids]

    def _unended(self, ids: list[int]) -> list[int]:
        end = self._end()
        return ids[: -len(end)] if end and ids[-len(end) :] == end else ids

    def _end(self) -> list[int]:
        eos = getattr(self.tokenizer, "eos_token_id", None)
        return [] if eos is None else [eos]


def _text(value: Any, name: str, where: str, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"{where}: expected {name} to be text, got {_short(value)}")
    if not value.strip() and not may_be_empty:
        raise DatasetError(f"{where}: expected {name} to say something, got {_short(value)}; take the row out")
    return value


def _tools(value: Any, where: str) -> dict[str, Any]:
    """What a chat template is told of tools, a list or JSON: nothing where there are none."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
    except ValueError as error:
        raise DatasetError(f"{where}: expected tools as a list or JSON, got {_short(value)}: {error}") from error
    return {"tools": tools} if tools else {}


def _shared(left: list[int], right: list[int]) -> list[int]:
    """What both begin with."""
    end = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:end]


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) < 60 else shown[:57] + '...'}"
