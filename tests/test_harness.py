"""The real lm-evaluation-harness with a model that sleeps, on a task of one's own (nothing is downloaded)."""

from __future__ import annotations

import pytest
import talking
import torch
from tolerances import FLOAT32, assert_close

from sleepify.training import harness

instances = pytest.importorskip("lm_eval.api.instance", reason="lm-evaluation-harness is not installed")

CONTEXT, ENDS = "a cab had a bed, dad fed a hag. who?", [" dad", " a hag", " the bed"]


@pytest.mark.flow("lm-evaluation-harness")
def test_the_harness_scores_as_the_model_does():
    model, words = talking.talker(dtype=torch.float32), talking.tokenizer()
    lm = harness.register()(model, tokenizer=words, n_loops="2", batch_size=2, device="cpu", add_bos_token=False)
    asked = [instances.Instance("loglikelihood", {}, (CONTEXT, end), place) for place, end in enumerate(ENDS)]
    scores = lm.loglikelihood(asked)
    assert model.config.n_loops == 2
    for end, (score, _) in zip(ENDS, scores, strict=True):
        before, after = lm._encode_pair(CONTEXT, end)
        assert len(before) > 2 * model.config.window_size
        ids = torch.tensor([before + after])
        with torch.no_grad():
            each = model(ids, use_cache=False).logits.log_softmax(-1)[0, len(before) - 1 : -1]
        expected = each.gather(1, torch.tensor(after)[:, None]).sum()
        assert_close(torch.tensor(score), expected, FLOAT32, end)
    request = instances.Instance("generate_until", {}, (CONTEXT, {"until": ["?"], "max_gen_toks": 6}), 0)
    (said,) = lm.generate_until([request])
    assert isinstance(said, str) and "?" not in said
