"""How much a pool serves before anybody has to give way: real pool and scheduler, no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kvchat.bench.arms import Setup
from kvchat.bench.drive import Driver, NoModel
from kvchat.bench.workload import Range, Script, Workload, make_scripts
from kvchat.errors import CapacityError

MAX_SESSIONS = 512  # looked for; more are told as this many
_GROWTH_STEPS = 200  # a context is found to this part of it, or to a block
_VOCAB = range(1000, 30_000)


def peak_blocks(setup: Setup, scripts: list[Script]) -> int:
    """Blocks that the scripts hold at the most when none ever has to give way."""
    ample = sum(-(-script.num_tokens // setup.config.block_size) + 1 for script in scripts) + 64
    config = replace(setup.config, num_blocks=ample, max_num_seqs=max(256, len(scripts)))
    driver = Driver(replace(setup, config=config), NoModel(), scripts)
    driver.run()
    assert not driver.tally.num_redone, f"{ample} blocks are not ample"
    return driver.peak_held


def max_sessions(setup: Setup, workload: Workload) -> int:
    """Sessions of this workload that the pool serves and keeps, nobody preempted or dropped."""
    scripts = make_scripts(replace(workload, sessions=MAX_SESSIONS, trace=None), _VOCAB)
    return _largest(MAX_SESSIONS, lambda n: _is_calm(setup, scripts[:n]))


def max_context(setup: Setup, num_sessions: int) -> int:
    """Tokens that each of so many chats reaches, turn by turn in rotation, before anybody gives
    way; nothing is shared."""
    size = setup.config.block_size
    most = setup.kv.max_tokens(setup.config.num_request_blocks, size)
    step = max(size, 2 * most // num_sessions // _GROWTH_STEPS)
    num_turns = -(-most // step)
    config = replace(setup.config, max_model_len=most + 1)
    turns = Workload(
        num_sessions, num_turns, Range(step - 1, step - 1), Range(1, 1), shared_prefix=0
    )
    return _grow(replace(setup, config=config), make_scripts(turns, _VOCAB), step)


def _grow(setup: Setup, scripts: list[Script], step: int) -> int:
    """One turn of each script after another, until somebody has to give way."""
    driver = Driver(setup, NoModel(), [])
    chats = [list[int]() for _ in scripts]
    for turn_idx in range(len(scripts[0].turns)):
        for session_id, script in enumerate(scripts):
            chats[session_id] += script.turns[turn_idx].prompt_ids
            if len(chats[session_id]) >= setup.config.max_request_tokens:
                return turn_idx * step
            chats[session_id] = driver.take_turn(session_id, chats[session_id])
            counters = driver.scheduler.counters
            if counters.num_preemptions + counters.num_drops:
                return turn_idx * step
    return len(scripts[0].turns) * step


def _is_calm(setup: Setup, scripts: list[Script]) -> bool:
    """Everybody is served, and nobody gives up anything, also not when done."""
    config = replace(setup.config, max_model_len=max(s.num_tokens for s in scripts) + 1)
    driver = Driver(replace(setup, config=config), NoModel(), scripts)
    try:
        driver.run()
    except CapacityError:  # one is too long for the pool alone
        return False
    counters = driver.scheduler.counters
    return not counters.num_preemptions + counters.num_drops


def _largest(limit: int, is_good: Callable[[int], bool]) -> int:
    """The largest number up to the first that is not good: doubling, then halving."""
    low, high = 0, 1
    while high <= limit and is_good(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_good(middle) else (low, middle)
    return low
