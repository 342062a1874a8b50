"""Sessions: what is sent, what is read, the tree of turns between. Replies are scripted."""

import json
import random

import pytest
from chat_templates import CHATML, LLAMA2, LLAMA3, QWEN3
from scripted_engine import (
    CHAT_MARKERS,
    ScriptedEngine,
    scripted_library,
    scripted_tokenizer,
    text_source,
)
from text_models import tokenizer_json

from kvchat.chat import sandbox
from kvchat.chat.messages import Message, as_jsonl, as_markdown
from kvchat.chat.reply import Chunk
from kvchat.chat.template import ChatFormat, load_chat_format
from kvchat.chat.tokenizer import load_tokenizer
from kvchat.engine.request import Event
from kvchat.errors import CapacityError, UsageError

END = "<|im_end|>\n"
ASKS = "<|im_start|>assistant\n"


def chat(replies=(), markers=CHAT_MARKERS, template=None, **options):
    """A session, its engine and its library."""
    tokenizer = scripted_tokenizer(markers)
    engine = ScriptedEngine(tokenizer)
    engine.replies += replies
    if template:
        source = text_source(chat_template=template)
        options["chat_format"] = load_chat_format(source, tokenizer, None)
    library = scripted_library(engine, **options)
    return library.current, engine, library


def say(session, engine, library, text):
    """One whole turn; what it put out after it was asked."""
    session.send(text)
    engine.run()
    library.pump()
    return output(session)


def output(session):
    """What the session has put out, less the turns that were asked and the remarks."""
    chunks = session.take_output()
    return [chunk for chunk in chunks if chunk.kind not in ("asked", "remark")]


def user(text):
    return f"<|im_start|>user\n{text}{END}"


def reply(text):
    return f"{ASKS}{text}{END}"


def test_a_chat_is_rendered_sent_read_and_remembered():
    session, engine, library = chat(["Hello, wörld!", "Fine."], system="Be nice.")

    assert say(session, engine, library, "hi") == [Chunk("answer", "Hello, wörld!")]
    assert say(session, engine, library, "how are you?") == [Chunk("answer", "Fine.")]

    system = f"<|im_start|>system\nBe nice.{END}"
    first = system + user("hi") + ASKS
    second = system + user("hi") + reply("Hello, wörld!") + user("how are you?") + ASKS
    tokenizer = engine.tokenizer
    sent = [request.token_ids[: request.num_prompt_tokens] for request in engine.requests]
    assert [tokenizer.decode(ids) for ids in sent] == [first, second]
    assert session.messages == [
        Message("system", "Be nice."),
        Message("user", "hi"),
        Message("assistant", "Hello, wörld!"),
        Message("user", "how are you?"),
        Message("assistant", "Fine."),
    ]
    text, ids = session.prompt_view()
    assert text == second + "Fine.<|im_end|>" == tokenizer.decode(ids)
    assert ids == engine.requests[1].token_ids
    assert session.num_context_tokens == len(ids)


def test_requests_carry_seed_branch_sampling_and_every_stop_id():
    session, engine, library = chat(seed=11)
    session.set_option("temp", "0.25")
    say(session, engine, library, "hi")

    (request,) = engine.requests
    end = engine.tokenizer.markers["<|im_end|>"].token_id
    assert (request.seed, request.branch, request.session_id) == (11, 0, session.id)
    assert request.sampling.temperature == 0.25
    assert request.sampling.stop_token_ids == {end}


def test_stats_count_tokens_and_time():
    session, engine, library = chat(["abc"])
    engine.num_cached_tokens = 5
    say(session, engine, library, "hi")

    stats = session.last_reply
    assert stats.num_prompt_tokens == engine.requests[0].num_prompt_tokens
    assert (stats.num_generated_tokens, stats.num_cached_tokens) == (4, 5)
    assert stats.num_recomputed_tokens == 0
    assert (stats.ttft_s, stats.tokens_per_s) == (1.0, 1.0)  # the clock ticks once a look
    assert stats.finish_reason == "stop"


