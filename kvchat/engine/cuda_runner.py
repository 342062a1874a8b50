"""Steps on a GPU: rows that decode replay a graph, chunks of prompts another.

A step's tokens stay on the device, where the next step takes its inputs from, so the host builds
that one while this one is computed. Rows whose rules of drawing only the host knows (penalties, a
bias, ...) are drawn there, and their step is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kvchat.attention import AttentionBatch
from kvchat.attention.cuda import CudaBackend
from kvchat.attention.cuda_ops import Load
from kvchat.attention.kernels import load_kernel
from kvchat.attention.top_k import TopK
from kvchat.config import SchedulerConfig
from kvchat.engine.capture_sizes import row_sizes
from kvchat.engine.captures import Captures
from kvchat.engine.chunk_graphs import MAX_CHUNKS, ChunkGraphs
from kvchat.engine.decode_graphs import DecodeGraphs
from kvchat.engine.decode_rows import KNOWN, DecodeRows
from kvchat.engine.device_sampler import DeviceSampler, can_draw, draw_fields
from kvchat.engine.request import Batch, Row
from kvchat.engine.runner import Runner, Step, attention_batch
from kvchat.engine.sampler import Draw, Sampler
from kvchat.kv.block_ops import CompressSpan
from kvchat.kv.cache import KVCache
from kvchat.kv.host_memory import send
from kvchat.model.decoder import Decoder

_NUM_READ_BUFFERS = 3  # a step's is free when the step after the next is launched


class PendingStep(Step):
    """A launched step."""

    def __init__(self, here: Tensor, places: list[int], event: torch.cuda.Event | None) -> None:
        self._here = here  # tokens on the host, once the event has passed
        self._places = places
        self._event = event

    def tokens(self) -> list[int]:
        """Wait for it: one id per sampled row, in row order, -1 where logits were not finite.

        Also for a step without such rows: what it reads is written again three steps later.
        """
        self.wait()
        here = self._here.tolist()
        return [here[place] for place in self._places]

    def token_at(self, place: int) -> int:
        """Wait for it: the id that stands at a place of the device's tokens."""
        self.wait()
        return int(self._here[place])

    def wait(self) -> None:
        """Until its tokens are here."""
        if self._event is not None:
            self._event.synchronize()


class _Sampled:
    """What a step's rows come to: where on the device each token stands, and the logits of those
    that the host has to draw."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}  # by request id
        self.logits: dict[int, Tensor] = {}

    def add(self, row: Row, place: int, logits: Tensor, idx: int) -> None:
        """logits: [any, vocab_size], at idx of the row's last token."""
        if not row.is_sampled:
            return
        self.places[row.request.request_id] = place
        if not can_draw(row.request.sampling):
            self.logits[row.request.request_id] = logits[idx]


