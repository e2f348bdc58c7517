"""Sessions: text in, text out. What they answer is what plain `generate` gives on the whole text."""

from __future__ import annotations

import re
from pathlib import Path

import accelerate
import pytest
import talking
import torch
from families import true_float64
from tolerances import EXACT, assert_close
from transformers import StoppingCriteria, TextStreamer
from transformers.utils import logging

from sleepify import CacheMismatchError, CheckpointError, Session, SleepCache
from sleepify.conversation import render

ROOT = Path(__file__).resolve().parent.parent
STORY = "a cab had a bed, dad fed a hag. bad egg! "
QUESTIONS = ["who?", "what did dad do then?", "egg", "is a cab a bed or is it a hag, or a big bad egg?"]


@pytest.fixture(autouse=True)
def exact():
    with true_float64():
        yield


@pytest.fixture
def model():
    return talking.talker()


@pytest.fixture
def words():
    return talking.tokenizer()


@pytest.fixture
def session(model, words):
    return Session(model, words)


def alone(model, ids: list[int], n: int = 9, **generate) -> list[int]:
    """What plain `generate` makes of ids that nobody has read yet."""
    return model.generate(torch.tensor([ids]), max_new_tokens=n, **generate)[0, len(ids) :].tolist()


def ids_of(words, text: str) -> list[int]:
    return words(text, add_special_tokens=False)["input_ids"]


