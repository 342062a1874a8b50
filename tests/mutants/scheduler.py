"""Bugs of a scheduler: leaks, mix-ups, lost tokens, unfair or stalled queues."""

from __future__ import annotations

from mutants import Mutant


def _scheduler(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, "kvchat.engine.scheduler", edits)


def _roster(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, "kvchat.engine.roster", edits)


def _memory(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, "kvchat.engine.memory", edits)


def _ladder(name: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(name, "kvchat.kv.ladder", edits)


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
    _roster(
        "the foreground is a victim",
        (" or other.session_id == self.foreground or", " or other is request or"),
    ),
    _roster(
        "the foreground is not served first",
        (
            "self.requests.get(self.foreground) if self.foreground is not None else None",
            "None",
        ),
    ),
    _roster(
        "an older request is the victim",
        (
            "for other in reversed(self.requests.values()):",
            "for other in self.requests.values():",
        ),
        (
            "                return None\n            is_other_kind",
            "                pass\n            is_other_kind",
        ),
    ),
    _scheduler(
        "a small request overtakes",
        ("blocked = blocked or self._admit", "blocked = self._admit"),
    ),
    _memory(
        "idle sessions never give way",
        (
            "            if session_id is not None:\n                return self._give_up",
            "            if False:\n                return self._give_up",
        ),
    ),
    _memory(
        "nobody gives way",
        ("if victim := roster.victim(request, is_pinned):", "if victim := None:"),
    ),
    _memory("preemption leaks", ("        self.residents.free(request.seq)\n", "")),
    _memory(
        "preemption forgets the pending token",
        ("request.num_preemptions += 1", "request.num_pending_tokens = 0"),
    ),
    _memory("preemption does not count down", ("        self._roster.num_running -= 1\n", "")),
    _scheduler(
        "an ended request takes a late token",
        ("row.end)\n                continue", "row.end)"),
    ),
    _scheduler(
        "rows of ended requests keep no place in the tokens",
        (
            "            token_id = next(sampled_ids) if row.is_sampled else None\n",
            "",
        ),
        ("if token_id is None or token_id >= 0:", "if row:"),
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
        (
            "parent.token_ids[: parent.num_computed_tokens]",
            "parent.token_ids[: parent.num_computed_tokens + 1]",
        ),
    ),
    _memory(
        "the copies of a newcomer are lost",
        ("        ops += new_ops\n        return", "        return"),
    ),
    _scheduler("the copies of a reply are lost", ("batch.block_ops += ops", "pass")),
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
    _memory(
        "after a failed step sessions keep what it was to write",
        ("while (session_id := self.residents.coldest(None, set())) is not None:", "while False:"),
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
        ("        self._cut(resident.seq, num_common)\n", ""),
    ),
    _residents(
        "what is dropped leaks",
        ("            self._dropped.append(resident.seq)\n", "            pass\n"),
    ),
    _residents(
        "taken from the cache, the old sequence leaks",
        (
            "        if num_found > num_kept:\n            self.free(resident.seq)\n",
            "        if num_found > num_kept:\n",
        ),
    ),
    _residents(
        "what is trimmed claims its slots on",
        ("self._cut(resident.seq, len(resident.token_ids))", "pass"),
    ),
]

COMPRESSION_MUTANTS = [
    _ladder(
        "the window is not protected",
        ("return start // block_size, end // block_size", "return start // block_size, num_sealed"),
        (
            "num_tokens = seq.num_sealed * block_size\n",
            "num_sealed = seq.num_sealed\n        num_tokens = seq.num_sealed * block_size\n",
        ),
    ),
    _ladder("the sinks are not protected", ("return start // block_size, end", "return 0, end")),
    _ladder(
        "a span in another's window is compressed",
        ("if pinned or self._eligible(shortest)[1] < end:", "if pinned:"),
    ),
    _ladder(
        "a span that a pinned session shares is compressed",
        ("if pinned or self._eligible", "if self._eligible"),
    ),
    _ladder(
        "a pinned session is compressed",
        ("        if holder.is_pinned:\n            return None\n", ""),
    ),
    _ladder("the slice has no end", ("        return is_first or", "        return True or")),
    _ladder(
        "what was looked at once is never looked at again",
        (
            "        self._fresh[seq] = None\n        self._place = 0\n",
            "        self._fresh.update({} if seq in self._cursors else {seq: None})\n"
            "        self._place = 0\n",
        ),
    ),
    _ladder(
        "a span whose keeper is gone is forgotten",
        ("            self._orphans[entry] = start\n\n    def part", "\n    def part"),
    ),
    _ladder(
        "what the upper rung leaves is not seen below",
        ("if span.codec == self._src:", "if False:"),
    ),
    _ladder(
        "a torn span stays torn",
        ("if self._states(torn.seqs, torn.start) != torn.states:", "if False:"),
    ),
    _memory(
        "somebody gives way though there is more to compress",
        ("return not is_spent and ", "return "),
    ),
    _memory("the spans of a step are lost", ("        ops.append(compression.op)\n", "")),
    _memory("a span that was not encoded is believed", ("self.pool.distrust(op)", "pass")),
    _memory(
        "who holds a span that was not encoded goes on",
        (
            "if request.seq is not None and not lost.isdisjoint",
            "if request.seq and lost.isdisjoint",
        ),
    ),
    _residents(
        "a cut span keeps its tokens",
        ("del token_ids[self._pool.num_kept(seq, num_wanted) :]", "del token_ids[num_wanted:]"),
    ),
    _scheduler(
        "a fork is told it has all it asked for",
        ("child, token_ids[: child.num_tokens]", "child, token_ids[:num_wanted]"),
    ),
]
