"""Logits -> one token id a row. Knows no batch: a row's draw depends on that row alone.

The rules act in llama.cpp's order, each on what the one before it left:

    logit bias       added
    penalties        repetition (a positive logit divided, another multiplied), then frequency
                     (times the count) and presence subtracted; over the last penalty_last_n tokens
    DRY              multiplier * base^(n - allowed_length) off a token that would continue a
                     repeat of n >= allowed_length tokens; no repeat reaches over a breaker
    top-k            the k largest logits
    typical-p        those whose surprise is closest to the entropy, up to the mass (2202.00666)
    top-p            the most likely, up to the mass
    min-p            those at least min_p times as likely as the likeliest
    temperature      logits divided; 0 takes the largest logit after DRY, the first of equals
    draw             inverse CDF over what is left, in the order of token ids

The uniform of a draw is a function of (seed, branch, position): Philox4x64-10, a counter-based
generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvchat.config import SamplingParams

NON_FINITE = -1  # in place of a token id: the row's logits held NaN or infinity
# A bias above this counts as this: beyond any logit, and what the penalties make of it is finite.
_MAX_BIAS = 1e30
# A repeat longer than this counts as this long: its penalty is beyond any logit already.
_MAX_DRY_MATCH = 64
_MASK = (1 << 64) - 1
_PHILOX_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_PHILOX_WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_MIN_IN_ARRAYS = 48  # numbers from which arrays are faster than one after another

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Draw:
    """What a row is drawn with. len(token_ids) is the position that the token will take."""

    sampling: SamplingParams
    token_ids: list[int]  # the conversation so far, prompt included
    seed: int
    branch: int


class Sampler:
    """`dry_breakers`: token ids that end a repeat for DRY, such as those of line breaks."""

    def __init__(self, dry_breakers: frozenset[int] = frozenset()) -> None:
        self._dry_breakers = dry_breakers

    def sample(self, logits: Tensor, draws: list[Draw]) -> list[int]:
        """One id per row of logits, [len(draws), vocab_size] float32, which may be changed.

        NON_FINITE for a row with NaN or infinity in it; the other rows are drawn as ever.
        """
        tokens = [NON_FINITE] * len(draws)
        rows_by_top_k: dict[int, list[int]] = {}  # 0: greedy
        # NaN and infinity survive a sum, which costs a tenth of asking each logit.
        for row, is_finite in enumerate(logits.sum(dim=1).isfinite().tolist()):
            if is_finite:
                self._adjust(logits[row], draws[row])
                rows_by_top_k.setdefault(_top_k(draws[row], logits.shape[1]), []).append(row)
        for top_k, rows in rows_by_top_k.items():
            chosen = logits if len(rows) == len(draws) else logits[rows]
            if top_k == 0:
                picked = chosen.argmax(dim=1).tolist()
            else:
                picked = _sample(chosen, [draws[row] for row in rows], top_k)
            for row, token_id in zip(rows, picked, strict=True):
                tokens[row] = token_id
        return tokens

    def _adjust(self, row: Tensor, draw: Draw) -> None:
        """Bias, penalties and DRY, in place. Ids outside the vocabulary are passed over."""
        sampling = draw.sampling
        if sampling.logit_bias:
            bias = [(i, v) for i, v in sampling.logit_bias if 0 <= i < row.numel()]
            ids = torch.tensor([i for i, _ in bias], dtype=torch.int64)
            values = [min(v, _MAX_BIAS) for _, v in bias]
            row.index_add_(0, ids.to(row.device), row.new_tensor(values))
        is_penalised = sampling.frequency_penalty or sampling.presence_penalty
        if is_penalised or sampling.repetition_penalty != 1:
            _penalise(row, _last(draw.token_ids, sampling.penalty_last_n), sampling)
        if sampling.dry_multiplier:
            _dampen_repeats(
                row, _last(draw.token_ids, sampling.dry_last_n), sampling, self._dry_breakers
            )


def uniform(seed: int, branch: int, position: int) -> float:
    """A number in [0, 1) with 53 bits: the first word of Philox4x64-10."""
    key_0, key_1 = seed & _MASK, branch & _MASK
    a, b, c, d = position, 0, 0, 0
    for _ in range(10):
        product_0, product_1 = a * _PHILOX_MULTIPLIERS[0], c * _PHILOX_MULTIPLIERS[1]
        a, c = (product_1 >> 64) ^ b ^ key_0, (product_0 >> 64) ^ d ^ key_1
        b, d = product_1 & _MASK, product_0 & _MASK
        key_0, key_1 = (key_0 + _PHILOX_WEYL[0]) & _MASK, (key_1 + _PHILOX_WEYL[1]) & _MASK
    return (a >> 11) * 2.0**-53


def uniforms(keys: Sequence[tuple[int, int, int]]) -> Floats:
    """uniform(*key) of each (seed, branch, position); of many at once, in arrays."""
    if len(keys) < _MIN_IN_ARRAYS:
        return np.array([uniform(*key) for key in keys])
    columns = zip(*keys, strict=True)
    seed, branch, position = (np.array([x & _MASK for x in c], np.uint64) for c in columns)
    words, key = np.stack([position, np.zeros_like(position)]), np.stack([seed, branch])
    other_words = np.zeros_like(words)
    weyl = np.array(_PHILOX_WEYL, np.uint64)[:, None]
    for _ in range(10):
        high, low = _multiply(words)
        words, other_words = high[::-1] ^ other_words ^ key, low[::-1]
        key = key + weyl
    unit: Floats = (words[0] >> np.uint64(11)) * 2.0**-53
    return unit


def _multiply(words: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The high and low 64 bits of the products with Philox's multipliers; words: [2, n]."""
    half, low_half = np.uint64(32), np.uint64(0xFFFFFFFF)
    factors = np.array(_PHILOX_MULTIPLIERS, np.uint64)[:, None]
    low, high, factor_low, factor_high = (
        words & low_half, words >> half, factors & low_half, factors >> half,
    )  # fmt: skip
    middle = high * factor_low + (low * factor_low >> half)
    other_middle = low * factor_high + (middle & low_half)
    return high * factor_high + (middle >> half) + (other_middle >> half), words * factors


