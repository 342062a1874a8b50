"""The scheduler's exact behaviour: who gets which tokens and blocks, who waits, who gives way."""

import subprocess
import sys

import pytest
from fake_device import FakeDevice, continuation, make_request

from kvchat.config import SchedulerConfig
from kvchat.engine.scheduler import NON_FINITE, Scheduler
from kvchat.errors import CapacityError, UsageError
from kvchat.kv.block_pool import BlockPool

NEVER_EOS = frozenset()


class Bench:
    """A scheduler over a fake device, stepped by hand."""

    def __init__(self, num_blocks=101, block_size=4, **config):
        self.config = SchedulerConfig(num_blocks, block_size, **config)
        kv = self.config.kv
        self.pool = BlockPool(
            num_blocks, block_size, span_blocks=kv.span_blocks, num_reserved=kv.num_reserved
        )
        self.scheduler = Scheduler(self.config, self.pool)
        self.device = FakeDevice(num_blocks, block_size)
        self.requests = {}

    def submit(self, request_id, tokens, session_id=None, max_tokens=None, **sampling):
        sampling.setdefault("stop_token_ids", NEVER_EOS)
        request = make_request(request_id, tokens, session_id, max_tokens, **sampling)
        self.scheduler.submit(request)
        self.requests[request_id] = request
        return request

    def step(self):
        """One step; {request id: (start, num_tokens)} of its rows."""
        batch = self.scheduler.schedule()
        if batch is None:
            return {}
        self.events = self.scheduler.update(batch, self.device.launch(batch).tokens())
        self.check()
        return shares(batch)

    def finish(self, max_steps=1000):
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.step() and not self.scheduler.has_requests:
                return
        raise AssertionError(f"not done after {max_steps} steps")

    def check(self):
        self.pool.check_integrity([seq for _, seq, _ in self.scheduler.sequences()])

    def held(self):
        """{session id: tokens} of everything that holds blocks."""
        return {session: tokens for session, _, tokens in self.scheduler.sequences()}


def shares(batch):
    return {row.request.request_id: (row.start, row.num_tokens) for row in batch.rows}


def text(num_tokens, start=1000):
    return list(range(start, start + num_tokens))


def reply_of(request):
    return request.token_ids[request.num_prompt_tokens :]


def test_the_scheduler_and_the_engine_import_no_torch():
    code = (
        "import sys, kvchat.engine.engine, kvchat.engine.scheduler; print('torch' in sys.modules)"
    )

    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout == "False\n"


# --- the budget ---


def test_a_long_prompt_is_taken_in_chunks_of_the_budget():
    bench = Bench(max_num_batched_tokens=10)
    request = bench.submit(1, text(25))

    steps = [bench.step() for _ in range(5)]

    assert steps == [{1: (0, 10)}, {1: (10, 10)}, {1: (20, 5)}, {1: (25, 1)}, {1: (26, 1)}]
    assert reply_of(request) == continuation(text(25), 3)


def test_a_long_prompt_takes_what_the_running_replies_leave_and_they_go_on_at_every_step():
    bench = Bench(max_num_batched_tokens=8)
    for request_id in (1, 2, 3):
        bench.submit(request_id, text(2, request_id * 100))
    bench.step()
    bench.submit(4, text(30))

    steps = [bench.step() for _ in range(3)]

    assert steps[0] == {1: (2, 1), 2: (2, 1), 3: (2, 1), 4: (0, 5)}
    assert steps[1] == {1: (3, 1), 2: (3, 1), 3: (3, 1), 4: (5, 5)}
    assert steps[2] == {1: (4, 1), 2: (4, 1), 3: (4, 1), 4: (10, 5)}


