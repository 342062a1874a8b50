"""The tests can fail: each seeded bug is found by the random walk within 1,000 steps."""

from __future__ import annotations

from types import ModuleType

import pytest
from mutants import Mutant, kill, load
from mutants.block_pool import MUTANTS, WEAK_HASH, index_mutant
from pool_walk import WalkFailure, walk

SEEDS = range(5)


def check(module: ModuleType) -> None:
    walk(module, SEEDS, 1_000)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_walk_kills(mutant):
    error = kill(mutant, check)

    assert isinstance(error, WalkFailure)
    print(f"{mutant.name}: {error}"[:200])


def test_the_unchanged_pool_survives_in_the_same_harness():
    check(load(Mutant("none", "kvchat.kv.block_pool", ())))


def test_a_weak_hash_is_harmless_while_token_ids_are_compared():
    check(load(index_mutant("8-bit hash", WEAK_HASH)))


def test_a_mutant_whose_snippet_is_gone_or_ambiguous_is_refused():
    for snippet in ("no such line", "self"):
        with pytest.raises(AssertionError, match="not once"):
            load(Mutant("vanished", "kvchat.kv.block_pool", ((snippet, ""),)))


def test_a_mutant_that_does_nothing_survives_and_a_broken_one_does_not_count():
    with pytest.raises(AssertionError, match="survived"):
        kill(Mutant("nothing", "kvchat.kv.block_pool", ()), check)
    broken = Mutant("typo", "kvchat.kv.block_pool", (("seq.is_freed = True", "undefined_name"),))
    with pytest.raises(AssertionError, match="NameError"):
        kill(broken, check)