def test_an_empty_prompt_is_refused():
    session, engine, _library = chat()
    for text in ("", "  ", "\n\t"):
        with pytest.raises(UsageError, match="nothing to send"):
            session.send(text)
    assert engine.requests == [] and session.messages == []


def test_bytes_a_terminal_could_not_read_are_replaced():
    session, engine, library = chat(system="s\udcff")
    say(session, engine, library, "a\udcffb")

    assert session.messages[:2] == [Message("system", "s?"), Message("user", "a?b")]


# History keeps its tokens


def test_a_reply_keeps_the_tokens_it_was_made_of():
    tokenizer = load_tokenizer(text_source(tokenizer_json=tokenizer_json("byte_level")), 9999)
    engine = ScriptedEngine(tokenizer)
    session = (library := scripted_library(engine)).current
    letters = [tokenizer.encode(letter)[0] for letter in "hello world"]
    assert letters != tokenizer.encode("hello world")
    end = tokenizer.markers["<|im_end|>"].token_id
    engine.replies += [[*letters, end], "ok", "ok"]
    for text in ("a", "b", "c"):
        say(session, engine, library, text)

    first, second, third = (request.token_ids for request in engine.requests)
    assert second[: len(first)] == first and third[: len(second)] == second
    assert session.last_reply.num_recomputed_tokens == len(second) - 1  # nothing was said cached


def test_text_the_template_trims_costs_only_what_comes_after():
    markers = ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    session, engine, library = chat(["word \n\n"], markers, template=LLAMA3)
    say(session, engine, library, "a")
    say(session, engine, library, "b")

    first, second = (request.token_ids for request in engine.requests)
    num_agreed = engine.requests[0].num_prompt_tokens + len("word")
    assert second[:num_agreed] == first[:num_agreed]
    assert engine.tokenizer.marker(second[num_agreed]).text == "<|eot_id|>"


def test_recomputed_tokens_are_those_of_the_history_that_were_not_cached():
    session, engine, library = chat(["<think>\nlong thoughts\n</think>\n\nyes"], template=QWEN3)
    say(session, engine, library, "a")
    kept = engine.requests[0].num_prompt_tokens
    engine.num_cached_tokens = kept
    say(session, engine, library, "b")

    # the template drops the thoughts, so the answer and its end are computed anew
    assert session.last_reply.num_recomputed_tokens in range(len("yes") + 1, len("yes") + 30)
    assert "long thoughts" not in session.prompt_view()[0]

    engine.num_cached_tokens = session.num_context_tokens - 1
    say(session, engine, library, "c")
    assert session.last_reply.num_recomputed_tokens == 0


def test_the_space_a_template_puts_before_a_reply_is_not_its_own():
    session, engine, library = chat([" Hello "], ("<s>", "</s>"), template=LLAMA2)

    assert say(session, engine, library, "a") == [Chunk("answer", "Hello ")]
    assert session.messages[1] == Message("assistant", "Hello ")


def test_plain_text_goes_on_as_it_is():
    session, engine, library = chat([", there was", " a dog"], chat_format="plain")

    assert say(session, engine, library, "Once") == [Chunk("answer", ", there was")]
    assert session.prompt_view()[0] == "Once, there was<|im_end|>"
    say(session, engine, library, "And")
    assert engine.tokenizer.decode(engine.requests[1].token_ids).startswith("Once, there was")


# Stopping


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 50])
def test_a_stop_string_ends_the_reply_wherever_tokens_end(num_tokens):
    session, engine, library = chat(["one STOX two STOP three"])
    session.set_option("stop", "STOP")
    session.send("hi")
    while engine.step(num_tokens):
        library.pump()

    assert output(session) == [Chunk("answer", "one STOX two ")]
    assert session.messages[-1] == Message("assistant", "one STOX two ")
    assert session.last_reply.finish_reason == "stop"
    assert ("abort", 1) in engine.calls
    say(session, engine, library, "go on")
    sent = engine.tokenizer.decode(engine.requests[1].token_ids)
    assert sent.startswith(user("hi") + reply("one STOX two ") + user("go on"))


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_known():
    session, engine, library = chat(["ab###c###d"])
    session.set_option("stop", '["###d", "never"]')
    session.send("hi")
    shown = []
    while engine.step():
        library.pump()
        shown += [chunk.text for chunk in output(session)]

    assert shown == ["a", "b", "###c"]


