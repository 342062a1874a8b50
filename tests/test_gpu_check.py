"""scripts/gpu_check without a GPU: what it reads from outputs, that a part which hangs ends, and
what its exit status says."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hollow_model import write_zeros

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from gpu_checks import __main__ as check  # noqa: E402
from gpu_checks import build, parts  # noqa: E402
from gpu_checks.parts import Figure, Part  # noqa: E402

from kvchat.bench.decode import DecodeCase, DecodeSpeed, PromptSpeed, parse_case  # noqa: E402
from kvchat.bench.kernels import (  # noqa: E402
    DECODE_SHAPES,
    KernelReport,
    KernelTime,
    format_kernels,
)
from kvchat.bench.shapes import find_shape  # noqa: E402
from kvchat.model.families import check_tensors, parse_config  # noqa: E402
from kvchat.model.source import resolve  # noqa: E402


def part_named(name):
    return next(part for part in parts.all_parts() if part.name == name)


def rows(figures):
    return {figure.part: (figure.result, figure.gate, figure.is_met) for figure in figures}


def fake_part(name, code, must_pass=False, limit_s=30, read=lambda log: []):
    return Part(name, [sys.executable, "-c", code], limit_s, read, name, must_pass)


@pytest.fixture
def run_check(monkeypatch, tmp_path, capsys):
    """Runs main over these parts: (exit status, what it printed)."""

    def run(*fakes, flags=()):
        monkeypatch.setattr(check, "all_parts", lambda: list(fakes))
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path), *flags])
        return check.main(), capsys.readouterr().out

    return run


def test_kernel_times_are_held_against_their_gates():
    us = {"int8": 150.0, "int4": 130.0, "mixed": 190.0}
    times = [
        KernelTime("paged_decode", x.label, us.get(x.label.rpartition(" ")[2], 250.0), 1)
        for x in DECODE_SHAPES
    ]
    log = format_kernels(KernelReport("a GPU", 4.0, 3.0, [*times, KernelTime("other", "x", 1, 1)]))

    found = rows(part_named("kernels").read(log))

    assert found["decode attention B8@32k 32/8 native"] == ("250.0 us", "<= 256", True)
    assert found["decode attention B1@4k 32/8 native"] == ("250.0 us", "<= 13", False)
    assert found["int8 over native"] == ("1.67 x", ">= 1.7", False)
    assert found["int4 over native"] == ("1.92 x", ">= 2.5", False)
    assert found["mixed over its parts"] == ("1.08 x", "<= 1.02", False)
    assert len(found) == 10


def test_decode_speeds_are_held_against_their_gates():
    speeds = [
        DecodeSpeed(DecodeCase(8, 512), 64, 5000.0, 350.0, 200.0),
        DecodeSpeed(DecodeCase(8, 4096, "int8"), 64, 6000.0, 350.0, 200.0),
        PromptSpeed(512, 0.014),
        PromptSpeed(4096, 0.2),
    ]
    log = "".join(json.dumps(speed.record()) + "\n" for speed in speeds)

    found = rows(part_named("decode-8b").read(f"loading\n{log}"))

    assert found == {
        "decode-8b 8x512:native": ("1,600 tok/s", ">= 1,550", True),
        "decode-8b 8x512:native host": ("350.0 us a step", "<= 300", False),
        "decode-8b 8x4096:int8": ("1,333 tok/s", ">= 1,350", False),
        "decode-8b prompt 512": ("14.0 ms", "<= 15", True),
        "decode-8b prompt 4096": ("20,480 tok/s", ">= 33,000", False),
    }


def test_speeds_with_int8_weights_have_nothing_to_meet():
    log = json.dumps(DecodeSpeed(DecodeCase(1, 512), 64, 2500.0, 350.0, 200.0).record())

    assert rows(part_named("decode-8b int8 weights").read(log)) == {
        "decode-8b int8 weights 1x512:native": ("400.0 tok/s", "", None)
    }


@pytest.mark.parametrize(
    ("name", "num_cases"), [("decode-8b", 8), ("decode-1.1b", 5), ("decode-8b int8 weights", 2)]
)
def test_the_cases_that_are_asked_for_exist(name, num_cases):
    command = part_named(name).command
    cases = [command[i + 1] for i, word in enumerate(command) if word == "--case"]
    assert len(cases) == num_cases and all(map(parse_case, cases))
    find_shape(command[command.index("--shape") + 1])


@pytest.mark.parametrize(
    ("said", "is_met"), [("I am Sprout.\n", True), ("Error\n", False), ("", False)]
)
def test_a_chat_is_held_to_say_its_name(said, is_met):
    (figure,) = part_named("chat").read(said)

    assert figure.is_met == is_met


@pytest.mark.parametrize(
    ("log", "is_met"),
    [
        ("....\n12 passed, 3 skipped in 4.20s\n", True),
        ("==== 1 failed, 11 passed in 4.20s ====\n", False),
        ("2 errors in 1.0s\n", False),
        ("Traceback\n", False),
    ],
)
def test_a_summary_of_tests_is_read(log, is_met):
    (figure,) = part_named("tests").read(log)

    assert figure.is_met == is_met


def test_only_files_with_gpu_tests_are_collected():
    files = part_named("tests").command

    assert "tests/test_decode_grid.py" in files and "tests/test_cuda_ops.py" in files
    assert "tests/test_repl.py" not in files


def test_a_sanitizer_says_what_it_found_and_that_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(parts.shutil, "which", lambda name: None)
    monkeypatch.setattr(parts.glob, "glob", lambda pattern: [])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert part_named("memcheck").read("")[0].result == "compute-sanitizer is not installed"

    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    part = part_named("racecheck")

    assert part.command[:3] == [str(tool), "--tool", "racecheck"]
    clean = part.read("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    dirty = part.read("========= ERROR SUMMARY: 3 errors")
    assert [clean[0].is_met, dirty[0].is_met, part.read("")[0].is_met] == [True, False, False]


def test_what_must_pass_decides_and_a_missed_speed_does_not(run_check, tmp_path):
    slow = fake_part("slow", "", read=lambda log: [Figure("speed", "1", ">= 2", False)])
    failing = fake_part("failing", "print('why'); raise SystemExit(3)")

    assert run_check(slow, failing)[0] == 0
    status, printed = run_check(slow, fake_part("broken", "raise SystemExit(3)", must_pass=True))

    assert status == 1
    assert "| speed | 1 | >= 2 | NO |\n| broken | ended with 3 |  | NO |" in printed
    assert "why" in (tmp_path / "failing.log").read_text()
    assert (tmp_path / "table.md").read_text() in printed


def test_a_part_that_hangs_leaves_time_for_the_rest_and_its_figures_count(run_check):
    code = "import time; print('42', flush=True); time.sleep(60)"
    hanging = fake_part(
        "hanging", code, limit_s=1, read=lambda log: [Figure("answer", log.split()[-1])]
    )
    started = time.monotonic()

    status, printed = run_check(hanging, fake_part("next", "", read=lambda log: [Figure("b", "c")]))

    assert status == 0 and time.monotonic() - started < 15
    assert "| hanging | stopped after 1 s |  | NO |" in printed
    assert "| b | c |  |  |" in printed


def test_parts_are_chosen_by_name(run_check, capsys):
    printed = run_check(fake_part("a", ""), fake_part("b", ""), flags=("--only", "b"))[1]
    assert "gpu_check: b" in printed and "gpu_check: a" not in printed

    with pytest.raises(SystemExit):
        run_check(fake_part("a", ""), flags=("--only", "x"))
    assert "no part called x; there are a" in capsys.readouterr().err


def test_nothing_is_begun_when_the_time_is_up(run_check):
    status, printed = run_check(fake_part("a", "", must_pass=True), flags=("--limit", "1"))

    assert status == 1 and "| a | not run: no time left |" in printed


def test_a_build_tells_registers_and_spills(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (row,) = build.compile_one(("silu_mul.cu", {"SCALAR_BF16": 1}), 90, None)

    assert row["kernel"] == "silu_mul_kernel" and row["registers"] > 8
    bad = row | {"kernel": "paged_decode_kernel", "spilled_bytes": 16}
    read = part_named("build").read
    assert [x.is_met for x in read(json.dumps(row))] == [None, True]
    assert [x.is_met for x in read(f"{json.dumps(row)}\n{json.dumps(bad)}")] == [None, False]


def test_every_kernel_file_is_built():
    files = {file_name for file_name, _ in build.all_builds()}

    assert files == {path.name for path in (ROOT / "kernels_cu").glob("*.cu")}


def test_a_checkpoint_of_zeros_is_one(tmp_path):
    write_zeros(tmp_path, find_shape("smollm2-1.7b"))

    source = resolve(str(tmp_path))

    assert check_tensors(source, parse_config(source))
    assert sum(x.stat().st_blocks for x in tmp_path.iterdir()) * 512 < 1 << 20


def test_a_process_comes_to_its_first_token(tmp_path):
    write_zeros(tmp_path, find_shape("stories15m"))
    code = f"from gpu_checks.ready import first_token; first_token({str(tmp_path)!r})"
    folders = (ROOT, ROOT / "scripts", ROOT / "tests")  # as scripts/gpu_check has them
    env = {"PYTHONPATH": ":".join(map(str, folders)), "PATH": "/usr/bin:/bin"}

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)

    assert done.stdout.startswith("a token on "), done.stderr
