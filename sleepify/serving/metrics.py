"""What the server counts, in the text form of Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Mapping

_BOUNDS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """Counters that the model's thread and the server's both write."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens_read = self._tokens_spoken = self._windows = self._pauses = 0
        self._paused = 0.0
        self._within = [0] * len(_BOUNDS)
        self._answers: dict[int, int] = {}

    def read(self, tokens: int) -> None:
        """Tokens of prompts."""
        with self._lock:
            self._tokens_read += tokens

    def spoke(self, tokens: int) -> None:
        """Tokens of answers."""
        with self._lock:
            self._tokens_spoken += tokens

    def slept(self, windows: int, seconds: float) -> None:
        """A sleep on so many windows together, for which others waited so long."""
        with self._lock:
            self._windows += windows
            self._pauses += 1
            self._paused += seconds
            for place, bound in enumerate(_BOUNDS):
                self._within[place] += seconds <= bound

    def answered(self, status: int) -> None:
        """A request."""
        with self._lock:
            self._answers[status] = self._answers.get(status, 0) + 1

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All of it; ``gauges`` are values as they are now, by name, each with what it means."""
        with self._lock:
            lines = [
                *_one("tokens_read_total", "counter", "tokens of prompts that were read", self._tokens_read),
                *_one("tokens_generated_total", "counter", "tokens of answers; its rate is tokens per second",
                      self._tokens_spoken),
                *_one("windows_slept_total", "counter", "windows consolidated", self._windows),
                "# HELP sleepify_pause_seconds how long a step with a sleep kept others waiting",
                "# TYPE sleepify_pause_seconds histogram",
                *(f'sleepify_pause_seconds_bucket{{le="{bound}"}} {count}'
                  for bound, count in zip(_BOUNDS, self._within, strict=True)),
                f'sleepify_pause_seconds_bucket{{le="+Inf"}} {self._pauses}',
                f"sleepify_pause_seconds_sum {self._paused}",
                f"sleepify_pause_seconds_count {self._pauses}",
                "# HELP sleepify_requests_total requests by status",
                "# TYPE sleepify_requests_total counter",
                *(f'sleepify_requests_total{{status="{status}"}} {count}'
                  for status, count in sorted(self._answers.items())),
            ]  # fmt: skip
        for name, (meaning, value) in gauges.items():
            lines += _one(name, "gauge", meaning, value)
        return "\n".join(lines) + "\n"


def _one(name: str, kind: str, meaning: str, value: float) -> list[str]:
    return [f"# HELP sleepify_{name} {meaning}", f"# TYPE sleepify_{name} {kind}", f"sleepify_{name} {value}"]
