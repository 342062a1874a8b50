"""`kvchat bench --verify`: the same tokens, whichever way the pool came to hold them.

Each check makes greedy replies in two ways that must not differ, on engines of their own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from kvchat.bench.arms import Model, Setup, make_arm, make_setup
from kvchat.bench.drive import Driver
from kvchat.bench.workload import Script
from kvchat.config import SamplingParams
from kvchat.engine.engine import StepRunner
from kvchat.engine.request import Event, Request
from kvchat.errors import UsageError
from kvchat.model.source import Progress

_NUM_REPLY = 17  # tokens of the replies of the forks and hits
_NUM_FORKS = 4


@dataclass(frozen=True)
class Check:
    """One way against another: how many replies, how many were equal."""

    name: str
    num_equal: int
    num_replies: int
    note: str = ""

    @property
    def is_good(self) -> bool:
        """All equal, and there were any."""
        return 0 < self.num_replies == self.num_equal

    def line(self) -> str:
        """For the report."""
        mark = "ok    " if self.is_good else "FAILED"
        note = f" ({self.note})" if self.note else ""
        return f"{mark} {self.name}: {self.num_equal} of {self.num_replies} equal{note}"


def run_verify(model: Model, scripts: list[Script], progress: Progress) -> list[Check]:
    """All checks. The scripts' first two turns are used."""
    scripts = [replace(script, turns=script.turns[:2], arrival_s=0.0) for script in scripts]
    longest = max(max(script.num_tokens for script in scripts), 1024) + 64
    num_tokens = sum(script.num_tokens + 64 for script in scripts) + 4 * longest
    num_bytes = 2 * num_tokens * model.spec.bytes_per_token
    native = make_setup(model, "native", num_bytes, longest)
    runner = make_arm(model, native, progress).runner
    progress("verifying", 0, 3)
    batched, num_leaked = _batched_is_solo(native, runner, scripts)
    progress("verifying", 1, 3)
    checks = [batched, _fork_is_prefill(model, native, runner)]
    progress("verifying", 2, 3)
    try:
        int8 = make_setup(model, "int8", num_bytes, longest)
    except UsageError:
        int8 = None
    if int8 is not None:
        checks.append(_hit_is_resident(model, int8, make_arm(model, int8, progress).runner))
    progress("verifying", 1, 1)
    return [*checks, Check("blocks given back, leaks 0", int(not num_leaked), 1)]


def _batched_is_solo(setup: Setup, runner: StepRunner, scripts: list[Script]) -> tuple[Check, int]:
    """All sessions together, then one after another."""
    found, num_leaked = [], 0
    for num_at_once in (len(scripts), 1):
        driver = Driver(setup, runner, scripts, num_at_once)
        driver.run()
        driver.close()
        num_leaked += driver.num_leaked
        found.append(driver.replies)
    together, alone = found
    num_equal = sum(together[key] == alone[key] for key in alone)
    return Check("batched replies are the solo ones", num_equal, len(alone)), num_leaked


def _fork_is_prefill(model: Model, setup: Setup, runner: StepRunner) -> Check:
    """A chat forked at several places, against the same ids computed from nothing."""
    rng = random.Random(1)
    chat = _Chats(setup, runner)
    prompt = _ids(rng, model, 200)
    whole = prompt + chat.reply(0, prompt, _NUM_REPLY)
    forks = []
    for i in range(1, _NUM_FORKS + 1):
        num_shared = len(whole) * i // (_NUM_FORKS + 1)  # mostly inside a block
        chat.engine.fork(0, i, num_shared)
        ids = whole[:num_shared] + _ids(rng, model, 20)
        forks.append((ids, chat.reply(i, ids, _NUM_REPLY)))
    chat.engine.close()
    num_equal = 0
    for ids, forked in forks:
        fresh = _Chats(setup, runner)
        num_equal += fresh.reply(0, ids, _NUM_REPLY) == forked
        fresh.engine.close()
    return Check("a fork's reply is that of a new prefill", num_equal, len(forks))


def _hit_is_resident(model: Model, setup: Setup, runner: StepRunner) -> Check:
    """The second turn of a chat whose blocks were compressed: by the session that holds them, and
    by another one that finds them in the prefix cache."""
    rng = random.Random(2)
    num_prompt = 48 * setup.config.block_size - _NUM_REPLY + 1  # what is computed is whole blocks
    prompt, more = _ids(rng, model, num_prompt), _ids(rng, model, 20)
    replies, num_cached, num_spans = [], 0, 0
    for session_id in (0, 1):
        chat = _Chats(setup, runner)
        whole = prompt + chat.reply(0, prompt, _NUM_REPLY)
        if session_id:
            chat.engine.release(0)
        replies.append(chat.reply(session_id, whole + more, _NUM_REPLY))
        stats = chat.engine.stats()
        num_cached = stats.num_cached_tokens
        num_spans = sum(stats.num_compressions.values())
        chat.engine.close()
    is_equal = replies[0] == replies[1] and num_spans > 0 and num_cached >= len(prompt)
    note = f"{num_cached} tokens found, {num_spans} spans compressed"
    return Check("a compressed hit is the resident continuation", int(is_equal), 1, note)


class _Chats:
    """An engine that makes greedy replies one after another."""

    def __init__(self, setup: Setup, runner: StepRunner) -> None:
        self._events: list[Event] = []
        self.engine = setup.start(runner, self._events.extend)[0]
        self._num_requests = 0

    def reply(self, session_id: int, ids: list[int], num_tokens: int) -> list[int]:
        """Its ids."""
        self._num_requests += 1
        self._events.clear()
        sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        self.engine.submit(Request(self._num_requests, session_id, [*ids], len(ids), sampling))
        while self.engine.step():
            pass
        return [token_id for event in self._events for token_id in event.token_ids]


def _ids(rng: random.Random, model: Model, num_tokens: int) -> list[int]:
    return [rng.randrange(model.vocab.start, model.vocab.stop) for _ in range(num_tokens)]
