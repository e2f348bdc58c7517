"""A tiny model that can be served, with its tokenizer, and the server in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from families import tiny_base
from small import sleeping
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sleepify import SleepCache, SleepForCausalLM

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
WINDOW = 16


def tokenizer(window: int = WINDOW) -> PreTrainedTokenizerFast:
    """One token per character of a small alphabet, so that what is written is read as it was written."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"()-+*/=<>[]{}_#"
    vocabulary = {each: place for place, each in enumerate([*SPECIAL, *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    made.chat_template = TEMPLATE
    return made


def tiny(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[SleepForCausalLM, Any]:
    """The model and its tokenizer, saved as `sleepify serve` loads them."""
    torch.manual_seed(7)
    tokens = tokenizer()
    base = tiny_base("qwen3", dtype, vocab_size=len(tokens), num_hidden_layers=2)
    # Larger scores: answers that differ, and no near ties.
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(3)
        base.get_output_embeddings().weight.mul_(30)
    model = sleeping(base, n_loops=2, window_size=WINDOW, fast_weights=None).eval()
    model.generation_config.eos_token_id = tokens.convert_tokens_to_ids("<|end|>")
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return model, tokens


def alone(model: SleepForCausalLM, tokens: Any, messages: Sequence[dict[str, str]], limit: int) -> str:
    """What `generate` says to a whole conversation by itself."""
    ids = tokens.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        made = model.generate(ids, max_new_tokens=limit, do_sample=False, past_key_values=SleepCache())
    return tokens.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


class Served:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen, address: str) -> None:
        self.process, self.address = process, address

    @property
    def base_url(self) -> str:
        """As OpenAI's client wants it."""
        return f"{self.address}/v1"

    def memory(self) -> int:
        """Bytes that the process has in memory."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def metrics(self) -> dict[str, float]:
        """What it counts."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def end(self, how: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(how)
        return self.process.wait(120)


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Served]:
    """``sleepify serve`` in a process of its own, on a port that is free."""
    code = "import sys; from sleepify.cli.serve import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder), "--port", "0", "--device", "cpu", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving "):
                break
        else:
            raise AssertionError(f"the server ended with {process.wait()}")
        served = Served(process, line.split(" at ")[1].strip().removesuffix("/v1"))
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{served.address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
