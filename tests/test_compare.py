"""`scripts/compare`: who is run with what, in which order, and what the table says of it."""

import json
import stat
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from comparison import __main__ as program  # noqa: E402
from comparison.llama_cpp import LlamaCpp  # noqa: E402
from comparison.ours import draw_prompts  # noqa: E402
from comparison.table import Missing, Sample, Shape, Timed, compare, markdown  # noqa: E402

ONE, EIGHT = Shape(1, 32, 8), Shape(8, 32, 8)
# Prints what llama-bench of build 5163 does, as far as its README shows, for the test it is given.
FAKE_BENCH = """\
import json, sys
flag = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
print(json.dumps([{{
    "build_commit": "8cf427ff", "build_number": 5163, "model_filename": flag["-m"],
    "n_threads": int(flag["-t"]), "type_k": flag["-ctk"], "n_prompt": int(flag["-p"]),
    "n_gen": int(flag["-n"]), "n_depth": int(flag.get("-d", 0)), "avg_ns": 1, "stddev_ns": 0,
    "avg_ts": 320.0, "stddev_ts": 0.0, "samples_ns": [1],
    "samples_ts": [640.0 if int(flag["-p"]) else 80.0],
}}]))
"""
FAKE_BATCHED = """\
import json, sys
flag = dict(zip(sys.argv[1::2], sys.argv[2::2]))
pp, tg, pl = (int(flag[name]) for name in ("-npp", "-ntg", "-npl"))
print("llama_model_loader: some log line")
print(json.dumps({{"n_kv_max": int(flag["-c"]), "n_threads": int(flag["-t"]), "pp": pp, "tg": tg,
    "pl": pl, "n_kv": pl * (pp + tg), "t_pp": 0.5, "speed_pp": pl * pp / 0.5, "t_tg": 1.5,
    "speed_tg": pl * tg / 1.5, "t": 2.0, "speed": pl * (pp + tg) / 2.0}}))
print()
"""


