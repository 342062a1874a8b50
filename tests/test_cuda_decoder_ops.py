"""The decoder's steps as on a GPU, its kernels on the emulator, against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from emulator import load_emulated

from kvchat.model import cuda_ops
from kvchat.model.cuda_ops import MAX_INT8_ROWS, MAX_SKINNY_ROWS, CudaOps
from kvchat.model.linear import Linear, quantise

EPS = 1e-5


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def wide_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


def product(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    bias = None if linear.bias is None else linear.bias.double()
    weight = linear.weight.double()
    if linear.scales is not None:
        weight = weight * linear.scales[:, None].double()
    return F.linear(x.double(), weight, bias)


def assert_close(y: torch.Tensor, right: torch.Tensor):
    """Within two units in the last place of bfloat16, and one of an inner value of up to 4."""
    assert y.dtype == torch.bfloat16
    assert ((y.double() - right).abs() <= 2**-7 * right.abs() + 2**-6).all()


@pytest.fixture(scope="module")
def ops():
    return CudaOps("bfloat16", load_emulated)


@pytest.mark.parametrize("size", [128, 172, 12])  # rows of 172 and 12 are no whole vectors
def test_norm_of_rows_and_of_heads_inside_rows(ops, size):
    x, weight = random(3, size), random(size)
    heads = random(3, 4 * size)[:, size:].unflatten(1, (3, size))

    assert_close(ops.norm(x, weight, EPS), wide_norm(x, weight))
    assert_close(ops.norm(heads, weight, EPS), wide_norm(heads, weight))


@pytest.mark.parametrize("num_rows", [1, MAX_SKINNY_ROWS, MAX_SKINNY_ROWS + 1])
@pytest.mark.parametrize("dim", [128, 172])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products(ops, num_rows, dim, has_bias):
    x, residual = random(num_rows, dim), random(num_rows, 48)
    linear = Linear(random(48, dim) * dim**-0.5, random(48) if has_bias else None)
    right = product(x, linear)

    assert_close(ops.linear(x, linear), right)
    total = right + residual.double()
    assert_close(ops.add_linear(residual, x, linear), total)
    assert linear.num_reads == 2


@pytest.mark.parametrize("num_rows", [2, MAX_SKINNY_ROWS + 1])
@pytest.mark.parametrize("num_out", [24, 20])
def test_gated(ops, num_rows, num_out):
    x, gate_up = random(num_rows, 128), Linear(random(2 * num_out, 128) * 128**-0.5)
    gate, up = product(x, gate_up).chunk(2, -1)

    assert_close(ops.gated(x, gate_up), F.silu(gate) * up)
    assert gate_up.num_reads == 1


@pytest.mark.parametrize("num_rows", [1, MAX_INT8_ROWS, MAX_INT8_ROWS + 1])
@pytest.mark.parametrize("dim", [128, 192])  # 192 is no whole number of the kernel's steps
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_with_int8_weights(monkeypatch, num_rows, dim, has_bias):
    monkeypatch.setattr(cuda_ops, "DEQUANTISED_VALUES", 20 * dim)  # pieces of 20, 20 and 8 rows
    ops = CudaOps("bfloat16", load_emulated)
    x, residual = random(num_rows, dim), random(num_rows, 48)
    weight = quantise(random(48, dim) * dim**-0.5)
    linear = Linear.of(weight, random(48) if has_bias else None)
    right = product(x, linear)

    assert_close(ops.linear(x, linear), right)
    total = right + residual.double()
    assert_close(ops.add_linear(residual, x, linear), total)
    assert linear.num_reads == 2
    is_by_kernel = num_rows <= MAX_INT8_ROWS and dim == 128
    assert (ops._wide is None) == is_by_kernel
    assert is_by_kernel or ops._wide.numel() == 20 * dim


@pytest.mark.parametrize("num_rows", [2, MAX_INT8_ROWS + 1])
@pytest.mark.parametrize("num_out", [24, 20])
def test_gated_with_int8_weights(ops, num_rows, num_out):
    x, gate_up = random(num_rows, 128), Linear.of(quantise(random(2 * num_out, 128) * 128**-0.5))
    gate, up = product(x, gate_up).chunk(2, -1)

    assert_close(ops.gated(x, gate_up), F.silu(gate) * up)
    assert gate_up.num_reads == 1


def test_warm_up_reserves_what_a_captured_step_may_not():
    ops = CudaOps("bfloat16", load_emulated)
    wide, narrow = (Linear.of(quantise(random(48, dim))) for dim in (256, 128))

    ops.warm_up([narrow, wide, Linear(random(48, 512))])

    reserved = ops._wide
    assert reserved.numel() == 48 * 256
    ops.linear(random(MAX_INT8_ROWS + 1, 128), narrow)
    assert ops._wide is reserved