def test_an_older_long_prompt_leaves_a_token_to_each_that_runs_and_to_one_newcomer_a_step():
    bench = Bench(max_num_batched_tokens=8)
    for request_id in (1, 2, 3):
        bench.submit(request_id, text(30, request_id * 100))

    steps = [bench.step() for _ in range(3)]

    assert steps[0] == {1: (0, 8)}
    assert steps[1] == {1: (8, 7), 2: (0, 1)}
    assert steps[2] == {1: (15, 6), 2: (1, 1), 3: (0, 1)}


def test_the_foreground_is_served_first_whenever_it_came():
    bench = Bench(max_num_batched_tokens=8)
    bench.submit(1, text(30, 100))
    bench.submit(2, text(30, 200))
    bench.scheduler.set_foreground(2)

    assert [bench.step() for _ in range(2)] == [{2: (0, 8)}, {2: (8, 7), 1: (0, 1)}]


def test_no_more_run_than_max_num_seqs_and_the_others_are_told_how_many_are_ahead():
    bench = Bench(max_num_seqs=2, max_num_batched_tokens=64)
    for request_id in range(1, 6):
        bench.submit(request_id, text(3, request_id * 100), max_tokens=2)

    assert list(bench.step()) == [1, 2]
    assert [bench.requests[i].wait_reason for i in (3, 4, 5)] == [
        "waiting for its turn (0 ahead)",
        "waiting for its turn (1 ahead)",
        "waiting for its turn (2 ahead)",
    ]
    assert list(bench.step()) == [1, 2]
    assert list(bench.step()) == [3, 4]
    assert bench.requests[3].wait_reason == ""
    assert bench.requests[5].wait_reason == "waiting for its turn (0 ahead)"


def test_no_more_run_than_the_budget_has_tokens():
    bench = Bench(max_num_seqs=64, max_num_batched_tokens=3)
    for request_id in range(1, 6):
        bench.submit(request_id, text(3, request_id * 100), max_tokens=4)

    rows = [bench.step() for _ in range(8)]

    assert max(sum(n for _, n in step.values()) for step in rows) == 3
    assert max(len(step) for step in rows) == 3


def test_a_waiting_foreground_takes_the_place_of_the_youngest():
    bench = Bench(max_num_seqs=2, max_num_batched_tokens=2)
    for request_id in (1, 2, 3):
        bench.submit(request_id, text(1, request_id * 100))
    bench.step()
    bench.scheduler.set_foreground(3)

    assert bench.step() == {3: (0, 1), 1: (1, 1)}
    assert [bench.requests[i].num_preemptions for i in (1, 2, 3)] == [0, 1, 0]


# --- the end of a reply ---


def test_a_reply_ends_at_a_stop_token_which_is_part_of_it():
    bench = Bench()
    third = continuation(text(5), 3)[2]
    request = bench.submit(1, text(5), stop_token_ids=frozenset({third}))

    bench.finish()

    assert reply_of(request) == continuation(text(5), 3)
    assert request.finish_reason == "stop"
    assert [(e.token_ids, e.finish_reason) for e in bench.events] == [((third,), "stop")]


def test_ignore_eos_goes_past_a_stop_token():
    bench = Bench()
    third = continuation(text(5), 3)[2]
    request = bench.submit(
        1, text(5), max_tokens=6, stop_token_ids=frozenset({third}), ignore_eos=True
    )

    bench.finish()

    assert reply_of(request) == continuation(text(5), 6)
    assert request.finish_reason == "length"


@pytest.mark.parametrize("limits", [{"max_model_len": 12}, {"num_blocks": 4}])
def test_without_max_tokens_a_reply_goes_to_the_end_of_the_context(limits):
    bench = Bench(**limits)
    request = bench.submit(1, text(5))

    bench.finish()

    assert len(request.token_ids) == bench.config.max_request_tokens == 12
    assert request.finish_reason == "length"


# --- what can never fit ---