def test_what_only_looked_like_a_stop_string_is_said_at_the_end():
    session, engine, library = chat(["ab##"])
    session.set_option("stop", "###")

    assert say(session, engine, library, "hi") == [Chunk("answer", "ab##")]
    assert session.messages[-1].content == "ab##"


def test_a_text_only_end_of_turn_stops_and_is_not_shown():
    tokenizer = load_tokenizer(text_source(tokenizer_json=tokenizer_json("prepend")), 9999)
    engine = ScriptedEngine(tokenizer)
    alpaca = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    chat_format = load_chat_format(text_source(chat_template=alpaca), tokenizer, None)
    session = (library := scripted_library(engine, chat_format)).current
    engine.replies += ["sure.\n\n### user:\nmore"]

    assert say(session, engine, library, "hi") == [Chunk("answer", "sure.\n\n")]


def test_stop_keeps_what_was_said_and_the_next_turn_is_well_formed():
    session, engine, library = chat(["I think that"])
    assert session.stop() is False
    session.send("hi")
    engine.step(7)
    library.pump()

    assert session.stop() is True
    assert not session.is_working
    assert session.last_reply.finish_reason == "abort"
    engine.run()
    library.pump()  # what came too late changes nothing
    assert session.messages[-1] == Message("assistant", "I think")
    say(session, engine, library, "go on")
    sent = engine.tokenizer.decode(engine.requests[1].token_ids)
    assert sent.startswith(user("hi") + reply("I think") + user("go on"))


def test_stop_before_the_first_token_leaves_an_empty_reply():
    session, engine, library = chat()
    session.send("hi")

    assert session.stop() is True
    assert session.messages == [Message("user", "hi"), Message("assistant", "")]
    assert session.last_reply.ttft_s is None and session.last_reply.tokens_per_s is None
    say(session, engine, library, "still there?")
    sent = engine.tokenizer.decode(engine.requests[1].token_ids)
    assert sent.startswith(user("hi") + reply("") + user("still there?"))


def test_half_a_character_is_not_kept_when_a_reply_is_stopped():
    session, engine, library = chat(["a😀"])
    session.send("hi")
    engine.step(3)
    library.pump()
    session.stop()

    assert output(session) == [Chunk("answer", "a")]
    assert session.messages[-1].content == "a"
    say(session, engine, library, "b")
    assert session.prompt_view()[0].startswith(user("hi") + reply("a") + user("b"))


# Thinking


def test_thoughts_and_answer_are_told_apart_wherever_tokens_end():
    for num_tokens in (1, 2, 5, 99):
        session, engine, library = chat(
            ["<think>\nhm </thin\n</think>\n\nYes <think>."], template=QWEN3
        )
        session.send("why?")
        while engine.step(num_tokens):
            library.pump()

        assert output(session) == [
            Chunk("reasoning", "hm </thin\n"),
            Chunk("answer", "Yes <think>."),
        ]
        assert session.messages[-1] == Message("assistant", "Yes <think>.", "hm </thin")


def test_thinking_markers_of_the_vocabulary_work_as_well():
    markers = (*CHAT_MARKERS, "<think>", "</think>")
    replies = ["<think>\nhm\n</think>\n\nYes."]
    session, engine, library = chat(replies, markers, template=QWEN3)
    for marker in ("<think>", "</think>"):  # as in Qwen3: added, not special
        object.__setattr__(engine.tokenizer.markers[marker], "is_hidden", False)

    assert say(session, engine, library, "why?") == [
        Chunk("reasoning", "hm\n"),
        Chunk("answer", "Yes."),
    ]


