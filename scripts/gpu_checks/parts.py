"""The parts of a check: what each runs, for how long at most, and how its output is read."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PYTHON = [sys.executable, "-P", "-u", "-m"]
# Of one layer's decode attention, bf16, cold caches: microseconds at most.
_KERNEL_GATES_US = {
    "B1@4k 32/8 native": 13.0,
    "B1@32k 32/8 native": 46.0,
    "B8@4k 32/8 native": 46.0,
    "B8@32k 32/8 native": 256.0,
    "B64@16k 32/8 native": 985.0,
    "B1@4k 32/32 native": 29.0,
    "B8@4k 32/32 native": 136.0,
}
_LONG = "B8@32k 32/8"  # where codecs are compared
_CODEC_GATES = {"int8": 1.7, "int4": 2.5}  # times as fast as native
_MIX_SLACK = 1.02  # of the mean of its parts: what the clock cannot tell
# Of all sessions together: tokens a second at least, by case of `kvchat bench decode`.
_DECODE_GATES = {
    "llama3-8b": {
        "1x512:native": 211,
        "8x512:native": 1550,
        "64x512:native": 9350,
        "8x4096:native": 1300,
        "8x4096:int8": 1350,
        "8x32000:native": 625,
        "8x32000:int8": 850,
        "8x32000:int4": 1000,
        "prompt 4096": 33_000,
    },
    "tinyllama-1.1b": {
        "1x512:native": 760,
        "8x512:native": 3700,
        "64x512:native": 19_000,
        "256x512:native": 32_000,
        "1000x128:native": 50_000,
    },
}
_FIRST_TOKEN = "prompt 512"
_FIRST_TOKEN_GATE_MS = 15.0
_HOST_GATE_US = 300.0  # of a step of eight sessions
_READY_GATE_S = 15.0
# Every kernel on shapes small enough for a tool that slows it down a hundred times.
_SMALL_TESTS = (
    "tests/test_decode_grid.py::test_a_slice_of_the_grid",
    "tests/test_cuda_ops.py",
    "tests/test_emulator.py",
    "tests/test_top_k.py",
    "tests/test_skinny_gemm.py",
)
_SMALL = "not 8b"
_CHAT = [*_PYTHON, "kvchat", "run", "--device", "cuda", "--temp", "0", "-p", "What is your name?"]


@dataclass(frozen=True)
class Figure:
    """A row of the table; is_met None: nothing to meet."""

    part: str
    result: str
    gate: str = ""
    is_met: bool | None = None


@dataclass(frozen=True)
class Part:
    """read: what ran to its end or not, its output, as rows. A part that must pass fails the check
    when it does not end well; a figure that is missed never does."""

    name: str
    command: list[str]
    limit_s: int
    read: Callable[[str], list[Figure]]
    log_name: str
    must_pass: bool = False


def all_parts() -> list[Part]:
    """In the order in which they run."""
    return [
        Part("build", [*_PYTHON, "gpu_checks.build"], 75, _read_build, "build", True),
        Part("tests", _pytest(*_gpu_test_files()), 170, _read_tests, "tests", True),
        _sanitizer("memcheck"),
        _sanitizer("racecheck"),
        Part("kernels", [*_PYTHON, "kvchat", "bench", "kernels"], 60, _read_kernels, "kernels"),
        Part("chat", _CHAT, 40, _read_chat, "chat", True),
        _decode("llama3-8b", 110),
        _decode("tinyllama-1.1b", 50),
        _decode_int8("llama3-8b", ("1x512:native", "8x512:native"), 50),
        Part("ready", [*_PYTHON, "gpu_checks.ready", "llama3-8b"], 75, _read_ready, "ready"),
    ]


def _pytest(*targets: str) -> list[str]:
    return [*_PYTHON, "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-ra", *targets]


def _gpu_test_files() -> list[str]:
    """Those with tests marked gpu; others may want packages that a GPU's machine has not."""
    marks = ("mark.gpu", "marks.gpu", "from machines import")
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(x.relative_to(ROOT)) for x in found if any(m in x.read_text() for m in marks)]


def _sanitizer(tool: str) -> Part:
    """Without the tool the part says so and passes."""
    path = find_sanitizer()
    command = [sys.executable, "-c", "print('compute-sanitizer is not installed')"]
    if path:
        options = ["--tool", tool, "--error-exitcode", "86", "--report-api-errors", "no"]
        command = [path, *options, *_pytest(*_SMALL_TESTS, "-k", _SMALL)]

    def read(log: str) -> list[Figure]:
        if not path:
            return [Figure(tool, "compute-sanitizer is not installed")]
        summaries = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.+)", log)
        is_clean = bool(summaries) and all(re.match("0 (errors|hazards)", x) for x in summaries)
        return [Figure(tool, summaries[-1] if summaries else "no summary", "0 errors", is_clean)]

    return Part(tool, command, 90, read, "sanitizer", must_pass=True)


def find_sanitizer() -> str:
    """compute-sanitizer from the path or a CUDA toolkit's folder; "" where there is none."""
    if found := shutil.which("compute-sanitizer"):
        return found
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *glob.glob("/usr/local/cuda-*")]
    for folder in filter(None, folders):
        for place in ("bin", "compute-sanitizer"):
            path = Path(folder, place, "compute-sanitizer")
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return ""


