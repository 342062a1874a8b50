"""What scheduling costs: the fastest of many runs, so that a busy machine cannot fail it."""

from __future__ import annotations

import pytest

from kvchat.bench.scheduling import SchedulingCost, format_scheduling, measure_scheduling

LIMIT_US = {8: 100, 100: 500, 1000: 4000}  # of one core, for schedule and update together
MAX_GROWTH = 1.5
NUM_TRIES = 30  # a shared machine may run at half its speed for many seconds


def best(costs: list[SchedulingCost]) -> SchedulingCost:
    return min(costs, key=lambda cost: cost.best_us)


@pytest.mark.parametrize("num_running", LIMIT_US)
def test_a_step_stays_below_its_limit(num_running):
    costs = []
    for _ in range(NUM_TRIES):
        costs.append(measure_scheduling(num_running, num_repeats=5))
        if best(costs).best_us <= LIMIT_US[num_running]:
            break

    print(format_scheduling([best(costs)]))
    assert best(costs).best_us <= LIMIT_US[num_running]


def test_the_cost_of_a_session_does_not_grow_with_their_number():
    hundred, thousand = [], []
    for _ in range(NUM_TRIES):
        hundred.append(measure_scheduling(100, num_repeats=20))
        thousand.append(measure_scheduling(1000, num_repeats=3))
        growth = best(thousand).us_per_session / best(hundred).us_per_session
        if growth <= MAX_GROWTH:
            break

    print(f"{growth=:.2f}")
    assert growth <= MAX_GROWTH


def test_the_report_is_a_markdown_table():
    lines = format_scheduling([SchedulingCost(8, 25.4, 22.6), SchedulingCost(100, 250, 230)])

    assert lines.splitlines() == [
        "| sessions | µs a step | best | µs a session |",
        "|---:|---:|---:|---:|",
        "| 8 | 25 | 23 | 2.83 |",
        "| 100 | 250 | 230 | 2.30 |",
    ]
