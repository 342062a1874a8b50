"""The sampler's rules against independent definitions: transformers' warpers and plain numpy."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from kvchat.config import SamplingParams
from kvchat.engine.sampler import NON_FINITE, Draw, Sampler, uniform

PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [5, 3, 5, 9, 3, 5]


def draw(sampling, token_ids=PROMPT, seed=7, branch=0):
    return Draw(sampling, list(token_ids), seed, branch)


def random_logits(num_rows, vocab_size=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(num_rows, vocab_size, generator=generator)


def inverse_cdf(scores, a_draw):
    """What a draw from softmax(scores) must be, ids in ascending order; scores: float64 [vocab]."""
    cdf = np.cumsum(np.exp(scores - scores.max()))
    point = uniform(a_draw.seed, a_draw.branch, len(a_draw.token_ids)) * cdf[-1]
    return int(np.searchsorted(cdf, point, side="right"))


def sampled_and_expected(sampling, processors, num_rows=300, vocab_size=200):
    """Ids from the sampler, and from transformers' processors in our order, for random logits."""
    logits = random_logits(num_rows, vocab_size)
    draws = [draw(sampling, PROMPT + [1] * (i % 7), seed=i) for i in range(num_rows)]
    expected = []
    for row, a_draw in zip(logits.double(), draws, strict=True):
        scores, input_ids = row[None], torch.tensor([a_draw.token_ids])
        for processor in processors:
            scores = processor(input_ids, scores)
        expected.append(inverse_cdf(scores[0].numpy(), a_draw))
    return Sampler().sample(logits, draws), expected


@pytest.mark.parametrize(
    ("fields", "processors"),
    [
        ({}, []),
        ({"temperature": 0.3}, [hf.TemperatureLogitsWarper(0.3)]),
        ({"temperature": 2.5}, [hf.TemperatureLogitsWarper(2.5)]),
        ({"top_k": 1}, [hf.TopKLogitsWarper(1)]),
        ({"top_k": 17}, [hf.TopKLogitsWarper(17)]),
        ({"top_k": 1000}, []),
        ({"top_p": 0.9}, [hf.TopPLogitsWarper(0.9)]),
        ({"top_p": 0.2}, [hf.TopPLogitsWarper(0.2)]),
        ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
        ({"typical_p": 0.8}, [hf.TypicalLogitsWarper(0.8)]),
        ({"typical_p": 0.2}, [hf.TypicalLogitsWarper(0.2)]),
        (
            {"repetition_penalty": 1.8, "penalty_last_n": -1},
            [hf.RepetitionPenaltyLogitsProcessor(1.8)],
        ),
    ],
    ids=str,
)
def test_each_rule_is_that_of_transformers(fields, processors):
    sampled, expected = sampled_and_expected(dataclasses.replace(PLAIN, **fields), processors)

    assert sampled == expected


def test_rules_act_in_the_documented_order():
    sampling = SamplingParams(
        temperature=1.7,
        top_k=60,
        typical_p=0.95,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=1.3,
        penalty_last_n=-1,
    )
    processors = [
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.TopKLogitsWarper(60),
        hf.TypicalLogitsWarper(0.95),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
        hf.TemperatureLogitsWarper(1.7),
    ]

    sampled, expected = sampled_and_expected(sampling, processors)
    assert sampled == expected

    _, other_order = sampled_and_expected(sampling, processors[::-1])
    assert sampled != other_order


def test_uniform_is_philox_4x64():
    for seed, branch, position in [(0, 0, 1), (7, 3, 0), (2**64 - 1, 2**63, 4095), (-1, 0, 12)]:
        # numpy's counter, four words, moves on before a block is made
        before = (position - 1) % 2**256
        counter = np.array([before >> 64 * i & (2**64 - 1) for i in range(4)], np.uint64)
        key = np.array([seed % 2**64, branch], np.uint64)
        reference = np.random.Philox(key=key, counter=counter)
        assert uniform(seed, branch, position) == (int(reference.random_raw()) >> 11) * 2.0**-53


def test_draws_follow_the_probabilities():
    num_draws, probs = 20_000, np.array([0.4, 0.0, 0.3, 0.2, 0.06, 0.04])
    with np.errstate(divide="ignore"):
        logits = torch.from_numpy(np.log(probs)).float().clamp(min=-200).repeat(num_draws, 1)
    draws = [draw(PLAIN, [], seed=seed) for seed in range(num_draws)]

    counts = np.bincount(Sampler().sample(logits, draws), minlength=6)

    assert counts[1] == 0
    seen = probs > 0
    chi_square = ((counts - num_draws * probs)[seen] ** 2 / (num_draws * probs[seen])).sum()
    assert chi_square < 13.3  # 99 % of 4 degrees of freedom; the seeds are fixed


def test_seed_branch_and_position_each_change_the_draw():
    logits = torch.zeros(1, 100_000)
    base = [draw(PLAIN, [1, 2], seed=5, branch=1)]
    others = [
        draw(PLAIN, [1, 2], seed=6, branch=1),
        draw(PLAIN, [1, 2], seed=5, branch=2),
        draw(PLAIN, [1, 2, 3], seed=5, branch=1),
    ]

    first = Sampler().sample(logits.clone(), base)

    assert Sampler().sample(logits.clone(), base) == first
    tokens = [*first, *(Sampler().sample(logits.clone(), [other])[0] for other in others)]
    assert len(set(tokens)) == 4


