"""Bugs of a scheduler: leaks, mix-ups, lost tokens, unfair or stalled queues."""

from __future__ import annotations

from mutants import Mutant


def _scheduler(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, "kvchat.engine.scheduler", edits)


def _residents(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, "kvchat.engine.residents", edits)


MUTANTS = [
    _scheduler(
        "a preempted request comes back in the same step",
        ("if not blocked and self.counters.num_preemptions != num_preemptions:", "if False:"),
    ),
    _scheduler(
        "a long prompt takes what others are owed",
        ("self._serve(request, budget - num_owed, batch)", "self._serve(request, budget, batch)"),
    ),
    _scheduler(
        "the budget is not counted down",
        ("budget -= self._serve", "self._serve"),
    ),
    _scheduler(
        "the foreground is a victim",
        (" and other.session_id != self._foreground:", " and other is not request:"),
    ),
    _scheduler(
        "the foreground is not served first",
        (
            "self._requests.get(self._foreground) if self._foreground is not None else None",
            "None",
        ),
    ),
    _scheduler(
        "an older request is the victim",
        (
            "for other in reversed(self._requests.values()):",
            "for other in self._requests.values():",
        ),
        (
            "                return None\n            if other.seq",
            "                pass\n            if other.seq",
        ),
    ),
    _scheduler(
        "a small request overtakes",
        ("blocked = blocked or self._admit", "blocked = self._admit"),
    ),
    _scheduler(
        "idle sessions never give way",
        ("if resident := self._residents.drop_coldest(self._foreground):", "if resident := None:"),
    ),
    _scheduler("nobody gives way", ("victim = self._victim(request)\n", "victim = None\n")),
    _scheduler("preemption leaks", ("        self.pool.free(request.seq)\n", "")),
    _scheduler(
        "preemption forgets the pending token",
        ("request.num_preemptions += 1", "request.num_pending_tokens = 0"),
    ),
    _scheduler(
        "preemption does not count down",
        ("self._num_running -= 1\n        self.counters", "self.counters"),
    ),
    _scheduler(
        "an ended request takes a late token",
        ("if request.finish_reason is not None:\n                continue", "pass"),
    ),
    _scheduler(
        "rows of ended requests keep no place in the tokens",
        (
            "            token_id = next(sampled_ids) if row.is_sampled else None\n",
            "",
        ),
        (
            "            if token_id is not None and token_id < 0:\n",
            "            token_id = next(sampled_ids) if row.is_sampled else None\n"
            "            if token_id is not None and token_id < 0:\n",
        ),
    ),
    _scheduler(
        "sealed before it is computed",
        (
            "self.pool.seal(request.seq, request.token_ids, end)",
            "self.pool.seal(request.seq, request.token_ids, request.seq.num_tokens)",
        ),
    ),
    _scheduler(
        "a session is handed what is not computed",
        ("request.token_ids[: request.num_computed_tokens]", "request.token_ids[:]"),
    ),
    _scheduler(
        "a fork gets what is not computed",
        ("num_tokens = min(num_tokens, parent.num_computed_tokens)", "num_tokens += 1"),
    ),
    _scheduler(
        "the copies of a newcomer are lost",
        ("        batch.block_ops += ops\n        r", "        r"),
    ),
    _scheduler("the copies of a reply are lost", ("            batch.block_ops += ops\n", "")),
    _scheduler(
        "one token too many",
        (
            "return num_tokens >= self._max_request_tokens",
            "return num_tokens > self._max_request_tokens",
        ),
    ),
    _scheduler(
        "a prompt as large as the pool is taken",
        ("if num_tokens >= limit:", "if num_tokens > limit:"),
    ),
    _scheduler("a launched step's tables are cut", ("if not self._launched:", "if True:")),
    _scheduler(
        "after a failed step sessions keep what it was to write",
        ("while self._residents.drop_coldest(None):", "while False:"),
    ),
    _scheduler(
        "the stop token is missed", ("token_id in sampling.stop_token_ids and", "False and")
    ),
    _scheduler("closing leaks", ("        self._residents.drop(session_id)\n", "")),
    _residents(
        "nothing is left to compute",
        (
            "min(_num_common(resident.token_ids, token_ids), len(token_ids) - 1)",
            "_num_common(resident.token_ids, token_ids)",
        ),
    ),
    _residents(
        "another text is kept",
        ("        self._pool.truncate(resident.seq, num_common)\n", ""),
    ),
    _residents(
        "what is dropped leaks",
        ("            self._dropped.append(resident.seq)\n", "            pass\n"),
    ),
    _residents(
        "taken from the cache, the old sequence leaks",
        ("            self._pool.free(resident.seq)\n", ""),
    ),
    _residents(
        "what is trimmed claims its slots on",
        ("self._pool.truncate(resident.seq, len(resident.token_ids))", "pass"),
    ),
]
