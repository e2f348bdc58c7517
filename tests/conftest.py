"""What every test may rely on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@pytest.fixture(autouse=True)
def no_deepspeed_left_behind() -> Iterator[None]:
    """transformers keeps the last DeepSpeed configuration in a global, and models built later would heed it."""
    yield
    unset_hf_deepspeed_config()
