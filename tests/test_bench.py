"""`kvchat bench`: what it counts against second counts, what it computes against numpy."""

import csv
import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest
from tiny_model import write_tiny_model

from kvchat.bench import sessions_report as report
from kvchat.bench.arms import load_model, make_arm, make_setup
from kvchat.bench.capacity_search import max_context, max_sessions, peak_blocks
from kvchat.bench.drive import Driver, NoModel
from kvchat.bench.metrics import Reply, RunLog, StepTime, goodput, measure, percentile
from kvchat.bench.sessions import BenchOptions, run_bench
from kvchat.bench.tally import Tally, look_at
from kvchat.bench.trace import TracedChat, Turn, write_trace
from kvchat.bench.workload import Range, Workload, make_scripts, parse_arrival, parse_range
from kvchat.cli import run_cli
from kvchat.errors import UsageError
from kvchat.kv.layout import Codec, unpack_entry
from kvchat.terminal.show import Show

SMALL = Workload(sessions=4, turns=2, prompt=Range(150, 200), reply=Range(4, 8), shared_prefix=64)
VOCAB = range(20, 300)
FLAGS = (
    *("--sessions", 3, "--turns", 2, "--prompt", "60-90", "--gen", "3-5"),
    *("--shared-prefix", 32, "-r", 1, "--warmup", 0),
)