def _decode(shape: str, limit_s: int) -> Part:
    gates = _DECODE_GATES[shape]
    command = [*_PYTHON, "kvchat", "bench", "decode", "--shape", shape, "-o", "jsonl"]
    for case in gates:
        if not case.startswith("prompt"):
            command += ["--case", case]
    for num_prompt in (512, 4096) if "prompt 4096" in gates else (512,):
        command += ["-p", str(num_prompt)]
    name = f"decode-{shape.rpartition('-')[2]}"
    return Part(name, command, limit_s, lambda log: _read_decode(name, gates, log), "decode")


def _decode_int8(shape: str, cases: tuple[str, ...], limit_s: int) -> Part:
    """With int8 weights: nothing to meet."""
    command = [*_PYTHON, "kvchat", "bench", "decode", "--shape", shape, "-o", "jsonl"]
    command += ["--weights", "int8", *(word for case in cases for word in ("--case", case))]
    name = f"decode-{shape.rpartition('-')[2]} int8 weights"
    return Part(name, command, limit_s, lambda log: _read_decode(name, {}, log), "decode")


def _read_build(log: str) -> list[Figure]:
    """Of lines as gpu_checks.build writes them."""
    found = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    spilled = sorted({row["kernel"] for row in found if row["spilled_bytes"]})
    seconds = max((row["seconds"] for row in found), default=0.0)
    result = f"{len(found)} kernels, the slowest {seconds:.1f} s"
    figures = [Figure("build", result)]
    has_spilled = any("paged_decode" in name for name in spilled)
    figures.append(
        Figure("build: spills", ", ".join(spilled) or "none", "none in paged_decode",
               bool(found) and not has_spilled)
    )  # fmt: skip
    return figures


def _read_tests(log: str) -> list[Figure]:
    found = re.findall(r"^=* ?(\d+ \w+.*) in ([\d.]+)s", log, re.MULTILINE)
    if not found:
        return [Figure("tests", "no summary", "all pass", False)]
    counts, seconds = found[-1]
    is_met = "passed" in counts and not re.search("failed|error", counts)
    return [Figure("tests", f"{counts} in {float(seconds):.0f} s", "all pass", is_met)]


def _read_kernels(log: str) -> list[Figure]:
    """Of the markdown table of `kvchat bench kernels`."""
    rows = re.findall(r"^\| paged_decode \| ([^|]+) \| ([\d.]+) \|", log, re.MULTILINE)
    times = {shape: float(us) for shape, us in rows}
    figures = [
        _at_most(f"decode attention {shape}", times[shape], gate, "us")
        for shape, gate in _KERNEL_GATES_US.items()
        if shape in times
    ]
    codecs = [times.get(f"{_LONG} {codec}") for codec in ("native", *_CODEC_GATES, "mixed")]
    native, *compressed, mixed = codecs
    for us, (codec, gate) in zip(compressed, _CODEC_GATES.items(), strict=True):
        if native and us:
            figures.append(_at_least(f"{codec} over native", native / us, gate, "x"))
    if mixed and native and all(compressed):
        mean = (native + sum(filter(None, compressed))) / (1 + len(compressed))
        figures.append(_at_most("mixed over its parts", mixed / mean, _MIX_SLACK, "x"))
    return figures


def _read_decode(name: str, gates: dict[str, int], log: str) -> list[Figure]:
    """Of the records of `kvchat bench decode`."""
    figures = []
    for record in (json.loads(line) for line in log.splitlines() if line.startswith("{")):
        case = record["case"]
        part = f"{name} {case}"
        if case in gates:
            figures.append(_at_least(part, record["tokens_a_second"], gates[case], "tok/s"))
        elif not gates:
            figures.append(Figure(part, f"{_told(record['tokens_a_second'])} tok/s"))
        if case == _FIRST_TOKEN:
            figures.append(_at_most(part, 1e3 * record["seconds"], _FIRST_TOKEN_GATE_MS, "ms"))
        if gates and case == "8x512:native":
            figures.append(_at_most(f"{part} host", record["host_us"], _HOST_GATE_US, "us a step"))
    return figures


def _read_chat(log: str) -> list[Figure]:
    """Of the shipped model's answer to who it is."""
    answer = (log.strip().splitlines() or ["nothing"])[-1]
    return [Figure("chat", answer[:60], "says its name", "Sprout" in log)]


def _read_ready(log: str) -> list[Figure]:
    """Of lines as gpu_checks.ready writes them; the last run has everything cached."""
    found = [json.loads(line)["seconds"] for line in log.splitlines() if line.startswith("{")]
    if not found:
        return []
    return [_at_most("ready to chat, 8B from page cache", found[-1], _READY_GATE_S, "s")]


def _at_least(part: str, value: float, gate: float, unit: str) -> Figure:
    return Figure(part, f"{_told(value)} {unit}", f">= {gate:,g}", value >= gate)


def _at_most(part: str, value: float, gate: float, unit: str) -> Figure:
    return Figure(part, f"{_told(value)} {unit}", f"<= {gate:,g}", value <= gate)


def _told(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
