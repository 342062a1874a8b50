"""Drawing on the device, so that the host can read a step's tokens one step late.

The rules that need no history: greedy, and top-k, top-p, min-p, temperature, draw, in the order and
with the arithmetic of engine/sampler, on the MAX_TOP_K largest logits. Shapes are fixed and nothing
waits for the host, so that a call may be captured in a CUDA graph. The ids are Sampler's but for
two things: which of equal logits at the k-th place stay, Sampler leaves to torch.topk, and here
those of the lowest ids do (without kernels, of the MAX_TOP_K that torch.topk gives); and exp and
log of another library may differ in the last bit of a double.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvchat.attention.top_k import NUM_DRAW_FIELDS, TOP
from kvchat.config import SamplingParams
from kvchat.engine.request import Request
from kvchat.engine.sampler import NON_FINITE, Floats, uniforms

MAX_TOP_K = TOP
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _UNIFORM = range(NUM_DRAW_FIELDS)
_GREEDY = (0.0,) * NUM_DRAW_FIELDS


class DrawKernels(Protocol):
    """attention.top_k.TopK: both write int64 tokens [rows], -1 for a row that is not finite."""

    def largest(self, tokens: Tensor, logits: Tensor) -> None: ...

    def draw(self, tokens: Tensor, logits: Tensor, params: Tensor) -> None: ...


def can_draw(sampling: SamplingParams) -> bool:
    """Whether the device can apply these rules; Sampler does the others on the host."""
    has_history_rules = (
        sampling.logit_bias
        or sampling.repetition_penalty != 1
        or sampling.frequency_penalty
        or sampling.presence_penalty
        or sampling.dry_multiplier
    )
    if has_history_rules:
        return False
    if sampling.temperature <= 0:
        return True
    return 1 <= sampling.top_k <= MAX_TOP_K and sampling.typical_p >= 1


def draw_fields(requests: Sequence[Request], positions: Sequence[int]) -> Floats:
    """[rows, NUM_DRAW_FIELDS]: what DeviceSampler.draw is told of each row.

    positions: those that the tokens will take. A row the device cannot draw is as a greedy one.
    """
    rules = [request.sampling for request in requests]
    is_drawn = [sampling.temperature > 0 and can_draw(sampling) for sampling in rules]
    keys = [
        (request.seed, request.branch, position)
        for request, position, is_here in zip(requests, positions, is_drawn, strict=True)
        if is_here
    ]
    points = iter(uniforms(keys).tolist())
    fields = [
        (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, next(points))
        if is_here
        else _GREEDY
        for sampling, is_here in zip(rules, is_drawn, strict=True)
    ]
    return np.array(fields, np.float64).reshape(-1, NUM_DRAW_FIELDS)


class DeviceSampler:
    """By `kernels` if there are any, else by torch on whatever device the logits are.

    logits: [rows, vocab_size], float32, float16 or bfloat16. Tokens are int64 [rows], NON_FINITE
    for a row with NaN or infinity in it.
    """

    def __init__(self, kernels: DrawKernels | None = None) -> None:
        self._kernels = kernels

    def greedy(self, logits: Tensor) -> Tensor:
        """The largest of each row, the first of equals."""
        if self._kernels is None:
            return _only_finite(logits, logits.argmax(dim=1))
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        self._kernels.largest(tokens, logits)
        return tokens

    def draw(self, logits: Tensor, params: Tensor) -> Tensor:
        """One token a row. params: float64 [rows, NUM_DRAW_FIELDS] of draw_fields."""
        if self._kernels is None:
            drawn = _draw(logits, params)
            is_greedy = params[:, _TEMPERATURE] <= 0
            return _only_finite(logits, torch.where(is_greedy, logits.argmax(dim=1), drawn))
        tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
        self._kernels.draw(tokens, logits, params)
        return tokens


def _only_finite(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.where(logits.isfinite().all(dim=1), tokens, NON_FINITE)


def _draw(logits: Tensor, params: Tensor) -> Tensor:
    """One id a row by the rules from top-k on; of a greedy row, any."""
    found, ids = logits.topk(min(MAX_TOP_K, logits.shape[1]), dim=1)
    ids, order = ids.sort(dim=1)
    values = found.gather(1, order).double()  # [rows, candidates] in the order of ids
    columns = params[:, :, None]
    is_kept = _ranks(values) < columns[:, _TOP_K]
    is_kept &= _in_nucleus(values, is_kept, columns[:, _TOP_P])
    tops = values.masked_fill(~is_kept, -torch.inf).amax(dim=1, keepdim=True)
    is_kept &= values >= tops + columns[:, _MIN_P].log()
    temperatures = torch.where(columns[:, _TEMPERATURE] > 0, columns[:, _TEMPERATURE], 1.0)
    cdf = (((values - tops) / temperatures).exp() * is_kept).cumsum(dim=1)
    totals = cdf[:, -1:]
    # Kept below the total, or rounding could pick an id of probability 0 behind the last.
    points = (columns[:, _UNIFORM] * totals).minimum(totals.nextafter(torch.zeros_like(totals)))
    chosen = (cdf <= points).sum(dim=1, keepdim=True)
    # A row that is not finite, or of no candidates, may point behind the end: it is not read.
    return ids.gather(1, chosen.clamp(max=ids.shape[1] - 1))[:, 0]


def _in_nucleus(values: Tensor, is_kept: Tensor, masses: Tensor) -> Tensor:
    """Whether each is in the smallest set of most likely ones that reaches the mass; all are where
    it is 1. values, is_kept: [rows, candidates]; masses: [rows, 1]."""
    weights = (values - values.amax(dim=1, keepdim=True)).exp() * is_kept
    probs = weights / weights.sum(dim=1, keepdim=True)
    ranks = _ranks(probs.masked_fill(~is_kept, -1.0))  # the others behind all
    in_order = torch.empty_like(probs).scatter_(1, ranks, probs)
    before = in_order.cumsum(dim=1).roll(1, dims=1)
    before[:, 0] = -1.0  # at least one is kept
    return (before.gather(1, ranks) < masses) | (masses >= 1)


def _ranks(numbers: Tensor) -> Tensor:
    """The place of each in its row, the largest first, of equals the first. [rows, any], int64."""
    order = numbers.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(numbers.shape[1], device=numbers.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
