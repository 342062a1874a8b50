"""Parking as chats meet it: who is parked and when, the same words as without, nothing leaks."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from fake_device import continuation
from mutants import Mutant, assemble, kill, load
from mutants.parking import SIMULATED, WALKED
from parking_walk import WalkFailure, walk
from simulation import Scenario, Simulation
from test_runner import CONFIG, random_decoder
from test_scheduler import NEVER_EOS, Bench, reply_of, text

from kvchat.attention.backends import make_backend
from kvchat.attention.rope import build_rope
from kvchat.config import KVPolicy, KVSpec, SamplingParams, SchedulerConfig
from kvchat.engine.request import Request, Shared
from kvchat.engine.runner import Runner
from kvchat.engine.sampler import Sampler
from kvchat.engine.scheduler import Scheduler
from kvchat.engine.stats import read_session_kv, read_stats
from kvchat.kv import block_pool, parking
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec

# --- who is parked, who comes back ---


def two_chats(num_host_slots: int = 20, **config) -> Bench:
    """Session 1 has 15 tokens in four blocks and is idle; session 2 has been given seven of the
    eight blocks that there are."""
    bench = Bench(9, num_host_slots=num_host_slots, **config)
    bench.submit(1, text(12), max_tokens=4)
    bench.finish()
    bench.submit(2, text(25, 2000), max_tokens=2)
    bench.step()
    return bench


def test_an_idle_session_is_parked_and_nothing_is_computed_twice():
    bench = two_chats()
    assert list(bench.scheduler.parked) == [1]
    assert bench.scheduler.parked[1].token_ids == [*text(12), *continuation(text(12), 4)][:15]
    bench.finish()

    history = bench.requests[1].token_ids
    request = bench.submit(3, [*history, *text(3, 3000)], session_id=1, max_tokens=3)
    bench.step()

    assert request.num_cached_tokens == 15
    assert list(bench.scheduler.parked) == [2]
    bench.finish()
    assert reply_of(request) == continuation([*history, *text(3, 3000)], 3)
    assert (bench.scheduler.counters.num_drops, bench.scheduler.counters.num_preemptions) == (0, 0)
    stats = read_stats(bench.scheduler)
    assert (stats.num_parks, stats.num_resumes, stats.num_parked_blocks) == (2, 1, 4 + 7)
    assert (stats.num_host_blocks, stats.num_host_blocks_used) == (20, 7)
    assert 0 < stats.num_restored_blocks <= 4
    shown = read_session_kv(bench.scheduler, 2, 1000, (1000,))
    assert (shown.num_tokens, shown.num_parked_tokens, shown.num_parked_blocks) == (0, 26, 7)


def test_where_the_slots_are_short_it_is_dropped_and_computed_again():
    bench = two_chats(num_host_slots=3)

    assert not bench.scheduler.parked
    assert bench.scheduler.counters.num_drops == 1
    assert bench.scheduler.arena.num_free == 3


@pytest.mark.parametrize("kept", ["foreground", "pinned"])
def test_who_is_on_screen_or_pinned_is_not_parked(kept):
    bench = Bench(9, num_host_slots=20)
    for request_id in (1, 2):
        bench.submit(request_id, text(7, request_id * 1000), max_tokens=2)
        bench.finish()
    if kept == "pinned":
        bench.scheduler.set_pinned(1, True)
    else:
        bench.scheduler.set_foreground(1)

    bench.submit(3, text(17, 3000), max_tokens=2)
    bench.step()

    assert list(bench.scheduler.parked) == [2]
    assert bench.held()[1] == 8


def test_fork_undo_and_close_of_a_parked_session_need_no_block():
    bench = two_chats()
    num_held, words = bench.pool.num_held, bench.scheduler.parked[1].token_ids[:]

    assert bench.scheduler.fork(1, 7, 10) == Shared(10, 0)
    assert bench.scheduler.trim(1, 6) == 0
    assert [bench.scheduler.parked[i].token_ids for i in (1, 7)] == [words[:6], words[:10]]
    assert bench.scheduler.arena.num_free == 20 - 3
    bench.scheduler.release(1)

    assert list(bench.scheduler.parked) == [7]
    assert (bench.scheduler.arena.num_free, bench.pool.num_held) == (17, num_held)
    bench.finish()
    request = bench.submit(9, [*words[:10], 5, 6], session_id=7, max_tokens=2)
    bench.step()
    assert request.num_cached_tokens == 10
    bench.finish()
    assert reply_of(request) == continuation([*words[:10], 5, 6], 2)
    bench.scheduler.release_all()
    assert (bench.scheduler.arena.num_free, bench.pool.num_held) == (20, 0)


def test_a_parked_session_waits_for_who_runs_and_holds_no_block_meanwhile():
    bench = two_chats()
    request = bench.submit(3, [*bench.requests[1].token_ids, 5], session_id=1, max_tokens=2)

    bench.step()

    assert request.wait_reason == "waiting for memory (0 ahead)"
    assert bench.scheduler.abort(3)
    assert list(bench.scheduler.parked) == [1]
    assert list(bench.held()) == [2]
    bench.finish()


def test_what_never_fits_as_it_was_parked_is_computed_again():
    bench = Bench(6, num_host_slots=20)
    bench.submit(1, text(16), max_tokens=3)  # 18 tokens in all five blocks
    bench.finish()
    bench.submit(2, text(9, 2000), max_tokens=1)
    bench.finish()
    assert list(bench.scheduler.parked) == [1]

    request = bench.submit(3, bench.requests[1].token_ids, session_id=1, max_tokens=1)
    bench.finish()

    assert reply_of(request) == continuation(bench.requests[1].token_ids, 1)
    assert bench.scheduler.counters.num_drops == 1


def chats_with_a_queued_one(num_host_slots: int, max_tokens: int = 20) -> Bench:
    """Session 1, the coldest, has a request that waits for its turn; session 2 is idle, session 3
    generates and takes what is free."""
    bench = Bench(17, num_host_slots=num_host_slots, max_num_seqs=1)
    for request_id in (1, 2):
        bench.submit(request_id, text(12, request_id * 1000), max_tokens=4)
        bench.finish()
    bench.submit(3, text(20, 3000), max_tokens=max_tokens)
    bench.step()
    history = bench.requests[1].token_ids
    bench.submit(4, [*history, *text(3, 4000)], session_id=1, max_tokens=2)
    return bench


@pytest.mark.parametrize("num_host_slots", [0, 20], ids=["dropped", "parked"])
def test_a_session_that_waits_for_its_turn_gives_way_after_the_idle_ones(num_host_slots):
    bench = chats_with_a_queued_one(num_host_slots)

    while bench.requests[3].finish_reason is None:
        bench.step()

    assert 1 in bench.held() and 2 not in bench.held()
    assert list(bench.scheduler.parked) == ([2] if num_host_slots else [])
    bench.finish()
    assert bench.requests[4].num_cached_tokens == 15
    assert reply_of(bench.requests[4]) == continuation(
        bench.requests[4].token_ids[: bench.requests[4].num_prompt_tokens], 2
    )


def count_looks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a sequence is looked at, how much of it is its own."""
    looks: list[int] = []
    arena, num_own = bench.scheduler.arena, parking.HostArena.num_own

    def count(seq):
        looks.append(seq.num_tokens)
        return num_own(arena, seq)

    monkeypatch.setattr(arena, "num_own", count)
    return looks


