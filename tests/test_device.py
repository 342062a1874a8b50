"""Where a run takes place, what it says of a GPU that it cannot use, and what fits on one."""

import os
import re
from dataclasses import replace

import pytest
from test_build import OPTIONS, build
from tiny_model import write_tiny_model

from kvchat.attention.paged_decode import PagedDecode
from kvchat.bench.shapes import find_shape
from kvchat.config import KVPolicy, KVSpec
from kvchat.engine import device, fit
from kvchat.engine.device import Choice, choose_device
from kvchat.engine.storage import num_bytes, ranges_of
from kvchat.engine.workspace import StepCaps, cuda_workspace
from kvchat.errors import CapacityError, UsageError
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.kv.planner import MAX_BLOCKS, plan_num_blocks
from kvchat.model.sizes import weight_bytes

GIB = 2**30


@pytest.fixture
def machine(monkeypatch):
    """Say what this machine has: a GPU or none, and what is wrong with it."""

    def make(has_gpu=True, problem=""):
        monkeypatch.setattr(device, "has_gpu", lambda: has_gpu)
        monkeypatch.setattr(device, "gpu_problem", lambda: problem)

    return make


def test_auto_takes_the_gpu_that_is_there_and_can_be_used(machine):
    machine()
    assert choose_device() == choose_device("cuda") == Choice("cuda")
    assert choose_device("auto", "auto", "int8", "8GiB") == Choice("cuda")
    assert choose_device("cpu") == Choice("cpu")
    machine(has_gpu=False)
    assert choose_device() == Choice("cpu")


def test_a_gpu_that_cannot_be_used_is_named_with_auto_and_refused_by_name(machine):
    machine(problem="CuPy is missing; pip install 'kvchat[cuda13]'")

    choice = choose_device()

    assert choice.device == "cpu"
    assert choice.warning == (
        "running on the CPU, not on the GPU: CuPy is missing; pip install 'kvchat[cuda13]'"
    )
    with pytest.raises(UsageError, match=r"^--device cuda: CuPy is missing; pip install"):
        choose_device("cuda")
    assert choose_device("cpu") == Choice("cpu")


def test_float32_is_no_dtype_of_a_gpu(machine):
    machine()

    assert "--dtype float32 was asked" in choose_device("auto", "float32").warning
    with pytest.raises(UsageError, match="computes in float16 or bfloat16"):
        choose_device("cuda", "float32")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"weights": "int8"}, "--weights int8 is for a GPU; on a CPU use --dtype bfloat16"),
        ({"host_mem": "1GiB"}, "on a CPU the KV pool is there already: raise --kv-mem"),
    ],
)
def test_what_a_gpu_alone_has_is_refused_on_a_cpu_with_the_reason_for_the_cpu(
    machine, asked, words
):
    machine(problem="its driver is too old")

    with pytest.raises(UsageError, match=re.escape(words)) as refused:
        choose_device("auto", **asked)

    assert str(refused.value).endswith("not on the GPU: its driver is too old)")


def test_a_gpu_by_its_number_is_the_only_one_that_is_seen(machine, monkeypatch):
    machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")

    assert choose_device("cuda:1") == Choice("cuda")

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=6 shows 1"):
        choose_device("cuda:1")
    with pytest.raises(UsageError, match="--device tpu: choose auto, cpu, cuda or cuda:N"):
        choose_device("tpu")


def test_a_gpu_is_seen_by_its_device_files_unless_it_is_hidden(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert not device.has_gpu(tmp_path)
    (tmp_path / "dev/nvidia3").touch()
    assert device.has_gpu(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not device.has_gpu(tmp_path)


def test_a_run_on_a_cpu_beside_a_gpu_warns(tmp_path, machine):
    machine(problem="its driver is too old")

    facts = build(write_tiny_model(tmp_path), replace(OPTIONS, device="auto"))[1]

    assert facts.device == "cpu"
    assert facts.warnings == ("running on the CPU, not on the GPU: its driver is too old",)


# --- what fits


def layout_of(name, lowest=Codec.INT8, dtype="bfloat16"):
    config = find_shape(name)
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_dim, 16, dtype)
    return config, BlockLayout(spec, lowest)


def refusal(name, free, weights="auto", main_memory=0, asked=(None, None)):
    config, layout = layout_of(name)
    beside = free - weight_bytes(config, "bfloat16", weights)
    sizes = fit.step_sizes(config, layout, asked, weights, beside)
    try:
        fit.check_fits(config, layout, sizes, weights, free, main_memory)
    except CapacityError as error:
        return str(error)
    return ""


def test_weights_of_8_billion_values_in_bytes():
    config = find_shape("llama3-8b")
    matrices = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336) + 128256 * 4096
    channels = 32 * (4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096) + 128256

    assert weight_bytes(config, "bfloat16") == 2 * 8_030_261_248
    kept = 8_030_261_248 - matrices  # embedding, norms
    assert weight_bytes(config, "bfloat16", "int8") == 2 * kept + matrices + 4 * channels
    tied = find_shape("qwen3-0.6b")
    assert weight_bytes(tied, "bfloat16", "int8") > 2 * tied.vocab_size * tied.hidden_size


