"""`sleepify doctor` says which code runs, and what to do where that is slow or fails."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from sleepify import __version__, cli
from sleepify.cli import doctor as command
from sleepify.hosts import FAMILIES
from sleepify.ops import describe, kernels


@pytest.fixture
def on_gpu(monkeypatch):
    """A machine with a GPU but, as here, without kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(command, "installed_version", lambda package: None if package in command.OPTIONAL else "1.0")
    monkeypatch.setattr(kernels, "_load", lambda module, name: (None, f"{module.split('.')[0]} is not installed"))
    monkeypatch.setattr(kernels, "_trial", lambda *sizes: "")


def test_the_command_reports_versions_operations_and_families(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = {words[0]: " ".join(words[1:]) for line in lines if (words := line.split())}
    assert fields["sleepify"] == __version__
    assert fields["torch"] == metadata.version("torch")
    for name, how in describe().items():
        operation, device = name.split(" on ")
        if device == ("cuda" if torch.cuda.is_available() else "cpu"):
            assert fields[operation] == how
    assert fields.keys() >= FAMILIES.keys()
    assert fields["ouro"] == "its own driver, OuroHost"


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = "\n".join(command.doctor())
    assert "everything runs on the CPU" in report
    assert "sleepify[gpu]" not in report, "kernels are of no use here"


def test_on_a_gpu_every_missing_kernel_is_named_with_its_remedy(on_gpu):
    report = "\n".join(command.doctor())
    assert "2 x Some GPU" in report
    for operation in ("gated_delta_rule", "gated_hebbian_rule", "short_conv", "dynamic_conv"):
        assert f'{operation} runs in plain PyTorch: pip install "sleepify[gpu]"' in report


def test_on_a_gpu_a_kernel_built_for_another_torch_is_named(on_gpu, monkeypatch):
    monkeypatch.setattr(
        kernels, "_load", lambda module, name: (None, f"{module}.{name} does not load: undefined symbol")
    )
    assert "short_conv runs in plain PyTorch, its kernel does not load: reinstall it" in "\n".join(command.doctor())


def test_on_a_gpu_with_all_kernels_nothing_is_wrong(on_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "_load", lambda module, name: (print, ""))
    monkeypatch.setattr(kernels, "_backward_fault", lambda: "")
    monkeypatch.setattr(command, "installed_version", lambda package: "1.0")
    assert "nothing slow or broken here" in command.doctor()


def test_kernels_for_gpus_on_a_machine_without_are_a_fault(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "installed_version", lambda package: "1.0")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    assert any("pip uninstall flash-linear-attention" in line for line in command.doctor())


def test_a_family_that_this_transformers_lacks_is_marked(monkeypatch):
    monkeypatch.setitem(command.FAMILIES, "of_tomorrow", command.Host)
    assert ("of_tomorrow", "this transformers does not know it") in command._families()


@pytest.mark.parametrize("arguments", [[], ["cure"]])
def test_unknown_commands_are_refused(arguments):
    with pytest.raises(SystemExit) as refused:
        cli.main(arguments)
    assert refused.value.code == 2
