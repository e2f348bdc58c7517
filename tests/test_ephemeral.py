"""Tokens that are read awake and never consolidated: after the next sleep the session is the one that never read them.

Bit for bit in float64, where the same text is read in the same pieces; by value where pieces differ.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import talking
import torch
from families import ATTENTION, FAMILIES, VOCAB, tokens, true_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from small import sleeping
from tolerances import EXACT, EXACT_GRAD, GROWN, assert_close

from sleepify import Session, SleepCache
from sleepify.files import read_tensors
from sleepify.memory import Memory
from sleepify.schedule import schedule

# No other token of these tests has it.
SECRET = 91
IGNORE = -100


@pytest.fixture(autouse=True, scope="module")
def exactly():
    # Where norms of transformers round to float32, a last bit decides which way, once in thousands of rows: 1e-7.
    with true_float64():
        yield


@pytest.fixture(scope="module", params=["hard", "sliding"])
def model(request):
    return sleeping(eviction=request.param, window_size=4, n_loops=2)


def ids_of(text) -> torch.Tensor:
    return torch.tensor([text])


@torch.no_grad()
def read(model, cache, text, flags, pieces, skip=False):
    """Logits of a row that is read piece by piece; with ``skip``, as one that never reads what is flagged."""
    logits = []
    for begin, end in zip([0, *pieces], [*pieces, len(text)], strict=True):
        piece = [
            (id_, flag) for id_, flag in zip(text[begin:end], flags[begin:end], strict=True) if not (skip and flag)
        ]
        if piece:
            ids, own = (torch.tensor([each]) for each in zip(*piece, strict=True))
            keywords = {} if skip else {"ephemeral": own}
            logits.append(model(ids, past_key_values=cache, **keywords).logits[0])
    return torch.cat(logits) if logits else torch.zeros(0, VOCAB, dtype=torch.float64)


def assert_same(mine: SleepCache, theirs: SleepCache, but=()) -> None:
    """Two sessions are equal in everything, bit for bit."""
    assert (mine.now is None) == (theirs.now is None)
    if mine.now is None or theirs.now is None:
        return
    for field in fields(mine.now):
        left, right = getattr(mine.now, field.name), getattr(theirs.now, field.name)
        if field.name in but:
            continue
        if field.name in ("memory", "at_start"):
            left, right = (each if isinstance(each, Memory) else Memory(1, each) for each in (left, right))
            assert left.state.keys() == right.state.keys() and left.kv_lengths == right.kv_lengths
            left, right = left.tensors(), right.tensors()
        elif isinstance(left, torch.Tensor):
            left, right = [left], [right]
        elif field.name != "pending":
            assert left == right, field.name
            continue
        assert len(left) == len(right), field.name
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), field.name


@st.composite
def texts(draw, longest=14):
    """A row: ids, which of them are ephemeral, and where it is cut."""
    flags = draw(st.lists(st.booleans(), min_size=1, max_size=longest))
    row = tokens(1, len(flags), draw(st.integers(0, 50)))[0] % 80 + 3
    text = [SECRET if flag else id_ for id_, flag in zip(row.tolist(), flags, strict=True)]
    cuts = draw(st.lists(st.integers(1, len(flags)), max_size=3, unique=True))
    return text, flags, [cut for cut in sorted(cuts) if cut < len(flags)]


# --- equal to the session that never read them ------------------------------------------------------------------------


@settings(max_examples=80)
@given(texts())
def test_once_slept_the_session_never_read_them(model, row):
    text, flags, pieces = row
    mine, theirs = SleepCache(), SleepCache()
    read(model, mine, text, flags, pieces)
    read(model, theirs, text, flags, pieces, skip=True)
    if theirs.now is None:
        assert mine.seen == mine.windows == mine.open_lengths == [0]
        return
    for name in ("seen", "windows", "open_lengths", "passes"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert torch.equal(mine.now.open_ids, theirs.now.open_ids) and SECRET not in mine.now.open_ids
    assert torch.equal(mine.now.digest, theirs.now.digest)
    if not any(mine.ephemeral):
        # A sleep came after them in the same call already.
        assert_same(mine, theirs, but=("columns",))
    model.sleep(mine)
    model.sleep(theirs)
    assert_same(mine, theirs, but=("columns",))


def test_the_session_is_the_same_to_the_last_count_where_calls_are_only_ephemeral(model):
    mine, theirs = SleepCache(), SleepCache()
    for cache in (mine, theirs):
        model(ids_of([5, 6, 7]), past_key_values=cache)
        if cache is mine:
            model(ids_of([SECRET] * 6), past_key_values=cache, ephemeral=torch.ones(1, 6, dtype=torch.bool))
            assert cache.ephemeral == [6] and cache.kv_bytes > theirs.kv_bytes
        model(ids_of([8, 9]), past_key_values=cache)
    # The second call filled the window and slept.
    assert mine.windows == [1] and mine.ephemeral == [0]
    assert_same(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_every_family(family, eviction):
    inserted = {} if family in ATTENTION else {"fast_weights": None}
    model = sleeping(family, eviction=eviction, window_size=3, n_loops=2, **inserted)
    text = [5, 6, SECRET, SECRET, 7, SECRET, 8, SECRET, 9, 10, 11, SECRET, 12]
    flags = [id_ == SECRET for id_ in text]
    mine, theirs = SleepCache(), SleepCache()
    logits = read(model, mine, text, flags, [3, 6])
    read(model, theirs, text, flags, [3, 6], skip=True)
    assert_close(logits, read(model, SleepCache(), text, flags, []), GROWN, "in pieces")
    model.sleep(mine)
    model.sleep(theirs)
    assert mine.windows == [3]
    assert_same(mine, theirs, but=("columns",))


def test_what_was_made_in_their_sight_is_slept_on_for_what_it_says(model):
    mine, theirs = SleepCache(), SleepCache()
    prompt, flags = [5, 6, SECRET, SECRET], [False, False, True, True]
    how = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    made = model.generate(ids_of(prompt), past_key_values=mine, ephemeral=torch.tensor([flags]), **how)
    blind = model.generate(ids_of(prompt[:2]), **how)
    answer = made[0, 4:].tolist()
    assert answer != blind[0, 2:].tolist(), "it saw them"
    assert (
        made.tolist()
        == model.generate(ids_of(prompt), ephemeral=torch.tensor([flags]), use_cache=False, **how).tolist()
    ), "also without a session, where each step reads the whole text anew"
    read(model, theirs, prompt[:2] + answer, [False] * 9, [2])
    assert mine.pending == [answer[-1:]]
    model.sleep(mine)
    model.sleep(theirs)
    assert_same(mine, theirs, but=("columns", "digest"))
    assert torch.equal(mine.now.digest, theirs.now.digest)


def test_sleep_drops_them_where_nothing_else_is_open(model):
    mine, theirs = SleepCache(), SleepCache()
    for cache in (mine, theirs):
        read(model, cache, [5, 6, 7], [False] * 3, [])
        model.sleep(cache)
    read(model, mine, [SECRET] * 3, [True] * 3, [])
    model.sleep(mine)
    assert mine.windows == [1]
    assert_same(mine, theirs)
    only = SleepCache()
    read(model, only, [SECRET] * 3, [True] * 3, [])
    model.sleep(only)
    assert not only.memory.tensors() and only.seen == [0] and only.ephemeral == [0]


# --- awake ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=4), st.booleans())
def test_awake_they_are_tokens_like_others(model, flags, slept):
    """In an open window that has room for all of them, logits and memory are what plain reading gives."""
    text = tokens(1, len(flags))[0].tolist()
    mine = SleepCache()
    if slept:
        read(model, mine, [7, 8, 9], [False] * 3, [])
        model.sleep(mine)
    plain = mine.clone()
    got = read(model, mine, text, flags, [])
    assert torch.equal(got, read(model, plain, text, [False] * len(flags), []))
    for left, right in zip(mine.memory.tensors(), plain.memory.tensors(), strict=True):
        assert torch.equal(left, right)


def test_more_of_them_than_a_window_holds():
    """The open window is as wide as it must be, until it sleeps."""
    text = tokens(1, 11)
    model = sleeping(window_size=4, n_loops=2)
    flags = torch.tensor([[True, False, True, True, True, False, True, True, True, False, True]])
    with torch.no_grad():
        narrow = model(text, ephemeral=flags, use_cache=False).logits
        model.config.window_size = 11
        assert_close(narrow, model(text).logits, EXACT)


@settings(max_examples=40)
@given(texts(), st.booleans())
def test_pieces_do_not_matter(model, row, fixed):
    text, flags, pieces = row
    whole, cut, single = SleepCache(), SleepCache(fixed_shapes=fixed), SleepCache(fixed_shapes=fixed)
    expected = read(model, whole, text, flags, [])
    assert_close(read(model, cut, text, flags, pieces), expected, EXACT, "in pieces")
    assert_close(read(model, single, text, flags, list(range(1, len(text)))), expected, EXACT, "one by one")
    for other in (cut, single):
        for name in ("seen", "windows", "open_lengths", "ephemeral"):
            assert getattr(other, name) == getattr(whole, name), name
        assert other.now.ephemeral == whole.now.ephemeral


@settings(max_examples=25)
@given(st.lists(texts(longest=9), min_size=2, max_size=3), st.lists(texts(longest=7), min_size=3, max_size=3))
def test_a_batch_is_its_rows(model, rows, more):
    """Ephemeral in other columns per row, padded, called twice, slept in some rows only."""
    together, alone = SleepCache(), [SleepCache() for _ in rows]
    for texts_ in (rows, more[: len(rows)]):
        width = max(len(text) for text, *_ in texts_) + 1
        ids, mask, own = torch.zeros(3, len(rows), width, dtype=torch.long)
        own = torch.rand(own.shape) < 0.5
        for row, (text, flags, _) in enumerate(texts_):
            ids[row, width - len(text) :], mask[row, width - len(text) :] = torch.tensor(text), 1
            own[row, width - len(text) :] = torch.tensor(flags)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, past_key_values=together, ephemeral=own).logits
        for row, (text, flags, _) in enumerate(texts_):
            expected = read(model, alone[row], text, flags, [])
            assert_close(logits[row, width - len(text) :], expected, EXACT, f"row {row}")
        model.sleep(together, rows=[1])
        model.sleep(alone[1])
        for row, part in enumerate(together.split()):
            for name in ("seen", "windows", "open_lengths", "ephemeral", "passes"):
                assert getattr(part, name) == getattr(alone[row], name), name
    model.sleep(together)
    for row, part in enumerate(together.split()):
        model.sleep(alone[row])
        for key, layer in part.memory.state.items():
            for left, right in zip(layer, alone[row].memory.state.get(key, (None, None)), strict=True):
                if left is not None:
                    right = torch.zeros_like(left) if right is None else right
                    assert_close(left, right, EXACT, f"row {row}, {key}")


# --- what one can do with a session -----------------------------------------------------------------------------------


@pytest.fixture
def begun(model):
    """A window slept on, and an open one of which two are ephemeral: 9 S 10 S 11."""
    cache = SleepCache()
    text = [5, 6, 7, 8, 9, SECRET, 10, SECRET, 11]
    read(model, cache, text, [id_ == SECRET for id_ in text], [6])
    return cache


def never(model, text, pieces=()):
    cache = SleepCache()
    read(model, cache, text, [False] * len(text), list(pieces))
    return cache


def test_no_file_has_them(model, begun, tmp_path):
    """The file is that of the session that never read them, set aside, with all that stands in it."""
    begun.save(tmp_path / "mine")
    theirs = never(model, [5, 6, 7, 8, 9, 10, 11], [5])
    theirs.now = theirs.now.at_rest()
    theirs.save(tmp_path / "theirs")
    (mine, known), (others, expected) = (read_tensors(tmp_path / name) for name in ("mine", "theirs"))
    assert known == expected and mine.keys() == others.keys()
    assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert begun.ephemeral == [2], "the session itself goes on"
    loaded = SleepCache.load(tmp_path / "mine")
    assert loaded.ephemeral == [0] and loaded.seen == [7]
    got = read(model, loaded, [12, 13], [False] * 2, [])
    assert_close(got, read(model, never(model, [5, 6, 7, 8, 9, 10, 11]), [12, 13], [False] * 2, []), EXACT)


def test_no_file_has_what_was_taken_back_or_slept_on(model, begun, tmp_path):
    """Not where ids once stood, either: the file's ids are compared number by number."""
    other = begun.clone()
    begun.rewind(2)
    model.sleep(other)
    for name, cache in (("back", begun), ("slept", other)):
        cache.save(tmp_path / name)
        assert SECRET not in SleepCache.load(tmp_path / name).now.open_ids


