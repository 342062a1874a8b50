"""A whole runtime over a tiny random model: sharing and pressure, as a person meets them."""

import pytest
from chat_driver import finish, say
from tiny_model import write_tiny_model

from kvchat.chat.runtime import RunOptions, open_runtime
from kvchat.engine.build import EngineOptions
from kvchat.errors import CapacityError, UsageError

GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def opened(model):
    """A function that opens the model; what it opened is closed at the end."""
    made = []

    def open_with(sampling=GREEDY, **engine):
        options = EngineOptions(**({"kv_mem": "4MiB"} | engine))
        made.append(open_runtime(RunOptions(str(model), options, sampling=sampling), _silent))
        return made[-1]

    yield open_with
    for runtime in made:
        runtime.close()
        stats = runtime.engine.stats()
        assert stats.num_blocks_used == 0, f"blocks not home: {stats}"


def _silent(what, done, total):
    pass


def test_a_second_turn_computes_only_what_is_new(opened):
    library = opened().library

    first = say(library, library.current, "hello there")
    second = say(library, library.current, "how are you today?")

    assert len(first) > 0
    assert len(second) > 0
    reply = library.current.last_reply
    assert reply.num_cached_tokens >= reply.num_prompt_tokens - 40
    assert reply.num_recomputed_tokens == 0


def test_a_reply_is_the_same_alone_and_among_seven_others(opened):
    library = opened().library
    alone = say(library, library.current, "one two three")

    sessions = [library.new() for _ in range(8)]
    for index, session in enumerate(sessions):
        session.send("one two three" if index == 3 else f"four five six {index}")
    finish(library)

    assert sessions[3].messages[-1].content == alone


def test_eight_chats_in_a_pool_for_three_say_what_they_say_alone(opened):
    roomy, tight = opened(), opened(kv_mem="160KiB")
    texts = [f"the quick brown fox {index} " * 4 for index in range(8)]
    alone = [say(roomy.library, roomy.library.new(), text) for text in texts]

    sessions = [tight.library.new() for _ in texts]
    for session, text in zip(sessions, texts, strict=True):
        session.send(text)
    finish(tight.library)

    stats = tight.engine.stats()
    assert stats.num_preemptions + stats.num_drops > 0
    assert [session.messages[-1].content for session in sessions] == alone


def test_a_fork_shares_its_parents_blocks_and_goes_its_own_way(opened):
    runtime = opened()
    library = runtime.library
    parent = library.current
    say(library, parent, "a chat runtime keeps many chats")
    used = runtime.engine.stats().num_blocks_used

    child = library.fork("child")

    assert runtime.engine.stats().num_blocks_used == used
    say(library, child, "alive in one pool")
    assert child.last_reply.num_recomputed_tokens == 0
    assert [m.content for m in parent.messages] == [m.content for m in child.messages][:2]


def test_the_same_seed_gives_the_same_reply_whoever_else_runs(opened, model):
    sampling = {"temperature": 1.5, "max_tokens": 24, "ignore_eos": True}
    replies = []
    for num_others in (0, 5):
        library = opened(sampling).library
        session = library.current
        session.set_option("seed", "7")
        for _ in range(num_others):
            library.new().send("something else")
        session.send("hello")
        finish(library)
        replies.append(session.messages[-1].content)

    assert replies[0] == replies[1]


def test_a_prompt_that_cannot_fit_is_refused_with_numbers_and_the_chat_goes_on(opened):
    library = opened(context=64).library

    with pytest.raises(CapacityError, match=r"\d+ tokens"):
        library.current.send("word " * 200)

    assert say(library, library.current, "hello")


def test_a_context_that_fills_up_ends_the_reply_and_says_so(opened):
    library = opened({"temperature": 0.0, "ignore_eos": True}, context=64).library

    library.current.send("hello there")
    finish(library)

    assert library.current.last_reply.finish_reason == "length"
    assert library.current.num_context_tokens == 64
    notices = [c.text for c in library.current.take_output() if c.kind == "notice"]
    assert any("context full" in text for text in notices)


def test_cuda_by_name_is_refused_and_never_replaced(opened):
    with pytest.raises(UsageError, match="--device cuda:0: "):
        opened(device="cuda:0")
