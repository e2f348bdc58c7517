"""`transformers serve` and `transformers chat` with a checkpoint that sleeps, as from a shell: they never import us."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import talking
from transformers.utils.import_utils import is_serve_available

from sleepify import SleepForCausalLM

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-c", "from transformers.cli.transformers import main; main()"]
# Written apart, as in test_package: the package itself never says it.
TRUST = "--trust-remote" + "-code"
SAID = "a cab had a bed, who did?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with its tokenizer; greedy by its own settings."""
    return talking.saved_talker(tmp_path_factory.mktemp("cli") / "talker", do_sample=False)


def environment(folder: Path) -> dict[str, str]:
    told = {"HF_MODULES_CACHE": str(folder.parent / "modules"), "OMP_NUM_THREADS": "1"}
    # The chat is a client of the Hub's, which offline would not ask a server on this machine either.
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    return inherited | told | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    """Where the server answers."""
    if not is_serve_available():
        pytest.skip("transformers[serving] is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = folder.parent / "serve.log"
    command = [*COMMAND, "serve", str(folder), "--port", str(port), "--device", "cpu", TRUST]
    with open(log, "w") as output:
        server = subprocess.Popen(command, env=environment(folder), stdout=output, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield f"http://localhost:{port}"
    finally:
        server.kill()
        server.wait()


def expected(folder: Path, n: int) -> str:
    """What the model says by `generate`."""
    model, words = SleepForCausalLM.from_pretrained(folder), talking.tokenizer()
    ids = words.apply_chat_template(
        [{"role": "user", "content": SAID}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    assert ids.shape[1] > 2 * model.config.window_size
    made = model.generate(ids, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :]
    return str(words.decode(made, skip_special_tokens=True))


@pytest.mark.flow("`transformers serve`")
def test_the_server_of_transformers_answers_as_generate_does(folder, address):
    asked = {"model": str(folder), "messages": [{"role": "user", "content": SAID}], "max_tokens": 8, "stream": False}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer = json.load(reply)["choices"][0]["message"]["content"]
    assert answer == expected(folder, 8)


@pytest.mark.flow("`transformers chat`")
def test_the_chat_of_transformers_talks_to_that_server(folder, address):
    command = [*COMMAND, "chat", str(folder), address, "do_sample=False", "max_new_tokens=8"]
    done = subprocess.run(
        command, env=environment(folder), input=f"{SAID}\n!exit\n", capture_output=True, text=True, timeout=400
    )
    shown = done.stdout + done.stderr
    assert expected(folder, 8).strip() in shown, shown
