"""The step of rows that decode, captured once for each of some numbers of rows, then replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from kvchat.attention.cuda import CudaBackend
from kvchat.engine.capture_sizes import row_sizes
from kvchat.engine.captures import Captures
from kvchat.engine.decode_rows import DecodeRows
from kvchat.engine.device_sampler import DeviceSampler
from kvchat.model.decoder import Decoder


@dataclass(frozen=True)
class _Parts:
    """One number of rows. step: all up to the logits; then the most likely tokens, or those drawn
    by each row's rules."""

    step: Callable[[], None]
    greedy: Callable[[], None]
    draw: Callable[[], None]


class DecodeGraphs:
    """Runs `rows`.

    logits: [rows.max_rows, vocab_size] in the model's dtype, of the last run.
    tokens: int64 [2 * rows.max_rows]: the first half those of the rows, -1 where logits were not
    finite. The second is the caller's; both are what the next run's sources point into.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: CudaBackend,
        rows: DecodeRows,
        sampler: DeviceSampler,
        captures: Captures,
    ) -> None:
        self._decoder, self._backend = decoder, backend
        self._rows, self._sampler, self._captures = rows, sampler, captures
        device, vocab_size = decoder.device, decoder.lm_head.weight.shape[0]
        dtype = decoder.embedding.dtype
        self.logits = torch.zeros(rows.max_rows, vocab_size, dtype=dtype, device=device)
        self.tokens = torch.zeros(2 * rows.max_rows, dtype=torch.int64, device=device)
        self.sizes = row_sizes(rows.max_rows)
        self._parts: dict[int, _Parts] = {}

    def capture(self, num_rows: int) -> None:
        """One of the sizes; the largest is to come first."""
        parts = (partial(part, num_rows) for part in (self._step, self._greedy, self._draw))
        self._parts[num_rows] = _Parts(*map(self._captures.capture, parts))

    def bucket(self, num_rows: int) -> int:
        """The captured number of rows that these take."""
        return min(size for size in self._parts if size >= num_rows)

    def run(self, bucket: int, is_greedy: bool) -> None:
        """Queue a step of what was sent to the rows."""
        parts = self._parts[bucket]
        parts.step()
        (parts.greedy if is_greedy else parts.draw)()

    def _step(self, num_rows: int) -> None:
        input_ids = self._rows.receive(num_rows, self.tokens)
        self._backend.plan_rows(self._rows.tensors.first(num_rows))
        logits = self.logits[:num_rows]
        logits.copy_(self._decoder.logits(self._decoder.hidden(input_ids, self._backend)))

    def _greedy(self, num_rows: int) -> None:
        self.tokens[:num_rows] = self._sampler.greedy(self.logits[:num_rows])

    def _draw(self, num_rows: int) -> None:
        draws = self._rows.draws[:num_rows]
        self.tokens[:num_rows] = self._sampler.draw(self.logits[:num_rows], draws)
