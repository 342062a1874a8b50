"""The kernels' benchmark: its table, and what it says without a GPU."""

import pytest
import torch

from kvchat.bench.block_kernels import BLOCK_PARTS
from kvchat.bench.kernel_cases import DecodeShape
from kvchat.bench.kernel_timer import Timer
from kvchat.bench.kernels import KernelReport, KernelTime, format_kernels, run_kernel_bench
from kvchat.errors import UsageError
from kvchat.kv.layout import Codec


def test_the_table():
    times = [
        KernelTime("paged_decode", "B1@4k 32/8 native", 10.0, 16_777_216, {"torch": 20.0}),
        KernelTime("skinny_gemm", "o [4096, 4096] x 1", 16.0, 33_554_432),
    ]

    lines = format_kernels(KernelReport("a GPU", 4.0, 3.0, times)).split("\n")

    assert lines[0].startswith("a GPU: reads 4.00 TB/s; an empty launch takes 3.0 µs")
    assert (
        lines[4] == "| paged_decode | B1@4k 32/8 native | 10.0 | 16.8 | 1.68 | 42% | torch 20.0 |"
    )
    assert lines[5] == "| skinny_gemm | o [4096, 4096] x 1 | 16.0 | 33.6 | 2.10 | 52% | - |"


def test_labels():
    assert DecodeShape(8, 32768, 32, 8, (Codec.INT8,)).label == "B8@32k 32/8 int8"
    assert DecodeShape(1, 4096, 32, 32, tuple(Codec)).label == "B1@4k 32/32 mixed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(UsageError, match=r"without CUDA|CuPy is missing"):
        run_kernel_bench(lambda *_: None)


@pytest.mark.gpu
def test_kernels_that_move_blocks_and_rows_are_measured():
    timer = Timer()

    found = [time for part in BLOCK_PARTS.values() for time in part(timer)]

    names = {time.kernel.partition(" ")[0] for time in found}
    kernels = ("rope_write_kv", "gather_blocks", "copy_blocks", "compress_blocks", "rms_norm")
    assert names == {*kernels, "silu_mul"}
    assert all(0 < time.tb_per_s < 100 for time in found)