@pytest.mark.parametrize("num_tokens", [11, 10])
def test_a_prompt_that_leaves_room_for_one_token_fits_the_pool_exactly(num_tokens):
    bench = Bench(num_blocks=4, max_num_batched_tokens=5)  # 3 blocks of 4: 12 tokens
    request = bench.submit(1, text(num_tokens))

    bench.finish()

    assert request.token_ids == text(num_tokens) + continuation(text(num_tokens), 12 - num_tokens)


@pytest.mark.parametrize("num_tokens", [12, 13, 4000])
def test_a_prompt_as_large_as_the_pool_is_refused_at_once_with_what_would_fit(num_tokens):
    bench = Bench(num_blocks=4)

    with pytest.raises(CapacityError) as refusal:
        bench.submit(1, text(num_tokens))

    assert str(refusal.value) == (
        f"the prompt has {num_tokens} tokens and at most 11 fit, as the KV pool holds 12 with the"
        f" reply; shorten the chat by {num_tokens - 11} tokens or raise --kv-mem"
    )
    assert not bench.scheduler.has_requests


def test_a_prompt_longer_than_the_context_names_the_context():
    bench = Bench(max_model_len=64)
    bench.submit(1, text(63))

    with pytest.raises(CapacityError, match=r"at most 63 fit, as a session holds 64 .*--ctx-size"):
        bench.submit(2, text(64))
    with pytest.raises(UsageError, match="empty"):
        bench.submit(3, [])


def test_a_request_reaches_the_end_of_the_pool_though_others_hold_and_share_its_blocks():
    bench = Bench(num_blocks=6)  # 5 blocks of 4: 20 tokens
    bench.submit(1, text(6), session_id=1, max_tokens=1)
    bench.finish()
    for child_id in (2, 3, 4):
        assert bench.scheduler.fork(1, child_id, 6).num_tokens == 6
    request = bench.submit(2, text(7), session_id=1)

    bench.finish()

    assert request.token_ids == text(7) + continuation(text(7), 13)
    assert request.num_preemptions == 0


# --- memory ---


def test_the_newest_background_request_gives_way_and_resumes_to_the_same_tokens():
    bench = Bench(num_blocks=9)  # 8 blocks of 4
    first = bench.submit(1, text(9, 100), max_tokens=12)
    second = bench.submit(2, text(9, 200), max_tokens=12)

    bench.finish()

    assert [first.num_preemptions, second.num_preemptions] == [0, 1]
    assert reply_of(first) == continuation(text(9, 100), 12)
    assert reply_of(second) == continuation(text(9, 200), 12)


def test_a_preempted_request_computes_only_what_was_taken_from_the_cache():
    bench = Bench(num_blocks=9)
    bench.submit(1, text(13, 100), max_tokens=12)
    second = bench.submit(2, text(9, 200), max_tokens=12)
    while not second.num_preemptions:
        bench.step()
    assert second.wait_reason == "waiting for memory (0 ahead)"
    num_tokens = len(second.token_ids)
    while 2 not in (rows := bench.step()):
        pass

    start, num_new = rows[2]

    assert start == 8 and start + num_new == num_tokens
    assert second.num_cached_tokens == 0  # of its first admission


def test_the_foreground_is_never_a_victim_even_when_it_is_the_newest():
    bench = Bench(num_blocks=9)
    first = bench.submit(1, text(9, 100), max_tokens=12)
    second = bench.submit(2, text(9, 200), max_tokens=12)
    bench.scheduler.set_foreground(2)

    bench.finish()

    assert [first.num_preemptions, second.num_preemptions] == [1, 0]
    assert reply_of(first) == continuation(text(9, 100), 12)
    assert reply_of(second) == continuation(text(9, 200), 12)


def test_a_running_request_that_finds_no_block_keeps_what_it_has_and_says_so():
    bench = Bench(num_blocks=8)
    first = bench.submit(1, text(12, 100), max_tokens=3)
    second = bench.submit(2, text(12, 200), max_tokens=3)
    bench.step()

    assert bench.step() == {1: (12, 1)}
    assert second.wait_reason == "waiting for memory (0 ahead)"
    bench.step()
    assert first.finish_reason == "length"
    assert bench.step() == {2: (12, 1)}
    assert second.wait_reason == "" and second.num_preemptions == 0