@pytest.mark.parametrize("count, left", [(0, "9S10S11"), (1, "9S10S"), (2, "9S10"), (3, "9S"), (4, "9"), (5, "")])
def test_rewind_takes_them_back_too(model, begun, count, left):
    begun.rewind(count)
    text = [9, SECRET, 10, SECRET, 11][: 5 - count]
    anew = SleepCache()
    whole = [5, 6, 7, 8, *text]
    read(model, anew, whole, [id_ == SECRET for id_ in whole], [])
    assert begun.ephemeral == [left.count("S")] and begun.open_lengths == [len(text) - left.count("S")]
    assert begun.seen == anew.seen
    if count < 5:
        assert begun.now.ephemeral == anew.now.ephemeral
        assert_close(
            read(model, begun, [12, SECRET], [False, True], []),
            read(model, anew, [12, SECRET], [False, True], []),
            EXACT,
        )
    with pytest.raises(ValueError, match="expected to take back at most"):
        begun.rewind(9)


def test_crop_counts_columns_of_which_they_are_none(model, begun):
    before = begun.now
    with pytest.raises(ValueError, match=r"expected no ephemeral tokens in the open window, .*got \[2\]"):
        begun.crop(3)
    assert begun.now is before
    begun.crop(-2)
    assert begun.ephemeral == [1] and begun.open_lengths == [2]


