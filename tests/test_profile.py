"""`--profile`: what is timed and what is not, and what the trace and the table say of it."""

import io
import json
import shutil
import threading

import pytest
import torch
from tiny_model import write_tiny_model

from kvchat.bench.arms import load_model, make_arm, make_setup
from kvchat.cli import run_cli
from kvchat.config import SamplingParams
from kvchat.engine.device_sampler import DeviceSampler
from kvchat.engine.profile import (
    HAND_OVER,
    LAUNCH,
    MAX_SPANS,
    STEP,
    STEP_PARTS,
    WAIT,
    Profiler,
    profiling,
)
from kvchat.engine.request import Request
from kvchat.errors import UsageError
from kvchat.terminal.show import Show

NUM_LAYERS = 2
BENCH = ("--sessions", 2, "--turns", 1, "--prompt", 40, "--gen", 3, "-r", 1, "--warmup", 0)


class Watch:
    """A clock in nanoseconds that goes on when it is told to."""

    def __init__(self):
        self.now_ns = 1000

    def __call__(self):
        return self.now_ns


class Worker:
    """Methods that take as long as they are told."""

    def __init__(self, clock):
        self.clock = clock

    def work(self, ns):
        self.clock.now_ns += ns

    def call(self, before_ns, *inside_ns):
        self.clock.now_ns += before_ns
        for ns in inside_ns:
            self.work(ns)

    def fail(self):
        self.clock.now_ns += 7
        raise ValueError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position=2048)


@pytest.fixture
def engine(folder):
    """A real engine over the tiny model, stepped by hand; and its events."""
    model = load_model(str(folder), None, "auto", 16, lambda *a: None)
    arm = make_arm(model, make_setup(model, "native", 1 << 20, 200), lambda *a: None)
    events = []
    return arm.setup.start(arm.runner, events.extend)[0]


def kvchat(*arguments):
    out, err = io.StringIO(), io.StringIO()
    code = run_cli([*map(str, arguments)], Show(out, err))
    return code, out.getvalue(), err.getvalue()


def reply(engine, num_tokens=4, request_id=1):
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    prompt = [*range(20, 60)]
    engine.submit(Request(request_id, request_id, prompt, len(prompt), sampling))
    while engine.step():
        pass


def watched(clock, max_spans=MAX_SPANS):
    profiler, worker = Profiler(max_spans, clock), Worker(clock)
    profiler.time(worker, "work", "inner")
    profiler.time(worker, "call", "outer")
    profiler.time(worker, "fail", "failed")
    return profiler, worker


def test_a_part_is_a_call_without_the_calls_in_it():
    clock = Watch()
    profiler, worker = watched(clock)

    worker.call(10, 3, 4)
    worker.work(5)
    with pytest.raises(ValueError):
        worker.fail()

    assert profiler.parts() == {"inner": (3, 12), "outer": (1, 10), "failed": (1, 7)}
    assert [(span[0], *span[3:]) for span in profiler.spans] == [
        ("Worker.work", 1010, 3),
        ("Worker.work", 1013, 4),
        ("Worker.call", 1000, 17),
        ("Worker.work", 1017, 5),
        ("Worker.fail", 1022, 7),
    ]


def test_threads_do_not_nest_in_each_other():
    clock = Watch()
    profiler, worker = watched(clock)
    other = Worker(clock)
    profiler.time(other, "work", "elsewhere")
    worker.work = lambda ns: join_thread(lambda: other.work(ns))

    worker.call(10, 100)

    assert profiler.parts() == {"outer": (1, 110), "elsewhere": (1, 100)}
    names = {e["args"]["name"] for e in profiler.events() if e["ph"] == "M"}
    assert names == {"MainThread", "another"}


def join_thread(target):
    thread = threading.Thread(target=target, name="another")
    thread.start()
    thread.join()


def test_only_the_last_spans_are_kept_and_all_are_counted():
    clock = Watch()
    profiler, worker = watched(clock, max_spans=3)

    for ns in range(10):
        worker.work(ns)

    assert [span[4] for span in profiler.spans] == [7, 8, 9]
    assert profiler.parts() == {"inner": (10, 45)}
    assert (profiler.about()["calls"], profiler.about()["kept"]) == (10, 3)


def test_every_part_of_a_step_is_found_from_the_engine(engine):
    profiler = Profiler()
    profiler.watch(engine)

    reply(engine, num_tokens=4)

    calls = {part: found[0] for part, found in profiler.parts().items()}
    per_step = {
        "schedule": 1,
        "block operations": 1,
        "plan": 1,
        "norm": 2 * NUM_LAYERS + 1,
        "write_kv": NUM_LAYERS,
        "attend": NUM_LAYERS,
        "sampling": 1,
        LAUNCH: 1,
        WAIT: 1,
        "update": 1,
        STEP: 1,
    }
    # the last call of schedule finds nothing to do, and that step is none
    extra = {"schedule": 1}
    assert profiler.num_steps == 4
    assert {name: calls.pop(name) for name in per_step} == {
        name: 4 * number + extra.get(name, 0) for name, number in per_step.items()
    }
    assert calls.pop("products") >= 4 * (4 * NUM_LAYERS + 1)
    assert calls == {}


