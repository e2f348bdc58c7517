"""lm-evaluation-harness with sleeping models: ``--model sleepify``.

    python -m sleepify.training.harness run --model sleepify --tasks hellaswag \\
        --model_args pretrained=outputs/ouro,n_loops=4,window_size=512

The harness knows models by name from its own list only, so `main` puts this one on it and hands over to its command
line; a program that calls ``lm_eval.simple_evaluate`` calls `register` first. The model is the harness's own ``hf``
with sleep's settings; all else (dtype, batch_size, tokenizer, max_length ...) is as there.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

from sleepify.config import SleepConfig
from sleepify.defaults import resolve

NAME = "sleepify"
SETTINGS = ("n_loops", "window_size", "eviction")


def register() -> type:
    """Put the model on the harness's list, under the name ``sleepify``. Twice does no harm.

    Returns:
        The class.

    Raises:
        ImportError: without lm-eval, which the extra ``eval`` brings.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("expected lm-evaluation-harness, found none: pip install 'sleepify[eval]'")
    return _register()


@lru_cache(maxsize=1)
def _register() -> type:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    class SleepLM(HFLM):
        """The harness's model of transformers; ``n_loops``, ``window_size`` and ``eviction`` may differ from the
        checkpoint's. Every text starts without a state."""

        def __init__(self, pretrained: Any, **options: Any) -> None:
            settings = {name: options.pop(name) for name in SETTINGS if name in options}
            super().__init__(pretrained=pretrained, **options)
            configure(self.model.config, settings)

    return register_model(NAME)(SleepLM)


def configure(config: Any, settings: dict[str, Any]) -> None:
    """Change how a model sleeps.

    Args:
        config: of the model, changed in place.
        settings: some of `SETTINGS`; numbers may be text, as they are on a command line.

    Raises:
        ValueError: for a model that does not sleep, or a value that it cannot have.
    """
    if not isinstance(config, SleepConfig):
        raise ValueError(
            f"expected a checkpoint of a sleeping model, got one of {config.model_type}; "
            "save the result of sleepify(base), or use the harness's --model hf"
        )
    for name, value in settings.items():
        setattr(config, name, int(value) if isinstance(value, str) and value.isdecimal() else value)
    config.validate_sleep()
    resolve(config)


def main() -> None:
    """The harness's command line, with this model."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