def test_a_waiting_background_request_waits_for_memory_in_order_of_arrival():
    bench = Bench(num_blocks=9)
    bench.submit(1, text(20, 100), max_tokens=8)
    second = bench.submit(2, text(14, 200), max_tokens=2)
    third = bench.submit(3, text(1, 300), max_tokens=2)

    assert list(bench.step()) == [1]
    assert second.wait_reason == "waiting for memory (0 ahead)"
    assert third.wait_reason == "waiting for memory (1 ahead)"
    bench.finish()
    assert reply_of(second) == continuation(text(14, 200), 2)
    assert [bench.requests[i].num_preemptions for i in (1, 2, 3)] == [0, 0, 0]


def test_a_waiting_foreground_takes_its_blocks_from_the_youngest():
    bench = Bench(num_blocks=9)
    for request_id in (1, 2):
        bench.submit(request_id, text(12, 100 * request_id))
    bench.step()
    third = bench.submit(3, text(15, 300))
    bench.scheduler.set_foreground(3)

    assert bench.step() == {3: (0, 15), 1: (12, 1)}
    assert [bench.requests[i].num_preemptions for i in (1, 2, 3)] == [0, 1, 0]
    assert third.wait_reason == ""


def test_idle_sessions_give_way_before_running_ones_the_coldest_first_the_foreground_last():
    bench = Bench(num_blocks=13)  # 12 blocks
    for session_id in (1, 2, 3):
        bench.submit(session_id, text(10, session_id * 100), max_tokens=2)
        bench.finish()
    bench.scheduler.set_foreground(1)
    assert list(bench.held()) == [1, 2, 3]

    bench.submit(4, text(14, 400), max_tokens=1)
    bench.finish()
    assert list(bench.held()) == [1, 3, 4]
    bench.submit(5, text(30, 500), max_tokens=1)
    bench.finish()

    assert list(bench.held()) == [1, 5]
    assert bench.scheduler.counters.num_drops == 3
    assert bench.scheduler.counters.num_preemptions == 0


def test_a_waiting_request_that_idle_sessions_cannot_help_leaves_them_what_they_hold():
    bench = Bench(num_blocks=9)
    bench.submit(1, text(3, 100), max_tokens=1)
    bench.finish()
    bench.submit(2, text(16, 200))
    bench.step()
    bench.submit(3, text(20, 300))
    bench.step()

    assert bench.requests[3].wait_reason == "waiting for memory (0 ahead)"
    assert bench.held() == {2: 17, 1: 3}


# --- what a session holds between its turns ---


def test_the_next_turn_computes_only_its_new_tokens():
    bench = Bench()
    first = bench.submit(1, text(9), session_id=7, max_tokens=5)
    bench.finish()
    assert bench.held() == {7: 13}  # the last token was never an input

    second = bench.submit(2, first.token_ids + text(3, 50), session_id=7, max_tokens=1)

    assert bench.step() == {2: (13, 4)}
    assert second.num_cached_tokens == 13
    assert [(e.token_ids, e.num_cached_tokens) for e in bench.events] == [
        (tuple(continuation(first.token_ids + text(3, 50), 1)), 13)
    ]


def test_only_the_first_event_tells_what_was_cached():
    bench = Bench()
    bench.submit(1, text(9), session_id=7, max_tokens=1)
    bench.finish()
    bench.submit(2, [*text(9), 5], session_id=7, max_tokens=2)

    cached = []
    for _ in range(2):
        bench.step()
        cached += [event.num_cached_tokens for event in bench.events]

    assert cached == [9, 0]


