"""What one step of scheduling costs of one core: schedule and update, real pool, no model."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from kvchat.config import SamplingParams, SchedulerConfig
from kvchat.engine.request import Request
from kvchat.engine.scheduler import Scheduler
from kvchat.kv.block_pool import BlockPool

SESSIONS = (8, 100, 1000)
BLOCK_SIZE = 16
NUM_PROMPT_TOKENS = 64
NUM_STEPS = 32  # two blocks for each session: claiming and sealing are in the figures


@dataclass(frozen=True)
class SchedulingCost:
    """CPU microseconds of one decode step with `num_running` sessions, each adding one token."""

    num_running: int
    mean_us: float
    best_us: float  # the fastest of the repeats' means: what noise on the machine cannot raise

    @property
    def us_per_session(self) -> float:
        """The best mean over the sessions."""
        return self.best_us / self.num_running


def run_scheduling_bench(num_repeats: int = 5) -> list[SchedulingCost]:
    """One row for each of SESSIONS."""
    return [measure_scheduling(num_running, num_repeats) for num_running in SESSIONS]


def measure_scheduling(num_running: int, num_repeats: int) -> SchedulingCost:
    """Time `num_repeats` runs of NUM_STEPS decode steps, prompts excluded."""
    scheduler = _scheduler(num_running)
    tokens = list(range(num_running))
    while _step(scheduler, tokens) > num_running:  # the prompts, and one step to warm up
        pass
    times = []
    for _ in range(num_repeats):
        started = time.thread_time()
        for _ in range(NUM_STEPS):
            _step(scheduler, tokens)
        times.append((time.thread_time() - started) / NUM_STEPS * 1e6)
    return SchedulingCost(num_running, statistics.mean(times), min(times))


def format_scheduling(costs: list[SchedulingCost]) -> str:
    """A markdown table."""
    lines = ["| sessions | µs a step | best | µs a session |", "|---:|---:|---:|---:|"]
    for cost in costs:
        figures = f"{cost.mean_us:.0f} | {cost.best_us:.0f} | {cost.us_per_session:.2f}"
        lines.append(f"| {cost.num_running} | {figures} |")
    return "\n".join(lines)


def _scheduler(num_running: int) -> Scheduler:
    """Sessions of different prompts, in a pool that is never short."""
    max_model_len = 4096
    num_blocks = num_running * max_model_len // BLOCK_SIZE + 1
    config = SchedulerConfig(
        num_blocks, BLOCK_SIZE, max_model_len, num_running, num_running * NUM_PROMPT_TOKENS
    )
    scheduler = Scheduler(config, BlockPool(num_blocks, BLOCK_SIZE))
    sampling = SamplingParams(stop_token_ids=frozenset({-2}))
    for session_id in range(num_running):
        prompt = [session_id] * NUM_PROMPT_TOKENS
        scheduler.submit(Request(session_id, session_id, prompt, NUM_PROMPT_TOKENS, sampling))
    return scheduler


def _step(scheduler: Scheduler, tokens: list[int]) -> int:
    """One step in which every session gets a token; the number of tokens computed."""
    batch = scheduler.schedule()
    assert batch is not None, "nothing to schedule"
    scheduler.update(batch, tokens[: len(batch.rows)])
    return batch.num_tokens
