"""Serve a sleeping model from several replicas by Ray Serve, with sessions that outlive the replica that has them.

    pip install "sleepify[serve]" "ray[serve]"
    python examples/ray_serve.py path/to/model --sessions /shared/sessions --replicas 2

Every replica is the server of `sleepify serve`: OpenAI's endpoints, and those of sessions. All keep their sessions in
one folder. Ray's router brings a request to the replica that holds its session, if the client says which it is in the
header by which Ray multiplexes models, beside the one that the server itself wants:

    headers = {"X-Session-Id": session, "serve_multiplexed_model_id": session}

If that replica is gone, or another is chosen, the session is taken over from the folder and goes on to equal text; so a
request without the second header, or one with ``previous_response_id``, is answered alike, and reads one file more.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import threading
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from transformers import AutoTokenizer

from sleepify import SleepForCausalLM
from sleepify.serving.api import create_app

# Sessions of which the router remembers, per replica, that they are there; the folder has all of them.
REMEMBERED = 1000


@serve.deployment(max_ongoing_requests=1024, health_check_period_s=2, graceful_shutdown_timeout_s=30)
@serve.ingress()
class Replica:
    """One server."""

    def __init__(self, model: str, folder: str, keys: list[str], idle_sleep: float | None) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.server = create_app(
            SleepForCausalLM.from_pretrained(model).to(device),
            AutoTokenizer.from_pretrained(model),
            Path(model).name,
            keys=keys,
            folder=Path(folder),
            idle_sleep=idle_sleep,
            shared=True,
        )
        self.name = f"{platform.node()}:{os.getpid()}"

    @serve.multiplexed(max_num_models_per_replica=REMEMBERED)
    async def hold(self, session_id: str) -> str:
        """Let the router know that the session is here."""
        return session_id

    def __serve_build_asgi_app__(self) -> Any:
        """The server, whose answers name the replica in a header; the session that a request is part of is held."""

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def noted(message: Any) -> None:
                if message["type"] == "http.response.start":
                    headers = dict(message["headers"])
                    if session := headers.get(b"x-session-id"):
                        await self.hold(session.decode())
                    message["headers"] = [*message["headers"], (b"x-replica", self.name.encode())]
                await send(message)

            if scope["type"] == "http" and (session := serve.get_multiplexed_model_id()):
                await self.hold(session)
            await self.server(scope, receive, noted)

        # A function, by which uvicorn knows the kind of application.
        return answer


def main() -> None:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model that sleeps, with its tokenizer; on every machine")
    parser.add_argument("--sessions", required=True, help="folder that all replicas share")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key", action="append", default=[], metavar="KEY", help="may be given several times")
    parser.add_argument("--idle-sleep", type=float, metavar="SECONDS")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica")
    given = parser.parse_args()
    serve.start(http_options={"host": given.host, "port": given.port})
    replica = Replica.options(num_replicas=given.replicas, ray_actor_options={"num_cpus": 1, "num_gpus": given.gpus})
    serve.run(replica.bind(given.model, given.sessions, given.api_key, given.idle_sleep), name="sleepify")
    ended = threading.Event()
    # Ray has set its own by now.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: ended.set())
    print(f"serving {given.model} from {given.replicas} replicas at http://{given.host}:{given.port}/v1", flush=True)
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
