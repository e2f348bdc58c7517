"""Answers in OpenAI's form: whole, and as the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from sleepify.serving.engine import Outcome
from sleepify.serving.refusals import Refusal

Events = Iterator[str]


class Reply(ABC):
    """One answer on its way out."""

    @abstractmethod
    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """All of it as one object."""

    @abstractmethod
    def opening(self) -> Events:
        """Events before the first piece of text."""

    @abstractmethod
    def piece(self, text: str) -> Events:
        """Events of a piece of text."""

    @abstractmethod
    def closing(self, outcome: Outcome) -> Events:
        """Events after the last piece."""

    @abstractmethod
    def failing(self, refusal: Refusal) -> Events:
        """Events of an answer that breaks off."""


class ChatReply(Reply):
    """``chat.completion`` and its chunks.

    Args:
        model: its name.
        usage: whether the stream says what was used.
    """

    def __init__(self, model: str, usage: bool) -> None:
        self._usage = usage
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        message = {"role": "assistant", "content": outcome.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": outcome.reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": _chat_usage(outcome)}

    def opening(self) -> Events:
        yield self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> Events:
        yield self._chunk({"content": text})

    def closing(self, outcome: Outcome) -> Events:
        yield self._chunk({}, outcome.reason)
        if self._usage:
            yield _event(
                {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _chat_usage(outcome)}
            )
        yield "data: [DONE]\n\n"

    def failing(self, refusal: Refusal) -> Events:
        yield _event(refusal.body())
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self._usage else {}
        return _event({**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage})


class ResponseReply(Reply):
    """``response`` and its events.

    Args:
        model: its name.
        response_id: under which it may be gone on from.
        asked: the request's fields that the response repeats.
    """

    def __init__(self, model: str, response_id: str, asked: dict[str, Any]) -> None:
        self._id, self._item = response_id, f"msg_{secrets.token_hex(12)}"
        self._head = {"id": response_id, "object": "response", "created_at": int(time.time()), "model": model, **asked}
        self._number = -1
        self._said = ""

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        cut = outcome.reason == "length"
        status = "incomplete" if cut else "completed"
        usage = {
            "input_tokens": outcome.prompt,
            "input_tokens_details": {"cached_tokens": outcome.cached},
            "output_tokens": outcome.made,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": outcome.prompt + outcome.made,
        }
        details = {"reason": "max_output_tokens"} if cut else None
        return self._response(status, [self._message(outcome.text, status)], usage, details)

    def opening(self) -> Events:
        yield self._event("response.created", response=self._response("in_progress", [], None, None))
        yield self._event("response.in_progress", response=self._response("in_progress", [], None, None))
        item = {**self._message("", "in_progress"), "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._place(), part=_part(""))

    def piece(self, text: str) -> Events:
        self._said += text
        yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def closing(self, outcome: Outcome) -> Events:
        whole = self.whole(outcome)
        yield self._event("response.output_text.done", **self._place(), text=outcome.text, logprobs=[])
        yield self._event("response.content_part.done", **self._place(), part=_part(outcome.text))
        yield self._event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield self._event(f"response.{whole['status']}", response=whole)

    def failing(self, refusal: Refusal) -> Events:
        error = {"code": "server_error", "message": refusal.message}
        failed = self._response("failed", [self._message(self._said, "incomplete")], None, None) | {"error": error}
        yield self._event("response.failed", response=failed)

    def _response(self, status: str, output: list[Any], usage: Any, details: Any) -> dict[str, Any]:
        return {**self._head, "status": status, "output": output, "usage": usage, "incomplete_details": details,
                "error": None, "parallel_tool_calls": False, "tool_choice": "none", "tools": []}  # fmt: skip

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {"type": "message", "id": self._item, "role": "assistant", "status": status, "content": [_part(text)]}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> str:
        self._number += 1
        return f"event: {kind}\n" + _event({"type": kind, "sequence_number": self._number, **fields})


def _chat_usage(outcome: Outcome) -> dict[str, Any]:
    return {
        "prompt_tokens": outcome.prompt,
        "completion_tokens": outcome.made,
        "total_tokens": outcome.prompt + outcome.made,
        "prompt_tokens_details": {"cached_tokens": outcome.cached},
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
