"""The kernel of the largest logits against a stable sort, on the emulator and on GPUs."""

import functools

import pytest
import torch
from machines import GENERATIONS, MACHINES

from kvchat.attention.top_k import MAX_VOCAB_SIZE, TOP, TopK
from kvchat.errors import UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def random_logits(num_rows, vocab_size, seed=0):
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def coarse(num_rows, vocab_size):
    """Some hundred equal ones at every value."""
    return random_logits(num_rows, vocab_size).round()


def extremes(num_rows, vocab_size, dtype=torch.float32):
    """The dtype's largest and smallest numbers, denormal ones, zeros of both signs."""
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    values = torch.tensor([info.max, info.min, tiny, -tiny, tiny / 4, -tiny / 4, 0.0, -0.0])
    generator = torch.Generator().manual_seed(2)
    return values[torch.randint(len(values), (num_rows, vocab_size), generator=generator)]


KINDS = {
    "random": random_logits,
    "coarse": coarse,
    "equal": lambda *shape: torch.full(shape, -2.5),
    "ascending": lambda num_rows, size: torch.linspace(-9, 9, size).repeat(num_rows, 1),
    "descending": lambda num_rows, size: torch.linspace(9, -9, size).repeat(num_rows, 1),
    "extremes": extremes,
}


def top(kernels, logits):
    values = torch.full((logits.shape[0], TOP), torch.nan)
    ids = torch.full((logits.shape[0], TOP), -7, dtype=torch.int32)
    kernels.top(values, ids, logits)
    return values, ids


def assert_top(kernels, logits):
    """The largest first, of equals the lower id; the largest alone; counters as they were."""
    values, ids = top(kernels, logits)
    tokens = torch.full((logits.shape[0],), -7)
    kernels.largest(tokens, logits)

    expected = logits.float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(values[:, : logits.shape[1]], expected.values[:, :TOP])
    assert torch.equal(ids[:, : logits.shape[1]], expected.indices[:, :TOP].int())
    assert (values[:, logits.shape[1] :] == -torch.inf).all()
    assert (ids[:, logits.shape[1] :] >= logits.shape[1]).all()
    assert torch.equal(tokens, expected.indices[:, 0])
    assert not kernels._counters.any()


@pytest.fixture(params=MACHINES)
def load(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", [1, 63, 97, 4096, 8200, 9001])
def test_the_largest_of_any_logits(load, dtype, vocab_size):
    kernels = TopK(vocab_size, dtype, 3, load, "cpu")
    for name, kind in KINDS.items():
        if name == "extremes":
            kind = functools.partial(extremes, dtype=DTYPES[dtype])
        assert_top(kernels, kind(2, vocab_size).to(DTYPES[dtype]))


@pytest.mark.parametrize("kind", ["random", "coarse"])
@pytest.mark.parametrize("vocab_size", [128_256, 262_208])
def test_large_vocabularies(load, vocab_size, kind):
    kernels = TopK(vocab_size, "bfloat16", 1, load, "cpu")

    assert_top(kernels, KINDS[kind](1, vocab_size).bfloat16())


@pytest.mark.parametrize("load", GENERATIONS)
def test_the_order_of_blocks_and_the_generation_change_nothing(load):
    kernels = TopK(9000, "float16", 2, load, "cpu")
    for kernel in (kernels._top_k, kernels._largest):
        kernel.has_reversed_blocks = True

    assert_top(kernels, coarse(2, 9000).half())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_no_largest(load, dtype, bad):
    kernels = TopK(5000, dtype, 3, load, "cpu")
    logits = random_logits(3, 5000)
    logits[0, 4999] = logits[2, 17] = bad
    logits = logits.to(DTYPES[dtype])
    tokens = torch.full((3,), -7)

    kernels.largest(tokens, logits)
    values, _ = top(kernels, logits)

    assert tokens.tolist() == [-1, int(logits[1].argmax()), -1]
    assert values[:, 0].isnan().tolist() == [True, False, True]


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match=r"a vocabulary of 507,905 is more .* --device cpu"):
        TopK(MAX_VOCAB_SIZE + 1, "bfloat16", 1, None)