def same(one: SleepCache, other: SleepCache) -> None:
    """Two caches that go on alike."""
    for name in ("seen", "windows", "open_lengths", "passes", "pending"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.memory.state.keys() == other.memory.state.keys()
    for key, layer in one.memory.state.items():
        for mine, theirs in zip(layer, other.memory.state[key], strict=True):
            if mine is not None:
                assert_close(mine, theirs, EXACT, str(key))


def watched(model, patch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shape of the ids of every call of the model from now on."""
    shapes: list[tuple[int, int]] = []
    forward = type(model).forward

    def counted(self, input_ids, *args, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, *args, **kwargs)

    patch.setattr(type(model), "forward", counted)
    return shapes


# --- reading and asking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 4])
def test_an_answer_is_that_of_generate(session, model, words, times):
    session.read(STORY * times)
    given = [words.bos_token_id, *ids_of(words, STORY * times), *ids_of(words, "who?")]
    assert session.ask("who?", max_new_tokens=9) == words.decode(alone(model, given), skip_special_tokens=True)


def test_text_in_pieces_leaves_the_state_of_one_call(model, words, session):
    text = STORY * 9
    seen: list[tuple[int, int]] = []
    session.read(text, progress=lambda read, whole: seen.append((read, whole)))
    cache = SleepCache()
    ids = [words.bos_token_id, *ids_of(words, text)]
    model(torch.tensor([ids]), past_key_values=cache)
    same(session.cache, cache)
    assert len(seen) == 4 and seen[0] == (8 * 12 + 1, len(ids)) and seen[-1] == (len(ids), len(ids))
    again = Session(model, words).read(STORY, progress=print).read(STORY * 8)
    assert again.cache.seen == [1 + len(ids_of(words, STORY)) + len(ids_of(words, STORY * 8))]
    assert again.ask("who?", max_new_tokens=5) is not None


def test_reading_holds_no_graph_and_no_logits_of_the_text(session, model, monkeypatch):
    widths = []
    head = type(model.blocks).logits

    def counted(self, hidden):
        widths.append(hidden.shape[0])
        return head(self, hidden)

    monkeypatch.setattr(type(model.blocks), "logits", counted)
    model.train()
    session.read(STORY * 9)
    assert not any(widths)
    assert not any(tensor.requires_grad for tensor in session.cache.memory.tensors())


def test_special_tokens_stand_at_the_start_only(session, words):
    session.read("abc").read("abc")
    spelled = [words.bos_token_id, *ids_of(words, "abc"), *ids_of(words, "abc")]
    assert session.cache.open_ids[0, : session.cache.open_lengths[0]].tolist() == spelled


def test_a_model_that_is_offloaded_between_calls_is_asked_as_any(words):
    model = talking.talker(dtype=torch.float32)
    expected = Session(model, words)
    expected.read(STORY)
    answer = expected.ask("who?", max_new_tokens=5)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    session = Session(model, words)
    session.read(STORY)
    assert session.ask("who?", max_new_tokens=5) == answer


def test_asking_leaves_no_trace(session):
    session.read(STORY)
    before, now = repr(session), session.cache.now
    first = session.ask("who?", max_new_tokens=9)
    assert session.ask(QUESTIONS, max_new_tokens=9)[0] == first
    assert session.cache.now is now and repr(session) == before
    session.undo()
    assert session.cache.now is None


def test_many_questions_are_answered_as_each_alone(session, model, words):
    """Of unequal lengths, with windows that fill at different steps; the text is read once."""
    session.read(STORY * 2)
    expected = [session.ask(question, max_new_tokens=15) for question in QUESTIONS]
    with pytest.MonkeyPatch.context() as patch:
        shapes = watched(model, patch)
        assert session.ask(QUESTIONS, max_new_tokens=15) == expected
    assert shapes[0] == (4, len(ids_of(words, QUESTIONS[3]))) and set(shapes[1:]) == {(4, 1)}
    assert len(set(expected)) > 1
    # of a session that has read nothing, too
    empty = session.fork().forget()
    assert empty.ask(QUESTIONS, max_new_tokens=5) == [empty.ask(each, max_new_tokens=5) for each in QUESTIONS]


def test_rows_that_end_early_are_cut_where_they_ended(session, model, words):
    session.read(STORY)
    ends = {"eos_token_id": [2, *range(50, 60)], "pad_token_id": words.convert_tokens_to_ids("z")}
    answers = session.ask(QUESTIONS, max_new_tokens=12, **ends)
    assert answers == [session.ask(each, max_new_tokens=12, **ends) for each in QUESTIONS]
    assert len({len(answer) for answer in answers}) > 1, "the model is to end some answers before the others"


def test_a_kept_question_is_part_of_what_was_read(session, model, words):
    session.read(STORY)
    answer = session.ask("who?", keep=True, max_new_tokens=9)
    start = [words.bos_token_id, *ids_of(words, STORY), *ids_of(words, "who?")]
    made = alone(model, start)
    assert answer == words.decode(made, skip_special_tokens=True)
    follow = alone(model, [*start, *made, *ids_of(words, "and?")])
    assert session.ask("and?", max_new_tokens=9) == words.decode(follow, skip_special_tokens=True)


def test_answers_are_streamed(session, words, capsys):
    session.read(STORY)
    answer = session.ask(
        "who?", max_new_tokens=9, streamer=TextStreamer(words, skip_prompt=True, skip_special_tokens=True)
    )
    assert capsys.readouterr().out == answer + "\n"


def test_an_answer_stops_at_a_string(session):
    session.read(STORY)
    answer = session.ask("who?", max_new_tokens=20)
    assert session.ask("who?", max_new_tokens=20, stop_strings=[answer[3:5]]).endswith(answer[3:5])


def test_an_answer_has_a_limit_unless_somebody_says_which(session, model):
    session.read(STORY)
    lengths = []
    session.model = model
    generate = model.generate

    def noted(*args, **kwargs):
        lengths.append((kwargs.get("max_new_tokens"), kwargs.get("max_length")))
        return generate(*args, **(kwargs | {"max_new_tokens": 2, "max_length": None}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", noted)
        session.ask("who?")
        session.ask("who?", max_length=30)
        patch.setattr(model.generation_config, "max_new_tokens", 7)
        session.ask("who?")
    assert lengths == [(256, None), (None, 30), (None, None)]


def test_sleep_is_the_models(session, model, words):
    session.read("a cab").sleep(n_loops=2)
    cache = SleepCache()
    model(torch.tensor([[words.bos_token_id, *ids_of(words, "a cab")]]), past_key_values=cache)
    model.sleep(cache, n_loops=2)
    same(session.cache, cache)
    assert session.cache.passes == [2]


# --- conversations ----------------------------------------------------------------------------------------------------

TURNS = ["who had a bed?", "and dad?", "why, o why a hag", "egg"]


@pytest.mark.parametrize("template", [talking.TEMPLATE, talking.FORGETFUL], ids=["plain", "forgetful"])
@pytest.mark.parametrize("generate", [{}, {"repetition_penalty": 3.0}], ids=["greedy", "penalty"])
def test_a_turn_is_what_generate_gives_on_the_whole_conversation(session, model, words, template, generate):
    """Also where the template rewrites earlier turns, and where answers are spelled as no tokenizer would."""
    words.chat_template = template
    messages: list[dict[str, str]] = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        ids = words.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        made = alone(model, ids, **generate)
        assert session.say(turn, max_new_tokens=9, **generate) == words.decode(made, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": words.decode(made, skip_special_tokens=True)})
    assert session.messages == messages
    assert any(len(message["content"]) > 2 for message in messages[1:5:2]), (
        "there is to be something that the template can leave out"
    )


def test_only_what_is_new_is_read(session, model, monkeypatch):
    """Where the model spells as the tokenizer does: here each letter of an answer is one."""
    session.say(TURNS[0], max_new_tokens=1)
    first = session.cache.seen[0]
    shapes = watched(model, monkeypatch)
    session.say("egg", max_new_tokens=1)
    assert sum(tokens for _, tokens in shapes) < first


@pytest.mark.parametrize("template", [talking.TEMPLATE, talking.FORGETFUL], ids=["plain", "forgetful"])
def test_text_and_sleep_come_between_turns(session, model, words, template):
    """A text read before is before the conversation; after a sleep, turns stand as the template writes them then."""
    words.chat_template = template
    session.read(STORY)
    talk: list[dict[str, str]] = []

    def turn(text: str) -> str:
        talk.append({"role": "user", "content": text})
        answer = session.say(text, max_new_tokens=9)
        talk.append({"role": "assistant", "content": answer})
        return answer

    turn(TURNS[0])
    turn(TURNS[1])
    slept = session.sleep().fork()
    answer = turn("egg")
    story = [words.bos_token_id, *ids_of(words, STORY)]
    whole = render(words, talk[:-1], opens=False)
    count = slept.cache.seen[0] - len(story)
    assert words.decode(whole[:count]).endswith("<end><user>")
    cache = SleepCache()
    model(torch.tensor([[*story, *whole[:count]]]), past_key_values=cache)
    model.sleep(cache)
    same(slept.cache, cache)
    out = model.generate(torch.tensor([whole[count:]]), past_key_values=cache, new_tokens=True, max_new_tokens=9)
    assert answer == words.decode(out[0, len(whole) - count :], skip_special_tokens=True)
    session.read("dad ")
    assert isinstance(turn("who?"), str)


def test_a_template_that_rewrites_what_was_slept_on_is_refused(session, words):
    words.chat_template = "{{ messages | length }}" + talking.TEMPLATE
    session.say("who?", max_new_tokens=5)
    session.say("egg?", max_new_tokens=5)  # still all there is: it can be read anew
    session.sleep().say("dad?", max_new_tokens=5)  # as the template wrote it with this turn
    before = session.cache.now, session.messages
    with pytest.raises(ValueError, match=r"leaves earlier turns as they are.*undo\(\)"):
        session.say("hag?", max_new_tokens=5)
    assert (session.cache.now, session.messages) == before
    session.undo().undo().say("dad?", max_new_tokens=5)
    session.say("hag?", max_new_tokens=5)


def test_text_between_turns_is_never_dropped(words):
    """Also where all of it is in the open window, and could be taken back."""
    words.chat_template = "{{ messages | length }}" + talking.TEMPLATE
    session = Session(talking.talker(window_size=128), words)
    session.say("who?", max_new_tokens=5)
    session.read("abc").say("egg?", max_new_tokens=5)
    with pytest.raises(ValueError, match="leaves earlier turns as they are"):
        session.say("dad?", max_new_tokens=5)


def test_a_conversation_needs_a_template(session, words):
    words.chat_template = None
    with pytest.raises(ValueError, match="with a chat template, got one without"):
        session.say("who?")
    assert session.cache.now is None


# --- fork, undo, forget -----------------------------------------------------------------------------------------------


def test_forks_are_independent(session):
    session.read(STORY)
    other = session.fork()
    assert other.cache.now is session.cache.now
    kept = session.ask("who?", max_new_tokens=9)
    other.read("no hag")
    other.say("who?", max_new_tokens=3)
    assert session.ask("who?", max_new_tokens=9) == kept and session.messages == [] and len(other.messages) == 2
    other.undo().undo()
    assert other.ask("who?", max_new_tokens=9) == kept


def test_undo_takes_back_one_step_after_the_other(session):
    steps = [
        lambda: session.read(STORY),
        lambda: session.say(TURNS[0], max_new_tokens=9),
        lambda: session.sleep(),
        lambda: session.say(TURNS[1], max_new_tokens=9),
        lambda: session.ask("who?", keep=True, max_new_tokens=9),
        lambda: session.read(STORY),
    ]
    answers = []
    for step in steps:
        answers.append((session.messages, session.fork().say("egg", max_new_tokens=9), session.cache.seen))
        step()
    for messages, answer, seen in reversed(answers):
        session.undo()
        assert (session.messages, session.cache.seen) == (messages, seen)
        assert session.fork().say("egg", max_new_tokens=9) == answer
    with pytest.raises(ValueError, match="a step to take back"):
        session.undo()


def test_steps_do_not_keep_windows(session):
    """Sixteen, of which the latest keeps its keys and the others a state each."""
    for _ in range(30):
        session.read("a cab had a bed")
    steps = [step.now for step in session._steps]
    assert len(steps) == 16
    assert steps[-1].memory.kv and not any(step.memory.kv for step in steps[:-1])


def test_forget_leaves_nothing(session):
    session.read(STORY)
    session.say("who?", max_new_tokens=3)
    fresh = Session(session.model, session.tokenizer)
    session.forget()
    assert session.cache.now is None and session.messages == [] and repr(session) == repr(fresh)
    with pytest.raises(ValueError, match="take back"):
        session.undo()
    assert session.read("abc").cache.seen == fresh.read("abc").cache.seen


def test_repr_shows_tokens_windows_and_bytes(session, words):
    session.read(STORY * 2)
    cache, n = session.cache, 1 + len(ids_of(words, STORY * 2))
    n_bytes = cache.state_bytes + cache.kv_bytes
    shown = f"Session({n} tokens, {(n - 1) // 12} windows slept on, {cache.open_lengths[0]} of 12 tokens awake, "
    assert repr(session) == f"{shown}{n_bytes:,} bytes)"


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [talking.TEMPLATE, talking.FORGETFUL], ids=["plain", "forgetful"])
def test_a_saved_session_goes_on_as_it_would_have(session, model, words, template, tmp_path):
    words.chat_template = template
    session.read(STORY)
    for turn in TURNS[:2]:
        session.say(turn, max_new_tokens=15)
    session.save(tmp_path / "session.safetensors")
    loaded = Session.load(tmp_path / "session.safetensors", model, talking.tokenizer(template))
    assert loaded.messages == session.messages and loaded.cache.seen == session.cache.seen
    assert loaded.ask("who?", max_new_tokens=9) == session.ask("who?", max_new_tokens=9)
    for turn in TURNS[2:]:
        assert loaded.say(turn, max_new_tokens=9) == session.say(turn, max_new_tokens=9)
    assert [path.name for path in tmp_path.iterdir()] == ["session.safetensors"]


def test_files_that_do_not_fit_are_refused(session, model, words, tmp_path):
    path = tmp_path / "session.safetensors"
    with pytest.raises(ValueError, match="has read something"):
        session.save(path)
    session.read(STORY)
    session.say("who?", max_new_tokens=3)
    session.save(path)
    with pytest.raises(CacheMismatchError, match="of this model"):
        Session.load(path, talking.talker(window_size=7), words)
    other = talking.tokenizer()
    other.add_tokens(["dog"])
    with pytest.raises(CheckpointError, match="another vocabulary"):
        Session.load(path, model, other)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"who?", b"why?"))
    with pytest.raises(CheckpointError, match="altered or damaged"):
        Session.load(path, model, words)
    session.cache.save(path)
    with pytest.raises(CheckpointError, match="bare SleepCache"):
        Session.load(path, model, words)


# --- failures ---------------------------------------------------------------------------------------------------------


class Breaks(StoppingCriteria):
    """Fails after some tokens."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_what_fails_did_not_happen(session, monkeypatch):
    session.read(STORY)
    session.say("who?", max_new_tokens=9)
    before, messages, steps = session.cache.now, session.messages, len(session._steps)
    expected = session.fork().say("egg", max_new_tokens=9)

    def stop(read: int, whole: int) -> None:
        raise KeyboardInterrupt

    failing = [
        lambda: session.read(STORY * 9, progress=stop),
        lambda: session.say("egg", max_new_tokens=9, stopping_criteria=[Breaks(0)]),
        lambda: session.ask("egg", keep=True, max_new_tokens=9, stopping_criteria=[Breaks(0)]),
    ]
    for fail in failing:
        with pytest.raises(KeyboardInterrupt):
            fail()
        assert session.cache.now is before and session.messages == messages and len(session._steps) == steps
    assert session.say("egg", max_new_tokens=9) == expected


def test_what_a_user_can_get_wrong(session, model, words):
    with pytest.raises(TypeError, match="a model that sleeps"):
        Session(model.unload(), words)
    with pytest.raises(TypeError, match="a tokenizer of transformers"):
        Session(model, "qwen")
    with pytest.raises(ValueError, match="has read something"):
        session.sleep()
    for wrong in (lambda: session.read(""), lambda: session.ask(""), lambda: session.ask(["who?", ""])):
        with pytest.raises(ValueError, match="at least one token"):
            wrong()
    for wrong in (lambda: session.read(b"abc"), lambda: session.ask([1]), lambda: session.say(["abc"])):
        with pytest.raises(TypeError, match="expected"):
            wrong()
    with pytest.raises(ValueError, match="empty list"):
        session.ask([])
    with pytest.raises(ValueError, match="one question with keep=True"):
        session.ask(["who?", "egg"], keep=True)
    with pytest.raises(ValueError, match="other than inputs"):
        session.ask("who?", input_ids=torch.ones(1, 1))
    with pytest.raises(ValueError, match="one answer to a question"):
        session.say("who?", num_beams=2)
    assert session.cache.now is None


def test_the_cache_may_be_moved_by_hand(session, model, words):
    session.say("who?", max_new_tokens=9)
    model.sleep(session.cache)
    session.undo()
    assert session.cache.now is None
    session.read(STORY)
    model(torch.tensor([ids_of(words, "abc")]), past_key_values=session.cache)
    session.undo()
    assert session.cache.now is None


# --- the documentation ------------------------------------------------------------------------------------------------


def test_the_documented_example_is_what_users_type(model, words, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "talk.md").read_text(encoding="utf-8")
    example = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = talking.run_example(example, model, words, STORY * 9, monkeypatch)
    assert isinstance(names["session"], Session) and Path("book.safetensors").exists()


def test_a_text_is_read_where_progress_is_hidden(session):
    logging.disable_progress_bar()
    try:
        session.read(STORY * 4)
    finally:
        logging.enable_progress_bar()
    assert session.cache.windows[0] > 0


def test_a_session_with_text_is_no_bare_cache(session, tmp_path):
    """Its file holds the moment before the latest answer, too, which is no row of the cache."""
    session.say("hello", max_new_tokens=3)
    session.save(tmp_path / "session")
    with pytest.raises(CheckpointError, match="Session.load reads it"):
        SleepCache.load(tmp_path / "session")
