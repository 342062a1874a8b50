"""A full arena: who was idle for longest leaves it for those that are wanted sooner."""

from __future__ import annotations

import pytest
from fake_device import continuation
from test_parked_chats import chats_with_a_queued_one
from test_scheduler import Bench, reply_of, text

from kvchat.engine.stats import read_stats


def evening_of_three(num_host_slots: int) -> Bench:
    """Sessions 1 to 3, of four blocks each, the coldest first; session 4 has need of all eight."""
    bench = Bench(14, num_host_slots=num_host_slots)
    for session_id in (1, 2, 3):
        bench.submit(session_id, text(12, session_id * 1000), max_tokens=4)
        bench.finish()
    return bench


@pytest.mark.parametrize(
    ("num_host_slots", "parked", "num_displaced"),
    [(3, [], 0), (4, [3], 2), (7, [3], 2), (8, [2, 3], 1), (12, [1, 2, 3], 0)],
)
def test_the_coldest_leaves_a_full_arena_for_one_that_was_used_later(
    num_host_slots, parked, num_displaced
):
    bench = evening_of_three(num_host_slots)

    request = bench.submit(4, text(46, 4000), max_tokens=3)
    bench.finish()

    counters = bench.scheduler.arena.counters
    assert list(bench.scheduler.parked) == parked
    assert (counters.num_displaced, read_stats(bench.scheduler).num_displaced) == (
        num_displaced,
    ) * 2
    assert bench.scheduler.counters.num_drops == 3 - len(parked)
    assert reply_of(request) == continuation(text(46, 4000), 3)
    again = bench.submit(5, [*bench.requests[3].token_ids, 5], session_id=3, max_tokens=1)
    bench.step()
    assert again.num_cached_tokens == (15 if parked else 4)


@pytest.mark.parametrize("kept", ["foreground", "pinned", "waiting"])
def test_nobody_leaves_the_arena_who_is_wanted_soon(kept):
    bench = evening_of_three(num_host_slots=8)
    bench.submit(4, text(30, 4000), max_tokens=30)
    bench.step()
    assert list(bench.scheduler.parked) == [1, 2]
    if kept == "waiting":
        bench.submit(5, [*bench.requests[1].token_ids, 5], session_id=1, max_tokens=1)
    elif kept == "pinned":
        bench.scheduler.set_pinned(1, True)
    else:
        bench.scheduler.set_foreground(1)

    while not bench.scheduler.arena.counters.num_displaced:
        bench.step()

    assert list(bench.scheduler.parked) == [1, 3]


@pytest.mark.parametrize(
    ("num_host_slots", "parked", "num_drops"), [(0, [], 2), (4, [1], 1), (8, [2, 1], 0)]
)
def test_a_session_that_waits_is_parked_when_it_gives_way(num_host_slots, parked, num_drops):
    bench = chats_with_a_queued_one(num_host_slots, max_tokens=40)

    while bench.requests[3].finish_reason is None:
        bench.step()

    assert 1 not in bench.held() and 2 not in bench.held()
    assert list(bench.scheduler.parked) == parked
    assert bench.scheduler.counters.num_drops == num_drops
    bench.finish()
    assert bench.requests[4].num_cached_tokens == (15 if parked else 4)
    assert reply_of(bench.requests[4]) == continuation(
        bench.requests[4].token_ids[: bench.requests[4].num_prompt_tokens], 2
    )
