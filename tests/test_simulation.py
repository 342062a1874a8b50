"""10,000 simulated sessions: nobody stalls or starves, no token is lost, all blocks come home."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
from mutants import Mutant, assemble, kill, load
from mutants.scheduler import COMPRESSION_MUTANTS, MUTANTS
from simulation import Scenario, Simulation

from kvchat.config import KVPolicy
from kvchat.kv.layout import Codec

SCHEDULER = "kvchat.engine.scheduler"
ENDS = ("stop", "length", "abort", "error", "closed while generating")
# 8 evenings x tokens read at once or one step late x 625 sessions = 10,000.
EVENINGS = {
    "one long chat fills the pool": Scenario(1, mean_gap=40),
    "two long chats fill the pool": Scenario(2, num_blocks=48),
    "a few chats at once": Scenario(
        3, num_blocks=64, mean_gap=10, max_num_seqs=16, max_num_batched_tokens=32
    ),
    "blocks of 8": Scenario(4, block_size=8),
    "three tokens a step": Scenario(5, mean_gap=150, max_num_batched_tokens=3, max_wait=2000),
    "many chats at once": Scenario(
        6, 200, block_size=2, mean_gap=6, max_num_seqs=64, max_num_batched_tokens=64
    ),
    "blocks of 16": Scenario(7, 12, block_size=16, mean_gap=30, max_model_len=120),
    "four blocks": Scenario(8, 5, block_size=16, mean_gap=60),
}


@pytest.mark.parametrize("is_late", [False, True], ids=["read at once", "read a step late"])
@pytest.mark.parametrize("name", EVENINGS)
def test_every_turn_ends_with_its_own_text_and_all_blocks_come_home(name, is_late):
    simulation = Simulation(load(Mutant("none", SCHEDULER, ())), late(EVENINGS[name], is_late))

    simulation.run()

    counts, counters = simulation.counts, simulation.scheduler.counters
    assert simulation.num_opened == 625
    assert counts["turns"] == sum(counts[end] for end in ENDS)
    others = ("refused", "forks", "forks that share", "undone")
    assert min(counts[what] for what in (*ENDS, *others)) > 0, counts
    assert counters.num_preemptions > 0 and counters.num_drops > 50 and counters.num_cached_tokens
    print(f"{simulation.longest_gap=} {counts} {counters}")


# By mode and span_blocks; what 16-bit and 32-bit pools have.
COMPRESSED = {
    "auto": KVPolicy("auto", 8, 4, (1, 2), num_reserved=2, slice_tokens=16),
    "auto4": KVPolicy("auto4", 8, 4, (1, 2, 4), num_reserved=2, slice_tokens=16),
    "int8": KVPolicy("int8", 8, 4, (1, 2), num_reserved=2),
    "int4": KVPolicy("int4", 8, 4, (1, 2, 4), num_reserved=2),
    "auto, wide spans": KVPolicy("auto", 10, 0, (1, 4), num_reserved=2, slice_tokens=32),
    "auto4, wide spans": KVPolicy("auto4", 0, 5, (1, 4, 8), num_reserved=1, slice_tokens=64),
    "int8, wide spans": KVPolicy("int8", 8, 4, (1, 4), num_reserved=2),
    "int4, wide spans": KVPolicy("int4", 8, 4, (1, 4, 8), num_reserved=2),
}


@pytest.mark.parametrize("is_late", [False, True], ids=["read at once", "read a step late"])
@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_chats_say_the_same_and_nobody_gives_way_while_there_is_more_to_compress(
    name, is_late
):
    scenario = squeezed(21, COMPRESSED[name], is_late)
    simulation = Simulation(load(Mutant("none", SCHEDULER, ())), scenario, check_every=10)

    simulation.run()

    counts, counters = simulation.counts, simulation.scheduler.counters
    assert counts["turns"] == sum(counts[end] for end in ENDS)
    others = ["refused", "forks that share", "undone", "pins"]
    others += [] if is_late else ["failures"]
    others += [] if "wide" in name else ["shared spans"]
    assert min(counts[what] for what in (*ENDS, *others)) > 0, counts
    lowest = Codec(len(COMPRESSED[name].span_blocks) - 1)
    assert counts[f"to {lowest.name}"] > 50 and counters.num_recomputed_tokens > 0
    assert counters.num_drops > 10 and counters.num_cached_tokens > 0
    print(f"{simulation.longest_gap=} {counts} {counters}")


def squeezed(seed: int, kv: KVPolicy, is_late: bool, num_sessions: int = 150) -> Scenario:
    """An evening of chats that are longer than the pool is wide."""
    return Scenario(
        seed,
        num_blocks=32,
        max_model_len=150,
        mean_gap=40,
        num_sessions=num_sessions,
        max_wait=2000,
        meddling=0.2,
        is_late=is_late,
        failure_rate=0.003,
        kv=kv,
    )


def late(scenario: Scenario, is_late: bool) -> Scenario:
    return replace(scenario, is_late=is_late)


# --- the simulation can fail ---

SHORT = [
    Scenario(seed, num_sessions=120, is_late=is_late, failure_rate=0.05, meddling=0.3, **pool)
    for seed in (11, 12)
    for is_late in (False, True)
    for pool in ({"mean_gap": 40}, {"num_blocks": 64, "mean_gap": 8})
]


def check(module: ModuleType) -> None:
    for scenario in SHORT:
        Simulation(assemble(module), scenario, check_every=1).run()


def check_compressed(module: ModuleType) -> None:
    for kv in (COMPRESSED["auto4"], COMPRESSED["auto4, wide spans"], COMPRESSED["int4"]):
        for is_late in (False, True):
            scenario = squeezed(22, kv, is_late, num_sessions=60)
            scenario = replace(scenario, failure_rate=0.0 if is_late else 0.05)
            Simulation(assemble(module), scenario, check_every=5).run()


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_simulation_kills(mutant):
    print(f"{mutant.name}: {kill(mutant, check)!r}"[:200])


@pytest.mark.parametrize("mutant", COMPRESSION_MUTANTS, ids=str)
def test_the_simulation_of_compressed_chats_kills(mutant):
    print(f"{mutant.name}: {kill(mutant, check_compressed)!r}"[:200])


def test_the_unchanged_scheduler_survives_in_the_same_harness():
    check(load(Mutant("none", SCHEDULER, ())))
    check(load(Mutant("none", "kvchat.engine.residents", ())))
    check_compressed(load(Mutant("none", "kvchat.kv.ladder", ())))


def test_a_scenario_replays_by_its_seed():
    runs = []
    for _ in range(2):
        simulation = Simulation(load(Mutant("none", SCHEDULER, ())), SHORT[0])
        simulation.run()
        runs.append((simulation.counts, simulation.num_steps, simulation.clock))

    assert runs[0] == runs[1]