def test_the_parts_of_a_step_add_up_to_it(engine):
    profiler = Profiler()
    profiler.watch(engine)

    reply(engine)
    idle_ns = profiler.spans[-1][4]  # schedule, with nothing to do

    in_parts = sum(ns for _, ns in profiler.parts().values())
    assert profiler.spans[-1][0] == "Scheduler.schedule"
    assert in_parts == profiler.steps_ns + idle_ns
    assert set(profiler.parts()) == {*STEP_PARTS} - {HAND_OVER}


def test_spans_lie_within_the_calls_that_made_them(engine):
    profiler = Profiler()
    profiler.watch(engine)

    reply(engine, num_tokens=1)

    events = [e for e in profiler.events() if e["ph"] == "X"]
    (step,) = (e for e in events if e["name"] == "Engine.step")
    (launch,) = (e for e in events if e["name"] == "Runner.launch")
    attends = [e for e in events if e["cat"] == "attend"]
    assert len(attends) == NUM_LAYERS
    for inner, outer in ((launch, step), *((attend, launch) for attend in attends)):
        assert outer["ts"] <= inner["ts"]
        assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.001


def test_a_sampler_on_the_device_is_found_too(engine):
    sampler, worker, profiler = DeviceSampler(), Worker(Watch()), Profiler()
    engine._runner.device_sampler = sampler
    worker.work = lambda ns: sampler.greedy(torch.ones(2, 3))

    profiler.watch(engine)
    profiler.time(worker, "call", "outer")
    worker.call(0, 1)

    assert {part: found[0] for part, found in profiler.parts().items()} == {
        "sampling": 1,
        "outer": 1,
    }


def test_outside_of_a_watched_step_nothing_is_timed(engine):
    profiler = Profiler()
    profiler.watch(engine)

    engine._scheduler.schedule()

    assert profiler.parts() == {}


def test_watching_twice_times_once_and_unwatching_leaves_nothing(engine):
    before = [set(vars(item)) for item in (engine, engine._scheduler, engine._runner)]
    profiler = Profiler()
    profiler.watch(engine)
    profiler.watch(engine)
    reply(engine, num_tokens=2)
    assert profiler.num_steps == profiler.parts()[STEP][0] == 2

    profiler.unwatch()
    reply(engine, request_id=2)

    assert [set(vars(item)) for item in (engine, engine._scheduler, engine._runner)] == before
    assert profiler.num_steps == 2


def test_without_a_file_there_is_no_profiler():
    with profiling(None, pytest.fail) as profiler:
        assert profiler is None


def test_the_trace_is_written_when_a_run_is_interrupted(tmp_path, engine):
    path, notes = tmp_path / "trace.json", []
    path.write_text("an older trace, much longer than the new one" * 1000)

    with pytest.raises(KeyboardInterrupt), profiling(path, notes.append) as profiler:
        profiler.watch(engine)
        reply(engine)
        raise KeyboardInterrupt

    assert len(json.loads(path.read_text())["traceEvents"]) == 1 + profiler.num_spans
    assert "profile: 4 steps took" in notes[0]


def test_a_trace_that_cannot_be_written_in_the_end_is_told(tmp_path):
    folder, notes = tmp_path / "gone", []
    folder.mkdir()

    with profiling(folder / "trace.json", notes.append):
        shutil.rmtree(folder)

    assert notes[0].startswith("profile: no step has run\n--profile ")
    assert "was not written: No such file or directory" in notes[0]


@pytest.mark.parametrize("name", ["missing/trace.json", "."])
def test_a_file_that_cannot_be_written_is_refused_before_anything_else(tmp_path, name):
    for command in (("run", "no-such-model", "-p", "hi"), ("bench", "-m", "no-such-model")):
        code, out, err = kvchat(*command, "--profile", tmp_path / name)

        assert (code, out) == (UsageError.exit_code, "")
        assert err.startswith("error: --profile ") and err.count("\n") == 1


def test_a_run_tells_where_its_steps_went(folder, tmp_path, monkeypatch):
    path = tmp_path / "trace.json"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))

    code, _, err = kvchat(
        *("run", folder, "-p", "hello", "-n", 5, "--temp", 0, "--ignore-eos", "--kv-mem", "4MiB"),
        *("--profile", path),
    )

    assert code == 0
    lines = err.splitlines()
    assert lines[0].startswith("profile: 5 steps took")
    names = [line[: len(LAUNCH)].strip() for line in lines[2:-2]]
    total = names.index("a step, all of it")
    assert names[:total] == [*STEP_PARTS]
    assert set(names[total + 1 :]) == {"events to text", "drawing"}
    shares = [float(line.split("%")[0].split()[-1]) for line in lines[2 : 2 + total]]
    assert sum(shares) == pytest.approx(100, abs=1)
    trace = json.loads(path.read_text())
    assert lines[-1].startswith(f"{trace['otherData']['kept']:,} spans in ")
    threads = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert threads == {"MainThread", "kvchat-engine"}


def test_a_bench_is_profiled_beside_its_report(folder, tmp_path):
    plain = kvchat("bench", "-m", folder, *BENCH)

    code, out, err = kvchat("bench", "-m", folder, *BENCH, "--profile", tmp_path / "trace.json")

    assert code == plain[0] == 0
    assert len(out.splitlines()) == len(plain[1].splitlines())
    assert (plain[2], err.startswith("profile: ")) == ("", True)
    assert "attend" in err
