"""Logits stand at the columns that were asked for, also where little is asked."""

from __future__ import annotations

import torch
from families import tokens
from small import sleeping

from sleepify import SleepCache


def test_padding_has_no_logits_where_another_column_is_wanted_for_its_label():
    model, session = sleeping("qwen3"), SleepCache()
    model(tokens(1, 2), past_key_values=session)
    ids, mask = tokens(1, 3), torch.tensor([[0, 1, 1]])
    chosen = {"logits_to_keep": torch.tensor([True, False, False]), "past_key_values": session}
    out = model(ids, attention_mask=mask, labels=ids, **chosen)
    assert out.logits.shape[1] == 1 and not out.logits.any() and out.loss > 0