def test_copies_joins_and_parts_have_them(model, begun):
    other = never(model, [20, 21])
    joined = SleepCache.join([begun, other, begun.clone()])
    assert joined.ephemeral == [2, 0, 2]
    joined.batch_select_indices([1, 0])
    parts = joined.split()
    assert parts[1].ephemeral == [2]
    for part, cache in zip(parts, (other, begun), strict=True):
        assert_close(read(model, part, [12], [False], []), read(model, cache.clone(), [12], [False], []), EXACT)
    aside = begun.clone()
    aside.now = aside.now.at_rest()
    assert aside.kv_bytes < begun.kv_bytes
    assert_close(read(model, aside, [12], [False], []), read(model, begun.clone(), [12], [False], []), EXACT)


def test_a_whole_conversation_is_without_them(model, begun):
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    ordinary = [5, 6, 7, 8, 9, 10, 11]
    only_new = model.generate(ids_of([12]), past_key_values=begun.clone(), new_tokens=True, **how)[0, 1:]
    whole = model.generate(ids_of([*ordinary, 12]), past_key_values=begun.clone(), **how)[0, 8:]
    assert only_new.tolist() == whole.tolist()
    with pytest.raises(ValueError, match="expected the whole conversation, which begins with the 7 tokens"):
        model.generate(ids_of([5, 6, 7, 8, 9, SECRET, 10, SECRET, 11, 12]), past_key_values=begun, **how)
    with pytest.raises(ValueError, match="expected new_tokens=True with ephemeral tokens"):
        model.generate(ids_of([*ordinary, 12]), past_key_values=begun, ephemeral=torch.zeros(1, 8) > 0, **how)
    assert begun.ephemeral == [2] and begun.seen == [7]