def script(path: Path, text: str) -> Path:
    """An executable that runs this Python."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def log(tmp_path):
    return tmp_path / "calls.jsonl"


@pytest.fixture
def llama(tmp_path, log):
    """Both programs as fakes."""
    single = script(tmp_path / "llama-bench", FAKE_BENCH.format(log=str(log)))
    batched = script(tmp_path / "llama-batched-bench", FAKE_BATCHED.format())
    return LlamaCpp(single, batched, tmp_path / "model.gguf", "bfloat16", "cpu", 2)


def test_a_run_as_speeds():
    # 8 chats: the last first token after 2 s, when 20 of 64 tokens were there; all after 6 s
    assert Timed(2.0, 6.0, 20).sample(EIGHT) == Sample(8 * 32 / 2, 44 / 4, 64 / 6)


def test_pairs_alternate_and_the_first_is_not_counted():
    calls = []

    def side(name, speed):
        def run(shape, pair):
            calls.append((name, pair))
            return Sample(speed * (pair + 2), None, speed)

        return run

    (row,) = compare(
        [ONE], side("ours", 100.0), lambda shape: {"it": side("it", 50.0)}, 3, lambda what: None
    )

    assert calls == [
        *(("it", -1), ("ours", -1)),
        *(("ours", 0), ("it", 0)),
        *(("it", 1), ("ours", 1)),
        *(("ours", 2), ("it", 2)),
    ]
    shape, ratio = "1 x (32 + 8)", "2.00x (2.00-2.00)"
    assert row.cells() == [
        [shape, "reading prompts", "it", "300", "150", ratio, "3"],
        [shape, "replies over all", "it", "100", "50.0", ratio, "3"],
    ]


def test_a_program_that_is_missing_is_asked_once_and_says_so():
    calls = []

    def missing(shape, pair):
        calls.append(pair)
        raise Missing("not installed")

    rows = compare([ONE], lambda *a: Sample(1, 1, 1), lambda s: {"it": missing}, 3, lambda w: None)

    assert calls == [-1]
    assert markdown(rows)[2] == "| 1 x (32 + 8) | n/a | it: not installed | n/a | n/a | n/a | 0 |"


def test_prompts_differ_between_pairs_and_chats_and_repeat():
    first = draw_prompts(EIGHT, 0, range(300, 400))

    assert (
        first == draw_prompts(EIGHT, 0, range(300, 400)) != draw_prompts(EIGHT, 1, range(300, 400))
    )
    assert len({tuple(ids) for ids in first}) == 8
    assert {len(ids) for ids in first} == {32}


def test_llama_bench_is_given_the_same_shape_and_precision(llama, log):
    (run,) = llama.programs(ONE).values()

    sample = run(ONE, 0)

    # 32 tokens at 640 a second and 8 at 80 are 0.15 s
    assert sample == Sample(640.0, 80.0, pytest.approx(8 / 0.15))
    read, written = (
        dict(zip(call[::2], call[1::2], strict=True))
        for call in map(json.loads, log.read_text().splitlines())
    )
    common = {"-t": "2", "-ngl": "0", "-r": "1"}
    assert common.items() <= read.items() and common.items() <= written.items()
    assert (read["-p"], read["-n"], read["-ctk"], read["-ctv"]) == ("32", "0", "bf16", "bf16")
    assert (written["-p"], written["-n"], written["-d"]) == ("0", "8", "32")


def test_llama_batched_bench_is_read_between_its_log_lines(llama):
    (run,) = llama.programs(EIGHT).values()

    assert run(EIGHT, 0) == Sample(512.0, pytest.approx(64 / 1.5), 32.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import sys; sys.exit('error: no such model')", "ended with 1: error: no such model"),
        ("print('usage: llama-bench')", "printed no result"),
        ("print('[{]')", "printed no result"),
    ],
)
def test_a_program_that_fails_is_missing(tmp_path, text, words):
    broken = script(tmp_path / "llama-bench", text)

    with pytest.raises(Missing, match=words):
        LlamaCpp(broken, None, Path("m.gguf"), "float16", "cuda", 2).run_single(ONE, 0)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((None, Path("m.gguf")), "--llama-bench PATH"),
        ((Path("llama-bench"), None), "--gguf FILE"),
        ((Path("no/such/program"), Path("m.gguf")), "does not run"),
    ],
)
def test_what_is_not_named_or_not_there_is_missing(names, words):
    single, gguf = names

    with pytest.raises(Missing, match=words):
        LlamaCpp(single, None, gguf, "float16", "cpu", 2).run_single(ONE, 0)


def test_kvchat_and_transformers_write_the_same_replies(capsys, monkeypatch):
    pytest.importorskip("transformers")
    tiny = program_shape()
    monkeypatch.setattr("kvchat.bench.shapes.find_shape", lambda name: tiny)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    code = program.main(["-p", "20", "-n", "4", "-r", "2", "--sessions", "1,3"])

    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert [line[:3] for line in lines[:3]] == [
        ["| 1 x (20 + 4)", "reading prompts", "transformers"],
        ["| 1 x (20 + 4)", "writing replies", "transformers"],
        ["| 1 x (20 + 4)", "replies over all", "transformers"],
    ]
    assert lines[3][2] == "llama-bench: not named (--llama-bench PATH)"
    assert [line[-1] for line in lines] == ["2 |", "2 |", "2 |", "0 |"] * 2
    assert "transformers' in 12 of 12 tokens" in out.replace("\n", " ")


def program_shape():
    """A Llama of two small layers."""
    from kvchat.config import ModelConfig

    return ModelConfig(
        family="llama",
        vocab_size=700,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position=256,
        rope_theta=10000.0,
        norm_eps=1e-5,
        checkpoint_dtype="float32",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sessions", "1,x"], "--sessions 1,x: write 1,8"),
        (["-n", "1"], "-n at least 2"),
        (["-m", "no/such/folder"], "name one folder with a config.json"),
        (["--shape", "llama3.2-1b"], "only Llamas without RoPE scaling"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(capsys, monkeypatch, arguments, words):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = program.main(arguments)

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1
