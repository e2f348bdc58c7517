"""What Muon makes of its rate for a matrix's shape is chosen, not fixed."""

from __future__ import annotations

import pytest
import torch

from sleepify.training.arguments import SleepTrainingArguments
from sleepify.training.optim import build_optimizer


def moved(tmp_path, **chosen):
    """How far one step moves a matrix [8, 32] whose gradient is orthogonal rows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 8, bias=False), torch.nn.Linear(8, 1))
    args = SleepTrainingArguments(output_dir=str(tmp_path), weight_decay=0.0, muon_learning_rate=0.5, **chosen)
    optimizer, before = build_optimizer(model, args), model[0].weight.detach().clone()
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    return model[0].weight.detach() - before


def test_muon_is_told_how_to_scale_by_shape(tmp_path):
    original, matched = moved(tmp_path), moved(tmp_path, muon_adjust_lr="match_rms_adamw")
    # [8, 32]: sqrt(max(1, 8 / 32)) = 1, and 0.2 sqrt(32).
    torch.testing.assert_close(matched, original * 0.2 * 32**0.5)


def test_another_word_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected muon_adjust_lr to be one of original, match_rms_adamw, got 'rms'"):
        SleepTrainingArguments(output_dir=str(tmp_path), muon_adjust_lr="rms")
