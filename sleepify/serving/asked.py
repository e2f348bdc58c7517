"""From the body of a request to what is asked: every field is checked, and what cannot be done is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sleepify.serving.kept import Message
from sleepify.serving.refusals import Refusal
from sleepify.serving.sampling import Sampling

_CHAT_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_LARGEST_SEED = 2**63
# Of an answer for which no limit was asked, if the server's is not smaller.
DEFAULT_TOKENS = 1024
# Fields that ask for what is not built, unless they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "logprobs": (False,),
    "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "response_format": ({"type": "text"},),
    "reasoning_effort": (), "web_search_options": (), "reasoning": ({},), "include": ([],), "background": (False,),
    "truncation": ("disabled",), "text": ({"format": {"type": "text"}}, {}), "prompt": (), "conversation": (),
    "max_tool_calls": (), "verbosity": ("medium",),
}  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A request for an answer.

    Attributes:
        messages: what is new, or the whole conversation.
        sampling: how to answer.
        stream: in pieces.
        usage: whether the stream ends with what was used.
        store: whether the response may be gone on from.
        before: the response that it goes on from.
        instructions: a system message for this answer only.
        metadata: what a response repeats.
    """

    messages: list[Message]
    sampling: Sampling
    stream: bool
    usage: bool = False
    store: bool = True
    before: str | None = None
    instructions: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body holds.

    Raises:
        Refusal: 400 if it holds none.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"expected a body in JSON, got none: {error}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise Refusal(400, f"expected a JSON object, got {type(found).__name__}", code="invalid_json")
    return found


def chat(body: Mapping[str, Any], model: str, limit: int) -> Asked:
    """A request to ``/v1/chat/completions``; at most ``limit`` tokens are answered."""
    fields = _Fields(body, model)
    messages = fields.get("messages", _list)
    if not messages:
        _refuse("messages", "at least one message", messages)
    options = fields.get("stream_options", _object, {})
    if not set(options) <= {"include_usage", "include_obfuscation"}:
        _refuse("stream_options", "include_usage", options)
    stream = fields.get("stream", _flag, False)
    if options and not stream:
        _refuse("stream_options", "there with stream: true only", options)
    most = fields.get("max_completion_tokens", _count(limit))
    older = fields.get("max_tokens", _count(limit))
    sampling = Sampling(
        temperature=fields.get("temperature", _number(0, 2), 1.0),
        top_p=fields.get("top_p", _number(0, 1), 1.0),
        seed=fields.get("seed", _seed),
        stop=fields.get("stop", _stops, ()),
        max_tokens=most or older or min(limit, DEFAULT_TOKENS),
    )
    asked = Asked(
        messages=[_message(each, f"messages[{place}]", ("text",)) for place, each in enumerate(messages)],
        sampling=sampling,
        stream=stream,
        usage=_flag("stream_options.include_usage", options.get("include_usage", False)),
    )
    fields.see_that_nothing_is_left()
    return asked


def response(body: Mapping[str, Any], model: str, limit: int) -> Asked:
    """A request to ``/v1/responses``; at most ``limit`` tokens are answered."""
    fields = _Fields(body, model)
    given = fields.get("input", lambda name, value: value)
    if isinstance(given, str):
        messages = [{"role": "user", "content": _text("input", given)}]
    else:
        messages = [_item(each, f"input[{place}]") for place, each in enumerate(_list("input", given))]
    if not messages:
        _refuse("input", "a text or at least one message", given)
    sampling = Sampling(
        temperature=fields.get("temperature", _number(0, 2), 1.0),
        top_p=fields.get("top_p", _number(0, 1), 1.0),
        max_tokens=fields.get("max_output_tokens", _count(limit), min(limit, DEFAULT_TOKENS)),
    )
    options = fields.get("stream_options", _object, {})
    if not set(options) <= {"include_obfuscation"}:
        _refuse("stream_options", "include_obfuscation", options)
    asked = Asked(
        messages=messages,
        sampling=sampling,
        stream=fields.get("stream", _flag, False),
        store=fields.get("store", _flag, True),
        before=fields.get("previous_response_id", _text),
        instructions=fields.get("instructions", _text),
        metadata=fields.get("metadata", _metadata, {}),
    )
    fields.see_that_nothing_is_left()
    return asked