@pytest.mark.parametrize("num_host_slots", [0, 200])
def test_idle_sessions_that_share_all_are_looked_at_once_a_step(num_host_slots, monkeypatch):
    kv = KVPolicy("auto", 8, 0, (1, 2), num_reserved=2, slice_tokens=80, high_share=0.9)
    bench = Bench(43, kv=kv, num_host_slots=num_host_slots)
    bench.submit(1, text(140), max_tokens=1)
    bench.finish()
    for child in range(2, 12):
        assert bench.scheduler.fork(1, child, 140).num_tokens == 140
    looks = count_looks(bench, monkeypatch)
    bench.submit(20, text(16, 5000), max_tokens=20)

    for _ in range(10):
        bench.step()

    assert bench.pool.counters.num_compressions[Codec.NATIVE, Codec.INT8] > 5
    assert not bench.scheduler.parked
    assert len(looks) <= (2 * 11 if num_host_slots else 0), looks


def test_a_parent_and_its_fork_take_no_slots_for_what_they_share():
    bench = Bench(41, num_host_slots=60)
    bench.submit(1, text(60), max_tokens=1)
    bench.finish()
    assert bench.scheduler.fork(1, 2, 60).num_tokens == 60
    for session_id in (1, 2):
        words = [*text(60), *text(6, session_id * 2000)]
        bench.submit(session_id + 2, words, session_id=session_id, max_tokens=1)
        bench.finish()
    assert bench.pool.num_held == 15 + 2 + 2

    bench.submit(5, text(110, 5000), max_tokens=1)
    bench.step()

    # The parent has to give way, and what is the fork's alone then is parked, once.
    assert list(bench.scheduler.parked) == [2]
    assert bench.scheduler.arena.counters.num_parked_blocks == 15 + 2
    assert bench.scheduler.counters.num_drops == 1


