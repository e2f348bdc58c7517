"""What must hold on every device: here on the CPU, with ``-m gpu`` (`make test-gpu`) the same on a CUDA device.

What is exact is compared with the CPU in float64, where the contract is tested; what is not, with the same device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from families import VOCAB, tiny_base, tokens, true_float64
from small import sleeping
from test_ops import NAMES, make_inputs, run_with_grads
from tolerances import DEVICE32, FLASH16, HALF_IN_NORM, ROUNDING32, SINGLE_IN_NORM, assert_close
from transformers.utils.import_utils import is_flash_attn_2_available

from benchmarks.models import attending
from sleepify import FastWeightConfig, SleepCache, SleepForCausalLM, ops, sleepify

ON = {"cpu": pytest.param("cpu"), "cuda": pytest.param("cuda", marks=pytest.mark.gpu)}
on_devices = pytest.mark.parametrize("device", ON.values())
EVICTIONS = ("hard", "sliding")


@pytest.fixture(autouse=True)
def no_tf32() -> Iterator[None]:
    """A float32 product is one on every device."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def pair(device: str, **keywords: object) -> tuple[SleepForCausalLM, SleepForCausalLM]:
    """The same model in float64 on the CPU and in float32 on a device."""
    exact = sleeping(**keywords)
    return exact, copy.deepcopy(exact).float().to(device)


# --- operations in half precision, against the float64 reference token by token, with state and every gradient --------


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_tokens, key_dim, value_dim", [(1, 8, 6), (63, 8, 6), (64, 64, 32), (130, 32, 80)])
@pytest.mark.parametrize("rule", ["delta", "hebbian"])
def test_a_rule(device: str, dtype: torch.dtype, rule: str, n_tokens: int, key_dim: int, value_dim: int) -> None:
    inputs = make_inputs(0, n_tokens, key_dim=key_dim, value_dim=value_dim, dtype=torch.float32)
    inputs[:3] = [x.to(dtype) for x in inputs[:3]]
    inputs[4] = inputs[4].to(dtype)
    exact = run_with_grads(getattr(ops, f"gated_{rule}_reference"), [x.double() for x in inputs], scale=0.3)
    ours = run_with_grads(getattr(ops, f"gated_{rule}_rule"), [x.to(device) for x in inputs], scale=0.3)
    limit = HALF_IN_NORM if dtype == torch.bfloat16 else SINGLE_IN_NORM
    for name, mine, theirs in zip(("o", "state", *NAMES), [*ours[:2], *ours[2]], [*exact[:2], *exact[2]], strict=True):
        error = (mine.double().cpu() - theirs).norm() / theirs.norm()
        assert error < limit, f"{name}: {error:.1e}"
    assert ours[1].dtype == torch.float32  # the state, whatever the inputs