def test_think_off_is_passed_to_the_template():
    session, engine, library = chat(["Yes."], template=QWEN3)
    session.set_option("think", "off")

    assert say(session, engine, library, "why?") == [Chunk("answer", "Yes.")]
    prompt = engine.tokenizer.decode(engine.requests[0].token_ids)
    assert prompt.startswith(user("why?") + ASKS + "<think>\n\n</think>\n\n")
    assert session.options()["think"] is False


def test_a_prompt_that_opens_the_thinking_is_understood():
    template = QWEN3.replace(
        "'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}"
    )
    session, engine, library = chat(["hm</think>Yes."], template=template)

    assert say(session, engine, library, "why?") == [
        Chunk("reasoning", "hm"),
        Chunk("answer", "Yes."),
    ]


def test_a_reply_stopped_while_thinking_has_no_answer():
    session, engine, library = chat(["<think>hmmm"], template=QWEN3)
    session.send("why?")
    engine.step(9)
    library.pump()
    session.stop()

    assert session.messages[-1] == Message("assistant", "", "hm")


def test_think_is_refused_where_the_template_cannot():
    session, _, _ = chat()
    with pytest.raises(UsageError, match="no switch for thinking"):
        session.set_option("think", "on")


# The queue


def test_texts_sent_while_a_reply_is_made_wait_their_turn():
    session, engine, library = chat(["one", "two", "three"])
    for text in ("a", "b", "c"):
        session.send(text)
    assert session.queued == ["b", "c"] and len(engine.requests) == 1
    engine.run()
    library.pump()
    assert session.queued == ["c"] and session.is_working
    while session.is_working:
        engine.run()
        library.pump()

    assert [m.content for m in session.messages] == ["a", "one", "b", "two", "c", "three"]


def test_output_tells_turns_and_replies_apart():
    session, engine, library = chat(["one", "", "three"])
    engine.num_cached_tokens = 1 << 20
    session.set_option("n", "2")
    for text in ("a", "b", "c"):
        session.send(text)
    while session.is_working:
        engine.run()
        library.pump()
    session.send("d")
    session.stop()

    assert session.take_output() == [
        Chunk("asked", "a"),
        Chunk("answer", "on"),
        Chunk("remark", "cut at 2 tokens"),
        Chunk("asked", "b"),
        Chunk("remark", "empty reply"),
        Chunk("asked", "c"),
        Chunk("answer", "th"),
        Chunk("remark", "cut at 2 tokens"),
        Chunk("asked", "d"),
        Chunk("remark", "stopped"),  # before the first token: nothing is known of what it cost
    ]


def test_queued_texts_can_be_dropped():
    session, engine, library = chat(["one"])
    for text in ("a", "b", "c"):
        session.send(text)

    assert session.drop_queued() == 2
    engine.run()
    library.pump()
    assert not session.is_working and len(engine.requests) == 1


def test_a_queued_text_that_does_not_fit_is_reported():
    session, engine, library = chat(["one"])
    session.send("a")
    session.send("b" * 50)
    engine.max_prompt = 40
    engine.run()
    library.pump()

    answer, notice = output(session)
    assert answer == Chunk("answer", "one")
    assert notice.kind == "notice" and notice.text.startswith("not sent: ")
    assert not session.is_working


# The tree


def two_turns(**options):
    session, engine, library = chat(["one", "two"], **options)
    say(session, engine, library, "a")
    say(session, engine, library, "b")
    return session, engine, library


def contents(session):
    return [message.content for message in session.messages]


def test_an_undo_that_cuts_compressed_tokens_says_what_is_computed_again():
    session, engine, _library = two_turns()
    session.take_output()
    engine.num_lost_tokens = 1234

    session.undo()

    said = [chunk.text for chunk in session.take_output() if chunk.kind == "remark"]
    assert said == [
        "1,234 kept tokens were compressed with later ones: computed again with the next turn"
    ]
    engine.num_lost_tokens = 0
    session.undo()
    assert session.take_output() == []