def test_a_model_that_fits_is_let_through():
    assert refusal("llama3-8b", 80 * GIB) == refusal("llama3-8b", 12 * GIB, "int8") == ""


def test_what_is_suggested_for_a_model_that_does_not_fit_does_fit():
    said = refusal("llama3-8b", 12 * GIB, main_memory=64 * GIB)

    assert said.startswith("the weights need 15.0 GiB as bfloat16, beside ")
    assert "12.0 GiB of GPU memory are free: use --weights int8 (8.5 GiB in all)" in said
    assert said.endswith("or --device cpu (15.0 GiB of main memory as bfloat16)")
    assert refusal("llama3-8b", 12 * GIB, "int8") == ""
    # no flag is named that would not do
    assert "int8" not in refusal("llama3-8b", 8 * GIB, main_memory=64 * GIB)
    assert refusal("llama3-8b", 8 * GIB, main_memory=8 * GIB).endswith("use a smaller model")
    assert refusal("llama3-8b", 8 * GIB, "int8").endswith("use a smaller model")


def test_large_steps_that_were_asked_for_are_what_gives_way():
    free = 16 * GIB
    said = refusal("llama3-8b", free, asked=(8192, 1024))

    flags = re.search(r"use (-b (\d+) -np (\d+)) \(", said)
    assert flags, said
    assert refusal("llama3-8b", free, asked=(int(flags[2]), int(flags[3]))) == ""


@pytest.mark.parametrize("name", ["llama3-8b", "tinyllama-1.1b", "qwen2.5-7b", "mistral-7b"])
@pytest.mark.parametrize("free", [10 * GIB, 24 * GIB, 80 * GIB])
def test_pool_and_workspace_for_it_are_within_what_is_free(name, free):
    config, layout = layout_of(name)
    kv = KVPolicy("auto", span_blocks=layout.span_blocks, num_reserved=4)
    caps = StepCaps(
        *fit.step_sizes(config, layout, (None, None), "auto", free), config.max_position
    )

    pool = fit.free_for_pool(config, layout, kv, caps, "auto", free)
    num_blocks = plan_num_blocks(layout, None, pool, "cuda")

    longest = min(config.max_position, kv.max_tokens(num_blocks - 5, 16))
    needed = cuda_workspace(config, layout, StepCaps(caps.num_tokens, caps.num_rows, longest))
    assert needed.total + num_blocks * layout.bytes_per_block <= 0.9 * free
    assert pool >= 0.8 * free and abs(num_blocks * layout.bytes_per_block / pool - 0.85) < 0.01


def test_steps_are_as_large_as_memory_leaves_room_for():
    config, layout = layout_of("llama3-8b")

    def sizes(free, *asked):
        return fit.step_sizes(config, layout, asked or (None, None), "auto", free)

    assert sizes(60 * GIB) == (2048, 256)
    assert sizes(9 * GIB)[1] < 256 and sizes(GIB) == (512, 16)
    assert sizes(GIB, 4096, 100) == (4096, 100)


def test_blocks_are_as_many_as_have_numbers():
    config = find_shape("stories15m")
    layout = BlockLayout(KVSpec(1, 1, config.head_dim, 16, "float16"))
    size = layout.bytes_per_block

    assert plan_num_blocks(layout, None, 10**6 * GIB, "cuda") == MAX_BLOCKS == 2**24
    assert plan_num_blocks(layout, f"{MAX_BLOCKS * size}", 10**6 * GIB, "cuda") == MAX_BLOCKS
    with pytest.raises(CapacityError, match=f"lower --kv-mem to {MAX_BLOCKS * size}$"):
        plan_num_blocks(layout, f"{(MAX_BLOCKS + 1) * size}", 10**6 * GIB, "cuda")


@pytest.mark.parametrize("name", ["llama3-8b", "llama2-7b", "qwen2.5-7b"])
def test_the_scratch_of_decode_attention_is_what_it_reserves(name, monkeypatch):
    config, layout = layout_of(name, Codec.INT4)
    monkeypatch.setattr("kvchat.attention.paged_decode._max_shared", lambda device: 227 << 10)
    decode = PagedDecode(layout, config.num_heads, 8, 4096, "cpu", load=lambda *args: None)
    reserved = num_bytes(ranges_of(decode, decode.make_plan()))

    assert cuda_workspace(config, layout, StepCaps(512, 8, 4096)).decode == reserved
