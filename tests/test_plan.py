"""`kvchat plan`: the bytes of real shapes, what fits, and what would make it fit."""

import io
import json
import shlex
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hollow_model import write_zeros
from tiny_model import write_tiny_model

from kvchat.bench import plan
from kvchat.bench.shapes import SHAPES, find_shape
from kvchat.cli import run_cli
from kvchat.config import KVPolicy, SchedulerConfig
from kvchat.errors import UsageError
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec
from kvchat.model.sizes import weight_bytes
from kvchat.terminal.show import Show

GIB = 2**30
FIVE = ("llama2-7b", "llama3-8b", "tinyllama-1.1b", "qwen2.5-7b", "mistral-7b")
# As published with the checkpoints, by counting their tensors.
NUM_WEIGHTS = {
    "stories15m": 15_191_712,
    "stories42m": 41_689_600,
    "smollm-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3-8b": 8_030_261_248,
    "llama3.1-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
}


def command(*arguments):
    """(exit code, stdout, stderr) of `kvchat plan`."""
    out, err = io.StringIO(), io.StringIO()
    code = run_cli(["plan", *map(str, arguments)], Show(out, err))
    return code, out.getvalue(), err.getvalue()


def as_json(*arguments):
    code, out, err = command(*arguments, "-o", "json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_shapes_have_the_published_number_of_weights():
    assert {name: plan.load_shape(name).num_values for name in SHAPES} == NUM_WEIGHTS


@pytest.mark.parametrize("mode", list(Codec))
@pytest.mark.parametrize("name", FIVE)
def test_a_plan_agrees_byte_for_byte_with_a_pool_of_that_shape(name, mode):
    config = replace(find_shape(name), num_layers=2)
    model = plan.PlanModel(name, config, 0, None)
    ask = plan.Ask(2, 512, 64 * GIB, mode, config.checkpoint_dtype)

    made = plan.make_plan(model, ask)

    layout = plan.layout_of(config, ask)
    cache = KVCache(layout.spec, made.num_blocks, lowest=mode)
    assert made.pool == cache.num_bytes


def test_the_textbook_example_comes_out_and_is_completed():
    code, out, _ = command("--shape", "llama2-7b", "--ctx", 4096, "--sessions", 8, "--mem", "24GiB")

    assert code == 0
    assert (
        "one session of 4,096 tokens: 1.07 GB for K alone, 2.15 GB for K and V; 8 sessions 17.2 GB"
    ) in out
    assert "| native | 524,288 |" in out


@pytest.mark.parametrize("mode", list(Codec))
@pytest.mark.parametrize("context", [1, 16, 17, 255, 256, 1000, 4096])
def test_a_pool_of_the_plan_serves_what_was_asked_and_one_block_less_does_not(mode, context):
    """The scheduler's own limit says so, for one session and nothing in flight."""
    layout = plan.layout_of(find_shape("llama3-8b"), plan.Ask(1, 1, 0, mode))
    policy = KVPolicy(mode.name.lower(), span_blocks=layout.span_blocks, num_reserved=4)
    num_blocks = plan.session_blocks(layout, mode, context)

    def longest(num_request_blocks):
        config = SchedulerConfig(num_request_blocks + 1 + 4, 16, 8192, kv=policy)
        return config.max_request_tokens

    assert longest(num_blocks) >= context
    assert num_blocks == 1 or longest(num_blocks - 1) < context


def test_weights_of_a_model_are_those_of_its_header_in_the_dtype_that_runs(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    stored = (folder / "model.safetensors").stat().st_size

    found = as_json(folder, "--mem", "1GiB", "--ctx", 512)
    narrow = as_json(folder, "--mem", "1GiB", "--ctx", 512, "--dtype", "bfloat16")

    weights = found["plans"]["native"]["weights"]
    assert found["stored_bytes"] == {"float32": weights}
    assert stored - 8192 < weights < stored
    assert narrow["plans"]["native"]["weights"] * 2 == weights


def test_int8_weights_are_counted_and_suggested_on_a_gpu():
    asked = ("--shape", "llama3-8b", "--mem", "16GiB", "--device", "cuda")

    wide, narrow = as_json(*asked), as_json(*asked, "--weights", "int8")

    config = find_shape("llama3-8b")
    assert wide["plans"]["native"]["weights"] == weight_bytes(config, "bfloat16")
    assert narrow["plans"]["native"]["weights"] == weight_bytes(config, "bfloat16", "int8")
    assert not wide["fits"] and narrow["fits"]
    assert "--weights int8" in [found["change"] for found in wide["suggestions"]]
    code, _, err = command("--shape", "llama3-8b", "--weights", "int8")
    assert code == 2 and "--weights int8 is for a GPU: add --device cuda" in err


def test_no_weights_are_read(tmp_path):
    """A model whose tensors are 13 GB of hole: reading it would take many seconds."""
    write_zeros(tmp_path, find_shape("llama2-7b"), "float16")

    started = time.perf_counter()
    from_header = as_json(tmp_path, "--mem", "24GiB")
    took = time.perf_counter() - started
    from_shape = as_json("--shape", "llama2-7b", "--mem", "24GiB")

    assert took < 2
    assert from_header["stored_bytes"] == {"float16": 13_476_831_232}
    for key in ("plans", "tokens", "matrix", "suggestions", "waste"):
        assert from_header[key] == from_shape[key]


@pytest.mark.parametrize(
    ("shape", "sessions", "context", "mem", "device"),
    [
        ("llama2-7b", 8, 4096, "24GiB", "cuda"),
        ("llama2-7b", 8, 4096, "24GiB", "cpu"),
        ("llama3-8b", 64, 8192, "24GiB", "cuda"),
        ("smollm-135m", 64, 2048, "3GiB", "cpu"),
        ("qwen2.5-7b", 200, 32768, "40GiB", "cuda"),
        ("llama2-7b", 8, 4096, "2GiB", "cuda"),
        ("tinyllama-1.1b", 400, 2048, "11GiB", "cpu"),
    ],
)
def test_every_suggestion_fits_when_it_is_followed(shape, sessions, context, mem, device):
    asked = {"--sessions": sessions, "--ctx": context, "--mem": mem, "--device": device}

    found = as_json("--shape", shape, *sum(asked.items(), ()))

    assert not found["fits"]
    assert found["suggestions"]
    for suggestion in found["suggestions"]:
        words = shlex.split(suggestion["change"])
        change = dict(zip(words[::2], words[1::2], strict=True))
        again = as_json("--shape", shape, *sum({**asked, **change}.items(), ()))
        assert again["fits"], suggestion
        mode = again["ask"]["kv_cache"]
        assert again["plans"][mode]["total"] == suggestion["total"]


def test_counts_suggested_are_the_largest_that_fit():
    model = plan.load_shape("llama3-8b")
    ask = plan.Ask(64, 8192, 24 * GIB, dtype="bfloat16", device="cuda")

    num_sessions, context = plan.max_sessions(model, ask), plan.max_context(model, ask)

    for field, most in (("num_sessions", num_sessions), ("context", context)):
        assert plan.make_plan(model, replace(ask, **{field: most})).fits
        assert not plan.make_plan(model, replace(ask, **{field: most + 1})).fits


def test_the_matrix_names_the_least_compression_that_fits():
    model = plan.load_shape("llama2-7b")
    ask = plan.Ask(8, 4096, 24 * GIB)

    for context, row in plan.matrix(model, ask).items():
        for num_sessions, least in row.items():
            fitting = [
                mode
                for mode in Codec
                if plan.make_plan(
                    model, replace(ask, num_sessions=num_sessions, context=context, mode=mode)
                ).fits
            ]
            assert least == min(fitting, default=None)


def test_waste_is_that_of_the_stated_mix():
    found = as_json("--shape", "llama2-7b", "--mem", "24GiB", "--mix", "1,16,17,4096")

    contiguous, paged = found["waste"]
    assert (contiguous["reserved"], contiguous["used"]) == (4 * 4096, 4130)
    assert (paged["reserved"], paged["used"]) == (16 + 16 + 32 + 4096, 4130)


def test_a_gpu_has_a_row_for_its_context():
    found = as_json("--shape", "llama3-8b", "--mem", "80GiB", "--device", "cuda")

    native = found["plans"]["native"]
    items = ("weights", "workspace", "logits", "cuda_context", "pool")
    assert native["cuda_context"] == 512 * 2**20
    assert native["total"] == sum(native[item] for item in items)
    assert found["ask"]["dtype"] == "bfloat16"


def test_heads_that_cannot_be_compressed_are_planned_natively(tmp_path):
    config = replace(find_shape("smollm-135m"), head_dim=60)
    model = plan.PlanModel("odd", config, 10, None)

    assert plan.modes(config) == (Codec.NATIVE,)
    with pytest.raises(UsageError, match="multiple of 8"):
        plan.layout_of(config, plan.Ask(1, 64, GIB, Codec.INT8))
    assert all("kv-cache" not in s.change for s in plan.suggest(model, plan.Ask(9, 2048, 2**20)))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--shape", "llama9"), 2, "no shape llama9; kvchat knows"),
        (("--shape", "llama2-7b", "--ctx", "5000"), 2, "at most 4096 tokens"),
        (("--shape", "llama2-7b", "--mem", "lots"), 2, "memory size lots is not understood"),
        (("--shape", "llama2-7b", "--mix", "1,x"), 2, "--mix 1,x: give lengths of 1 to 4096"),
        (("--shape", "llama2-7b", "some/model"), 2, "a model and a shape"),
        (("no/such-model",), 2, "plan downloads nothing"),
        (("no such model!",), 2, "plan downloads nothing"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, code, words):
    got_code, out, err = command(*arguments)

    assert (got_code, out) == (code, "")
    assert err.count("\n") == 1
    assert words in err


def test_weights_of_another_model_are_refused_as_run_refuses_them(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))

    code, out, err = command(folder)

    assert (code, out) == (3, "")
    assert "missing 9 tensors" in err


def test_a_shape_answers_at_once_and_without_torch():
    script = (
        "import sys, io, time; started = time.process_time()\n"
        "from kvchat.cli import run_cli; from kvchat.terminal.show import Show\n"
        "code = run_cli(['plan', '--shape', 'llama3-8b'], Show(io.StringIO(), sys.stderr))\n"
        "heavy = [m for m in ('torch', 'numpy', 'numba', 'cupy') if m in sys.modules]\n"
        "print(code, heavy, time.process_time() - started)\n"
    )

    found = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]

    code, heavy, _ = found[0].stdout.split()
    assert (code, heavy) == ("0", "[]")
    assert min(float(done.stdout.split()[2]) for done in found) < 0.5
