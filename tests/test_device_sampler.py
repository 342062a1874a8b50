"""Drawing on the device gives Sampler's ids: by torch, and by the kernels, emulated and on GPUs."""

import dataclasses
import random

import pytest
import torch
from machines import MACHINES

from kvchat.attention.top_k import TopK
from kvchat.config import SamplingParams
from kvchat.engine.device_sampler import (
    MAX_TOP_K,
    NUM_DRAW_FIELDS,
    DeviceSampler,
    can_draw,
    draw_fields,
)
from kvchat.engine.request import Request
from kvchat.engine.sampler import NON_FINITE, Draw, Sampler, uniform, uniforms

GREEDY = SamplingParams(temperature=0.0)
WAYS = [pytest.param(None, id="torch"), *MACHINES]


@pytest.fixture(params=WAYS)
def load(request):
    return request.param


def make_sampler(load, vocab_size, num_rows, dtype="float32"):
    """By torch where load is None."""
    return DeviceSampler(load and TopK(vocab_size, dtype, num_rows, load, "cpu"))


def make_request(sampling, idx, num_tokens):
    return Request(idx, idx, [1] * num_tokens, 1, sampling, seed=1000 + idx, branch=idx % 3)


def random_rules(rng):
    return SamplingParams(
        temperature=rng.choice([0.0, 1e-3, 0.3, 0.8, 1.0, 2.5, 100.0]),
        top_k=rng.choice([1, 2, 5, 17, 40, 63, 64]),
        top_p=rng.choice([1e-6, 0.1, 0.5, 0.9, 0.95, 1.0]),
        min_p=rng.choice([0.0, 0.01, 0.05, 0.5, 1.0]),
    )


def random_requests(num_rows, seed=0):
    rng = random.Random(seed)
    return [make_request(random_rules(rng), idx, rng.randrange(1, 9)) for idx in range(num_rows)]