def test_undo_and_redo_walk_the_path():
    session, engine, _library = two_turns()
    num_tokens = engine.requests[0].num_prompt_tokens + len("one") + 1

    assert session.undo() == 1
    assert contents(session) == ["a", "one"]
    assert session.num_context_tokens == num_tokens
    assert engine.calls[-1] == ("trim", session.id, num_tokens)
    session.redo()
    assert contents(session) == ["a", "one", "b", "two"]
    assert session.undo(9) == 2
    assert contents(session) == [] and session.num_context_tokens == 0
    session.redo()
    session.redo()
    assert contents(session) == ["a", "one", "b", "two"]
    with pytest.raises(UsageError, match="nothing to redo"):
        session.redo()
    session.undo(2)
    with pytest.raises(UsageError, match="nothing to undo"):
        session.undo()


def test_regen_asks_the_same_tokens_on_a_new_branch():
    session, engine, library = two_turns()
    engine.replies += ["three", "four"]
    session.regen()
    engine.run()
    library.pump()

    assert contents(session) == ["a", "one", "b", "three"]
    first, again = engine.requests[1:]
    assert again.token_ids[: again.num_prompt_tokens] == first.token_ids[: first.num_prompt_tokens]
    assert [request.branch for request in engine.requests] == [0, 0, 1]
    say(session, engine, library, "c")
    assert engine.requests[-1].branch == 1  # what follows stays on the branch


def test_edit_replaces_the_last_turn_and_keeps_the_old_one():
    session, engine, library = two_turns()
    engine.replies += ["three"]
    session.edit("B")
    engine.run()
    library.pump()

    assert contents(session) == ["a", "one", "B", "three"]
    rows = [(row.depth, row.user, row.is_on_path) for row in session.tree()]
    assert rows == [(0, "a", True), (1, "b", False), (1, "B", True)]
    session.undo()
    session.redo()
    assert contents(session)[-1] == "three"


def test_clear_starts_anew_and_can_be_redone():
    session, engine, library = two_turns()
    session.send("c")
    session.send("d")
    session.clear()

    assert contents(session) == [] and session.queued == [] and not session.is_working
    assert engine.calls[-1] == ("trim", session.id, 0)
    say(session, engine, library, "x")
    assert engine.requests[-1].branch == 1
    assert len(session.tree()) == 4


def test_moves_are_refused_while_a_reply_is_made():
    session, _engine, _library = two_turns()
    session.send("c")
    for move in (session.undo, session.redo, session.regen, lambda: session.edit("x")):
        with pytest.raises(UsageError, match="stop it first"):
            move()


def test_regen_and_edit_need_a_turn():
    session, _, _ = chat()
    for move in (session.regen, lambda: session.edit("x")):
        with pytest.raises(UsageError, match="no turn yet"):
            move()


def test_a_redone_branch_keeps_its_tokens():
    session, engine, library = two_turns()
    engine.replies += ["three", "four"]
    session.undo()
    say(session, engine, library, "other")
    session.undo()
    session._leaf.last_child = session._leaf.children[0]
    session.redo()
    say(session, engine, library, "c")

    old, new = engine.requests[1].token_ids, engine.requests[3].token_ids
    assert new[: len(old)] == old


# Limits


def test_a_prompt_that_cannot_fit_changes_nothing():
    session, engine, _library = two_turns(max_model_len=150)
    before = (session.prompt_view(), session.tree(), session.num_context_tokens)
    with pytest.raises(
        CapacityError, match=r"shorten the text by \d+ tokens, /undo turns or /clear"
    ):
        session.send("x" * 200)

    assert (session.prompt_view(), session.tree(), session.num_context_tokens) == before
    assert not session.is_working and len(engine.requests) == 2


def test_the_longest_prompt_leaves_one_token_for_the_reply():
    session, engine, _library = chat(max_model_len=100)
    num_chars = 100
    while not session.is_working:
        try:
            session.send("x" * num_chars)
        except CapacityError:
            num_chars -= 1

    assert engine.requests[0].num_prompt_tokens == 99


