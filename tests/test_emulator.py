"""The emulator: every instruction against tables written here from the PTX ISA, every check by a
kernel with just that fault."""

import pytest
import torch
from emulator import ROOT, EmulatorError, emulated
from machines import GENERATIONS

SCALARS = (torch.float16, torch.bfloat16)


@pytest.fixture(params=GENERATIONS)
def primitive(request):
    """Loads a kernel of primitives.cu."""

    def load(name, dtype=torch.float16):
        defines = {"SCALAR_BF16": int(dtype == torch.bfloat16)}
        return request.param("emulator/primitives.cu", name, defines)

    return load


def warp(kernel, *args):
    kernel.launch((1, 1, 1), (32, 1, 1), list(args))


def words(x):
    """int32 [..., n / 2] of 16-bit elements [..., n]."""
    return x.contiguous().view(torch.int32)


def lanes():
    """(group, pair) of every lane."""
    return [(lane // 4, lane % 4) for lane in range(32)]


def spread_a(a):
    """int32 [32, 4]: the A fragments of a [16, 16] matrix."""
    rows = [
        torch.cat([a[g + 8 * (i % 2), 2 * t + 8 * (i // 2) :][:2] for i in range(4)])
        for g, t in lanes()
    ]
    return words(torch.stack(rows))


def spread_b(b):
    """int32 [32, 2]: the B fragments of a [16, 8] matrix."""
    rows = [torch.cat([b[2 * t + 8 * i :, g][:2] for i in range(2)]) for g, t in lanes()]
    return words(torch.stack(rows))


def spread_d(d):
    """[32, 4]: the C or D fragments of a [16, 8] matrix."""
    rows = [torch.cat([d[g + 8 * i, 2 * t :][:2] for i in range(2)]) for g, t in lanes()]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", SCALARS)
def test_mma_is_the_product_of_the_matrices_its_fragments_spell(primitive, dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    c = torch.randn(16, 8)
    d = torch.full((32, 4), float("nan"))

    warp(primitive("mma_kernel", dtype), d, spread_a(a), spread_b(b), spread_d(c))

    torch.testing.assert_close(d, spread_d(a.float() @ b.float() + c), atol=1e-5, rtol=1e-5)


def test_mma_of_one_element_each_lands_where_the_isa_says(primitive):
    a, b = torch.zeros(16, 16), torch.zeros(16, 8)
    a[11, 13], b[13, 6] = 3.0, 5.0
    d = torch.full((32, 4), float("nan"))

    warp(primitive("mma_kernel"), d, spread_a(a.half()), spread_b(b.half()), torch.zeros(32, 4))

    # row 11 = group 3, second half (registers 2, 3); column 6 = pair 3, first of the two
    assert d.flatten().nonzero().tolist() == [[4 * (3 * 4 + 3) + 2]]
    assert d[15, 2] == 15.0


def test_ldmatrix_and_movmatrix_hand_out_rows_and_columns(primitive):
    elements = torch.arange(256, dtype=torch.int16).view(4, 8, 8)  # 4 matrices of 8 rows
    out = torch.full((7, 32, 4), -1, dtype=torch.int32)

    warp(primitive("ldmatrix_kernel"), out, words(elements.view(32, 8)))

    plain = words(torch.stack([elements[:, g, 2 * t :][:, :2] for g, t in lanes()]))[..., 0]
    turned = elements.mT
    trans = words(torch.stack([turned[:, g, 2 * t :][:, :2] for g, t in lanes()]))[..., 0]
    for form, expected in enumerate((plain, trans)):
        for idx, count in enumerate((1, 2, 4)):
            assert torch.equal(out[3 * form + idx, :, :count], expected[:, :count])
    assert torch.equal(out[6, :, 0], trans[:, 0])


def test_codes_become_halves_exactly(primitive):
    torch.manual_seed(1)
    codes = torch.randint(-128, 128, (32, 4), dtype=torch.int8)
    codes[0] = torch.tensor([-128, 127, -1, 0])
    out = torch.full((32, 6), -1, dtype=torch.int32)

    warp(primitive("codes_kernel"), out, codes.view(torch.int32).flatten())

    halves = out.view(torch.float16).view(32, 3, 4)
    raw = codes.view(torch.uint8)
    assert torch.equal(halves[:, 0], codes.half())
    two_rows = raw[:, [0, 2, 1, 3]]  # bytes of one and of the other in turn
    assert torch.equal(halves[:, 1], (two_rows & 15).half() - 7.5)
    assert torch.equal(halves[:, 2], (two_rows >> 4).half() - 7.5)


@pytest.mark.parametrize("dtype", SCALARS)
def test_numbers_round_as_torch_rounds_them(primitive, dtype):
    torch.manual_seed(2)
    x = torch.randn(32, 2) * torch.logspace(-12, 6, 64).view(32, 2)
    x[0] = torch.tensor([65519.9, 65520.0])  # the last half, the first infinity
    x[1] = torch.tensor([float("inf"), -0.0])
    x[2] = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11])  # ties to even
    x[3] = torch.tensor([2.0**-25, 3 * 2.0**-25])  # ties among the least
    operands = torch.randn(32, 3, 2).to(dtype)
    rounded = torch.full((32, 2), float("nan"), dtype=dtype)
    widened, powers = torch.full((32, 2), float("nan")), torch.full((32, 2), float("nan"))
    pairs = torch.full((32, 3), -1, dtype=torch.int32)

    kernel = primitive("numbers_kernel", dtype)
    warp(kernel, rounded, widened, pairs, powers, x, words(operands.view(32, 6)), 5)

    assert torch.equal(rounded.view(torch.int16), x.to(dtype).view(torch.int16))
    assert torch.equal(widened, x.to(dtype).float())
    a, b, c = operands.double().unbind(1)
    results = pairs[:, :2].contiguous().view(dtype).view(32, 2, 2)
    assert torch.equal(results[:, 0], (a * b + c).to(dtype))
    assert torch.equal(results[:, 1], (a * b).to(dtype))
    expected = torch.exp2(x.double()).float()
    expected[expected < 2.0**-126] = 0.0
    torch.testing.assert_close(powers, expected, rtol=3e-7, atol=0)
    raw = operands.view(torch.uint8).view(32, 3, 4)  # bytes of x, y and z
    mixed = torch.stack([raw[:, 1, 3], raw[:, 0, 0], raw[:, 0, 1], raw[:, 0, 2]], 1)
    mixed = (mixed & torch.tensor([0, 255, 255, 0], dtype=torch.uint8)) | raw[:, 2]
    assert torch.equal(pairs[:, 2].contiguous().view(torch.uint8).view(32, 4), mixed.roll(-5, 0))


def test_nan_stays_nan_in_both_formats(primitive):
    for dtype in SCALARS:
        x = torch.full((32, 2), float("nan"))
        rounded, widened = torch.zeros(32, 2, dtype=dtype), torch.zeros(32, 2)
        out = torch.zeros(32, 3, dtype=torch.int32)
        y = torch.zeros(32, 3, dtype=torch.int32)
        warp(primitive("numbers_kernel", dtype), rounded, widened, out, widened.clone(), x, y, 0)

        assert rounded.isnan().all()
        assert widened.isnan().all()


def test_shuffles_and_votes(primitive):
    x = torch.arange(32, dtype=torch.int32) * 7 % 32
    out = torch.full((32, 7), -1, dtype=torch.int32)

    warp(primitive("warp_kernel"), out, x)

    lane = torch.arange(32)
    segment_end = lane // 16 * 16 + 15
    down = torch.where(lane + 5 <= segment_end, lane + 5, lane)
    assert torch.equal(out[:, 0], x[torch.where(lane >= 3, lane - 3, lane)])
    assert torch.equal(out[:, 1], x[down])
    assert torch.equal(out[:, 2], x[lane ^ 9])
    assert torch.equal(out[:, 3], x[lane // 8 * 8 + 2 * lane % 8])
    votes = sum(1 << i for i in range(32) if x[i] % 3 == 0)
    assert (out[:, 4].long() % 2**32 == votes).all()
    assert (out[:, 5] == 2).all()
    assert torch.equal(out[:16, 6], x[lane[:16] ^ 1])


def test_cp_async_lands_by_its_wait(primitive):
    rows = torch.arange(128, dtype=torch.int32).view(32, 4)
    out = torch.full((32, 5), -1, dtype=torch.int32)

    warp(primitive("cp_async_kernel"), out, rows)

    expected = rows.clone()
    expected[1::2] = 0
    assert torch.equal(out[:, :4], expected)
    assert torch.equal(out[:, 4], rows[:, 0].flip(0))


FAULTS = {
    1: "write of 4 bytes outside every argument",
    2: "write to a const argument",
    3: "misaligned read of 16 bytes",
    4: "read of what no thread has written",
    5: "read of what no thread has written",
    6: "read of what no thread has written",
    7: "data race with a write",
    8: "data race with a write",
    9: "divergence: __syncthreads reached by 40 of 64 threads, 24 returned",
    10: "divergence: lane 0 waits in __shfl_sync .mask ffffffff. for lane 8, which is at its end",
    11: "a shuffle reads from a lane that its mask leaves out",
    12: "__shfl_sync by a lane that its mask leaves out",
    13: "divergence: lane 0 waits in movmatrix.trans",
    14: "write of 4 bytes outside every argument",
    15: "outside every argument and shared memory .null pointer.",
    16: "divergence: barrier 3 reached by 32 of 64 threads",
    18: "divergence: barrier 1 reached by 32 of 64 threads",
    19: "barrier 3 reached by a part of a warp",
    20: "a cp.async is in flight there .read",
    21: "a cp.async is in flight there .write",
    30: "a cp.async is in flight there .read",
    31: "read of what no thread has written|a cp.async is in flight there",
    32: "data race with a read",
    33: "misaligned cp.async of 16 bytes",
    34: "barrier 3 is for 32 threads here and for 64 elsewhere",
    35: "__syncthreads beside barrier 0, which is the same",
    36: "there is no barrier 16",
    40: "data race with a write",
    41: "divergence: lane 0 waits in __shfl_sync .* for lane 16, which is in __shfl_xor_sync",
    50: "two blocks write there .write of 4 bytes at byte 0 of an argument",
    51: "read of what another block wrote with no __threadfence after it",
    54: "data race with a write .read of 4 bytes .* of an argument, by thread",
}


def run_faults(fault, has_reversed_blocks=False):
    kernel = emulated("faults", folder=ROOT / "tests" / "kernels")
    kernel.has_reversed_blocks = has_reversed_blocks
    out = torch.full((64,), float("nan"))
    kernel((2,), (64,), [out, torch.arange(64.0), fault], 256)
    return out


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    with pytest.raises(EmulatorError, match=FAULTS[fault]) as caught:
        run_faults(fault)

    assert "faults.cu:" in str(caught.value)


def test_what_is_ordered_by_barriers_fences_and_atomics_is_no_fault():
    assert torch.equal(run_faults(0), ((63 - torch.arange(64)) ^ 1).float() + 64)
    assert torch.equal(run_faults(52), torch.arange(64.0))
    assert run_faults(53)[6] == 0.0
    assert torch.equal(run_faults(17), (torch.arange(64) ^ 31).float())


def test_blocks_run_from_either_end():
    # Here the second block reads what the first, in its turn, has yet to write.
    assert torch.equal(run_faults(51, has_reversed_blocks=True), torch.arange(64.0))
    with pytest.raises(EmulatorError, match=r"block \(1, 0, 0\).*two blocks write"):
        run_faults(50)
    with pytest.raises(EmulatorError, match=r"block \(0, 0, 0\).*two blocks write"):
        run_faults(50, has_reversed_blocks=True)