def test_a_turn_that_goes_back_keeps_the_common_prefix_and_computes_at_least_one_token():
    bench = Bench()
    bench.submit(1, text(11), session_id=7, max_tokens=2)
    bench.finish()
    bench.submit(2, text(6), session_id=7, max_tokens=1)
    assert bench.step() == {2: (5, 1)}

    bench.submit(3, [*text(3), 5, 6], session_id=7, max_tokens=1)

    assert bench.step() == {3: (3, 2)}
    assert reply_of(bench.requests[3]) == continuation([*text(3), 5, 6], 1)


def test_a_turn_takes_from_the_cache_what_is_more_than_the_session_holds():
    bench = Bench()
    bench.submit(1, text(21), session_id=7, max_tokens=1)
    bench.finish()
    bench.scheduler.trim(7, 5)
    assert bench.held() == {7: 5}

    bench.submit(2, text(22), session_id=7, max_tokens=1)

    assert bench.step() == {2: (20, 2)}


def test_an_undone_tail_is_copied_before_it_is_written_again():
    bench = Bench()
    bench.submit(1, text(8), session_id=7, max_tokens=1)
    bench.finish()
    bench.submit(2, [*text(6), 5, 6, 7], session_id=7, max_tokens=1)
    bench.finish()
    bench.submit(3, text(9), session_id=8, max_tokens=3)

    assert bench.step() == {3: (8, 1)}  # the first turn's second block was not written
    bench.finish()
    assert reply_of(bench.requests[3]) == continuation(text(9), 3)


def test_a_fork_shares_all_blocks_and_computes_only_its_own_tokens():
    bench = Bench()
    first = bench.submit(1, text(9), session_id=1, max_tokens=3)
    bench.finish()

    assert bench.scheduler.fork(1, 2, len(first.token_ids)).num_tokens == 11
    assert bench.pool.num_usable - bench.pool.num_free == 3
    bench.submit(2, [*first.token_ids, 5], session_id=2, max_tokens=2)
    bench.submit(3, [*first.token_ids, 6], session_id=1, max_tokens=2)

    assert bench.step() == {2: (11, 2), 3: (11, 2)}
    bench.finish()
    assert reply_of(bench.requests[2]) == continuation([*first.token_ids, 5], 2)
    assert reply_of(bench.requests[3]) == continuation([*first.token_ids, 6], 2)


def test_a_fork_of_a_generating_parent_shares_its_last_finished_turn():
    bench = Bench()
    first = bench.submit(1, text(9), session_id=1, max_tokens=3)
    bench.finish()
    history = first.token_ids[:]
    parent = bench.submit(2, history + text(9, 50), session_id=1, max_tokens=6)
    batch = bench.scheduler.schedule()  # while its prompt is on the device

    assert bench.scheduler.fork(1, 2, len(history)).num_tokens == 12
    bench.scheduler.update(batch, bench.device.launch(batch).tokens())
    bench.submit(3, [*history, 5], session_id=2, max_tokens=4)

    assert bench.step()[3] == (12, 1)
    bench.finish()
    assert reply_of(parent) == continuation(history + text(9, 50), 6)
    assert reply_of(bench.requests[3]) == continuation([*history, 5], 4)


def test_a_fork_gets_no_more_than_is_computed():
    bench = Bench(max_num_batched_tokens=6)
    bench.submit(1, text(20), session_id=1)
    bench.step()

    assert bench.scheduler.fork(1, 2, 20).num_tokens == 6
    assert bench.scheduler.fork(1, 3, 0).num_tokens == 0
    assert bench.held() == {1: 6, 2: 6}


def test_a_fork_of_a_session_that_lost_its_blocks_starts_from_the_cache():
    bench = Bench()
    bench.submit(1, text(9), session_id=1, max_tokens=1)
    bench.finish()
    bench.scheduler.release(1)

    assert bench.scheduler.fork(1, 2, 9).num_tokens == 0
    bench.submit(2, text(10), session_id=2, max_tokens=1)
    assert bench.step() == {2: (8, 2)}