def test_ten_megabytes_are_refused_without_being_read():
    session, _engine, _library = chat(max_model_len=4096)
    with pytest.raises(CapacityError, match="10,000,000 characters"):
        session.send("x" * 10_000_000)


def test_what_the_engine_refuses_changes_nothing():
    session, engine, _library = chat()
    engine.max_prompt = 3
    with pytest.raises(CapacityError):
        session.send("hi")

    assert session.messages == [] and session.tree() == [] and not session.is_working


def test_a_full_context_ends_the_reply_with_a_notice():
    session, engine, library = chat(["x" * 500], max_model_len=64)
    _answer, notice = say(session, engine, library, "hi")

    assert notice.kind == "notice"
    assert notice.text.startswith("context full: 64 of 64 tokens; /undo turns, /clear")
    assert session.last_reply.finish_reason == "length"
    assert session.num_context_tokens == 64 == session.max_context


def test_a_pinned_chat_that_fills_the_pool_uncompressed_is_told_that_pinning_is_the_limit():
    session, engine, library = chat(["x" * 500, "abcdef"], max_model_len=100)
    engine.max_context = 64
    library.pin()
    _answer, notice = say(session, engine, library, "hi")

    assert notice.kind == "notice"
    assert notice.text == (
        "the KV pool holds 64 tokens of a pinned chat, which is not compressed; /unpin it, "
        "/undo turns, /clear, or /fork an earlier point"
    )
    session.undo()
    session.set_option("n", "3")
    assert say(session, engine, library, "hi") == [Chunk("answer", "abc")]


def test_a_reply_at_its_own_limit_has_no_notice():
    session, engine, library = chat(["abcdef"])
    session.set_option("n", "3")

    assert say(session, engine, library, "hi") == [Chunk("answer", "abc")]
    assert session.last_reply.finish_reason == "length"


def test_an_engines_error_is_told_and_the_chat_goes_on():
    session, engine, library = chat(["abc", "fine"])
    session.send("hi")
    engine.step(2)
    engine.fail("3 logits were not finite; the reply was ended")
    library.pump()

    assert output(session) == [
        Chunk("answer", "ab"),
        Chunk("notice", "3 logits were not finite; the reply was ended"),
    ]
    assert say(session, engine, library, "again") == [Chunk("answer", "fine")]


def test_events_of_another_request_are_not_taken():
    session, _engine, _library = chat()
    session.send("hi")

    assert session.apply(Event(99, session.id, (1, 2)), 0.0) is False
    assert output(session) == []


# Settings


def test_options_are_set_shown_and_refused_by_name():
    session, _, _ = chat()
    values = {
        "temp": ("0", 0.0),
        "top_k": ("5", 5),
        "top_p": ("0.5", 0.5),
        "min_p": ("0.1", 0.1),
        "typical_p": ("0.9", 0.9),
        "repeat_penalty": ("1.1", 1.1),
        "frequency_penalty": ("-0.5", -0.5),
        "presence_penalty": ("0.5", 0.5),
        "repeat_last_n": ("-1", -1),
        "dry_multiplier": ("0.8", 0.8),
        "dry_base": ("2", 2.0),
        "dry_allowed_length": ("3", 3),
        "dry_penalty_last_n": ("64", 64),
        "n": ("128", 128),
        "stop": ('["a\\n", "b"]', ("a\n", "b")),
        "ignore_eos": ("on", True),
        "seed": ("42", 42),
    }
    for name, (text, _) in values.items():
        session.set_option(name, text)

    assert session.options() == {name: value for name, (_, value) in values.items()} | {
        "think": None
    }
    session.set_option("n", "-1")
    session.set_option("stop", 'say "x"\\n')
    assert session.options()["n"] is None and session.options()["stop"] == ('say "x"\n',)
    session.set_option("stop", "")
    assert session.options()["stop"] == ()
    for name, text in (
        ("temp", "hot"),
        ("temp", "nan"),
        ("temp", "-1"),
        ("top_p", "1.5"),
        ("top_k", "1.5"),
        ("n", "0"),
        ("seed", "-2"),
        ("seed", "9" * 5000),
        ("ignore_eos", "maybe"),
        ("stop", "[1]"),
        ("stop", '["a"'),
        ("nonsense", "1"),
    ):
        with pytest.raises(UsageError):
            session.set_option(name, text)