def test_pending_tokens_are_ordinary(model):
    cache = SleepCache()
    model.generate(ids_of([5, 6]), past_key_values=cache, max_new_tokens=1, do_sample=False)
    (pending,) = cache.pending
    read(model, cache, [SECRET, SECRET], [True, True], [])
    assert cache.seen == [3] and cache.ephemeral == [2] and cache.open_ids[0, :3].tolist() == [5, 6, *pending]
    assert cache.now.ephemeral == (((3, SECRET), (3, SECRET)),)


def test_they_take_positions_while_they_are_awake(model, begun):
    """position_ids that say so are let through, others refused."""
    model(ids_of([12]), past_key_values=begun.clone(), position_ids=torch.tensor([[9]]))
    with pytest.raises(ValueError, match="position"):
        model(ids_of([12]), past_key_values=begun.clone(), position_ids=torch.tensor([[7]]))
    model.sleep(begun)
    model(ids_of([12]), past_key_values=begun, position_ids=torch.tensor([[7]]))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.bool), [[True, False, True]], torch.ones(3) > 0]
)
def test_what_is_no_mask_is_refused_before_anything_is_read(model, begun, wrong):
    before = begun.now
    for call in (model, model.generate):
        keywords = {"new_tokens": True} if call == model.generate else {}
        with pytest.raises(ValueError, match=r"expected ephemeral to be bool of shape \(1, 3\), got"):
            call(ids_of([12, 13, 14]), past_key_values=begun, ephemeral=wrong, **keywords)
    assert begun.now is before


