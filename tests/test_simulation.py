"""10,000 simulated sessions: nobody stalls or starves, no token is lost, all blocks come home."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
from mutants import Mutant, kill, load
from mutants.scheduler import MUTANTS
from simulation import Scenario, Simulation

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


def assemble(module: ModuleType) -> ModuleType:
    """A fresh scheduler module that is built on this one of its parts."""
    if module.__name__ == SCHEDULER:
        return module
    scheduler = load(Mutant("none", SCHEDULER, ()))
    memory = load(Mutant("none", "kvchat.engine.memory", ()))
    scheduler.Memory = memory.Memory
    if module.__name__ == "kvchat.engine.memory":
        scheduler.Memory = module.Memory
    elif module.__name__ == "kvchat.engine.residents":
        memory.Residents = module.Residents
    elif module.__name__ == "kvchat.kv.ladder":
        memory.Ladder = module.Ladder
        memory.Holder = module.Holder
    else:
        scheduler.Roster = module.Roster
    return scheduler


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_simulation_kills(mutant):
    print(f"{mutant.name}: {kill(mutant, check)!r}"[:200])


def test_the_unchanged_scheduler_survives_in_the_same_harness():
    check(load(Mutant("none", SCHEDULER, ())))
    check(load(Mutant("none", "kvchat.engine.residents", ())))


def test_a_scenario_replays_by_its_seed():
    runs = []
    for _ in range(2):
        simulation = Simulation(load(Mutant("none", SCHEDULER, ())), SHORT[0])
        simulation.run()
        runs.append((simulation.counts, simulation.num_steps, simulation.clock))

    assert runs[0] == runs[1]