def quiet(*arguments):
    """A progress that shows nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position=2048)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), None, "auto", 16, quiet)


@pytest.fixture(scope="module")
def result(folder):
    workload = replace(SMALL, turns=3, prompt=Range(220, 260))
    return run_bench(BenchOptions(str(folder), workload=workload, reps=2, warmup=0), quiet)


def kvchat(*arguments):
    """(exit code, stdout, stderr) of `kvchat bench`."""
    out, err = io.StringIO(), io.StringIO()
    code = run_cli(["bench", *map(str, arguments)], Show(out, err))
    return code, out.getvalue(), err.getvalue()


def ticks():
    """A clock that goes on by a second each time it is read: a step takes one second."""
    now = [0]

    def clock():
        now[0] += 1
        return now[0]

    return clock


@pytest.mark.parametrize("percent", [50, 95, 99])
@pytest.mark.parametrize("num_samples", [10, 100, 101, 500, 777])
def test_percentiles_are_numpys_or_missing(percent, num_samples):
    rng = random.Random(num_samples)
    samples = [rng.expovariate(1) for _ in range(num_samples)]

    found = percentile(samples, percent)

    if num_samples < {50: 10, 95: 100, 99: 500}[percent]:
        assert found is None
    else:
        assert found == pytest.approx(np.percentile(samples, percent))


def test_a_percentile_of_one_sample_too_few_is_missing():
    assert [percentile([1.0] * n, p) for n, p in ((9, 50), (99, 95), (499, 99))] == [None] * 3


def test_latencies_and_speeds_of_replies_worked_out_by_hand():
    first = Reply(0, 0.0, 10, [1.0, 1.5, 2.5])
    second = Reply(1, 1.0, 10, [4.0])
    steps = [StepTime(1.0, 20, 0), StepTime(2.0, 5, 1), StepTime(1.0, 0, 2, kv_bytes=10**9)]
    log = RunLog([first, second], steps, seconds=4.0)

    speed = measure([log], weight_bytes=10**9)

    assert (first.ttft_s, first.gaps_s, first.tpot_s, second.tpot_s) == (
        1.0,
        [0.5, 1.0],
        0.75,
        None,
    )
    assert speed.tokens_a_second == 1.0
    assert log.session_speeds == {0: 3 / 2.5, 1: 1 / 3}
    assert (speed.session_min, speed.session_median) == (1 / 3, (1.2 + 1 / 3) / 2)
    assert (speed.prefill, speed.generation) == (25 / 3, 2.0)
    assert (speed.mean_batch, speed.max_batch, speed.read_gb_s) == (1.5, 2, 2.0)
    assert (speed.ttft.mean, speed.ttft.p50, speed.gap.mean) == (2000.0, None, 750.0)
    assert goodput([log], {"ttft": 1000, "itl": 750}) == 1 / 4
    assert goodput([log], {"ttft": 1000, "itl": 749}) == 0


def test_scripts_repeat_and_keep_to_their_ranges():
    scripts = make_scripts(SMALL, VOCAB)

    assert scripts == make_scripts(SMALL, VOCAB)
    assert scripts != make_scripts(replace(SMALL, seed=1), VOCAB)
    assert {s.turns[0].prompt_ids[:64] == scripts[0].turns[0].prompt_ids[:64] for s in scripts} == {
        True
    }
    for script in scripts:
        lengths = [len(turn.prompt_ids) for turn in script.turns]
        assert 150 <= lengths[0] - 64 <= 200 and 150 <= lengths[1] <= 200
        assert all(4 <= turn.num_reply <= 8 for turn in script.turns)
        assert script.num_tokens == sum(lengths) + sum(turn.num_reply for turn in script.turns)
        assert all(i in VOCAB for turn in script.turns for i in turn.prompt_ids)


def test_a_trace_gives_lengths_and_times(tmp_path):
    path = tmp_path / "trace.jsonl"
    write_trace(path, [TracedChat(0.5, (Turn(20, 3), Turn(9, 2, 1.5)))])

    (script,) = make_scripts(Workload(trace=path, shared_prefix=0), VOCAB, 500)

    assert script.arrival_s == 0.5
    assert [(len(t.prompt_ids), t.num_reply, t.think_s) for t in script.turns] == [
        (20, 3, 0.0),
        (9, 2, 1.5),
    ]


def test_poisson_arrivals_come_at_the_rate():
    scripts = make_scripts(Workload(sessions=2000, turns=1, rate=4.0, shared_prefix=0), VOCAB)

    assert scripts[-1].arrival_s / 2000 == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.parametrize("text", ["", "0", "5-4", "a", "1-2-3", "-5"])
def test_a_range_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="64-192"):
        parse_range(text, "--prompt")


@pytest.mark.parametrize("text", ["open", "poisson", "poisson:0", "poisson:-1"])
def test_an_arrival_that_is_none_is_refused(text):
    with pytest.raises(UsageError, match="closed"):
        parse_arrival(text)


def test_a_driver_times_every_token_on_its_own_clock(model):
    scripts = make_scripts(Workload(1, 2, Range(30, 30), Range(3, 3), 0), VOCAB)
    setup = make_setup(model, "native", 10**6, 200)
    driver = Driver(setup, NoModel(), scripts, clock=ticks())

    driver.run()

    # a step takes a second: the prompt is one step, and gives the first token
    assert [(r.submitted_s, r.token_times_s) for r in driver.log.replies] == [
        (0.0, [1, 2, 3]),
        (3, [4, 5, 6]),
    ]
    assert driver.log.seconds == 6


def test_one_at_a_time_is_one_after_another(model):
    scripts = make_scripts(Workload(3, 2, Range(30, 30), Range(3, 3), 0), VOCAB)
    setup = make_setup(model, "native", 10**6, 200)
    driver = Driver(setup, NoModel(), scripts, 1, clock=ticks())

    driver.run()

    assert driver.tally.peak_running == 1
    assert [reply.session_id for reply in driver.log.replies] == [0, 0, 1, 1, 2, 2]
    assert driver.is_done and driver.share_done == 1


def test_what_stands_before_the_clock_is_computed_and_not_timed(model):
    scripts = make_scripts(Workload(2, 1, Range(30, 30), Range(3, 3), 16, depth=100), VOCAB)
    driver = Driver(make_setup(model, "native", 10**6, 300), NoModel(), scripts, clock=ticks())

    assert driver.log.steps == [] and driver.tally.num_tokens > 200
    driver.run()

    assert sum(step.num_prompt_tokens for step in driver.log.steps) == 2 * 30
    assert [reply.num_prompt_tokens for reply in driver.log.replies] == [146, 146]


def test_counts_in_an_ample_pool_are_those_of_the_scripts(model):
    workload = replace(SMALL, shared_prefix=0)
    scripts = make_scripts(workload, VOCAB)
    setup = make_setup(model, "native", 10**7, 500)
    driver = Driver(setup, NoModel(), scripts)
    driver.run()
    held = look_at(driver.scheduler.sequences(), 16)
    driver.close()

    lengths = [script.num_tokens for script in scripts]
    num_replies = [turn.num_reply for script in scripts for turn in script.turns]
    # the last token of a session is never computed
    assert driver.tally.num_tokens == sum(lengths) - len(scripts)
    assert driver.tally.num_sampled == driver.log.num_generated == sum(num_replies)
    assert driver.tally.num_redone == driver.tally.num_setbacks == 0
    assert len(held.blocks) == driver.peak_held == sum(-(-(n - 1) // 16) for n in lengths)
    assert held.num_open_slots == sum(-(n - 1) % 16 for n in lengths)
    assert held.num_bytes(setup.layout) == len(held.blocks) * 16 * model.spec.bytes_per_token
    assert peak_blocks(setup, scripts) == driver.peak_held
    assert (driver.problems, driver.num_leaked, driver.num_calm) == ([], 0, 4)


def test_what_is_shared_and_redone_is_counted(model):
    scripts = make_scripts(replace(SMALL, sessions=6), VOCAB)
    needed = peak_blocks(make_setup(model, "native", 10**7, 500), scripts)
    num_bytes = (needed * 6 // 10 + 1) * 16 * model.spec.bytes_per_token
    driver = Driver(make_setup(model, "native", num_bytes, 500), NoModel(), scripts)
    driver.run()
    num_cached = driver.scheduler.counters.num_cached_tokens
    lengths = sum(script.num_tokens for script in scripts)
    held = look_at(driver.scheduler.sequences(), 16)
    driver.close()

    assert driver.problems == []
    assert driver.tally.num_setbacks > 0 and driver.num_calm < 6
    # every position of a session is computed once, found, or computed again
    first = driver.tally.num_tokens - driver.tally.num_redone
    assert lengths - 6 - num_cached <= first <= lengths - 6
    assert held.num_named >= len(held.blocks)


def test_bytes_and_codecs_of_held_blocks_are_those_of_the_tensors(model):
    scripts = make_scripts(replace(SMALL, prompt=Range(250, 300)), VOCAB)
    arm = make_arm(model, make_setup(model, "int8", 10**6, 1000), quiet)
    driver = Driver(arm.setup, arm.runner, scripts)
    driver.run()
    held = look_at(driver.scheduler.sequences(), 16)
    num_held = {codec: [*held.blocks.values()].count(codec) for codec in Codec}
    entries = [unpack_entry(e) for _, seq, _ in driver.scheduler.sequences() for e in seq.table]

    assert num_held[Codec.INT8] == len({i for i, codec, _ in entries if codec == Codec.INT8}) > 0
    by_codec = arm.cache.audit({c: n for c, n in num_held.items() if n}).by_codec
    assert held.num_bytes(arm.setup.layout) == sum(by_codec.values())
    assert driver.audit() == []
    # 16 + 16 bytes of payload and 2 + 2 of scales for each of 2 layers x 2 heads
    assert arm.setup.layout.bytes_used(Codec.INT8) / 64 == 4 * (16 + 16 + 2 + 2)
    driver.close()
    assert driver.problems == []


def test_a_counter_that_is_wrong_is_told(model):
    driver = Driver(make_setup(model, "native", 10**6, 500), NoModel(), make_scripts(SMALL, VOCAB))
    driver.run()
    driver.scheduler.counters.num_scheduled_tokens += 1

    driver.close()

    assert len(driver.problems) == 1 and driver.problems[0].startswith("tokens computed:")
    assert Tally().differences(driver.engine.stats()) != []


def test_capacity_is_that_of_trying_one_by_one(model):
    setup = make_setup(model, "native", 80 * 16 * model.spec.bytes_per_token, 600)
    workload = replace(SMALL, shared_prefix=0)

    scripts = make_scripts(replace(workload, sessions=512), VOCAB)
    blocks = [-(-(script.num_tokens - 1) // 16) for script in scripts]

    num_fitting = max(n for n in range(1, 20) if sum(blocks[:n]) <= 79)
    assert max_sessions(setup, workload) == num_fitting


def test_int8_chats_reach_further_in_the_same_bytes(model):
    num_bytes = 4 * 1024 * model.spec.bytes_per_token
    native = max_context(make_setup(model, "native", num_bytes, 500), 4)
    int8 = max_context(make_setup(model, "int8", num_bytes, 500), 4)
    auto = max_context(make_setup(model, "auto", num_bytes, 500), 4)

    assert 0.9 * 1024 < native <= 1024
    assert 2.5 * native < int8 < 4 * native
    assert auto >= 0.9 * int8


def test_the_default_report_has_25_lines_all_filled(result):
    lines = report.report_lines(result)
    table = report.table(result)

    assert 20 <= len(lines) <= report.MAX_LINES
    assert table[0] == ["", "native", "int8", "auto"]
    assert all(cell for row in table[1:] for cell in row)
    assert max(map(len, lines)) <= 125
    assert (
        lines[-2] == "checks: leaks 0; ledger = allocator; tokens, blocks, bytes = a second count"
    )


def test_native_gives_way_where_auto_compresses(result):
    native, _, auto = result.modes

    assert native.tally.num_redone > 0 and native.tally.num_spans == 0
    assert auto.tally.num_spans > 0 and auto.tally.num_redone < native.tally.num_redone
    assert native.setup.pool_bytes >= auto.setup.pool_bytes
    share = (native.setup.config.num_blocks - 1) / result.num_needed
    assert share == pytest.approx(0.6, abs=0.02)


def test_all_repetitions_of_closed_arrivals_count_the_same(result):
    for mode in result.modes:
        assert len({log.num_generated for log in mode.logs}) == 1
        assert len({len(log.steps) for log in mode.logs}) == 1


def test_formats_parse_and_agree(result):
    found = report.records(result, {"ttft": 500.0})

    rows = [*csv.DictReader(io.StringIO(report.as_csv(found)))]
    lines = [json.loads(line) for line in report.as_jsonl(found).splitlines()]

    assert json.loads(report.as_json(found)) == lines
    assert [row["mode"] for row in rows] == ["native", "int8", "auto"]
    for row, line in zip(rows, lines, strict=True):
        assert float(row["tokens_a_second"]) == line["tokens_a_second"]
        assert float(row["gap.mean"]) == line["gap"]["mean"]
        assert row["gap.p99"] == "" and line["gap"]["p99"] is None


@pytest.mark.parametrize("output", ["text", "md", "json"])
def test_the_command_prints_every_format(folder, output):
    code, out, err = kvchat("-m", folder, *FLAGS, "-o", output, "--kv-cache", "native,auto")

    assert (code, err) == (0, "")
    if output == "json":
        assert [record["mode"] for record in json.loads(out)] == ["native", "auto"]
    else:
        assert "tok/s over all" in out
        assert len(out.splitlines()) <= (25 if output == "text" else 35)


def test_verify_detail_and_goodput_add_their_lines(folder):
    code, out, err = kvchat(
        "-m",
        folder,
        *FLAGS,
        "--kv-cache",
        "native",
        "--verify",
        "--detail",
        "--goodput",
        "ttft:9000",
    )

    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["ok"] * 4
    assert "spans compressed)" in out and "| goodput, replies a second |" in out
    assert "| of the machine's | " in out


def test_rows_of_llama_bench(folder):
    code, out, err = kvchat(
        "-m",
        folder,
        "-p",
        48,
        "-n",
        "8",
        "-d",
        "0,40",
        "-r",
        2,
        "--kv-cache",
        "native,int8",
        "-o",
        "jsonl",
    )

    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "")
    names = ["pp48", "tg8", "pp48 @ d40", "tg8 @ d40"]
    assert [row["test"] for row in rows[::2]] == [row["test"] for row in rows[1::2]] == names
    for row in rows:
        assert len(row["samples"]) == 2
        assert row["mean"] == pytest.approx(np.mean(row["samples"]))
        assert row["deviation"] == pytest.approx(np.std(row["samples"], ddof=1))


def test_a_sweep_has_a_row_for_each_number_and_mode(folder):
    code, out, err = kvchat(
        "-m", folder, *FLAGS, "--sweep", "sessions=1,3", "--kv-cache", "native,auto", "-o", "csv"
    )

    rows = [*csv.DictReader(io.StringIO(out))]
    assert (code, err) == (0, "")
    assert [(row["sessions"], row["mode"]) for row in rows] == [
        *(("1", "native"), ("1", "auto")),
        *(("3", "native"), ("3", "auto")),
    ]


def test_a_picture_is_drawn(folder, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"

    code, _, err = kvchat("-m", folder, *FLAGS, "--kv-cache", "native", "--plot", path)

    assert (code, err) == (0, "")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sessions", 4, "layouts"), "write it after"),
        (("--kv-cache", "fp8"), "native, auto"),
        (("-p", "1x"), "whole numbers"),
        (("-p", "0"), "nothing to measure"),
        (("--sweep", "turns=1"), "sessions=1,2"),
        (("--goodput", "e2e:5"), "ttft:500"),
        (("--plot", "a.pdf"), ".svg"),
        (("--shape", "llama9"), "no shape"),
        (("--shape", "stories15m", "-m", "x"), "a model and a shape"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_a_line(folder, arguments, words):
    named = () if "--shape" in arguments else ("-m", folder)

    code, out, err = kvchat(*named, *arguments)

    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and words in err


def test_a_shape_runs_with_random_weights():
    made = load_model(None, "stories15m", "float32", 16, quiet)

    assert made.weight_bytes == 4 * (15_191_712 - 13 * 288)
    assert made.decoder.layers[0].qkv.weight.std().item() == pytest.approx(288**-0.5, rel=0.02)
    assert made.decoder.norm.unique().tolist() == [1.0]
