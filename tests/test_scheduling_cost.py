"""What scheduling costs: the fastest of many runs, so that a busy machine cannot fail it."""

from __future__ import annotations

import pytest

from kvchat.bench.scheduling import SchedulingCost, format_scheduling, measure_scheduling

LIMIT_US = {8: 100, 100: 500, 1000: 4000}  # of one core, for schedule and update together
NUM_TRIES = 6


def best(num_running: int, limit_us: float) -> SchedulingCost:
    """The best of a few measurements; no more of them than are needed."""
    costs = []
    for _ in range(NUM_TRIES):
        costs.append(measure_scheduling(num_running, num_repeats=5))
        if costs[-1].best_us <= limit_us:
            break
    return min(costs, key=lambda cost: cost.best_us)


@pytest.mark.parametrize("num_running", LIMIT_US)
def test_a_step_stays_below_its_limit(num_running):
    cost = best(num_running, LIMIT_US[num_running])

    print(format_scheduling([cost]))
    assert cost.best_us <= LIMIT_US[num_running]


def test_the_cost_of_a_session_does_not_grow_with_their_number():
    hundred = best(100, 0)
    thousand = best(1000, 1.5 * 10 * hundred.best_us)

    assert thousand.us_per_session <= 1.5 * hundred.us_per_session


def test_the_report_is_a_markdown_table():
    lines = format_scheduling([SchedulingCost(8, 25.4, 22.6), SchedulingCost(100, 250, 230)])

    assert lines.splitlines() == [
        "| sessions | µs a step | best | µs a session |",
        "|---:|---:|---:|---:|",
        "| 8 | 25 | 23 | 2.83 |",
        "| 100 | 250 | 230 | 2.30 |",
    ]
