"""The ways in that users take, each with the tests that walk it, and the record that a test run makes of them.

A test says ``@pytest.mark.flow("packed rows")``; with ``pytest --flows FILE`` the run leaves in FILE how each flow came
out, with the versions that it came out with. `benchmarks.compatibility` makes docs/compatibility.md of such files.
"""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "bitsandbytes", "torchao", "lm_eval")


class Flow(NamedTuple):
    """One row of the page.

    Attributes:
        subject: under which heading it stands.
        shown: what the tests see.
        refused: for what does not go: what the message says. Then a test that passes has seen the message.
    """

    subject: str
    shown: str
    refused: str | None = None


FLOWS = {
    "keywords that mean nothing new": Flow("transformers", "`position_ids`, `cache_position` ...: taken"),
    "keywords that mean something else": Flow("transformers", "", "named, with what was expected"),
    "stop strings, `pipeline`": Flow("transformers", "ends where the string does"),
    "packed rows": Flow("transformers", "equal to the texts alone, values and gradients"),
    "packed rows with a session": Flow("transformers", "", "one text per row; `use_cache=False`"),
    "`model.base_model`": Flow("transformers", "final norm applied, awake; with the session"),
    "`Trainer`: metrics, `predict`": Flow("transformers", "logits [rows, T, V] beside the labels, ours and plain"),
    "reward models, `num_labels=1`": Flow("transformers", "", "no head that scores texts; train it from the base"),
    "`trust_remote_code`": Flow("transformers", "loads in a process that never imports sleepify"),
    "without sleepify installed": Flow("transformers", "", "`pip install sleepify`"),
    "`import sleepify`, Auto classes": Flow("transformers", "loads, saves and loads again, nothing copied"),
    "`transformers serve`": Flow("transformers", "a chat answered over HTTP, as `generate` answers it"),
    "`transformers chat`": Flow("transformers", "a turn in the terminal, against that server"),
    "`lora_config(model)`": Flow("PEFT", "the base adapted, inserted layers whole"),
    "bare `LoraConfig`": Flow("PEFT", "the same targets filled in"),
    "targets without the inserted layers": Flow("PEFT", "warned of, with the line to write"),
    "saved, loaded onto a fresh base": Flow("PEFT", "`PeftModel.from_pretrained`, `load_adapter`: the same logits"),
    "saved, loaded onto other inserted layers": Flow("PEFT", "", "which rule or place it was trained with"),
    "an adapter without inserted weights": Flow("PEFT", "", "what is missing, and `sleepify.lora_config(model)`"),
    "`add_adapter`, `save_pretrained`": Flow("PEFT", "whole or not there, also on a full disk"),
    "`AutoPeftModelForCausalLM`": Flow("PEFT", "finds the sleeping checkpoint"),
    "LoRA, `merge_and_unload`": Flow("PEFT", "the same logits, saved and loaded"),
    "DoRA, `merge_and_unload`": Flow("PEFT", "the same logits"),
    "several adapters": Flow("PEFT", "in turn"),
    "bitsandbytes, 8 bits": Flow("PEFT", "learns, is saved, is loaded; CPU"),
    "bitsandbytes, 4 bits": Flow("PEFT", "learns, is saved, is loaded; CPU"),
    "torchao, int8": Flow("PEFT", "learns, is saved, is loaded; CPU"),
    "SFT: every dataset format": Flow("TRL", "loss equal to ours, packed and not, whole and by `peft_config`"),
    "SFT: packing": Flow("TRL", "the loss of the rows alone"),
    "SFT: bases that scale logits": Flow("TRL", "loss equal to ours (Gemma, Granite, Falcon-H1, Cohere)"),
    "SFT: quantized base": Flow("TRL", "warned of what TRL casts to bfloat16, with the line to write"),
    "SFT: mixture of experts": Flow("TRL", "", "`router_aux_loss_coef=0.0`"),
    "SFT: model by name, bf16": Flow("TRL", "trains"),
    "SFT: rows without a label": Flow("TRL", "cost nothing, also where the whole batch has none"),
    "SFT: `torch_compile`": Flow("TRL", "the losses of the model as it is"),
    "SFT: `compute_metrics`": Flow("TRL", "with `loss_type='nll'` and `model.logits_in_training = True`"),
    "SFT: facts from `messages`": Flow("TRL", "README lines and `peft_config`: learned, saved, loaded, asked"),
    "DPO": Flow("TRL", "by name, with `ref_model` or `peft_config`; log-probabilities are the model's"),
    "KTO": Flow("TRL", "with `ref_model`"),
    "GRPO": Flow("TRL", "generates and scores as the model does"),
    "RLOO": Flow("TRL", "generates and scores as the model does"),
    "reward modelling": Flow("TRL", "", "no head that scores texts; train it from the base"),
    "`SleepTrainer`: DDP, FSDP2, ZeRO": Flow("several processes", "two processes: the losses of one, resumed too"),
    "DDP with another trainer": Flow("several processes", "two processes: the losses of one"),
    "FSDP2, ZeRO-3 with another trainer": Flow("several processes", "", "`SleepTrainer`, or DDP, ZeRO-1, ZeRO-2"),
    "lm-evaluation-harness": Flow("transformers", "scores as the model does, at another N"),
}  # fmt: skip


class Recorder:
    """Writes down how each flow came out.

    Args:
        path: the file, written at the end of the run. Flows that are in it and were not walked now stay, if the
            versions are the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Any:
        report = yield
        if report.when == "call" or report.outcome != "passed":
            for name in flows_of(item):
                self.outcomes[name][report.outcome] += 1
        return report

    def pytest_sessionfinish(self) -> None:
        versions = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                versions[package] = version(package).partition("+")[0]
            except PackageNotFoundError:
                continue
        tried = {name: counts for name, counts in self.outcomes.items() if counts["passed"] or counts["failed"]}
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
        if known.get("versions") == versions:
            tried = known["flows"] | tried
        record = {"versions": versions, "flows": {name: tried[name] for name in FLOWS if name in tried}}
        draft = self.path.with_name(f".{self.path.name}.draft")
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.path)


def flows_of(item: pytest.Item) -> list[str]:
    """The flows that a test walks.

    Raises:
        KeyError: for one that is not in the table.
    """
    names = [name for mark in item.iter_markers("flow") for name in mark.args]
    for name in names:
        if name not in FLOWS:
            raise KeyError(f"{item.nodeid}: no flow is called {name!r}; see benchmarks/flows.py")
    return names