class _Fields:
    """The fields of a body, each looked at once; null is as if it was not there."""

    def __init__(self, body: Mapping[str, Any], model: str) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        if (asked := self.get("model", _text)) != model:
            if asked is None:
                _refuse("model", f"the model's name, {model!r}", None)
            raise Refusal(404, f"expected the model {model!r}, got {asked[:80]!r}", "model", "model_not_found")

    def get(self, name: str, check: Callable[[str, Any], Any], default: Any = None) -> Any:
        return check(name, self._left.pop(name)) if name in self._left else default

    def see_that_nothing_is_left(self) -> None:
        for name, value in self._left.items():
            if name in _NEUTRAL:
                if not any(value == each and type(value) is type(each) for each in _neutral(name)):
                    other = "".join(f" other than {json.dumps(each)}" for each in _NEUTRAL[name][:1])
                    raise Refusal(400, f"expected no {name}{other}: it is not supported", name,
                                  "unsupported_parameter")  # fmt: skip
            elif name in _IDLE:
                _IDLE[name](name, value)
            else:
                raise Refusal(400, f"expected no field {name[:80]!r}, which is not known", _shown(name),
                              "unknown_parameter")  # fmt: skip


def _neutral(name: str) -> list[Any]:
    """Whole numbers also as 0.0 and 1.0."""
    values = list(_NEUTRAL[name])
    return values + [float(value) for value in values if type(value) is int]


def _message(value: Any, name: str, kinds: tuple[str, ...]) -> Message:
    message = _object(name, value)
    role = message.get("role")
    if not isinstance(role, str) or role not in _CHAT_ROLES:
        _refuse(f"{name}.role", f"one of {', '.join(_CHAT_ROLES)}", role)
    known = {"role", "content", "name", "type", "id", "status"}
    extra = sorted(each for each, what in message.items() if each not in known and what not in (None, [], {}))
    if extra:
        raise Refusal(400, f"expected {name} to have a role and a content, got also {extra[0][:80]!r}, which is not "
                           "supported", f"{name}.{_shown(extra[0])}", "unsupported_parameter")  # fmt: skip
    content = message.get("content")
    if isinstance(content, list):
        texts = []
        for place, part in enumerate(content):
            where = f"{name}.content[{place}]"
            if _object(where, part).get("type") not in kinds:
                _refuse(f"{where}.type", f"one of {', '.join(kinds)}", part.get("type"))
            texts.append(_text(f"{where}.text", part.get("text")))
        return {"role": _CHAT_ROLES[role], "content": "".join(texts)}
    return {"role": _CHAT_ROLES[role], "content": _text(f"{name}.content", content)}


def _item(value: Any, name: str) -> Message:
    if _object(name, value).get("type", "message") != "message":
        _refuse(f"{name}.type", "message", value.get("type"))
    return _message(value, name, ("input_text", "output_text"))


# --- values --------------------------------------------------------------------------------------------------------


def _refuse(name: str, expected: str, got: Any) -> NoReturn:
    shown = repr(got)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise Refusal(400, f"expected {name} to be {expected}, got {shown}", name, "invalid_value")


def _shown(name: str) -> str:
    """The beginning of a name that a client has chosen; half a character in it could not be sent back."""
    return name[:80].encode("utf-8", "backslashreplace").decode("utf-8")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(name, "a text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        _refuse(name, "a text of whole characters", value)
    return value


def _flag(name: str, value: Any) -> bool:
    return value if isinstance(value, bool) else _refuse(name, "true or false", value)


def _list(name: str, value: Any) -> list[Any]:
    return value if isinstance(value, list) else _refuse(name, "a list", value)


def _object(name: str, value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else _refuse(name, "an object", value)


def _number(least: float, most: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most
        return float(value) if fits and math.isfinite(value) else _refuse(name, f"from {least} to {most}", value)

    return check


def _count(most: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
        return value if fits else _refuse(name, f"a whole number from 1 to {most}", value)

    return check


def _seed(name: str, value: Any) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool) and -_LARGEST_SEED <= value < _LARGEST_SEED
    return value if fits else _refuse(name, "a whole number of 64 bits", value)


def _stops(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else _list(name, value)
    if len(stops) > 4 or not all(isinstance(each, str) and 0 < len(each) <= 1000 for each in stops):
        _refuse(name, "a text, or up to four, of 1 to 1000 characters", value)
    return tuple(_text(name, each) for each in stops)


def _metadata(name: str, value: Any) -> dict[str, str]:
    found = _object(name, value)
    if len(found) > 16 or not all(isinstance(each, str) and len(each) <= 512 for each in found.values()):
        _refuse(name, "an object of at most 16 texts of at most 512 characters", value)
    return {_text(name, each): _text(name, text) for each, text in found.items()}


# Fields that change no answer, whatever they say.
_IDLE: dict[str, Callable[[str, Any], Any]] = {
    "user": _text, "metadata": _metadata, "store": _flag, "safety_identifier": _text, "prompt_cache_key": _text,
    "prompt_cache_retention": _text, "service_tier": _text, "parallel_tool_calls": _flag, "prediction": _object,
}  # fmt: skip


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")