class CudaRunner(Runner):
    """See engine.StepRunner. use_graphs False runs the same steps without a capture."""

    is_async = True

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        backend: CudaBackend,
        sampler: Sampler,
        config: SchedulerConfig,
        use_graphs: bool = True,
        load: Load = load_kernel,
    ) -> None:
        super().__init__(decoder, cache, backend, sampler)
        self._has_kernel = backend.has_decode_kernel
        max_rows = row_sizes(config.max_num_seqs)[-1]
        assert max_rows <= backend.max_rows, f"{max_rows} rows, {backend.max_rows} in the backend"
        max_entries = -(-config.max_request_tokens // config.block_size) + 1
        device, vocab_size = decoder.device, decoder.lm_head.weight.shape[0]
        kernels = TopK(vocab_size, cache.spec.dtype, max_rows, load, str(device))
        self._device_sampler = DeviceSampler(kernels)
        self._rows = DecodeRows(max_rows, max_entries, config.block_size, device)
        self._captures = captures = Captures(device, use_graphs)
        self._graphs = DecodeGraphs(decoder, backend, self._rows, self._device_sampler, captures)
        self._tokens = self._graphs.tokens
        self._chunks = None
        if backend.can_plan_chunks:
            self._chunks = ChunkGraphs(
                decoder, backend, self._tokens[max_rows:][:MAX_CHUNKS], self._device_sampler,
                captures, config.max_num_batched_tokens, config.block_size,
            )  # fmt: skip
        is_gpu = self._tokens.is_cuda
        self._read = [
            torch.zeros(self._tokens.shape, dtype=torch.int64, pin_memory=is_gpu)
            for _ in range(_NUM_READ_BUFFERS)
        ]
        self._num_steps = 0
        self._last = PendingStep(self._read[0], [], None)
        self._places: dict[int, int] = {}  # of the last step that sampled

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None]) -> None:
        """Capture chunks and rows of every size, those first that take the most memory."""
        graphs: list[ChunkGraphs | DecodeGraphs] = [self._chunks] if self._chunks else []
        graphs += [self._graphs] if self._has_kernel else []
        steps = [(own, size) for own in graphs for size in reversed(own.sizes)]
        with self._captures.quiet():
            for num_done, (own, size) in enumerate(steps):
                progress(num_done, len(steps))
                own.capture(size)
        progress(len(steps), len(steps))

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Queue one step. Its block tables are not read after this returns."""
        if any(isinstance(op, CompressSpan) for op in batch.block_ops):
            self._rows.note_compression()
        self._cache.apply(batch.block_ops)
        if not batch.rows:
            return PendingStep(self._read[0], [], None)
        self._cache.await_copies(self._written_blocks(batch.rows))
        sampled = _Sampled()
        if rows := [row for row in batch.rows if self._is_decode(row)]:
            self._launch_rows(rows, sampled)
        if chunks := [row for row in batch.rows if not self._is_decode(row)]:
            self._launch_chunks(chunks, sampled)
        if sampled.logits:
            self._draw_here(batch.rows, sampled)
        in_order = [row.request.request_id for row in batch.rows if row.is_sampled]
        self._places = sampled.places
        self._last = self._read_back([sampled.places[request_id] for request_id in in_order])
        return self._last

    def _is_decode(self, row: Row) -> bool:
        return self._has_kernel and row.num_tokens == 1

    def _launch_rows(self, rows: list[Row], sampled: _Sampled) -> None:
        """One new token each, by a graph for at least as many rows."""
        places = self._rows.assign(rows)
        sources = [
            KNOWN if row.end <= len(row.request.token_ids) else self._places[row.request.request_id]
            for row in rows
        ]
        bucket = self._graphs.bucket(len(rows))
        arrays = self._rows.fill(rows, places, sources, bucket)
        fields = _draw_fields(rows)
        arrays["draws"][:bucket] = 0  # greedy
        arrays["draws"][places] = fields
        self._rows.send()
        self._graphs.run(bucket, is_greedy=not fields.any())
        for row, place in zip(rows, places, strict=True):
            sampled.add(row, place, self._graphs.logits, place)

    def _launch_chunks(self, chunks: list[Row], sampled: _Sampled) -> None:
        """Several new tokens each; without a decode kernel, everybody's."""
        input_ids = [token_id for row in chunks for token_id in self._ids(row, row.start)]
        batch = attention_batch(chunks)
        if self._chunks is None or not self._chunks.can_run(batch):
            self._launch_eagerly(chunks, batch, input_ids, sampled)
            return
        is_drawn = any(row.is_sampled for row in chunks)
        self._chunks.run(batch, input_ids, _draw_fields(chunks) if is_drawn else None)
        for idx, row in enumerate(chunks):
            sampled.add(row, self._rows.max_rows + idx, self._chunks.logits, idx)

    def _launch_eagerly(
        self, chunks: list[Row], batch: AttentionBatch, input_ids: list[int], sampled: _Sampled
    ) -> None:
        """What was not captured: launch by launch."""
        self._backend.plan(batch)
        hidden = self._decoder.hidden(self._send(input_ids), self._backend)
        ends = zip(chunks, accumulate(batch.query_lens), strict=True)
        last_tokens = [end - 1 for row, end in ends if row.is_sampled]
        if not last_tokens:
            return
        rows = [row for row in chunks if row.is_sampled]
        logits = self._decoder.logits(hidden[self._send(last_tokens)])
        fields = _draw_fields(rows)
        first, end = self._rows.max_rows, self._rows.max_rows + len(rows)
        self._tokens[first:end] = (
            self._device_sampler.draw(logits, send(fields, torch.float64, self._tokens.device))
            if fields.any()
            else self._device_sampler.greedy(logits)
        )
        for idx, row in enumerate(rows):
            sampled.add(row, first + idx, logits, idx)

    def _draw_here(self, rows: list[Row], sampled: _Sampled) -> None:
        """Draw on the host, after waiting for the step, and tell the device."""
        rows = [row for row in rows if row.request.request_id in sampled.logits]
        ids = [row.request.request_id for row in rows]
        logits = torch.stack([sampled.logits[request_id] for request_id in ids]).float().cpu()
        draws = [
            Draw(row.request.sampling, self._ids(row), row.request.seed, row.request.branch)
            for row in rows
        ]
        tokens = self._sampler.sample(logits, draws)
        places = [sampled.places[request_id] for request_id in ids]
        self._tokens[self._send(places)] = self._send(tokens)

    def _ids(self, row: Row, start: int = 0) -> list[int]:
        """The request's ids from `start` to the row's end; the last may have to be waited for."""
        request = row.request
        token_ids = request.token_ids[start : row.end]
        if row.end <= len(request.token_ids):
            return token_ids
        assert row.end == len(request.token_ids) + 1, f"{row.end=}, {len(request.token_ids)} known"
        # A row whose logits were not finite ends at the next update: its token does not matter.
        return [*token_ids, max(0, self._last.token_at(self._places[request.request_id]))]

    def _read_back(self, places: list[int]) -> PendingStep:
        """Queue the copy of the tokens to the host."""
        here = self._read[self._num_steps % _NUM_READ_BUFFERS]
        self._num_steps += 1
        here.copy_(self._tokens, non_blocking=True)
        event = None
        if self._tokens.is_cuda:
            event = torch.cuda.Event()
            event.record()
        return PendingStep(here, places, event)

    def _send(self, numbers: list[int]) -> Tensor:
        return send(numbers, torch.int64, self._tokens.device)

    def _written_blocks(self, rows: list[Row]) -> Iterable[int]:
        size = self._cache.spec.block_size
        for row in rows:
            yield from row.table[row.start // size : -(-row.end // size)]


def _draw_fields(rows: list[Row]) -> np.ndarray:
    return draw_fields([row.request for row in rows], [row.end for row in rows])