# --- gradient and labels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["none", "loop", "window"])
@pytest.mark.parametrize("backprop_windows", [None, 1])
def test_gradient_is_that_of_the_pieces(model, checkpoint, backprop_windows):
    """One call with labels against calls up to each boundary, with explicit sleeps and the loss by hand."""
    text = [5, SECRET, 6, 7, 8, SECRET, 9, 10, SECRET, 11, 12, 13, 14]
    flags = [id_ == SECRET for id_ in text]
    ids, own = ids_of(text), torch.tensor([flags])
    model.train()
    model.config.checkpoint, model.config.backprop_windows = checkpoint, backprop_windows
    model.zero_grad()
    loss = model(ids, labels=ids, ephemeral=own).loss
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    cache, logits = SleepCache(), []
    for number, (begin, end) in enumerate([(0, 6), (6, 11), (11, 13)]):
        if number:
            # Of two sleeps the last carries gradient.
            with torch.set_grad_enabled(backprop_windows is None or number == 2):
                model.sleep(cache)
        out = model(ids[:, begin:end], past_key_values=cache, ephemeral=own[:, begin:end], logits_to_keep=0)
        logits.append(out.logits)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits, 1)[0, :-1], ids[0, 1:])
    expected.backward()
    assert_close(loss.detach(), expected.detach(), EXACT)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(got[name], parameter.grad, EXACT_GRAD, name)
    model.zero_grad()
    model.eval()
    model.config.checkpoint, model.config.backprop_windows = "none", None


def test_no_gradient_crosses_a_sleep_to_them(model):
    ids = ids_of([5, SECRET, 6, 7, 8, 9, 10, 11])
    embedding = model.get_input_embeddings().weight
    # The first is made in the secret's window, the second after it.
    for predicted, reached in ((4, True), (7, False)):
        labels = torch.where(torch.arange(8)[None] == predicted, ids, IGNORE)
        model.train().zero_grad()
        model(ids, labels=labels, ephemeral=ids == SECRET).loss.backward()
        assert bool(embedding.grad[SECRET].any()) == reached
    model.eval().zero_grad()


def test_a_wake_pass_that_saw_one_is_no_first_pass_of_a_sleep():
    model = sleeping(window_size=4, n_loops=2).train()
    text = [5, 6, SECRET, 7, 8, 9]
    mine, theirs = SleepCache(), SleepCache()
    model(ids_of(text), labels=ids_of(text), past_key_values=mine, ephemeral=ids_of(text) == SECRET)
    plain = [id_ for id_ in text if id_ != SECRET]
    model(ids_of(plain), labels=ids_of(plain), past_key_values=theirs)
    assert mine.windows == [1]
    assert_same(mine.detach_(), theirs.detach_(), but=("columns",))
    later, again = SleepCache(), SleepCache()
    model(ids_of([SECRET]), past_key_values=later, ephemeral=ids_of([SECRET]) == SECRET)
    model(ids_of(plain), labels=ids_of(plain), past_key_values=later)
    model(ids_of(plain), labels=ids_of(plain), past_key_values=again)
    assert_same(later.detach_(), again.detach_(), but=("columns",))