def test_a_fork_inside_the_tail_that_the_parent_writes_parts_them_by_a_copy():
    bench = Bench()
    parent = bench.submit(1, text(9), session_id=1, max_tokens=6)
    bench.step()
    bench.step()
    said = parent.token_ids[:]
    assert (
        bench.scheduler.fork(1, 2, len(said)).num_tokens == 10
    )  # of 11: the last is not computed yet

    bench.submit(2, [*said, 5, 6, 7], session_id=2, max_tokens=3)
    bench.finish()

    assert bench.pool.counters.num_copies == 1
    assert reply_of(parent) == continuation(text(9), 6)
    assert reply_of(bench.requests[2]) == continuation([*said, 5, 6, 7], 3)


def test_a_fork_replaces_what_the_child_held():
    bench = Bench()
    for session_id in (1, 2):
        bench.submit(session_id, text(9, session_id * 100), max_tokens=1)
    bench.finish()

    assert bench.scheduler.fork(1, 2, 6).num_tokens == 6
    assert bench.held() == {1: 9, 2: 6}
    assert bench.pool.num_usable - bench.pool.num_free == 3
    bench.check()


def test_a_prompt_that_was_aborted_while_it_waited_leaves_no_trace_in_the_next_one():
    bench = Bench(num_blocks=9)
    bench.submit(1, text(8, 100), max_tokens=1)
    bench.finish()
    bench.submit(2, text(16, 200))
    bench.step()
    bench.submit(3, text(19, 100), session_id=1)  # has 8 of them, and no blocks for the rest
    bench.step()
    assert bench.requests[3].wait_reason == "waiting for memory (0 ahead)"
    assert bench.held() == {2: 17, 1: 8}

    bench.scheduler.abort(3)
    bench.scheduler.release(2)
    bench.submit(4, [*text(5, 100), 7, 8, 9, 10], session_id=1, max_tokens=1)

    assert bench.step() == {4: (5, 4)}
    assert reply_of(bench.requests[4]) == continuation([*text(5, 100), 7, 8, 9, 10], 1)


def test_trim_and_release_give_blocks_back_and_leave_running_sessions_alone():
    bench = Bench()
    bench.submit(1, text(9), session_id=1, max_tokens=1)
    bench.finish()
    bench.submit(2, text(9, 50), session_id=2)
    bench.step()

    bench.scheduler.trim(1, 4)
    bench.scheduler.trim(2, 4)
    bench.scheduler.trim(3, 4)
    assert bench.held() == {2: 9, 1: 4}
    assert bench.pool.num_usable - bench.pool.num_free == 4
    bench.scheduler.trim(1, 0)
    assert bench.scheduler.release(3) is None
    event = bench.scheduler.release(2)

    assert (event.request_id, event.finish_reason) == (2, "abort")
    assert bench.held() == {}
    assert bench.pool.num_free == bench.pool.num_usable


# --- abort, in every state ---


def run_until_decoding(bench):
    bench.step()
    bench.step()


def run_until_preempted(bench):
    run_until_decoding(bench)
    bench.submit(90, text(23, 900), session_id=90)
    bench.scheduler.set_foreground(90)
    bench.step()
    assert bench.requests[1].num_preemptions == 1


@pytest.mark.parametrize(
    ("to_state", "num_held"),
    [
        (lambda bench: None, 0),  # waiting
        (Bench.step, 8),  # prefilling: a prompt of 9 in chunks of 8
        (run_until_decoding, 9),
        (run_until_preempted, 0),
    ],
    ids=["waiting", "prefilling", "decoding", "preempted"],
)
def test_an_abort_keeps_what_is_computed_and_a_release_leaves_nothing(to_state, num_held):
    bench = Bench(num_blocks=9, max_num_batched_tokens=8)
    request = bench.submit(1, text(9))
    to_state(bench)

    event = bench.scheduler.abort(1)

    assert (event.request_id, event.token_ids, event.finish_reason) == (1, (), "abort")
    assert request.finish_reason == "abort" and request.wait_reason == ""
    assert bench.scheduler.abort(1) is None
    bench.check()
    assert bench.held().get(1, 0) == num_held
    bench.scheduler.release_all()
    bench.check()
    assert bench.pool.num_free == bench.pool.num_usable
    assert bench.scheduler.schedule() is None


