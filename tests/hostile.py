"""Requests to a server, and those that it must refuse: the status of each, and how it is sent."""

from __future__ import annotations

import json
from typing import Any


def user(text: Any) -> dict[str, Any]:
    """What a user says."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """What was answered."""
    return {"role": "assistant", "content": text}


def body(**keywords: Any) -> dict[str, Any]:
    """A request for a short answer."""
    return {"model": "tiny", "messages": [user("hi")], "temperature": 0, "max_tokens": 4} | keywords


# For a server with bodies of at most 100,000 bytes and conversations of at most 2,000 tokens.
HOSTILE = {
    "no json": (400, {"content": b"{"}),
    "not utf-8": (400, {"content": b'{"model": "\xff"}'}),
    "no object": (400, {"json": [1]}),
    "deep": (400, {"content": b'{"messages":' + b"[" * 40000 + b"]" * 40000 + b"}"}),
    "nan": (400, {"content": json.dumps(body(temperature=float("nan"))).encode()}),
    "long number": (400, {"content": b'{"seed": ' + b"9" * 5000 + b"}"}),
    "large number": (400, {"content": json.dumps(body()).encode()[:-1] + b', "top_p": 1e999}'}),
    "no messages": (400, {"json": body(messages=None)}),
    "empty": (400, {"json": body(messages=[])}),
    "wrong messages": (400, {"json": body(messages="hi")}),
    "wrong role": (400, {"json": body(messages=[{"role": "wizard", "content": "hi"}])}),
    "role list": (400, {"json": body(messages=[{"role": [], "content": "hi"}])}),
    "no content": (400, {"json": body(messages=[{"role": "user"}])}),
    "wrong content": (400, {"json": body(messages=[user(5)])}),
    "image": (400, {"json": body(messages=[user([{"type": "image_url", "image_url": {"url": "x"}}])])}),
    "half a character": (400, {"content": json.dumps(body(messages=[user("\ud800")])).encode()}),
    "half a character as field": (400, {"content": json.dumps(body() | {"\ud800": 1}).encode()}),
    "half a character within": (400, {"content": json.dumps(body(messages=[user("x") | {"\ud800": 1}])).encode()}),
    "negative limit": (400, {"json": body(max_tokens=-1)}),
    "no limit": (400, {"json": body(max_tokens=0)}),
    "large limit": (400, {"json": body(max_tokens=10**12)}),
    "limit of text": (400, {"json": body(max_tokens="4")}),
    "limit of truth": (400, {"json": body(max_tokens=True)}),
    "temperature": (400, {"json": body(temperature=-0.1)}),
    "hot": (400, {"json": body(temperature=1e9)}),
    "top_p": (400, {"json": body(top_p=1.5)}),
    "seed": (400, {"json": body(seed=2**70)}),
    "stops": (400, {"json": body(stop=["a"] * 5)}),
    "empty stop": (400, {"json": body(stop="")}),
    "stream": (400, {"json": body(stream="yes")}),
    "several": (400, {"json": body(n=3)}),
    "tools": (400, {"json": body(tools=[{"type": "function"}])}),
    "probabilities": (400, {"json": body(logprobs=True)}),
    "short": (400, {"json": body(verbosity="low")}),
    "user": (400, {"json": body(user=5)}),
    "usage of no stream": (400, {"json": body(stream_options={"include_usage": True})}),
    "unknown field": (400, {"json": body(surprise=1)}),
    "other model": (404, {"json": body(model="gpt")}),
    "no model": (400, {"json": body(model=None)}),
    "long prompt": (400, {"json": body(messages=[user("a" * 5000)])}),
    "huge": (413, {"content": b"a" * 200_000}),
    "other type": (415, {"content": b"a=1", "headers": {"Content-Type": "application/x-www-form-urlencoded"}}),
    "unknown session": (404, {"json": body(), "headers": {"X-Session-Id": "sess_x"}}),
    "empty session": (404, {"json": body(), "headers": {"X-Session-Id": ""}}),
    "path as session": (404, {"json": body(), "headers": {"X-Session-Id": "../../etc/passwd"}}),
    "wrong key": (401, {"json": body(), "key": "eve"}),
    "no path": (404, {"json": body(), "path": "/v1/nothing"}),
    "input": (400, {"json": {"model": "tiny", "input": 5}, "path": "/v1/responses"}),
    "no input": (400, {"json": {"model": "tiny"}, "path": "/v1/responses"}),
    "item": (400, {"json": {"model": "tiny", "input": [{"type": "image"}]}, "path": "/v1/responses"}),
    "before": (400, {"json": {"model": "tiny", "input": "x", "previous_response_id": 5}, "path": "/v1/responses"}),
    "unknown before": (
        404,
        {"json": {"model": "tiny", "input": "x", "previous_response_id": "resp_x"}, "path": "/v1/responses"},
    ),
}