def test_texts_packed_into_a_row_have_them_too(model):
    text = ids_of([5, SECRET, 6, 7, 8, 9, SECRET, 10])
    marks = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        together = model(text, position_ids=marks, ephemeral=text == SECRET, use_cache=False).logits
        for part in (slice(0, 3), slice(3, 8)):
            alone = model(text[:, part], ephemeral=text[:, part] == SECRET, use_cache=False).logits
            assert_close(together[:, part], alone, EXACT)


# --- the schedule -----------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.data())
def test_ordinary_tokens_alone_fill_windows(data):
    """The sleeps of a row are where they would be without the others, which are taken with those before them."""
    window, batch, width = (data.draw(st.integers(1, most)) for most in (4, 3, 12))
    flags = np.array(
        data.draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=batch, max_size=batch))
    )
    lengths = data.draw(st.lists(st.integers(0, width), min_size=batch, max_size=batch))
    opened = data.draw(st.lists(st.integers(0, window), min_size=batch, max_size=batch))
    rounds = schedule(opened, lengths, None, window, keep=True, ephemeral=flags).rounds
    have, done, slept_before = list(opened), [0] * batch, [[] for _ in range(batch)]
    for each in rounds:
        for row in (row for nap in each.sleeps for row in nap.rows):
            assert have[row] == window and not flags[row, done[row]]
            have[row] = 0
            slept_before[row].append(done[row])
        ordinary = each.ordinary()
        for place, (row, start, count) in enumerate(zip(each.rows, each.starts, each.counts, strict=True)):
            assert start == done[row] and count > 0
            span = flags[row, start : start + count]
            assert list(each.ephemeral[place]) == (span.nonzero()[0] + start).tolist()
            assert ordinary[row].tolist() == ((~span).nonzero()[0] + start).tolist()
            have[row] += len(ordinary[row])
            done[row] += count
            assert have[row] <= window
    assert done == lengths
    for row, columns in enumerate(slept_before):
        counted, expected = opened[row], []
        for column in range(lengths[row]):
            if not flags[row, column]:
                if counted == window:
                    counted = 0
                    expected.append(column)
                counted += 1
        assert columns == expected


# --- text in, text out ------------------------------------------------------------------------------------------------


def test_a_session_reads_a_text_for_the_time_being(tmp_path):
    model, words = talking.talker(), talking.tokenizer()
    how = {"max_new_tokens": 5}
    mine, theirs = Session(model, words), Session(model, words)
    for session in (mine, theirs):
        session.read("a cab had a bed")
    without = theirs.ask("who?", **how)
    assert mine.read("the key is 7!", ephemeral=True) is mine
    assert mine.ask("who?", **how) != without, "it is seen"
    assert mine.cache.ephemeral == [13] and repr(mine).split(", ")[0] == repr(theirs).split(", ")[0]
    mine.save(tmp_path / "session")
    assert Session.load(tmp_path / "session", model, words).ask("who?", **how) == without
    mine.ask("and then?", keep=True, **how)
    theirs.read("and then?")
    mine.undo()
    assert mine.undo().ask("who?", **how) == without
    mine.read("the key is 7!", ephemeral=True)
    mine.read("and then?").sleep()
    theirs.sleep()
    assert_same(mine.cache, theirs.cache, but=("columns",))


def test_a_session_that_begins_with_one():
    """BOS stands before the first text that stays, too."""
    model, words = talking.talker(), talking.tokenizer()
    mine, theirs = Session(model, words), Session(model, words)
    mine.read("a key", ephemeral=True)
    for session in (mine, theirs):
        session.read("a cab").sleep()
    assert_same(mine.cache, theirs.cache)


def test_a_conversation_goes_on_around_one():
    """What is said next is said behind it; the turns are those of the template as ever."""
    model, words = talking.talker(), talking.tokenizer()
    mine, theirs = Session(model, words), Session(model, words)
    for session in (mine, theirs):
        session.say("who?", max_new_tokens=4)
    mine.read("ab", ephemeral=True)
    answers = [session.say("and?", max_new_tokens=4) for session in (mine, theirs)]
    assert [each["role"] for each in mine.messages] == ["user", "assistant"] * 2 and len(answers) == 2
    assert mine.cache.seen[0] + len(mine.cache.pending[0]) == len(mine._known.talk.ids)