@pytest.mark.parametrize(
    ("slice_tokens", "parked"),
    [(8, [[1], [1, 2], [1, 2, 3]]), (30, [[1, 2], [1, 2, 3]]), (1024, [[1, 2, 3]])],
    ids=["one a step, longer than the slice", "two in a slice", "all in a slice"],
)
@pytest.mark.parametrize("mode", ["native", "auto"])
def test_what_is_parked_in_a_step_is_bounded_by_its_slice(mode, slice_tokens, parked):
    kv = KVPolicy(mode, 64, 0, (1, 2)[: 1 + (mode != "native")], 0, slice_tokens)
    bench = Bench(14, num_host_slots=60, kv=kv, max_num_batched_tokens=64)
    for session_id in (1, 2, 3):
        bench.submit(session_id, text(12, session_id * 1000), max_tokens=4)
        bench.finish()
    bench.scheduler.set_foreground(4)
    request = bench.submit(4, text(50, 4000), max_tokens=2)

    for expected in parked:
        assert request.num_computed_tokens < 50
        bench.step()
        assert list(bench.scheduler.parked) == expected
        if expected != parked[-1]:
            assert mode == "auto" or request.wait_reason == "waiting for memory, parking (0 ahead)"

    bench.finish()
    assert reply_of(request) == continuation(text(50, 4000), 2)
    assert (bench.scheduler.counters.num_drops, bench.scheduler.counters.num_preemptions) == (0, 0)


# --- any chats, any time ---

POLICIES = {
    "native": KVPolicy(),
    "auto4": KVPolicy("auto4", 8, 4, (1, 2, 4), num_reserved=2, slice_tokens=16),
    "auto, wide spans": KVPolicy("auto", 10, 0, (1, 4), num_reserved=1, slice_tokens=32),
    "int8": KVPolicy("int8", 8, 4, (1, 2), num_reserved=2),
}


def evening(
    seed: int, kv: KVPolicy, is_late: bool, num_slots: int, num_sessions: int = 120
) -> Scenario:
    """Chats that come and go in a pool too small for them."""
    return Scenario(
        seed,
        num_blocks=40,
        max_model_len=200,  # more than the pool holds
        mean_gap=20,
        num_sessions=num_sessions,
        max_wait=2000,
        meddling=0.2,
        is_late=is_late,
        failure_rate=0.01,
        kv=kv,
        num_host_slots=num_slots,
    )


@pytest.mark.parametrize("num_slots", [12, 60], ids=["a small arena", "a large arena"])
@pytest.mark.parametrize("is_late", [False, True], ids=["read at once", "read a step late"])
@pytest.mark.parametrize("name", POLICIES)
def test_chats_say_the_same_whenever_they_are_parked(name, is_late, num_slots):
    simulation = Simulation(
        load(Mutant("none", "kvchat.engine.scheduler", ())),
        evening(31, POLICIES[name], is_late, num_slots),
        check_every=5,
    )

    simulation.run()

    counts, counters = simulation.counts, simulation.scheduler.arena.counters
    assert counters.num_resumes > 10 and counters.num_restored_blocks > 30, counters
    assert counters.num_displaced > 0 or num_slots == 60, counters
    events = ["forks", "undone", "closed", "aborted"] if num_slots == 60 else ["closed"]
    assert min(counts[f"{event} while parked"] for event in events) > 0, counts
    print(f"{simulation.longest_gap=} {counters}")


MUTANT_EVENINGS = [("native", 32, False), ("native", 32, True), ("auto4", 32, True)]
MUTANT_EVENINGS += [("auto4", seed, False) for seed in (32, 34, 38, 39)]


def check(module: ModuleType) -> None:
    for name, seed, is_late in MUTANT_EVENINGS:
        scenario = evening(seed, POLICIES[name], is_late, 60, num_sessions=80)
        Simulation(assemble(module), replace(scenario, failure_rate=0.03), check_every=2).run()


