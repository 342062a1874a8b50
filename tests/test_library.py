"""The library: names, order, forks, and events that come from another thread."""

import threading

import pytest
from scripted_engine import ScriptedEngine, scripted_library, scripted_tokenizer

from kvchat.chat.reply import Chunk
from kvchat.engine.request import Event
from kvchat.errors import UsageError


def library_of(*replies, **options):
    engine = ScriptedEngine(scripted_tokenizer())
    engine.replies += replies
    return scripted_library(engine, **options), engine


def names(library):
    return [session.name for session in library.sessions]


def finish(library, engine):
    while library.is_working:
        engine.run()
        library.pump()


def contents(session):
    return [message.content for message in session.messages]


def test_sessions_are_named_numbered_and_found():
    library, engine = library_of()
    library.new()
    library.new("notes")
    library.new("notes-2")
    library.new()

    assert names(library) == ["chat-1", "chat-2", "notes", "notes-2", "chat-3"]
    assert library.switch("2").name == "chat-2"
    assert library.switch("notes").name == "notes"
    assert library.switch("notes-").name == "notes-2"
    assert library.current.name == "notes-2"
    assert engine.calls[-1] == ("set_foreground", library.current.id)
    for key, message in (
        ("chat", "could be chat-1, chat-2, chat-3"),
        ("9", "no session"),
        ("9" * 5000, "no session"),
        ("", "no"),
    ):
        with pytest.raises(UsageError, match=message):
            library.switch(key)


def test_names_are_plain_words_of_their_own():
    library, _ = library_of()
    library.new("ok 1_2-3.x")
    for name in (
        "",
        " a",
        ".a",
        "a/b",
        "a..b",
        "ü",
        "a\n",
        "x" * 65,
        "con",
        "NUL",
        "com1",
        "lpt9.txt",
        "-",
    ):
        with pytest.raises(UsageError, match="a session cannot be called"):
            library.new(name)
    with pytest.raises(UsageError, match="already called"):
        library.new("chat-1")
    library.rename("fine")
    assert names(library) == ["chat-1", "fine"]
    library.rename("fine")
    with pytest.raises(UsageError, match="already"):
        library.rename("chat-1")


def test_closing_stops_releases_and_looks_at_a_neighbour():
    library, engine = library_of()
    first, second = library.current, library.new()
    second.send("hi")

    assert library.close() is first
    assert ("abort", 1) in engine.calls and ("release", second.id) in engine.calls
    third = library.new()
    assert library.close("1") is third
    assert library.close().name == "chat-4"  # there is always one
    assert not library.is_working


def test_sessions_talk_at_the_same_time_and_are_marked_unread():
    library, engine = library_of("from one", "from two")
    first = library.current
    first.send("a")
    second = library.new()
    second.send("b")
    assert library.is_working and library.num_unfinished == 2
    finish(library, engine)

    assert [contents(s)[-1] for s in (first, second)] == ["from one", "from two"]
    assert (first.unread, second.unread) == (1, 0)
    library.switch("1")
    assert first.unread == 0
    assert [c.text for c in first.take_output()] == ["a", "from one"]


def test_unfinished_counts_what_runs_and_what_waits():
    library, engine = library_of()
    for text in "abc":
        library.current.send(text)

    assert library.num_unfinished == 3
    finish(library, engine)
    assert library.num_unfinished == 0


def test_a_fork_goes_on_from_the_last_finished_turn_while_the_parent_talks():
    library, engine = library_of("one", "two", "from the child")
    parent = library.current
    parent.set_option("temp", "0.5")
    parent.send("a")
    finish(library, engine)
    parent.send("b")
    child = library.fork("other")

    held = len(engine.requests[0].token_ids)
    assert ("fork", parent.id, child.id, held) in engine.calls
    assert library.current is child and parent.is_working
    assert contents(child) == ["a", "one"]
    assert child.prompt_view()[1] == engine.requests[0].token_ids
    assert child.options() == parent.options()
    child.send("c")
    finish(library, engine)
    assert contents(parent) == ["a", "one", "b", "two"]
    assert contents(child) == ["a", "one", "c", "from the child"]
    assert [request.branch for request in engine.requests] == [0, 0, 1]
    child.undo(2)
    assert contents(parent) == ["a", "one", "b", "two"]


def test_branch_numbers_of_a_family_are_never_given_twice():
    library, engine = library_of()
    parent = library.current
    parent.send("a")
    finish(library, engine)
    children = [library.fork() for _ in range(2)]
    for session in (parent, *children, parent):
        if len(session.messages) == 2:
            session.send("b")
        else:
            session.regen()
        finish(library, engine)
    children[0].undo()
    children[0].regen()

    assert [request.branch for request in engine.requests] == [0, 0, 1, 2, 3, 4]


def test_fan_asks_one_text_with_each_arms_options():
    library, engine = library_of("base", "cold", "hot")
    parent = library.current
    parent.send("a")
    finish(library, engine)
    arms = library.fan("b", [{"temp": "0"}, {"temp": "1.5", "top_k": "3"}])
    finish(library, engine)

    assert [arm.name for arm in arms] == ["chat-1.1", "chat-1.2"]
    assert [contents(arm) for arm in arms] == [
        ["a", "base", "b", "cold"],
        ["a", "base", "b", "hot"],
    ]
    assert [request.sampling.temperature for request in engine.requests[1:]] == [0.0, 1.5]
    assert [request.branch for request in engine.requests] == [0, 1, 2]
    assert engine.requests[1].token_ids[:40] == engine.requests[2].token_ids[:40]
    assert library.current is parent and contents(parent) == ["a", "base"]


def test_a_fan_with_a_bad_arm_leaves_nothing_behind():
    library, _engine = library_of()
    with pytest.raises(UsageError):
        library.fan("b", [{"temp": "0"}, {"temp": "hot"}])

    assert names(library) == ["chat-1"] and not library.is_working


def test_send_all_reaches_every_session_that_can_take_it():
    library, engine = library_of(max_model_len=120)
    full = library.current
    full.send("x" * 60)
    finish(library, engine)
    library.new()
    refusals = library.send_all("y" * 40)

    assert [refusal.session for refusal in refusals] == [full]
    assert "shorten" in str(refusals[0].error)
    assert library.current.is_working and not full.is_working


def test_events_may_come_from_any_thread_and_are_applied_by_the_pump():
    told = threading.Event()
    library, engine = library_of("hello", notify=told.set)
    library.current.send("a")
    assert library.pump() is False
    worker = threading.Thread(target=engine.run)
    worker.start()
    worker.join()

    assert told.is_set()
    assert library.current.take_output() == [Chunk("asked", "a")] and library.current.is_working
    assert library.pump(timeout=5) is True
    assert library.current.take_output()[0].text == "hello"
    assert library.pump() is False


def test_the_pump_waits_for_the_first_event():
    library, engine = library_of("hello")
    library.current.send("a")
    worker = threading.Timer(0.05, engine.run)
    worker.start()

    assert library.pump(timeout=30) is True
    worker.join()
    finish(library, engine)


def test_events_of_closed_sessions_are_dropped():
    library, _engine = library_of()
    library.on_events([Event(1, 99, (1,)), Event(2, 99, finish_reason="stop")])

    assert library.pump() is False
