"""The scheduler under memory pressure: what is compressed before anybody waits or gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_device import continuation
from test_scheduler import Bench, reply_of, shares, text

from kvchat.config import KVPolicy
from kvchat.engine.history import History
from kvchat.engine.stats import read_session_kv, read_stats
from kvchat.errors import CapacityError
from kvchat.kv.block_ops import CompressSpan
from kvchat.kv.ladder import Compression, Ladder
from kvchat.kv.layout import Codec

NATIVE, INT8, INT4 = Codec
AUTO = KVPolicy("auto", window=8, sink=4, span_blocks=(1, 2), num_reserved=2)
AUTO4 = KVPolicy("auto4", window=8, sink=4, span_blocks=(1, 2, 4), num_reserved=2)
EAGER = KVPolicy("int8", window=8, sink=4, span_blocks=(1, 2), num_reserved=2)


def bench_of(kv, num_blocks, **config):
    config = {"max_model_len": 10_000, "max_num_batched_tokens": 16} | config
    return Bench(num_blocks, 4, kv=kv, **config)


def idle(bench, session_id, num_tokens):
    """A session that has said so much and waits for its next turn."""
    bench.submit(session_id, text(num_tokens, session_id * 10_000), max_tokens=1)
    bench.finish()


# --- what a request alone can reach ---


@pytest.mark.parametrize(
    "kv",
    [AUTO, AUTO4, EAGER, replace(AUTO4, window=0, sink=0)],
    ids=["auto", "auto4", "int8", "all"],
)
@pytest.mark.parametrize("num_blocks", [12, 13, 26])
def test_a_request_alone_reaches_exactly_what_the_pool_holds(kv, num_blocks):
    bench = bench_of(kv, num_blocks)
    limit = bench.config.max_request_tokens
    assert limit > (num_blocks - 3) * 4

    with pytest.raises(CapacityError, match=f"at most {limit - 1} fit"):
        bench.submit(1, text(limit))
    request = bench.submit(2, text(limit - 1))
    bench.finish()

    assert request.finish_reason == "length" and len(request.token_ids) == limit
    assert reply_of(request) == continuation(text(limit - 1), 1)
    # and not a token more: with one block less the same request does not fit
    assert bench_of(kv, num_blocks - 1).config.max_request_tokens < limit


def test_it_grows_to_the_limit_token_by_token_and_idle_ones_are_compressed_then_dropped():
    bench = bench_of(AUTO, 26)
    idle(bench, 1, 40)
    limit = bench.config.max_request_tokens

    request = bench.submit(2, text(3))
    bench.finish()

    assert len(request.token_ids) == limit
    assert reply_of(request) == continuation(text(3), limit - 3)
    assert bench.scheduler.counters.num_drops == 1
    assert bench.scheduler.counters.num_preemptions == 0


# --- the order of the ladder ---


def test_idle_chats_are_compressed_before_one_is_dropped():
    bench = bench_of(AUTO, 25)  # 22 blocks for claims
    idle(bench, 1, 40)
    idle(bench, 2, 40)  # 20 blocks are held

    bench.submit(3, text(20), max_tokens=1)
    bench.finish()

    assert bench.scheduler.counters.num_drops == 0
    assert bench.pool.counters.num_compressions[NATIVE, INT8] == 3
    assert bench.held() == {1: 40, 2: 40, 3: 20}
    bench.submit(4, text(40, 4000), max_tokens=1)
    bench.finish()
    assert bench.scheduler.counters.num_drops > 0


def test_a_running_background_chat_is_compressed_before_the_foreground_and_neither_is_preempted():
    bench = bench_of(AUTO, 27)
    bench.scheduler.set_foreground(2)
    front = bench.submit(2, text(40), max_tokens=30)
    bench.step()
    back = bench.submit(3, text(40, 5000), max_tokens=30)
    bench.finish()

    assert bench.scheduler.counters.num_preemptions == 0
    assert reply_of(front) == continuation(text(40), 30)
    assert reply_of(back) == continuation(text(40, 5000), 30)
    first = {session: bench.scheduler.history(session)[0] for session in (2, 3)}
    assert first[3].at_s <= first[2].at_s


def short_of_reserve():
    """A full pool in which a copy on write has taken a block of the reserve, and a turn of session
    2 that needs a new block. A step may compress one span."""
    bench = bench_of(replace(AUTO, slice_tokens=8, low_share=0, high_share=0), 33)
    idle(bench, 1, 58)
    idle(bench, 3, 60)
    bench.scheduler.fork(1, 2, 58)
    said = [*text(58, 10_000), 7, 7]
    bench.submit(2, said, max_tokens=1)
    bench.finish()
    assert bench.pool.num_held == 31 and not bench.pool.counters.num_compressions
    return bench, bench.submit(4, [*said, 8, 9], session_id=2, max_tokens=1)


def test_a_step_may_only_compress_and_nobody_is_dropped_while_there_is_more():
    bench, request = short_of_reserve()

    batch = bench.scheduler.schedule()

    assert not batch.rows and not batch.num_tokens
    assert [type(op) for op in batch.block_ops] == [CompressSpan]
    assert request.wait_reason == "waiting for memory, compressing (0 ahead)"
    assert bench.scheduler.update(batch, bench.device.launch(batch).tokens()) == []
    bench.check()
    assert bench.step() == {4: (60, 2)}
    assert bench.scheduler.counters.num_drops == 0


def test_a_prompt_longer_than_the_free_memory_is_claimed_as_it_is_computed():
    bench = bench_of(AUTO4, 26, max_num_batched_tokens=64)
    assert bench.config.max_request_tokens > 160 > 25 * 4

    request = bench.submit(1, text(160), max_tokens=3)
    steps = [bench.step() for _ in range(4)]
    bench.finish()

    assert steps[0] == {1: (0, 64)}
    assert reply_of(request) == continuation(text(160), 3)
    assert bench.scheduler.counters.num_preemptions == 0


def test_room_is_made_before_memory_is_short():
    bench = bench_of(replace(AUTO, low_share=0.5, high_share=0.6), 43)

    idle(bench, 1, 80)

    assert bench.pool.num_free > 21 and bench.pool.counters.num_compressions[NATIVE, INT8] > 3


def test_an_eager_mode_compresses_what_has_left_the_window_in_a_roomy_pool():
    bench = bench_of(EAGER, 400)
    request = bench.submit(1, text(30), max_tokens=20)
    bench.finish()

    assert reply_of(request) == continuation(text(30), 20)
    bench.submit(2, text(3), max_tokens=1)
    bench.step()
    # 49 tokens are computed, 48 in full blocks: [8, 40) is outside sinks and window
    by_codec = read_session_kv(bench.scheduler, 1, 10, (8, 9)).shares
    counts = {codec: share[:2] for codec, share in by_codec.items()}
    assert counts == {NATIVE: (17, 5), INT8: (32, 4)}


def test_the_ladder_is_told_who_has_its_own_copy_of_a_tail(monkeypatch):
    told = []
    monkeypatch.setattr(Ladder, "part", lambda _, seq: told.append(seq))
    bench = bench_of(AUTO, 60, max_num_batched_tokens=32)
    parent = bench.submit(1, text(17), max_tokens=3)
    bench.step()
    bench.scheduler.fork(1, 2, 17)
    bench.scheduler.fork(1, 3, 17)

    bench.step()
    assert told == [parent.seq]
    child = bench.submit(2, [*text(17), 7], max_tokens=1)
    bench.step()

    assert told == [parent.seq, child.seq] and bench.pool.counters.num_copies == 2


def unpinned(mode, num_blocks):
    """A pool in an eager mode, with all of an idle session of 800 tokens still to compress."""
    spans = AUTO4.span_blocks if mode == "int4" else EAGER.span_blocks
    kv = replace(EAGER, mode=mode, span_blocks=spans, slice_tokens=16)
    bench = bench_of(kv, num_blocks)
    bench.scheduler.set_pinned(1, True)
    idle(bench, 1, 800)
    bench.scheduler.set_pinned(1, False)
    return bench


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_backlog_of_an_eager_mode_is_spread_over_steps(mode):
    bench = unpinned(mode, 1000)
    request = bench.submit(2, text(100, 5000), max_tokens=60)
    num_ops = []
    while bench.scheduler.has_requests:
        batch = bench.scheduler.schedule()
        num_ops.append(sum(isinstance(op, CompressSpan) for op in batch.block_ops))
        bench.scheduler.update(batch, bench.device.launch(batch).tokens())
        bench.check()
    span_tokens = 8 if mode == "int8" else 16

    # twice the 16 of a step, and a span for each of two that were touched
    assert max(num_ops) * span_tokens <= 2 * 16 + 2 * span_tokens
    assert reply_of(request) == continuation(text(100, 5000), 60)
    assert bench.scheduler.history(1)[-1].end == (792 if mode == "int8" else 784)


def test_nobody_gives_way_because_an_eager_mode_has_a_backlog():
    bench = unpinned("int8", 206)  # 203 for claims, and 200 are held
    for key in range(11, 15):
        bench.scheduler.fork(1, key, 800)  # a span of five takes the slice of a step
    requests = [bench.submit(key, text(120, key * 5000), max_tokens=30) for key in (2, 3)]
    waits = set()
    while bench.scheduler.has_requests:
        bench.step()
        waits |= {request.wait_reason for request in requests}

    assert "waiting for memory, compressing (0 ahead)" in waits
    assert not bench.scheduler.counters.num_preemptions + bench.scheduler.counters.num_drops
    for key, request in zip((2, 3), requests, strict=True):
        assert reply_of(request) == continuation(text(120, key * 5000), 30)


# --- pinned sessions ---


def test_a_pinned_session_is_not_compressed_and_gives_way_last():
    bench = bench_of(AUTO, 33)  # 30 blocks for claims
    idle(bench, 1, 40)
    bench.scheduler.set_pinned(1, True)
    idle(bench, 2, 40)

    request = bench.submit(3, text(88), max_tokens=2)
    bench.finish()

    assert reply_of(request) == continuation(text(88), 2)
    assert bench.held() == {1: 40, 3: 89}
    assert not bench.scheduler.history(1)


def test_a_pinned_session_is_given_up_when_nothing_else_is_left():
    bench = bench_of(AUTO, 26)
    idle(bench, 1, 40)
    bench.scheduler.set_pinned(1, True)

    limit = bench.config.max_request_tokens
    request = bench.submit(2, text(limit - 1))
    bench.finish()

    assert len(request.token_ids) == limit and bench.scheduler.counters.num_drops == 1


def test_a_pinned_session_can_be_as_long_as_the_pool_holds_native():
    bench = bench_of(AUTO, 26)  # 23 blocks for claims: 92 tokens
    bench.scheduler.set_pinned(1, True)
    with pytest.raises(CapacityError, match="at most 91 fit, as a session that is pinned"):
        bench.submit(1, text(92))
    request = bench.submit(2, text(91), session_id=1)
    bench.finish()

    assert len(request.token_ids) == 92 and not bench.pool.counters.num_compressions
    idle(bench, 5, 100)
    with pytest.raises(CapacityError, match="the session has 100 tokens"):
        bench.scheduler.set_pinned(5, True)


# --- undo and fork in a compressed span ---


def compressed(bench, num_tokens=80):
    """Session 1 idle, [8, num_tokens - 8) of it in spans of 8 positions if the mode is eager."""
    idle(bench, 1, num_tokens)
    bench.submit(9, text(1, 9000), max_tokens=1)
    bench.finish()
    bench.scheduler.release(9)
    return bench


@pytest.mark.parametrize(
    ("num_tokens", "num_held"), [(80, 80), (77, 77), (72, 72), (64, 64), (63, 56), (61, 56), (8, 8)]
)
def test_what_is_cut_in_a_compressed_span_is_counted_and_said(num_tokens, num_held):
    bench = compressed(bench_of(EAGER, 400))

    shared = bench.scheduler.fork(1, 2, num_tokens)
    num_lost = bench.scheduler.trim(1, num_tokens)

    assert shared == (num_held, num_tokens - num_held) and num_lost == num_tokens - num_held
    assert bench.held() == {1: num_held, 2: num_held}
    assert bench.scheduler.counters.num_recomputed_tokens == 2 * num_lost
    bench.check()
    for session_id in (1, 2):
        prompt = text(num_tokens, 10_000) + text(3, 7000)
        request = bench.submit(20 + session_id, prompt, session_id, max_tokens=4)
        bench.finish()
        assert reply_of(request) == continuation(prompt, 4)
        assert request.num_cached_tokens >= num_held


def test_a_turn_that_goes_back_into_a_compressed_span_counts_what_it_computes_again():
    bench = compressed(bench_of(EAGER, 400))

    prompt = text(61, 10_000) + text(3, 7000)
    request = bench.submit(2, prompt, session_id=1, max_tokens=4)
    bench.finish()

    assert reply_of(request) == continuation(prompt, 4)
    assert bench.scheduler.counters.num_recomputed_tokens == 61 - request.num_cached_tokens == 5


def test_a_fork_of_a_compressed_chat_copies_nothing_and_shares_the_history():
    bench = compressed(bench_of(EAGER, 400))

    bench.scheduler.fork(1, 2, 80)

    assert bench.scheduler.history(2) == bench.scheduler.history(1) != ()
    assert bench.pool.counters.num_copies == 0


def test_the_history_of_a_fork_or_of_what_was_trimmed_ends_where_the_session_does():
    bench = compressed(bench_of(EAGER, 400))
    idle(bench, 2, 80)
    bench.submit(9, text(1, 9000), max_tokens=1)
    bench.finish()
    assert [entry[1:3] for entry in bench.scheduler.history(2)] == [(8, 72)]

    assert bench.scheduler.fork(1, 2, 61).num_tokens == 56
    assert bench.scheduler.trim(1, 30) == 6

    assert [entry[1:3] for entry in bench.scheduler.history(2)] == [(8, 56)]
    assert [entry[1:3] for entry in bench.scheduler.history(1)] == [(8, 24)]
    assert bench.scheduler.fork(1, 2, 8).num_tokens == 8
    assert bench.scheduler.history(2) == ()


# --- steps that fail ---


def test_a_span_that_was_not_encoded_is_found_by_nobody_and_who_holds_it_computes_again():
    bench = bench_of(EAGER, 400, max_num_seqs=2)
    first = bench.submit(1, text(40), max_tokens=30)
    second = bench.submit(2, text(40, 5000), max_tokens=30)
    for _ in range(8):
        bench.step()
    batch = bench.scheduler.schedule()
    while not any(isinstance(op, CompressSpan) for op in batch.block_ops):
        bench.scheduler.update(batch, bench.device.launch(batch).tokens())
        batch = bench.scheduler.schedule()
    rows = [row for row in batch.rows if row.request is first]
    alone = replace(batch, rows=rows, num_tokens=1)
    second.num_computed_tokens, second.num_pending_tokens = second.num_tokens - 2, 0  # not asked
    bench.scheduler._launched[-1] = alone

    events = bench.scheduler.fail(alone, "failed")

    assert [event.session_id for event in events] == [1]
    bench.check()
    bench.finish()
    assert reply_of(second) == continuation(text(40, 5000), 30)
    again = bench.submit(3, text(40), max_tokens=20)
    bench.finish()
    assert reply_of(again) == continuation(text(40), 20)


def test_a_step_without_rows_that_fails_ends_all_requests():
    bench, _ = short_of_reserve()
    batch = bench.scheduler.schedule()
    assert not shares(batch)

    events = bench.scheduler.fail(batch, "failed")

    assert [(event.session_id, event.error) for event in events] == [(2, "failed")]
    assert not bench.scheduler.has_requests and bench.held() == {}
    bench.check()


def test_a_span_of_a_step_that_could_not_be_scheduled_is_found_by_nobody(monkeypatch):
    bench = compressed(bench_of(EAGER, 400))
    bench.submit(2, text(80, 10_000) + text(12, 7000), session_id=1, max_tokens=1)
    bench.step()  # more has left the window now
    monkeypatch.setattr(bench.scheduler, "_serve", lambda *_: 1 / 0)
    bench.submit(4, text(2, 8000), max_tokens=1)
    with pytest.raises(ZeroDivisionError):
        bench.scheduler.schedule()
    assert bench.scheduler._unlaunched.block_ops
    monkeypatch.undo()

    bench.scheduler.fail(None, "failed")

    bench.check()
    prompt = text(80, 10_000) + text(12, 7000) + text(20, 6000)
    request = bench.submit(5, prompt, max_tokens=5)
    bench.finish()
    assert reply_of(request) == continuation(prompt, 5)


# --- what is told ---


def test_a_session_tells_what_it_holds_in_which_codec_and_how_that_came():
    bench = compressed(bench_of(AUTO4, 400))
    assert read_session_kv(bench.scheduler, 1, 10, (8, 9, 10)).shares == {NATIVE: (80, 20, 160)}

    bench = compressed(bench_of(EAGER, 400))
    kv = read_session_kv(bench.scheduler, 1, 10, (8, 9))

    assert kv[:3] == (80, 12, 120)
    assert kv.shares == {NATIVE: (16, 4, 32), INT8: (64, 8, 72)}
    assert [entry[1:] for entry in kv.history] == [(8, 72, NATIVE, INT8)]
    assert read_stats(bench.scheduler).num_compressions == {(NATIVE, INT8): 8}
    bench.scheduler.release(1)
    gone = read_session_kv(bench.scheduler, 1, 10, (8, 9))
    assert gone.num_blocks == 0 and not gone.shares and not gone.history


def test_neighbouring_spans_are_one_entry_of_the_history_for_a_while():
    now = [100.0]
    history = History(lambda: now[0])

    def note(start, at_s, codec=INT8):
        now[0] = 100.0 + at_s
        op = CompressSpan((1, 2), NATIVE, 3, codec)
        history.note(Compression(op, [7, 8], start, start + 8))

    note(8, 1.0)
    note(16, 2.0)
    note(32, 3.0)
    note(40, 3.5, INT4)
    note(48, 60.0, INT4)

    expected = (
        (1.0, 8, 24, NATIVE, INT8),
        (3.0, 32, 40, NATIVE, INT8),
        (3.5, 40, 48, NATIVE, INT4),
        (60.0, 48, 56, NATIVE, INT4),
    )
    assert history.of(7) == history.of(8) == expected
    history.forget(7)
    assert history.of(7) == () and history.of(8) == expected
