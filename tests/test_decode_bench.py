"""`kvchat bench decode`: what it counts, and what it says."""

import io
import json
from dataclasses import replace

import pytest
from tiny_model import write_tiny_model

from kvchat.bench.arms import load_model
from kvchat.bench.decode import DecodeCase, parse_case, run_decode_bench, run_prompt_bench
from kvchat.cli import run_cli
from kvchat.errors import UsageError
from kvchat.terminal.show import Show


def quiet(*arguments):
    """A progress that shows nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), max_position=2048)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(str(folder), None, "auto", 16, quiet)


def test_cases_are_read_from_words():
    assert parse_case("8x4096:int8") == DecodeCase(8, 4096, "int8")
    assert parse_case("1x512").name == "1x512:native"
    for text in ("8", "8x", "0x5", "5000x5", "8x512:fp8", "8 x 512"):
        with pytest.raises(UsageError, match=r"sessions|SESSIONSxTOKENS"):
            parse_case(text)


def test_every_session_generates_in_every_measured_step(model):
    cases = [DecodeCase(3, 200, "int4"), DecodeCase(5, 40), DecodeCase(2, 700), DecodeCase(1, 1)]

    speeds = [*run_decode_bench(model, cases, 6, quiet)]

    assert [speed.case for speed in speeds] == cases  # a wrong number of tokens raises
    for speed in speeds:
        assert speed.tokens_a_second * speed.step_us == pytest.approx(1e6 * speed.case.num_sessions)
        assert 0 < speed.host_us < speed.step_us
        assert 0 < speed.launch_us < speed.step_us
        assert speed.host_us + speed.launch_us == pytest.approx(speed.step_us)


def test_eager_modes_are_measured_once_all_is_compressed(model, monkeypatch):
    from kvchat.bench import decode

    held = []

    class Looking(decode._Bench):
        def _is_compressing(self):
            is_behind = super()._is_compressing()
            held.append((is_behind, self._scheduler.pool.num_held))
            return is_behind

    monkeypatch.setattr(decode, "_Bench", Looking)
    [*run_decode_bench(model, [DecodeCase(2, 600, "int8")], 4, quiet)]
    native_blocks = 2 * (600 // 16)

    assert not held[-1][0]
    assert held[-1][1] < 0.7 * native_blocks


def test_prompts_alone(model):
    short, long = run_prompt_bench(model, [8, 600], 2, quiet)

    assert (short.num_prompt, long.num_prompt) == (8, 600)
    assert 0 < short.seconds < long.seconds
    assert long.tokens_a_second == pytest.approx(600 / long.seconds)


def test_the_command_tells_each_case_as_it_is_done(folder):
    out, flags = io.StringIO(), ("--case", "2x20", "-p", "30", "--steps", "3", "-r", "1")

    code = run_cli(["bench", "decode", "-m", str(folder), *flags], Show(out, io.StringIO()))

    about, first, second = out.getvalue().splitlines()
    assert code == 0
    assert about.endswith("attention: numba kernels")
    assert first.startswith("2x20:native") and "the host's" in first
    assert second.startswith("prompt 30") and "to the first token" in second


def test_records_for_programs(folder):
    out, flags = io.StringIO(), ("--case", "2x20:int8", "--steps", "3", "-o", "jsonl")

    run_cli(["bench", "decode", "-m", str(folder), *flags], Show(out, io.StringIO()))

    record = json.loads(out.getvalue())
    assert record["case"] == "2x20:int8" and record["num_steps"] == 3
    assert record["tokens_a_second"] > 0
    assert record["attention"] == "numba kernels"


@pytest.mark.parametrize(("head_dim", "word"), [(128, "paged_decode"), (8, "slower")])
def test_on_a_gpu_it_says_which_attention_runs(model, head_dim, word):
    spec = replace(model.spec, head_dim=head_dim, dtype="float16")

    assert word in replace(model, device="cuda", spec=spec).attention
