"""Batched replies from the plain model with a cache: many prompts or conversations of different
lengths at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .llama import Cache, Llama, rotary_tables

PREFILL_CHUNK = 512  # tokens; bounds the attention mask


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0
    seed: int = 0


class Talkers:
    """A batch of conversations. Each round takes every row's new tokens and gives every row's
    reply."""

    def __init__(self, model: Llama, rows: int, length: int, end_id: int) -> None:
        self.model = model
        weight = model.model.embed_tokens.weight
        self.device, self.end_id = weight.device, end_id
        self.cache = Cache(model.config, rows, length, weight.device, weight.dtype)
        self.tables = rotary_tables(model.config, length, weight.device)
        self.length, self.longest = length, 0  # longest: no row has more tokens than that

    @torch.no_grad()
    def read(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Takes in each row's tokens; logits [rows, vocab] after its last. Padding is overwritten
        by what follows."""
        counts = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        longest = int(counts.max())
        ids = torch.full((len(prompts), longest), self.end_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        last = torch.zeros(len(prompts), self.model.config.vocab_size, device=self.device)
        for start in range(0, longest, PREFILL_CHUNK):
            chunk = ids[:, start : start + PREFILL_CHUNK]
            offsets = torch.arange(start, start + chunk.shape[1], device=self.device)
            positions = (self.cache.lengths[:, None] + offsets).clamp(max=self.length - 1)
            self.cache.span = min(self.length, self.longest + start + chunk.shape[1])
            logits = self.model.extend(chunk, positions, self.cache, self.tables)
            here = (counts > start) & (counts <= start + chunk.shape[1])
            rows = here.nonzero()[:, 0]
            last[rows] = logits[rows, counts[rows] - start - 1].float()
        self.cache.lengths += counts
        self.longest = int(self.cache.lengths.max())
        return last

    @torch.no_grad()
    def reply(self, logits: Tensor, max_tokens: int, sampling: Sampling) -> list[list[int]]:
        """Each row's reply, its end token included when it came within max_tokens."""
        chance = torch.Generator(self.device).manual_seed(sampling.seed)
        rows = logits.shape[0]
        done = torch.zeros(rows, dtype=torch.bool, device=self.device)
        taken: list[Tensor] = []
        for _ in range(max_tokens):
            token = choose(logits, sampling, chance)
            token = torch.where(done, self.end_id, token)
            taken.append(token)
            self.longest += 1
            self.cache.span = self.longest
            logits = self.model.extend(
                token[:, None], self.cache.lengths[:, None], self.cache, self.tables
            )[:, 0].float()
            self.cache.lengths += (~done).long()
            done |= token == self.end_id
            if bool(done.all()):
                break
        self.longest = int(self.cache.lengths.max())
        return [self._cut(row) for row in torch.stack(taken, dim=1).tolist()]

    def _cut(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.end_id) + 1] if self.end_id in ids else ids


def choose(logits: Tensor, sampling: Sampling, chance: torch.Generator) -> Tensor:
    """One token per row of logits [rows, vocab]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    index = torch.multinomial(ordered, 1, generator=chance)
    return order.gather(-1, index)[:, 0]