@pytest.mark.parametrize("is_released", [False, True])
def test_an_abort_while_a_step_is_launched_leaves_its_table_alone_until_it_is_read(is_released):
    bench = Bench()
    request = bench.submit(1, text(9), session_id=1)
    bench.submit(2, text(9, 50), session_id=2)
    bench.step()
    batch = bench.scheduler.schedule()
    table = request.seq.table[:]

    if is_released:
        assert bench.scheduler.release(1).finish_reason == "abort"
    else:
        assert bench.scheduler.abort(1).finish_reason == "abort"
        bench.scheduler.trim(1, 3)
    assert request.seq.table == table
    events = bench.scheduler.update(batch, bench.device.launch(batch).tokens())

    assert [event.request_id for event in events] == [2]
    assert len(reply_of(request)) == 1
    assert bench.held() == ({2: 10} if is_released else {2: 10, 1: 3})
    bench.check()


def test_a_turn_sent_right_after_an_abort_goes_on_from_what_the_launched_step_computes():
    bench = Bench()
    first = bench.submit(1, text(9), session_id=1)
    bench.step()
    batch = bench.scheduler.schedule()
    bench.scheduler.abort(1)
    second = bench.submit(2, [*first.token_ids, 5, 6], session_id=1, max_tokens=4)
    bench.scheduler.update(batch, bench.device.launch(batch).tokens())

    assert bench.step() == {2: (10, 2)}
    bench.finish()
    assert reply_of(second) == continuation([*first.token_ids, 5, 6], 4)


# --- tokens that arrive a step late ---


class LateBench(Bench):
    """Schedules and launches step n + 1 before the tokens of step n are read."""

    launched = None

    def step(self):
        batch = self.scheduler.schedule()
        handle = self.device.launch(batch) if batch else None
        if self.launched:
            self.events = self.scheduler.update(self.launched[0], self.launched[1].tokens())
            self.check()
        self.launched = (batch, handle) if batch else None
        return shares(batch) if batch else {}


def test_a_step_can_be_built_before_the_last_ones_tokens_are_read():
    bench = LateBench(max_num_batched_tokens=8)
    request = bench.submit(1, text(9), max_tokens=3)

    steps = [bench.step() for _ in range(6)]

    # three tokens: of the last prompt chunk, and of two decodes; none is computed in vain
    assert steps == [{1: (0, 8)}, {1: (8, 1)}, {1: (9, 1)}, {1: (10, 1)}, {}, {}]
    assert reply_of(request) == continuation(text(9), 3)
    assert bench.held() == {1: 11}


def test_a_late_stop_token_ends_the_reply_and_its_extra_row_is_the_sessions_gain():
    bench = LateBench()
    third = continuation(text(5), 3)[2]
    request = bench.submit(1, text(5), stop_token_ids=frozenset({third}))

    bench.finish()

    assert reply_of(request) == continuation(text(5), 3)
    assert bench.held() == {1: 8}  # the stop token was an input already
    bench.submit(2, [*request.token_ids, 5], session_id=1, max_tokens=1)
    assert bench.step() == {2: (8, 1)}


def test_a_token_that_arrives_after_its_request_was_preempted_is_kept():
    bench = LateBench(num_blocks=9)
    first = bench.submit(1, text(9, 100), max_tokens=12)
    second = bench.submit(2, text(9, 200), max_tokens=12)

    bench.finish()

    assert [first.num_preemptions, second.num_preemptions] == [0, 1]
    assert reply_of(first) == continuation(text(9, 100), 12)
    assert reply_of(second) == continuation(text(9, 200), 12)


