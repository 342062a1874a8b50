"""`kvchat bench`: solo runs beside the whole, pair by pair; what it says where there is nothing."""

import statistics
from dataclasses import replace

import pytest
import torch
from tiny_model import write_tiny_model

from kvchat.bench import sessions
from kvchat.bench.detail import detail_lines
from kvchat.bench.sessions import BenchOptions, peak_device_bytes, run_bench
from kvchat.bench.workload import Range, Workload
from kvchat.kv.planner import format_size

REPS = 3


class Runs:
    """A driver that is done after so many slices, and writes down when it ran."""

    def __init__(self, name, num_slices, log):
        self.name, self.num_slices, self.num_run, self.log = name, num_slices, 0, log

    @property
    def is_done(self):
        return self.num_run >= self.num_slices

    @property
    def share_done(self):
        return self.num_run / self.num_slices

    def run(self, seconds):
        if not self.is_done:
            self.log.append(self.name)
            self.num_run += 1


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position=2048)
    workload = Workload(
        sessions=4, turns=2, prompt=Range(60, 90), reply=Range(4, 8), shared_prefix=32
    )
    options = BenchOptions(str(folder), workload=workload, reps=REPS, modes=("native", "int8"))
    return run_bench(options, lambda *arguments: None)


def alternate(driver_slices, solo_slices, rep=0):
    """Who ran, one slice after the other."""
    log = []
    drivers = [Runs(i, n, log) for i, n in enumerate(driver_slices)]
    solos = [Runs(f"solo {i}", n, log) for i, n in enumerate(solo_slices)]
    list(sessions._alternate(drivers, solos, rep))
    assert all(run.is_done for run in (*drivers, *solos))
    return log


def test_a_solo_run_goes_on_in_step_with_its_mode():
    log = alternate([8], [2])

    # a solo slice is half of the solo run: it is due when the mode has done more than it
    assert log == [0, "solo 0", *[0] * 4, "solo 0", *[0] * 3]


def test_a_solo_run_that_takes_longer_goes_on_alone():
    assert alternate([1], [3]) == [0, "solo 0", "solo 0", "solo 0"]


@pytest.mark.parametrize("rep", [0, 1, 2])
def test_another_mode_is_first_each_time(rep):
    log = alternate([3, 3, 3], [1, 1, 1], rep)

    turns = [run for run in log if isinstance(run, int)]
    assert [turns[i : i + 3] for i in (0, 3, 6)] == [
        [(rep + turn + i) % 3 for i in range(3)] for turn in range(3)
    ]


def test_every_repetition_has_its_solo_run_and_ratios_are_medians_of_their_pairs(result):
    solo_ids = {result.scripts[0].session_id, result.scripts[2].session_id}
    all_tokens = sum(script.num_tokens for script in result.scripts)
    few_tokens = sum(s.num_tokens for s in result.scripts if s.session_id in solo_ids)

    for mode in result.modes:
        assert len(mode.logs) == len(mode.solo_logs) == REPS
        for solo in mode.solo_logs:
            assert {reply.session_id for reply in solo.replies} == solo_ids
            assert max(step.num_decodes for step in solo.steps) == 1
        pairs = list(zip(mode.logs, mode.solo_logs, strict=True))
        assert mode.times_one == statistics.median(
            log.generation_speed / solo.generation_speed for log, solo in pairs
        )
        assert mode.times_one_by_one == pytest.approx(
            statistics.median(s.seconds * all_tokens / few_tokens / log.seconds for log, s in pairs)
        )


def test_ratios_are_of_five_pairs_by_default():
    assert BenchOptions("model").reps == 5


def lines_of(result):
    return detail_lines(result, {}, 10.0)


def test_what_a_cpu_does_not_have_is_marked(result):
    lines = lines_of(result)

    assert "| idle chats parked, blocks copied | n/a | n/a |" in lines
    assert any(line.startswith("- memory of the device: n/a, main memory holds") for line in lines)
    assert peak_device_bytes("cpu") is None


def test_a_gpus_memory_and_parks_are_told(result, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    modes = [
        replace(
            mode,
            num_parks=2,
            num_parked_blocks=7,
            setup=replace(mode.setup, config=replace(mode.setup.config, num_host_slots=9)),
        )
        for mode in result.modes
    ]

    lines = lines_of(replace(result, modes=modes, peak_device_bytes=peak_device_bytes("cuda")))

    assert "| idle chats parked, blocks copied | 2, 7 | 2, 7 |" in lines
    kept = result.model.weight_bytes + 2 * sum(mode.setup.pool_bytes for mode in modes)
    told = next(line for line in lines if line.startswith("- memory of the device: 3.0 MiB at its"))
    assert told.endswith(f"weights and two pools a mode {format_size(kept)}")
