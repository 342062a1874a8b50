"""Chunks of prompts, padded to one of some numbers of tokens, captured once and then replayed: one
by one a chunk's hundreds of launches take longer than a GPU takes to do what they ask for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from kvchat.attention import AttentionBatch
from kvchat.attention.cuda import CudaBackend
from kvchat.attention.flash import ChunkTensors
from kvchat.attention.slots import plan_positions, plan_slots
from kvchat.engine.capture_sizes import chunk_sizes
from kvchat.engine.captures import Captures
from kvchat.engine.device_sampler import NUM_DRAW_FIELDS, DeviceSampler
from kvchat.engine.step_buffer import StepBuffer
from kvchat.model.cuda_ops import MAX_SKINNY_ROWS
from kvchat.model.decoder import Decoder

MAX_CHUNKS = MAX_SKINNY_ROWS  # of a step: our own product makes their logits
# Keys are not split among a GPU's processors: few queries on very long sequences use few of these,
# and launch by launch, with another kernel of torch's, it is done sooner (docs/benchmarks).
_FEW_TOKENS, _LONG_SEQUENCE = 512, 20_000


class ChunkGraphs:
    """Steps of up to max_chunks chunks, together of no more new tokens than the largest size, by a
    backend that can plan_chunks.

    tokens: int64 [max_chunks], where each chunk's next token goes, -1 where logits were not finite;
    of one that is not the end of what is known, any. logits: [max_chunks, vocab_size] in the
    model's dtype, of the last run that was asked for tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: CudaBackend,
        tokens: Tensor,
        sampler: DeviceSampler,
        captures: Captures,
        max_tokens: int,
        block_size: int,
    ) -> None:
        self._decoder, self._backend = decoder, backend
        self._tokens, self._sampler, self._captures = tokens, sampler, captures
        self._block_size = block_size
        self.sizes = chunk_sizes(max_tokens)
        device, dtype, most = decoder.device, decoder.embedding.dtype, self.sizes[-1]
        vocab_size, hidden_size = decoder.embedding.shape
        self._num_chunks = num_chunks = tokens.shape[0]
        self._buffer = StepBuffer(
            {
                "draws": ("float64", (num_chunks, NUM_DRAW_FIELDS)),
                "input_ids": ("int64", (most,)),
                "last": ("int64", (num_chunks,)),
                "positions": ("int32", (most,)),
                "slots": ("int32", (most,)),
                "starts": ("int32", (num_chunks + 1,)),
                "key_starts": ("int32", (num_chunks + 1,)),
                "seq_lens": ("int32", (num_chunks,)),
                "num_entries": ("int32", (1,)),
                "table": ("int32", (backend.max_entries,)),
            },
            device,
        )
        self._hidden = torch.zeros(num_chunks, hidden_size, dtype=dtype, device=device)
        self.logits = torch.zeros(num_chunks, vocab_size, dtype=dtype, device=device)
        self._steps: dict[int, Callable[[], None]] = {}
        self._greedy: Callable[[], None] = self._take_greedy
        self._draw: Callable[[], None] = self._take_drawn

    def capture(self, num_tokens: int) -> None:
        """One of the sizes; the largest is to come first."""
        is_first = not self._steps
        self._steps[num_tokens] = self._captures.capture(partial(self._step, num_tokens))
        if is_first:
            self._greedy = self._captures.capture(self._take_greedy)
            self._draw = self._captures.capture(self._take_drawn)

    def can_run(self, batch: AttentionBatch) -> bool:
        """Whether there are not too many chunks, new tokens or blocks of their sequences, and it
        is worth it."""
        num_entries = sum(map(len, batch.used_tables(self._block_size)))
        is_slow = batch.num_tokens < _FEW_TOKENS and max(batch.seq_lens) > _LONG_SEQUENCE
        return (
            len(batch.seq_lens) <= self._num_chunks
            and batch.num_tokens <= self.sizes[-1]
            and num_entries <= self._backend.max_entries
            and not is_slow
        )

    def run(self, batch: AttentionBatch, input_ids: list[int], draws: np.ndarray | None) -> None:
        """Queue a step. draws: of each chunk, draw_fields; None: no tokens are wanted."""
        size = min(size for size in self.sizes if size >= batch.num_tokens)
        tables = batch.used_tables(self._block_size)
        self._fill(batch, tables, input_ids, draws, size)
        self._buffer.send()
        self._steps[size]()
        if draws is not None:
            (self._draw if draws.any() else self._greedy)()
        self._backend.count_gathered(batch.seq_lens, tables)

    def _fill(
        self,
        batch: AttentionBatch,
        tables: list[list[int]],
        input_ids: list[int],
        draws: np.ndarray | None,
        size: int,
    ) -> None:
        arrays, num_chunks = self._buffer.begin(), len(batch.seq_lens)
        for name, numbers in (
            ("input_ids", input_ids),
            ("positions", plan_positions(batch)),
            ("slots", plan_slots(batch, self._block_size)),
        ):
            arrays[name][: len(numbers)] = numbers
            arrays[name][len(numbers) : size] = 0
        ends = [*accumulate(batch.query_lens)]
        key_ends = [self._block_size * end for end in accumulate(map(len, tables))]
        arrays["starts"][1:] = ends[-1]  # of those that are not there: empty ones behind the last
        arrays["starts"][1 : 1 + num_chunks] = ends
        arrays["key_starts"][1:] = key_ends[-1]
        arrays["key_starts"][1 : 1 + num_chunks] = key_ends
        arrays["seq_lens"][:] = 0
        arrays["seq_lens"][:num_chunks] = batch.seq_lens
        arrays["last"][:] = 0
        arrays["last"][:num_chunks] = np.array(ends) - 1
        entries = [*chain(*tables)]
        arrays["num_entries"][0] = len(entries)
        arrays["table"][: len(entries)] = entries
        arrays["draws"][:] = 0
        if draws is not None:
            arrays["draws"][:num_chunks] = draws

    def _step(self, num_tokens: int) -> None:
        sent = self._buffer.tensors
        self._backend.plan_chunks(
            ChunkTensors(
                sent["positions"][:num_tokens],
                sent["slots"][:num_tokens],
                sent["starts"],
                sent["key_starts"],
                sent["seq_lens"],
                sent["table"],
                sent["num_entries"],
            )
        )
        hidden = self._decoder.hidden(sent["input_ids"][:num_tokens], self._backend)
        self._hidden.copy_(hidden[sent["last"]])

    def _make_logits(self) -> None:
        self.logits.copy_(self._decoder.logits(self._hidden))

    def _take_greedy(self) -> None:
        self._make_logits()
        self._tokens.copy_(self._sampler.greedy(self.logits))

    def _take_drawn(self) -> None:
        self._make_logits()
        self._tokens.copy_(self._sampler.draw(self.logits, self._buffer.tensors["draws"]))
