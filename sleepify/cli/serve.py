"""``sleepify serve MODEL``: a server in OpenAI's form whose sessions sleep."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from sleepify.devices import device_of
from sleepify.modeling import SleepForCausalLM
from sleepify.serving.engine import Limits
from sleepify.training.evaluate_checkpoint import check_sleeps

_NEEDED = ("fastapi", "uvicorn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. argparse raises SystemExit for arguments that it does not know."""
    given = _parser().parse_args(arguments)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        print(f'expected {" and ".join(missing)} to be installed: pip install "sleepify[serve]"')
        return 2
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        app = _app(given)
    except (ValueError, OSError) as error:
        print(f"sleepify serve: {error}", file=sys.stderr)
        return 2
    if not given.api_key:
        print("no --api-key: whoever can reach this server shares all its sessions", flush=True)
    config = uvicorn.Config(
        app, host=given.host, port=given.port, log_level="warning", timeout_graceful_shutdown=int(given.max_seconds) + 1
    )
    # uvicorn raises the signal anew when it has finished what was under way; by then all is done, and the code is 0.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    socket = config.bind_socket()
    host, port = socket.getsockname()[:2]
    print(f"serving {given.model} at http://{host}:{port}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[socket])
    return 0


def _app(given: argparse.Namespace) -> Any:
    """The application, with its model.

    Raises:
        ValueError, OSError: for a model that is not there, does not sleep, or has no chat template.
    """
    from sleepify.serving.api import create_app

    check_sleeps(given.model)
    device = device_of(given.device)
    model = SleepForCausalLM.from_pretrained(given.model).to(device)
    limits = Limits(given.max_body, given.max_prompt, given.max_tokens, given.max_seconds, given.max_waiting,
                    given.max_sessions, given.session_bytes)  # fmt: skip
    return create_app(
        model,
        AutoTokenizer.from_pretrained(given.model),
        # Also of "."; a name of the Hub keeps its last part.
        given.name or os.path.basename(os.path.abspath(given.model)),
        keys=given.api_key,
        folder=given.sessions,
        idle_sleep=given.idle_sleep,
        limits=limits,
    )


def _parser() -> argparse.ArgumentParser:
    limits = Limits()
    parser = argparse.ArgumentParser(prog="sleepify serve", description="Serve a model that sleeps, in OpenAI's form.")
    parser.add_argument("model", help="folder or name of a model that sleeps, with its tokenizer")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--name", help="the model's name for clients; by default the last part of MODEL")
    parser.add_argument("--device", help="by default an accelerator if there is one")
    parser.add_argument("--api-key", action="append", default=[], metavar="KEY", help="may be given several times")
    parser.add_argument("--sessions", type=Path, metavar="DIR", help="keep sessions here, also past a restart")
    parser.add_argument("--session-bytes", type=_positive(int), default=limits.bytes, metavar="N",
                        help="of sessions in memory; idle ones leave it")  # fmt: skip
    parser.add_argument("--idle-sleep", type=_positive(float), metavar="SECONDS",
                        help="sessions that were idle for so long sleep; off by default")  # fmt: skip
    for name, default, meaning in (
        ("body", limits.body, "bytes of a request"),
        ("prompt", limits.prompt, "tokens of a conversation"),
        ("tokens", limits.tokens, "tokens of an answer"),
        ("seconds", limits.seconds, "seconds of a request"),
        ("waiting", limits.waiting, "requests at the same time"),
        ("sessions", limits.sessions, "sessions of one key"),
    ):
        parser.add_argument(f"--max-{name}", type=_positive(type(default)), default=default, metavar="N",
                            help=f"{meaning} (default %(default)s)")  # fmt: skip
    return parser


def _positive(kind: type) -> Callable[[str], float]:
    def positive(text: str) -> float:
        value: float = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    return positive
