"""`sleepify()` names every setting with its default, so that editors complete them; what was given still counts."""

from __future__ import annotations

import inspect

import pytest
from small import sleeping, tiny_base

from sleepify import SleepConfig, sleepify
from sleepify.retrofit import KEYWORDS


def test_the_signature_is_the_configurations() -> None:
    parameters = inspect.signature(sleepify).parameters
    assert list(parameters)[:2] == ["model", "config"]
    keywords = {name: parameter for name, parameter in parameters.items() if name not in ("model", "config")}
    assert keywords.keys() == KEYWORDS
    unset = SleepConfig()
    for name, parameter in keywords.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == getattr(unset, name), name
        assert type(parameter.default) is type(getattr(unset, name)), name


def test_every_parameter_is_explained() -> None:
    explained = inspect.getdoc(sleepify)
    assert explained is not None
    assert all(f"    {name}: " in explained for name in inspect.signature(sleepify).parameters)


def test_unknown_keywords_are_named_with_those_that_there_are() -> None:
    with pytest.raises(
        TypeError, match=r"unknown keywords \['n_lops'\]; known are \['auto_threshold'.*'window_size'\]"
    ):
        sleepify(tiny_base("qwen3"), n_lops=2)


def test_a_default_that_is_given_counts_as_given(tmp_path) -> None:
    """Beside a config it is refused, and over the settings of saved inserted weights it is taken."""
    with pytest.raises(TypeError, match=r"got both \(config and \['n_loops'\]\)"):
        sleepify(tiny_base("qwen3"), config=SleepConfig(n_loops=6), n_loops=4)
    model = sleeping(n_loops=6, window_size=7)
    model.save_pretrained(tmp_path, fast_weights_only=True)
    for again, n_loops in (
        (sleepify(tiny_base("qwen3"), fast_weights=tmp_path), 6),
        (sleepify(tiny_base("qwen3"), fast_weights=tmp_path, n_loops=4), 4),
        (sleepify(model=tiny_base("qwen3"), fast_weights=str(tmp_path), n_loops=4), 4),
    ):
        assert (again.config.n_loops, again.config.window_size) == (n_loops, 7)
