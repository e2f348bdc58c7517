"""What every test may rely on."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from benchmarks import flows

# The same examples in every run, so that a change is what a failure is due to; `--hypothesis-profile default` draws
# others. Times are no tests.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--flows", type=Path, help="write how the flows of docs/compatibility.md came out to this file")


def pytest_configure(config: pytest.Config) -> None:
    # Shells that start a program in the background have it ignore Ctrl-C, and so all that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests fork programs off, and a fork of a process with OpenMP threads waits for them for ever.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "flow(name): a row of docs/compatibility.md; see benchmarks/flows.py")
    if (path := config.getoption("--flows")) is not None:
        config.pluginmanager.register(flows.Recorder(path.absolute()))


def pytest_collection_finish() -> None:
    # Trainers collect garbage after every run, and each time look at all that torch and transformers are made of.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_deepspeed_left_behind() -> Iterator[None]:
    """transformers keeps the last DeepSpeed configuration in a global, and models built later would heed it."""
    yield
    unset_hf_deepspeed_config()