def _top_k(draw: Draw, vocab_size: int) -> int:
    """Candidates that the row begins with; 0 = greedy, which needs none."""
    sampling = draw.sampling
    if sampling.temperature <= 0:
        return 0
    return min(sampling.top_k, vocab_size) if sampling.top_k > 0 else vocab_size


def _last(token_ids: list[int], num_tokens: int) -> list[int]:
    """The last num_tokens ids; all of them for a negative number."""
    if num_tokens < 0:
        return token_ids
    return token_ids[-num_tokens:] if num_tokens else []


def _penalise(row: Tensor, recent: list[int], sampling: SamplingParams) -> None:
    ids_array, counts = np.unique(np.array(recent, dtype=np.int64), return_counts=True)
    ids = torch.from_numpy(ids_array).to(row.device)
    old, penalty = row[ids], sampling.repetition_penalty
    new = torch.where(old > 0, old / penalty, old * penalty)
    flat = counts * sampling.frequency_penalty + sampling.presence_penalty
    row[ids] = new - row.new_tensor(flat)


def _dampen_repeats(
    row: Tensor, recent: list[int], sampling: SamplingParams, breakers: frozenset[int]
) -> None:
    ids, lengths = _continuations(np.array(recent, np.int64), sampling.dry_allowed_length, breakers)
    with np.errstate(over="ignore"):  # beyond float64 is as good as beyond any logit
        growth = np.float64(sampling.dry_base) ** (lengths - sampling.dry_allowed_length)
    row[torch.from_numpy(ids).to(row.device)] -= row.new_tensor(sampling.dry_multiplier * growth)


def _continuations(recent: Ints, shortest: int, breakers: frozenset[int]) -> tuple[Ints, Ints]:
    """(ids, lengths): each token that once followed what `recent` ends with, and the length of
    the longest such ending, if that is at least `shortest` and without a breaker in it."""
    longest: dict[int, int] = {}
    ends = np.flatnonzero(recent[:-1] == recent[-1:])  # the last token's earlier places
    for length in range(1, _MAX_DRY_MATCH + 1):
        if not ends.size or int(recent[-length]) in breakers:
            break
        if length >= shortest:
            longest |= dict.fromkeys(recent[ends + 1].tolist(), length)
        ends = ends[ends >= length]
        ends = ends[recent[ends - length] == recent[-1 - length]]
    return np.array(list(longest), np.int64), np.array(list(longest.values()), np.int64)


def _sample(logits: Tensor, draws: list[Draw], top_k: int) -> list[int]:
    """One id per row, by the rules from top-k on. logits: [len(draws), vocab_size]."""
    if top_k < logits.shape[1]:
        values, ids = (x.cpu().numpy() for x in logits.topk(top_k, dim=1, sorted=False))
        order = ids.argsort(axis=1)
        ids = np.take_along_axis(ids, order, axis=1)
        values = np.take_along_axis(values, order, axis=1)
    else:
        values = logits.cpu().numpy()
        ids = np.broadcast_to(np.arange(top_k), values.shape)
    rows = zip(ids, values.astype(np.float64), draws, strict=True)
    return [_draw(row_ids, row_logits, draw) for row_ids, row_logits, draw in rows]


def _draw(ids: Ints, logits: Floats, draw: Draw) -> int:
    """One of ids, which are ascending; logits: [len(ids)]."""
    sampling = draw.sampling
    if sampling.typical_p < 1:
        kept = _typical(logits, sampling.typical_p)
        ids, logits = ids[kept], logits[kept]
    if sampling.top_p < 1:
        kept = _nucleus(logits, sampling.top_p)
        ids, logits = ids[kept], logits[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(logits >= logits.max() + np.log(sampling.min_p))
        ids, logits = ids[kept], logits[kept]
    cdf = np.exp((logits - logits.max()) / sampling.temperature).cumsum()
    point = uniform(draw.seed, draw.branch, len(draw.token_ids)) * cdf[-1]
    # Kept below the total, or rounding could pick an id of probability 0 behind the last.
    return int(ids[np.searchsorted(cdf, min(point, np.nextafter(cdf[-1], 0)), side="right")])


def _softmax(logits: Floats) -> Floats:
    weights: Floats = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights


def _typical(logits: Floats, mass: float) -> Ints:
    """Indices, ascending, of the locally typical set."""
    probs = _softmax(logits)
    log_probs = np.log(np.maximum(probs, np.finfo(np.float64).tiny))
    order = np.abs(log_probs - (probs * log_probs).sum()).argsort(kind="stable")
    return np.sort(order[: _count(probs[order], mass)])


def _nucleus(logits: Floats, mass: float) -> Ints:
    """Indices, ascending, of the smallest set of most likely tokens that reaches the mass."""
    probs = _softmax(logits)
    # All tokens below this together do not make up 1 - mass: only the others need sorting.
    likely = np.flatnonzero(probs >= (1 - mass) / probs.size)
    order = likely[(-probs[likely]).argsort(kind="stable")]
    return np.sort(order[: _count(probs[order], mass)])


def _count(probs: Floats, mass: float) -> int:
    """How many of probs, in their order, it takes to reach the mass; at least one."""
    return int((probs.cumsum() < mass).sum()) + 1
