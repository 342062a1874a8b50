"""From times and counts to figures: percentiles that have enough samples, speeds, latencies.

Knows no engine and no clock; every time is in seconds of the run's own clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

MIN_BEYOND = 5  # samples that must lie beyond a percentile, on its thinner side, for it to be told


@dataclass(slots=True)
class Reply:
    """One reply, as its reader sees it: when it was asked for, when each token came."""

    session_id: int
    submitted_s: float
    num_prompt_tokens: int  # of the whole conversation
    token_times_s: list[float] = field(default_factory=list)
    num_preemptions: int = 0

    @property
    def ttft_s(self) -> float:
        """From submit to the first token: queueing and prefill."""
        return self.token_times_s[0] - self.submitted_s

    @property
    def gaps_s(self) -> list[float]:
        """Between its tokens, one after another."""
        times = self.token_times_s
        return [b - a for a, b in pairwise(times)]

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; None for a reply of one token."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


class StepTime(NamedTuple):
    """One step of the engine: what it computed and how long it took."""

    seconds: float
    num_prompt_tokens: int  # rows of more than a reply's next token, and tokens computed anew
    num_decodes: int  # rows that take a reply one token on
    kv_bytes: int = 0  # of the pool, that these rows attend to


@dataclass
class RunLog:
    """All that one run of a workload leaves behind."""

    replies: list[Reply] = field(default_factory=list)
    steps: list[StepTime] = field(default_factory=list)
    seconds: float = 0.0  # from the first submit to the last token

    @property
    def num_generated(self) -> int:
        """Tokens of replies."""
        return sum(len(reply.token_times_s) for reply in self.replies)

    @property
    def tokens_a_second(self) -> float:
        """Generated tokens of all sessions over the whole run; prompts are not counted."""
        return _over(self.num_generated, self.seconds)

    @property
    def generation_speed(self) -> float:
        """Tokens a second in the steps that do nothing but generate."""
        steps = [step for step in self.steps if step.num_decodes and not step.num_prompt_tokens]
        return _over(sum(s.num_decodes for s in steps), sum(s.seconds for s in steps))

    @property
    def session_speeds(self) -> dict[int, float]:
        """By session: its tokens over the time in which it had a reply to wait for."""
        tokens: dict[int, int] = {}
        waited: dict[int, float] = {}
        for r in self.replies:
            tokens[r.session_id] = tokens.get(r.session_id, 0) + len(r.token_times_s)
            wait = r.token_times_s[-1] - r.submitted_s
            waited[r.session_id] = waited.get(r.session_id, 0.0) + wait
        return {session_id: _over(n, waited[session_id]) for session_id, n in tokens.items()}


@dataclass(frozen=True)
class Spread:
    """A latency in milliseconds; None where there are too few samples."""

    num_samples: int
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class Speed:
    """What the repetitions of one workload came to. Speeds are tokens a second."""

    tokens_a_second: float  # median of the repetitions
    session_median: float
    session_min: float
    prefill: float | None
    generation: float
    ttft: Spread
    gap: Spread
    tpot: Spread
    mean_batch: float
    max_batch: int
    read_gb_s: float | None  # weights and KV in steps that only generate


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest samples, as numpy's; None when fewer than MIN_BEYOND samples
    would lie beyond it: p50 wants 10 samples, p95 100, p99 500."""
    needed = MIN_BEYOND / (min(percent, 100 - percent) / 100)
    if len(samples) < round(needed):
        return None
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def spread(seconds: Iterable[float]) -> Spread:
    """Of seconds, in milliseconds."""
    found = [1000 * s for s in seconds]
    mean = statistics.fmean(found) if found else None
    return Spread(len(found), mean, *(percentile(found, p) for p in (50, 95, 99)))


def measure(logs: Sequence[RunLog], weight_bytes: int = 0) -> Speed:
    """Latencies are pooled over the repetitions; speeds are medians of them."""
    replies = [reply for log in logs for reply in log.replies]
    steps = [step for log in logs for step in log.steps]
    by_session = [log.session_speeds for log in logs]
    sessions = [
        statistics.median(speeds[session_id] for speeds in by_session if session_id in speeds)
        for session_id in sorted({session_id for speeds in by_session for session_id in speeds})
    ]
    prompts = [step for step in steps if step.num_prompt_tokens]
    decodes = [step for step in steps if step.num_decodes]
    alone = [step for step in decodes if not step.num_prompt_tokens]
    num_bytes = sum(weight_bytes + step.kv_bytes for step in alone)
    alone_s = sum(step.seconds for step in alone)
    prompt_s = sum(step.seconds for step in prompts)
    return Speed(
        tokens_a_second=statistics.median(log.tokens_a_second for log in logs),
        session_median=statistics.median(sessions),
        session_min=min(sessions),
        prefill=sum(s.num_prompt_tokens for s in prompts) / prompt_s if prompts else None,
        generation=statistics.median(log.generation_speed for log in logs),
        ttft=spread(reply.ttft_s for reply in replies),
        gap=spread(gap for reply in replies for gap in reply.gaps_s),
        tpot=spread(reply.tpot_s for reply in replies if reply.tpot_s is not None),
        mean_batch=_over(sum(step.num_decodes for step in decodes), len(decodes)),
        max_batch=max((step.num_decodes for step in decodes), default=0),
        read_gb_s=num_bytes / alone_s / 1e9 if alone and weight_bytes else None,
    )


def goodput(logs: Sequence[RunLog], limits_ms: dict[str, float]) -> float:
    """Replies a second that stay within all limits: ttft, and itl as the mean gap of the reply."""
    num_good = sum(_is_good(reply, limits_ms) for log in logs for reply in log.replies)
    return _over(num_good, sum(log.seconds for log in logs))


def _is_good(reply: Reply, limits_ms: dict[str, float]) -> bool:
    found = {"ttft": reply.ttft_s, "itl": reply.tpot_s or 0.0}
    return all(1000 * found[name] <= limit for name, limit in limits_ms.items())


def median_ratio(mine: Sequence[float], others: Sequence[float]) -> float | None:
    """Median of the pairs' ratios; None when there are none."""
    ratios = [a / b for a, b in zip(mine, others, strict=True) if b]
    return statistics.median(ratios) if ratios else None


def _over(amount: float, whole: float) -> float:
    return amount / whole if whole else 0.0