def test_a_token_that_arrives_after_its_request_was_aborted_is_dropped():
    bench = LateBench()
    request = bench.submit(1, text(9))
    bench.step()
    bench.step()
    bench.step()
    assert request.num_pending_tokens == 1

    bench.scheduler.abort(1)
    bench.step()

    assert reply_of(request) == continuation(text(9), 2)
    assert bench.scheduler.schedule() is None
    bench.check()
    assert bench.held() == {1: 11}


# --- what goes wrong ---


def test_a_row_that_is_not_finite_ends_its_request_alone_and_its_blocks_are_forgotten():
    bench = Bench()
    bad = bench.submit(1, text(9), session_id=1)
    good = bench.submit(2, text(9, 50), session_id=2, max_tokens=9)
    bench.step()
    batch = bench.scheduler.schedule()
    sampled = bench.device.launch(batch).tokens()

    events = bench.scheduler.update(batch, [-1, sampled[1]])

    assert [(e.request_id, e.finish_reason, e.error) for e in events] == [
        (1, "error", NON_FINITE),
        (2, None, ""),
    ]
    assert bad.finish_reason == "error" and len(reply_of(bad)) == 1
    assert bench.held() == {2: 10}
    assert bench.pool.match(text(9)) == 0
    bench.check()
    bench.finish()
    assert reply_of(good) == continuation(text(9, 50), 9)


def test_a_step_that_fails_ends_its_requests_and_drops_what_it_may_have_been_to_write():
    bench = Bench(max_num_seqs=2)
    for request_id in (1, 2):
        bench.submit(request_id, text(9, request_id * 100), session_id=request_id)
    bench.step()
    third = bench.submit(3, text(9, 300), max_tokens=3)
    batch = bench.scheduler.schedule()
    bench.scheduler.fork(1, 10, 9)
    bench.scheduler.abort(2)

    events = bench.scheduler.fail(batch, "out of luck")

    assert [(e.request_id, e.finish_reason, e.error) for e in events] == [
        (1, "error", "out of luck")
    ]
    assert bench.held() == {}
    assert bench.pool.match(text(9, 100)) == 8  # what was sealed before is still good
    bench.check()
    bench.finish()
    assert reply_of(third) == continuation(text(9, 300), 3)


def test_a_step_built_on_one_that_fails_fails_with_it():
    bench = Bench()
    bench.submit(1, text(9), session_id=1)
    first = bench.scheduler.schedule()
    assert bench.scheduler.fork(1, 2, 8).num_tokens == 8
    bench.submit(2, [*text(8), 5], session_id=2)
    second = bench.scheduler.schedule()
    assert shares(second) == {1: (9, 1), 2: (8, 1)}  # 2 reads what the first step was to write

    events = bench.scheduler.fail(first, "out of luck")

    assert [(e.request_id, e.finish_reason) for e in events] == [(1, "error"), (2, "error")]
    assert bench.scheduler.update(second, [7, 7]) == []
    assert bench.scheduler.schedule() is None
    assert bench.pool.match(text(9)) == 0
    bench.check()
    assert bench.pool.num_free == bench.pool.num_usable


def test_the_counters_tell_what_was_done():
    bench = Bench()
    for request_id in (1, 2):
        bench.submit(request_id, text(9, request_id * 100), max_tokens=4)
    bench.finish()
    bench.submit(3, [*text(9, 100), 5], session_id=1, max_tokens=1)
    bench.finish()

    counters = bench.scheduler.counters
    assert (counters.num_steps, counters.num_decode_steps, counters.num_decode_rows) == (5, 3, 6)
    assert counters.num_scheduled_tokens == 9 + 9 + 6 + 1
    assert counters.num_generated_tokens == 9
    assert counters.num_cached_tokens == 9