@pytest.mark.parametrize("mutant", SIMULATED, ids=str)
def test_the_simulation_of_parked_chats_kills(mutant):
    print(f"{mutant.name}: {kill(mutant, check)!r}"[:200])


def test_the_unchanged_engine_survives_in_the_same_harness():
    for name in ("kvchat.engine.memory", "kvchat.engine.residents"):
        check(load(Mutant("none", name, ())))


# --- the pool and the arena alone ---


def test_32_000_random_steps_with_an_arena_break_no_invariant():
    counts = walk(block_pool, range(8), 4_000)

    least = {"park": 500, "resume": 500, "resume compressed": 30, "resume what is cached": 80}
    least |= {"resume a tail": 150, "go back to a boundary": 15, "no room": 80}
    least |= {"trim inside a span": 30, "fork parked": 80, "not parked": 500}
    least |= {"displaced": 80, "not enough": 30}
    print(dict(counts))
    assert not {event: counts[event] for event, num in least.items() if counts[event] < num}


@pytest.mark.parametrize("mutant", WALKED, ids=str)
def test_the_walk_with_an_arena_kills(mutant):
    def check(module: ModuleType) -> None:
        is_arena = mutant.module == "kvchat.kv.parking"
        pool_module, arena_module = (block_pool, module) if is_arena else (module, parking)
        walk(pool_module, range(6), 1_500, arena_module)

    assert isinstance(kill(mutant, check), WalkFailure)


# --- a model ---

GREEDY = SamplingParams(temperature=0.0, max_tokens=11, ignore_eos=True, stop_token_ids=NEVER_EOS)
INT8 = KVPolicy("int8", 16, 0, (1, 4), num_reserved=1)  # of float32: four blocks become one


class Chats:
    """A random model under a scheduler; every chat gets turn after turn."""

    def __init__(self, kv: KVPolicy, num_blocks: int, num_host_slots: int) -> None:
        lowest = Codec(len(kv.span_blocks) - 1)
        cache = KVCache(
            KVSpec(2, 2, 8, 16, "float32"),
            num_blocks,
            lowest=lowest,
            num_host_slots=num_host_slots,
        )
        cache.blocks[1:] = torch.nan
        backend = make_backend("reference", CONFIG, cache, build_rope(CONFIG, 256))
        self.runner = Runner(random_decoder(), cache, backend, Sampler())
        config = SchedulerConfig(num_blocks, 16, 256, kv=kv, num_host_slots=num_host_slots)
        self.pool = BlockPool(
            num_blocks, 16, span_blocks=kv.span_blocks, num_reserved=kv.num_reserved
        )
        self.scheduler = Scheduler(config, self.pool)
        self.texts: dict[int, list[int]] = {}

    def say(self, request_id: int, session_id: int, token_ids: list[int]) -> None:
        prompt = self.texts.get(session_id, []) + token_ids
        request = Request(request_id, session_id, prompt, len(prompt), GREEDY)
        self.scheduler.submit(request)
        while (batch := self.scheduler.schedule()) is not None:
            self.scheduler.update(batch, self.runner.launch(batch).tokens())
        self.texts[session_id] = request.token_ids


@pytest.mark.parametrize(
    ("kv", "num_blocks"), [(KVPolicy(), 15), (INT8, 13)], ids=["native", "int8"]
)
def test_greedy_ids_with_parking_are_those_without(kv, num_blocks):
    parked, roomy = Chats(kv, num_blocks, 60), Chats(kv, 80, 0)

    for turn in range(6):
        for session_id in range(1, 5):
            words = [(session_id * 31 + turn * 7 + i * i) % 97 for i in range(24)]
            for chats in (parked, roomy):
                chats.say(turn * 10 + session_id, session_id, words)

    assert parked.texts == roomy.texts
    assert [len(token_ids) for token_ids in parked.texts.values()] == [6 * (24 + 11)] * 4
    counters, arena = parked.scheduler.counters, parked.scheduler.arena
    assert counters.num_drops == counters.num_preemptions == 0
    assert arena.counters.num_resumes > 6 and arena.counters.num_restored_blocks > 12
    assert not roomy.scheduler.arena.counters.num_parks
    assert bool(parked.pool.counters.num_compressions) == (kv is INT8)
    parked.scheduler.release_all()
    arena.check_integrity([])
    parked.pool.check_integrity([])