@on_devices
@pytest.mark.parametrize("n_tokens, ragged", [(1, False), (3, False), (70, False), (70, True)])
@pytest.mark.parametrize("kind", ["short", "dynamic"])
def test_a_convolution(device: str, kind: str, n_tokens: int, ragged: bool) -> None:
    generator = torch.Generator().manual_seed(n_tokens)
    shapes = [(3, n_tokens, 16, 4)] if kind == "dynamic" else [(16, 4), (16,)]
    inputs = [torch.randn(*shape, generator=generator) for shape in ((3, n_tokens, 16), *shapes, (3, 16, 4))]
    inputs = [x.bfloat16() for x in inputs]
    lengths = torch.tensor([n_tokens, n_tokens // 2, 0]) if ragged else None

    def on(device: str) -> dict[str, torch.Tensor | None]:
        return {"lengths": None if lengths is None else lengths.to(device)}

    exact = run_with_grads(getattr(ops, f"{kind}_conv_reference"), [x.double() for x in inputs], **on("cpu"))
    ours = run_with_grads(getattr(ops, f"{kind}_conv"), [x.to(device) for x in inputs], **on(device))
    for mine, theirs in zip([*ours[:2], *ours[2]], [*exact[:2], *exact[2]], strict=True):
        assert (mine.double().cpu() - theirs).norm() < HALF_IN_NORM * theirs.norm()


# --- the contract, points 1 to 6, in float32 --------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("rule", ["gdn", "jet", "mamba2"])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_01_03_logits_loss_state_and_gradients_are_those_of_float64(device: str, eviction: str, rule: str) -> None:
    given = {"eviction": eviction, "fast_weights": FastWeightConfig(rule=rule, layers=[0, 2]), "loop_range": (1, 3)}
    exact, ours = pair(device, **given)
    ids = tokens(2, 17)
    labels = torch.where(torch.arange(17) % 4 == 3, ids, -100)
    with true_float64():
        expected = exact(ids, labels=labels, logits_to_keep=0, use_cache=True)
        expected.loss.backward()
    actual = ours(ids.to(device), labels=labels.to(device), logits_to_keep=0, use_cache=True)
    actual.loss.backward()
    assert_close(actual.logits.cpu().double(), expected.logits, DEVICE32, "logits")
    assert_close(actual.loss.cpu().double(), expected.loss, DEVICE32, "loss")
    for key, layer in expected.past_key_values.at_start.items():
        for mine, theirs in zip(actual.past_key_values.at_start[key], layer, strict=True):
            assert_close(mine.cpu().double(), theirs, DEVICE32, f"state {key}")
    for (name, theirs), mine in zip(exact.named_parameters(), ours.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            error = (mine.grad.cpu().double() - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-6)
            assert error < SINGLE_IN_NORM, f"gradient of {name}: {error:.1e}"


@on_devices
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_02_the_same_text_gives_the_same_state_however_it_arrives(device: str, eviction: str) -> None:
    _, model = pair(device, eviction=eviction)
    ids = tokens(2, 17).to(device)
    whole, pieces, single = model(ids), SleepCache(), SleepCache()
    parts = [model(ids[:, a:b], past_key_values=pieces).logits for a, b in ((0, 3), (3, 11), (11, 17))]
    steps = [model(ids[:, t : t + 1], past_key_values=single).logits for t in range(17)]
    for name, logits, cache in (("pieces", parts, pieces), ("tokens", steps, single)):
        assert_close(torch.cat(logits, 1), whole.logits, DEVICE32, name)
        for key, layer in whole.past_key_values.at_start.items():
            for mine, theirs in zip(cache.at_start[key], layer, strict=True):
                assert_close(mine, theirs, DEVICE32, f"{name}: state {key}")


@on_devices
@pytest.mark.parametrize("family", ["qwen3", "ouro", "jet_nemotron"])
def test_04_without_eviction_it_is_the_base(device: str, family: str) -> None:
    base = tiny_base(family, torch.float32).to(device)
    ids = tokens(2, 12).to(device)
    if family == "ouro":
        base.config.total_ut_steps = 1
    expected = base(ids, use_cache=False).logits
    model = sleepify(base, n_loops=1, window_size=16)
    assert_close(model(ids).logits, expected, DEVICE32, family)


@on_devices
def test_05_06_what_crosses_a_boundary(device: str) -> None:
    """Hard eviction without fast weights forgets everything; sliding eviction reaches L - 1 tokens back, no further."""
    base = tiny_base("qwen3", torch.float32, num_hidden_layers=1).to(device)
    for eviction, expected in (("hard", [9, 10, 11]), ("sliding", [9, 10, 11, 12])):
        model = sleepify(copy.deepcopy(base), eviction=eviction, n_loops=1, window_size=4)
        one = tokens(1, 14, seed=1)
        other = one.clone()
        other[:, 9] = (other[:, 9] + 1) % VOCAB
        change = (model(one.to(device)).logits - model(other.to(device)).logits).abs().amax(-1)[0]
        # What does not see the token may be rounded apart, where a product's order depends on its neighbours.
        assert (change > 10 * ROUNDING32 * VOCAB).nonzero().flatten().tolist() == expected


@on_devices
def test_08_a_ragged_batch_is_its_rows(device: str) -> None:
    _, model = pair(device)
    ids, lengths = tokens(3, 17), (17, 9, 4)
    mask = torch.arange(17)[None, :] >= 17 - torch.tensor(lengths)[:, None]
    together = model(ids.to(device), attention_mask=mask.to(device)).logits
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 17 - length :].to(device)).logits[0]
        assert_close(together[row, 17 - length :], alone, DEVICE32, f"row {row}")


# --- attention --------------------------------------------------------------------------------------------------------

# Flash attention in half precision on CUDA where it is installed; eager attention in any case.
ATTENTION = [("cpu", "eager", torch.float32), ("cuda", "eager", torch.float32)]
if is_flash_attn_2_available():
    ATTENTION.append(("cuda", "flash_attention_2", torch.bfloat16))


@pytest.mark.parametrize(
    "device, implementation, dtype",
    [pytest.param(*case, marks=[pytest.mark.gpu] if case[0] == "cuda" else []) for case in ATTENTION],
)
@pytest.mark.parametrize("eviction", EVICTIONS)
@pytest.mark.parametrize("ragged", [False, True])
def test_attention_is_sdpa(device: str, implementation: str, dtype: torch.dtype, eviction: str, ragged: bool) -> None:
    model = sleeping(eviction=eviction).to(device, dtype)
    ids = tokens(2, 17).to(device)
    labels = torch.where(torch.arange(17, device=device) % 4 == 3, ids, -100)
    mask = torch.ones_like(ids)
    if ragged:
        mask[1, :6] = 0
        labels[1, :7] = -100
    results = []
    for attention in ("sdpa", implementation):
        model.zero_grad()
        with attending(model, attention, model.config.window_size):
            out = model(ids, attention_mask=mask, labels=labels, logits_to_keep=0)
            out.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((out.logits[mask.bool()].detach(), grads))
    tolerance = FLASH16 if dtype == torch.bfloat16 else DEVICE32
    assert_close(results[1][0], results[0][0], tolerance, "logits")
    norms = [torch.stack([grad.float().norm() for grad in grads]) for _, grads in results]
    assert_close(norms[1], norms[0], tolerance, "norms of gradients")


# --- training, compiling, saving --------------------------------------------------------------------------------------


@on_devices
def test_dropout_is_the_same_whatever_is_recomputed(device: str) -> None:
    base = tiny_base("qwen3", torch.float32, attention_dropout=0.4)
    model = sleeping(base).to(device).train()
    ids = tokens(2, 17).to(device)
    # Only the last window is read awake: where a wake pass is shared with a sleep, fewer numbers are drawn.
    labels = torch.where(torch.arange(17, device=device) >= 16, ids, -100)
    results = {}
    for level in ("none", "selective", "loop", "window"):
        model.config.checkpoint = level
        (model.gradient_checkpointing_disable if level == "none" else model.gradient_checkpointing_enable)()
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(ids, labels=labels).loss
        loss.backward()
        results[level] = [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    torch.manual_seed(1)
    assert abs(model(ids, labels=labels).loss - results["none"][0]) > 1e-4  # there is dropout
    for level in ("selective", "loop", "window"):
        for mine, theirs in zip(results[level], results["none"], strict=True):
            assert_close(mine, theirs, DEVICE32, level)


# Not "aot_eager" on a CPU: torch 2.13 traces the gradient of softplus with other strides than it then has, and stops
# where it makes a view of it. Inductor makes that gradient itself (docs/results/compiled.md), in minutes on a CPU.
GRAPHS = [("cpu", {"backend": "eager"}, None), ("cuda", {}, None)]
GRAPHS.append(("cuda", {"mode": "reduce-overhead"}, "static"))


@pytest.mark.parametrize(
    "device, compiling, cache",
    [pytest.param(*case, marks=pytest.mark.gpu if case[0] == "cuda" else pytest.mark.slow) for case in GRAPHS],
)
def test_compiled_captured_and_eager_agree(device: str, compiling: dict[str, str], cache: str | None) -> None:
    _, model = pair(device)
    twin, ids = copy.deepcopy(model), tokens(2, 12).to(device)
    torch._dynamo.reset()
    twin.compile(**compiling)
    arguments = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "output_scores": True}
    arguments |= {"return_dict_in_generate": True, "cache_implementation": cache}
    made = [each.eval().generate(ids, **arguments) for each in (model, twin)]
    assert torch.equal(made[0].sequences, made[1].sequences)
    for mine, theirs in zip(made[1].scores, made[0].scores, strict=True):
        assert_close(mine, theirs, DEVICE32, "scores")
    for each in (model, twin):
        each.train()(ids, labels=ids).loss.backward()
    for (name, theirs), mine in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            assert_close(mine.grad, theirs.grad, DEVICE32, name)
    torch._dynamo.reset()


@on_devices
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_no_sync_inside_of_a_pass(device: str, eviction: str) -> None:
    """A prompt of several windows, sleeps included, without the host waiting once (on the CPU there is nobody to wait
    for; tests/test_counts.py looks for the same on fake CUDA tensors)."""
    _, model = pair(device, eviction=eviction)
    model.eval()
    ids = tokens(2, 17).to(device)
    model(ids, use_cache=True)  # kernels are tried out before their first use
    watching = device == "cuda"
    try:
        if watching:
            torch.cuda.set_sync_debug_mode("error")
        with torch.no_grad():
            out = model(ids, logits_to_keep=1, use_cache=True)
            model.sleep(out.past_key_values)
    finally:
        if watching:
            torch.cuda.set_sync_debug_mode("default")
    assert out.past_key_values.windows == [4, 4]


@on_devices
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_sleep_in_the_background_is_one_in_front(device: str, eviction: str) -> None:
    """On CUDA on a stream of its own, while the session is read on on the first: several times over, since what two
    streams do wrong they do now and then."""
    _, model = pair(device, eviction=eviction)
    model.eval()
    ids = tokens(2, 36).to(device)

    def run(background: bool) -> tuple[torch.Tensor, SleepCache]:
        cache, logits = SleepCache(), []
        for begin in range(0, 36, 6):
            logits.append(model(ids[:, begin : begin + 4], past_key_values=cache, logits_to_keep=1).logits)
            model.sleep(cache, background=background)
            # What is freed here must not be given away while the other stream reads it.
            model(ids[:, begin + 4 : begin + 6], past_key_values=cache, logits_to_keep=1)
            cache.wait()
        return torch.cat(logits, 1), cache

    with torch.no_grad():
        (expected, front), (actual, behind) = run(False), run(True)
    assert_close(actual, expected, DEVICE32, "logits")
    assert behind.windows == front.windows and min(front.windows) >= 6
    for key, layer in front.at_start.items():
        for mine, theirs in zip(behind.at_start[key], layer, strict=True):
            assert_close(mine, theirs, DEVICE32, f"state {key}")


@on_devices
def test_models_and_sessions_move_between_devices(device: str, tmp_path) -> None:
    _, there = pair(device)
    ids = tokens(2, 13)
    cache = there(ids[:, :9].to(device), use_cache=True).past_key_values
    there.save_pretrained(tmp_path / "model")
    cache.save(tmp_path / "session.safetensors")
    here = SleepForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    again = SleepForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).to(device)
    for name, parameter in there.named_parameters():
        assert torch.equal(parameter.cpu(), here.get_parameter(name)), name
    expected = there(ids[:, 9:].to(device), past_key_values=cache).logits.cpu()
    for where, model in (("cpu", here), (device, again)):
        session = SleepCache.load(tmp_path / "session.safetensors")
        logits = model(ids[:, 9:].to(where), past_key_values=session.to(where)).logits
        assert_close(logits.cpu(), expected, DEVICE32, f"on {where}")