def test_a_row_is_drawn_alone_as_among_others():
    settings = [
        GREEDY,
        PLAIN,
        SamplingParams(),
        SamplingParams(top_k=0),
        SamplingParams(dry_multiplier=0.8, repetition_penalty=1.1),
        SamplingParams(logit_bias=((3, 8.0),), typical_p=0.5),
    ]
    logits = random_logits(24)
    draws = [draw(settings[i % 6], PROMPT * (1 + i % 3), seed=i) for i in range(24)]

    together = Sampler().sample(logits.clone(), draws)

    alone = [Sampler().sample(logits[i : i + 1].clone(), draws[i : i + 1])[0] for i in range(24)]
    assert together == alone


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0], [9.0, 4.0, 4.0, 9.0]])

    assert Sampler().sample(logits, [draw(GREEDY), draw(GREEDY)]) == [1, 0]


def test_penalties_count_within_their_window():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    token_ids = [3, 3, 0, 1, 1, 1]  # the last five: 3, 0, 1, 1, 1
    sampling = SamplingParams(
        temperature=0.0,
        repetition_penalty=2.0,
        frequency_penalty=0.25,
        presence_penalty=0.125,
        penalty_last_n=5,
    )

    Sampler().sample(logits, [draw(sampling, token_ids)])

    assert logits.tolist() == [[1 - 0.25 - 0.125, -4 - 0.75 - 0.125, 1.0, 0.25 - 0.25 - 0.125]]


@pytest.mark.parametrize("last_n", [0, 2, -1])
def test_penalties_look_back_as_far_as_told(last_n):
    logits = torch.ones(1, 4)
    sampling = SamplingParams(temperature=0.0, presence_penalty=1.0, penalty_last_n=last_n)

    Sampler().sample(logits, [draw(sampling, [0, 1, 2, 3])])

    seen = {0: [1, 1, 1, 1], 2: [1, 1, 0, 0], -1: [0, 0, 0, 0]}
    assert logits.tolist() == [seen[last_n]]


def dry_by_definition(token_ids, sampling, vocab_size, breakers=frozenset()):
    """The DRY penalty of every id, by comparing every two endings."""
    penalties = np.zeros(vocab_size)
    for end in range(1, len(token_ids)):
        length = 0
        while length < end and token_ids[end - 1 - length] == token_ids[-1 - length]:
            if token_ids[-1 - length] in breakers:
                break
            length += 1
        if length >= sampling.dry_allowed_length:
            penalty = sampling.dry_multiplier * sampling.dry_base ** (
                length - sampling.dry_allowed_length
            )
            penalties[token_ids[end]] = max(penalties[token_ids[end]], penalty)
    return penalties


@pytest.mark.parametrize("breakers", [frozenset(), frozenset({2})])
def test_dry_is_that_of_its_definition(breakers):
    rng = np.random.default_rng(4)
    sampling = SamplingParams(temperature=0.0, dry_multiplier=0.8, dry_allowed_length=2)
    num_penalised = 0
    for _ in range(200):
        token_ids = rng.integers(0, 4, rng.integers(0, 40)).tolist()
        logits = torch.zeros(1, 4)

        Sampler(breakers).sample(logits, [draw(sampling, token_ids)])

        expected = dry_by_definition(token_ids, sampling, 4, breakers)
        np.testing.assert_allclose(-logits[0].numpy(), expected, rtol=1e-6)
        num_penalised += (expected > 0).any()
    assert num_penalised > 50


def test_dry_survives_a_text_of_one_token():
    sampling = SamplingParams(temperature=0.0, dry_multiplier=1.0, dry_base=1e9)
    logits = torch.tensor([[50.0, 0.0]])

    assert Sampler().sample(logits, [draw(sampling, [0] * 5000)]) == [1]


def test_bias_acts_on_its_ids_and_passes_over_foreign_ones():
    banned = SamplingParams(temperature=0.0, logit_bias=((1, -math.inf), (9, 5.0), (-2, 5.0)))
    raised = SamplingParams(temperature=0.0, logit_bias=((0, 2.0), (0, 2.0)))
    logits = torch.tensor([[0.0, 9.0, 3.0], [0.0, 3.5, 3.0]])

    assert Sampler().sample(logits, [draw(banned), draw(raised)]) == [2, 0]


def test_a_banned_token_is_never_drawn():
    sampling = dataclasses.replace(PLAIN, logit_bias=((199, -math.inf),), typical_p=0.99)
    logits = torch.zeros(500, 200)

    tokens = Sampler().sample(logits, [draw(sampling, seed=seed) for seed in range(500)])

    assert 199 not in tokens and len(set(tokens)) > 100


@pytest.mark.parametrize("bias", [math.inf, 1e39, 1e38])
def test_a_token_of_endless_bias_is_always_drawn_and_harms_no_other_row(bias):
    for sampling in (GREEDY, SamplingParams(), PLAIN):
        logits = random_logits(2)
        expected = Sampler().sample(logits.clone(), [draw(sampling)] * 2)
        forced = dataclasses.replace(
            sampling, logit_bias=((7, bias), (7, bias)), repetition_penalty=0.01
        )

        tokens = Sampler().sample(logits, [draw(forced, [7]), draw(sampling)])

        assert tokens == [7, expected[1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_harms_no_other(bad):
    for sampling in (GREEDY, SamplingParams(), PLAIN):
        logits = random_logits(3)
        expected = Sampler().sample(logits.clone(), [draw(sampling)] * 3)
        logits[1, 17] = bad

        tokens = Sampler().sample(logits, [draw(sampling)] * 3)

        assert tokens == [expected[0], NON_FINITE, expected[2]]


def test_no_rows_give_no_tokens():
    assert Sampler().sample(torch.empty(0, 50), []) == []
