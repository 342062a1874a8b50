"""One step on the device: Batch -> tensors -> decoder -> sampled ids. Keeps no requests."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvchat.attention import AttentionBackend, AttentionBatch
from kvchat.config import NULL_BLOCK_ID
from kvchat.engine.device import gpu_bytes
from kvchat.engine.ledger import TensorBytes
from kvchat.engine.request import Batch, Request, Row
from kvchat.engine.sampler import Draw, Sampler
from kvchat.engine.storage import num_bytes, num_bytes_outside, ranges_of
from kvchat.kv.cache import KVCache
from kvchat.kv.layout import Codec
from kvchat.model.decoder import Decoder


class Step:
    """A launched step. On a CPU it is done when launch returns."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def tokens(self) -> list[int]:
        """One id per sampled row, in row order; -1 where the logits were not finite."""
        return self._token_ids


class Runner:
    """Owns the order of a step: block operations, plan, decoder, sampler. One thread may use it."""

    is_async = False

    def __init__(
        self, decoder: Decoder, cache: KVCache, backend: AttentionBackend, sampler: Sampler
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._backend = backend
        self._sampler = sampler
        # Request id -> id sampled for it in the last step: its input if the scheduler builds the
        # next step before it has read this one.
        self._sampled: dict[int, int] = {}

    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Compile what the first step would wait for; progress(kernels done, of how many)."""
        self._backend.warm_up(progress)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Step:
        """Run one step; the rows' K and V are in the pool when it is done."""
        self._cache.apply(batch.block_ops)
        if not batch.rows:
            return Step([])
        self._backend.plan(attention_batch(batch.rows))
        sampled_rows, last_tokens, input_ids = [], [], []
        for row in batch.rows:
            input_ids += self._known_ids(row.request, row.start, row.start + row.num_tokens)
            if row.is_sampled:
                sampled_rows.append(row)
                last_tokens.append(len(input_ids) - 1)
        device = self._decoder.device
        logits = self._decoder(
            torch.tensor(input_ids, device=device),
            self._backend,
            torch.tensor(last_tokens, dtype=torch.int64, device=device),
        )
        token_ids = self._sampler.sample(logits, [self._draw(row) for row in sampled_rows])
        ids = (row.request.request_id for row in sampled_rows)
        self._sampled = dict(zip(ids, token_ids, strict=True))
        return Step(token_ids)

    def count_bytes(self) -> TensorBytes:
        """What the tensors take, counted on their memory; not while a step is computed."""
        cache, layout, decoder = self._cache, self._cache.layout, self._decoder
        is_gpu = decoder.device.type == "cuda"
        pool = ranges_of(cache)
        weights = ranges_of(decoder.layers, decoder.norm, decoder.embedding, decoder.lm_head)
        kept = ranges_of(self, on_gpu=True) if is_gpu else ranges_of(self._backend)
        block_payload = cache.payload[NULL_BLOCK_ID].nbytes
        return TensorBytes(
            num_blocks=cache.num_blocks,
            payload=cache.blocks.untyped_storage().nbytes(),
            side=cache.side.untyped_storage().nbytes(),
            block_payload=block_payload,
            block_side=cache.side[NULL_BLOCK_ID].nbytes,
            side_used=tuple(
                cache.block_bytes(codec) - block_payload
                for codec in Codec
                if codec <= layout.lowest
            ),
            weights=num_bytes(weights),
            scratch=num_bytes_outside(kept, pool + weights),
            host=cache.num_host_bytes,
            gpu=gpu_bytes() if is_gpu else None,
        )

    def _known_ids(self, request: Request, start: int, end: int) -> list[int]:
        """The request's ids of positions start .. end - 1; the last may be pending."""
        token_ids = request.token_ids[start:end]
        if end <= len(request.token_ids):
            return token_ids
        assert end == len(request.token_ids) + 1, f"{end=}, {len(request.token_ids)} ids known"
        # A row whose logits were not finite ends at the next update: its input does not matter.
        return [*token_ids, max(0, self._sampled[request.request_id])]

    def _draw(self, row: Row) -> Draw:
        request, end = row.request, row.start + row.num_tokens
        token_ids = request.token_ids
        if end > len(token_ids):
            token_ids = self._known_ids(request, 0, end)
        return Draw(request.sampling, token_ids, request.seed, request.branch)


def attention_batch(rows: list[Row]) -> AttentionBatch:
    """The rows as a backend sees them."""
    return AttentionBatch(
        query_lens=[row.num_tokens for row in rows],
        seq_lens=[row.end for row in rows],
        block_tables=[row.table for row in rows],
    )