def test_a_seed_is_drawn_for_each_session_unless_one_is_given():
    _, _, library = chat(seed=None)
    seeds = {library.new().seed for _ in range(8)}
    assert len(seeds) == 8
    library.current.set_option("seed", "-1")
    assert library.current.seed not in seeds

    _, _, library = chat(seed=3)
    assert {library.new().seed for _ in range(3)} == {3}


def test_a_new_system_text_holds_from_the_next_turn_on():
    session, engine, library = two_turns()
    session.set_system("Be brief.")
    say(session, engine, library, "c")

    assert session.prompt_view()[0].startswith(f"<|im_start|>system\nBe brief.{END}" + user("a"))
    assert session.messages[0] == Message("system", "Be brief.")


# Exports


def test_exports_say_what_was_said():
    session, engine, library = chat(
        ["<think>\nhm\nwell\n</think>\n\nYes.\n"], template=QWEN3, system="S"
    )
    say(session, engine, library, "why?\n\nreally")

    assert as_markdown(session.name, session.messages) == (
        "# chat-1\n\n## System\n\nS\n\n## User\n\nwhy?\n\nreally\n\n"
        "## Assistant\n\n> hm\n> well\n\nYes.\n"
    )
    lines = [json.loads(line) for line in as_jsonl(session.messages).splitlines()]
    assert lines == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "why?\n\nreally"},
        {"role": "assistant", "content": "Yes.\n", "reasoning": "hm\nwell"},
    ]


# Everything at once


@pytest.mark.parametrize("template", [LLAMA2, LLAMA3, QWEN3, CHATML, None])
@pytest.mark.parametrize("kind", ["byte_level", "prepend", "metaspace_first"])
def test_whatever_is_said_the_ids_are_those_of_the_rendered_text(kind, template):
    """Random replies, tokens that are no text among them; stops, undo, regen, forks."""
    rng = random.Random(f"{kind} {template and len(template)}")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    source = text_source(tokenizer_json=tokenizer_json(kind), tokenizer_config=names)
    tokenizer = load_tokenizer(source, 9999)
    chat_format = load_chat_format(source, tokenizer, None if template else "plain")
    if template:
        chat_format = ChatFormat("model", template, tokenizer, sandbox.render)
    engine = ScriptedEngine(tokenizer)
    library = scripted_library(engine, chat_format)
    words = ["hi", " a\n", "<|im_end|>", "[INST]", "😀", "\ufffd", "</think>", "  "]
    for _ in range(40):
        session = rng.choice(library.sessions)
        engine.replies.append([rng.randrange(tokenizer.num_ids) for _ in range(rng.randrange(30))])
        act = rng.choice(["send", "send", "stop", "undo", "regen", "fork"])
        if act in ("undo", "regen") and not session.messages:
            continue
        if act == "undo":
            session.undo()
            continue
        if act == "fork":
            library.switch(session.name)
            session = library.fork()
        if act == "regen":
            session.regen()
        else:
            session.send("x" + "".join(rng.choices(words, k=rng.randrange(6))))
        request = engine.requests[-1]
        rendered = chat_format.pieces(session.messages[:-1])
        text, ids = session.prompt_view()
        assert text == "".join(piece.text for piece in rendered)
        assert ids == request.token_ids[: request.num_prompt_tokens]
        assert tokenizer.decode(ids) == text
        engine.step(rng.randrange(1, 30))
        library.pump()
        session.stop()
        assert session.prompt_view()[1][: len(ids)] == ids
        engine.replies.clear()