def random_logits(num_rows, vocab_size, seed=0):
    """Normal, of a different width each third row."""
    widths = torch.tensor([3.0, 0.05, 30.0]).repeat(-(-num_rows // 3))[:num_rows, None]
    generator = torch.Generator().manual_seed(seed)
    return widths * torch.randn(num_rows, vocab_size, generator=generator)


def draw_on_device(sampler, logits, requests):
    positions = [len(request.token_ids) for request in requests]
    return sampler.draw(logits, torch.from_numpy(draw_fields(requests, positions))).tolist()


def draw_on_host(logits, requests):
    draws = [Draw(r.sampling, r.token_ids, r.seed, r.branch) for r in requests]
    return Sampler().sample(logits.float(), draws)


@pytest.mark.parametrize("vocab_size", [97, 4099, 32000])
def test_random_rows_and_rules(load, vocab_size):
    num_rows = 700 if load is None else {97: 400, 4099: 80, 32000: 16}[vocab_size]
    logits, requests = random_logits(num_rows, vocab_size), random_requests(num_rows)

    drawn = draw_on_device(make_sampler(load, vocab_size, num_rows), logits, requests)

    assert drawn == draw_on_host(logits, requests)
    assert len(set(drawn)) > min(num_rows, vocab_size) / 4


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_of_16_bits(load, dtype):
    logits, requests = random_logits(60, 512).to(getattr(torch, dtype)), random_requests(60)

    drawn = draw_on_device(make_sampler(load, 512, 60, dtype), logits, requests)

    assert drawn == draw_on_host(only_first_of_equals(logits.float(), requests), requests)


def only_first_of_equals(logits, requests):
    """All but each row's top_k largest, of equals the lowest ids, as good as impossible."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    pruned = logits.clone()
    for row, request in enumerate(requests):
        pruned[row, order[row, request.sampling.top_k :]] = -1e30
    return pruned


def test_of_equals_at_the_kth_place_the_lowest_ids_stay(load):
    # Beyond MAX_TOP_K tokens torch.topk leaves it open, the kernel does not.
    for vocab_size in (60,) if load is None else (60, 97, 5000):
        num_rows = 200 if vocab_size < 100 else 12
        requests = random_requests(num_rows, seed=vocab_size)
        logits = random_logits(num_rows, vocab_size).clamp(-9, 9).round()

        drawn = draw_on_device(make_sampler(load, vocab_size, num_rows), logits, requests)

        assert drawn == draw_on_host(only_first_of_equals(logits, requests), requests)


@pytest.mark.parametrize("likeliest", [1.0, 0.0])
def test_logits_too_close_for_their_probabilities_to_differ_count_by_id(load, likeliest):
    logits = (torch.arange(50.0) * 1e-20).repeat(40, 1)
    logits[:, 30] = likeliest
    rules = [
        SamplingParams(temperature=1.0, top_k=50, top_p=(idx + 0.5) / 40, min_p=min_p)
        for idx, min_p in enumerate([0.0, 0.5, 1.0, 0.0] * 10)
    ]
    requests = [make_request(sampling, idx, 3) for idx, sampling in enumerate(rules)]

    drawn = draw_on_device(make_sampler(load, 50, 40), logits, requests)

    assert drawn == draw_on_host(logits, requests)


def test_points_at_the_limits_of_candidates(load):
    logits = torch.full((5, 20), -9.0)
    logits[:, 3], logits[:, 7] = 2.0, 2.0
    uniforms_by_row = [0.0, 0.5 - 2**-54, 0.5, 1 - 2**-53, 1.0]
    params = torch.tensor([[0.5, 20, 0.999, 0.1, u] for u in uniforms_by_row], dtype=torch.float64)

    assert make_sampler(load, 20, 5).draw(logits, params).tolist() == [3, 3, 7, 7, 7]


def test_one_candidate(load):
    logits = random_logits(3, 97)
    narrow = [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}]
    requests = [
        make_request(dataclasses.replace(SamplingParams(), **fields), idx, 5)
        for idx, fields in enumerate(narrow)
    ]

    drawn = draw_on_device(make_sampler(load, 97, 3), logits, requests)

    assert drawn == logits.argmax(dim=1).tolist()


def test_greedy_takes_the_first_of_the_largest(load):
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0], [9.0, 4.0, 4.0, 9.0], [-0.0, 0.0, -1.0, -2.0]])
    sampler = make_sampler(load, 4, 3)

    assert sampler.greedy(logits).tolist() == [1, 0, 0]
    requests = [make_request(GREEDY, idx, 3) for idx in range(3)]
    assert draw_on_device(sampler, logits, requests) == [1, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_harms_no_other(load, bad):
    logits = random_logits(6, 97)
    logits[1, 96] = logits[4, 3] = bad
    rules = [GREEDY] * 3 + [SamplingParams()] * 3
    requests = [make_request(sampling, idx, 4) for idx, sampling in enumerate(rules)]
    sampler = make_sampler(load, 97, 6)

    drawn, greedy = draw_on_device(sampler, logits, requests), sampler.greedy(logits).tolist()

    assert drawn == draw_on_host(logits, requests)
    assert [idx for idx in range(6) if drawn[idx] == NON_FINITE] == [1, 4]
    assert [idx for idx in range(6) if greedy[idx] == NON_FINITE] == [1, 4]


@pytest.mark.parametrize(
    ("fields", "is_drawn"),
    [
        ({}, True),
        ({"top_k": MAX_TOP_K}, True),
        ({"top_k": MAX_TOP_K + 1}, False),
        ({"top_k": 0}, False),
        ({"typical_p": 0.9}, False),
        ({"temperature": 0.0, "top_k": 0, "typical_p": 0.9}, True),
        ({"temperature": 0.0, "logit_bias": ((3, 1.0),)}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"temperature": 0.0, "presence_penalty": 0.1}, False),
        ({"temperature": 0.0, "dry_multiplier": 0.8}, False),
    ],
    ids=str,
)
def test_what_the_device_can_draw(fields, is_drawn):
    assert can_draw(dataclasses.replace(SamplingParams(), **fields)) is is_drawn


def test_fields_of_a_row():
    sampling = SamplingParams(temperature=0.7, top_k=30, top_p=0.8, min_p=0.1)
    requests = [
        make_request(sampling, 5, 3),
        make_request(GREEDY, 1, 3),
        make_request(dataclasses.replace(sampling, typical_p=0.5), 2, 3),
    ]

    fields = draw_fields(requests, [9, 9, 9])

    assert fields.tolist() == [
        [0.7, 30, 0.8, 0.1, uniform(1005, 2, 9)],
        [0] * NUM_DRAW_FIELDS,
        [0] * NUM_DRAW_FIELDS,
    ]
    assert draw_fields([], []).shape == (0, NUM_DRAW_FIELDS)


def test_many_uniforms_are_those_of_one_after_another():
    rng = random.Random(3)
    keys = [(rng.randrange(-(2**70), 2**70), rng.randrange(2**64), n) for n in range(200)]
    keys += [(2**64 - 1, 2**64 - 1, 2**40), (0, 0, 0)]

    for some in (keys, keys[:5], []):
        assert uniforms(some).tolist() == [uniform(*key) for key in some]


@pytest.mark.gpu
@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_captured_in_a_graph(has_kernels, dtype):
    from kvchat.attention.kernels import load_kernel

    num_rows, vocab_size = 8, 128_256
    kernels = TopK(vocab_size, dtype, num_rows, load_kernel) if has_kernels else None
    sampler = DeviceSampler(kernels)
    logits = torch.zeros(num_rows, vocab_size, dtype=getattr(torch, dtype), device="cuda")
    params = torch.zeros(num_rows, NUM_DRAW_FIELDS, dtype=torch.float64, device="cuda")
    for _ in range(2):  # what is set up at first use
        sampler.draw(logits, params)
        sampler.greedy(logits)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn, greedy = sampler.draw(logits, params), sampler.greedy(logits)

    for seed in range(20):
        requests = random_requests(num_rows, seed)
        logits.copy_(random_logits(num_rows, vocab_size, seed))
        positions = [len(request.token_ids) for request in requests]
        params.copy_(torch.from_numpy(draw_fields(requests, positions)))
        graph.replay()

        read = logits.float().cpu()
        assert greedy.tolist() == read.argmax(dim=1).tolist()
        if has_kernels or dtype == "float32":  # torch.topk leaves open which of equals it gives
            expected = draw_on_host(only_first_of_equals(read, requests), requests)
            assert drawn.tolist() == expected
