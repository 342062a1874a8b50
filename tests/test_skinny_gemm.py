"""skinny_gemm on the emulator, against float64 products; outputs begin as NaN."""

import pytest
import torch
import torch.nn.functional as F
from emulator import emulated

from kvchat.attention.kernels import load_kernel
from kvchat.attention.skinny_gemm import SkinnyGemm, gemm_defines, is_supported

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = [(False, False), (False, True), (True, False), (True, True)]


def make(num_rows: int, num_out: int, dim: int, dtype: str, is_int8=False, is_gated=False):
    """x (rows further apart than they are long), w, scales, bias, residual."""
    generator = torch.Generator().manual_seed(num_rows * dim + num_out)
    rows_of_w = num_out * (2 if is_gated else 1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = random(num_rows, dim + 16).to(DTYPES[dtype])[:, :dim]
    w = (random(rows_of_w, dim) * dim**-0.5).to(DTYPES[dtype])
    scales = None
    if is_int8:
        w = torch.randint(-127, 128, (rows_of_w, dim), generator=generator).to(torch.int8)
        scales = torch.rand(rows_of_w, generator=generator) * 0.01 / dim**0.5
    bias = random(rows_of_w).to(DTYPES[dtype])
    return x, w, scales, bias, random(num_rows, num_out).to(DTYPES[dtype])


def multiply(x, w, scales=None, bias=None, residual=None, is_gated=False, grid=3, **defines):
    constants = gemm_defines(x.dtype == torch.bfloat16, x.shape[0], is_gated)
    constants |= {"WARPS": 2, **defines}
    name = "skinny_gemm" if scales is None else "skinny_gemm_int8"
    num_out = w.shape[0] // (2 if is_gated else 1)
    y = torch.full((x.shape[0], num_out), torch.nan, dtype=x.dtype)
    weights = [w] if scales is None else [w, scales]
    args = [y, x, x.stride(0), *weights, bias, residual, x.shape[0], num_out, x.shape[1]]
    emulated(name, **constants)((grid,), (32 * constants["WARPS"],), args)
    return y


def expected(x, w, scales=None, bias=None, residual=None, is_gated=False):
    weights = w.double() if scales is None else w.double() * scales.double()[:, None]
    y = x.double() @ weights.T
    if bias is not None:
        y += bias.double()
    if is_gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.double()


def assert_close(y, right):
    eps = torch.finfo(y.dtype).eps
    assert ((y.double() - right).abs() <= eps * right.abs() + 1e-3).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("is_int8", "is_gated"), KINDS)
def test_products(dtype, is_int8, is_gated):
    for num_rows, num_out, dim in ((1, 16, 128), (3, 40, 384), (8, 24, 640)):
        inputs = make(num_rows, num_out, dim, dtype, is_int8, is_gated)
        assert_close(multiply(*inputs, is_gated=is_gated), expected(*inputs, is_gated=is_gated))


def test_without_bias_and_residual():
    x, w, *_ = make(2, 20, 256, "bfloat16")

    assert_close(multiply(x, w), expected(x, w))


def test_a_row_has_the_same_bits_beside_any_others_and_on_any_grid():
    x, w, *_ = make(11, 40, 640, "bfloat16")
    alone = multiply(x[:1], w)

    for num_rows, grid in ((2, 1), (8, 7), (11, 2)):
        assert torch.equal(multiply(x[:num_rows], w, grid=grid)[:1], alone)
    assert torch.equal(multiply(x, w)[:8], multiply(x[:8], w))


def test_more_loads_under_way_change_nothing():
    x, w, *_ = make(5, 33, 960, "float16")

    assert torch.equal(multiply(x, w, DEPTH=4), multiply(x, w))


def test_every_int8_weight_is_exact():
    w = torch.arange(-128, 128).to(torch.int8).repeat(16, 1).contiguous()
    x = torch.eye(256, dtype=torch.bfloat16)
    for first in range(0, 256, 64):
        y = multiply(x[first : first + 8], w, torch.ones(16))
        assert torch.equal(y, w[:, first : first + 8].T.to(torch.bfloat16))


def test_inner_dimensions():
    assert is_supported(4096)
    assert is_supported(64)
    assert not is_supported(64, is_int8=True)
    assert not is_supported(72)


SMALL, LARGE = (
    ((1, 64, 128), (3, 40, 384), (16, 72, 1024)),
    ((1, 4096, 4096), (8, 6152, 4096), (16, 4096, 14336)),
)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [SMALL, LARGE], ids=["small", "8b"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("is_int8", "is_gated"), KINDS)
def test_products_on_a_gpu(sizes, dtype, is_int8, is_gated):
    """The small ones are for a sanitizer, so what is right is computed on the CPU."""
    device = "cpu" if sizes == SMALL else "cuda"
    skinny_gemm = SkinnyGemm(dtype, load_kernel)
    for num_rows, num_out, dim in sizes:
        parts = make(num_rows, num_out, dim, dtype, is_int8, is_gated)
        inputs = [part if part is None else part.cuda() for part in parts]
        x, w, scales, bias, residual = inputs
        y = torch.full((num_rows, num_out), torch.nan, dtype=x.dtype, device="cuda")
        skinny_gemm(y, x, w, scales, bias, residual, is_gated)
        alone = torch.full_like(y[:1], torch.nan)
        skinny_gemm(alone, x[:1], w, scales, bias, residual[:1], is_gated)

        there = [part if part is None else part.to(device) for part in parts]
        assert_close(y.to(device), expected(*there, is_gated=is_gated))
        assert torch.equal(alone, y[:1])
