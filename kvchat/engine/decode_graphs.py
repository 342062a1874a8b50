"""The step of rows that decode, captured once for each of some numbers of rows, then replayed."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from kvchat.attention.cuda import CudaBackend
from kvchat.engine.decode_rows import DecodeRows
from kvchat.engine.device_sampler import DeviceSampler
from kvchat.model.decoder import Decoder

_NUM_WARM_UPS = 2  # runs before a capture: libraries set themselves up in the first


def buckets(max_rows: int) -> list[int]:
    """Numbers of rows that are captured: powers of two, from 16 on with one between, the last of
    them max_rows or more."""
    sizes = [1]
    while sizes[-1] < max_rows:
        last = sizes[-1]
        is_power = last & (last - 1) == 0
        sizes.append(last + last // 2 if last >= 16 and is_power else 1 << last.bit_length())
    return sizes


@dataclass(frozen=True)
class _Parts:
    """One number of rows. step: all up to the logits; then the most likely tokens, or those drawn
    by each row's rules."""

    step: Callable[[], None]
    greedy: Callable[[], None]
    draw: Callable[[], None]


class DecodeGraphs:
    """Runs `rows`. use_graphs False does the same without a capture, as does a CPU.

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
        use_graphs: bool,
    ) -> None:
        self._decoder, self._backend = decoder, backend
        self._rows, self._sampler = rows, sampler
        device, vocab_size = decoder.device, decoder.lm_head.weight.shape[0]
        dtype = decoder.embedding.dtype
        self.logits = torch.zeros(rows.max_rows, vocab_size, dtype=dtype, device=device)
        self.tokens = torch.zeros(2 * rows.max_rows, dtype=torch.int64, device=device)
        self._use_graphs = use_graphs and device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._use_graphs else None
        self._parts: dict[int, _Parts] = {}

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Every number of rows, the largest first, whose memory the others use again."""
        sizes = buckets(self._rows.max_rows)
        with _no_collection():
            for num_done, num_rows in enumerate(reversed(sizes)):
                progress(num_done, len(sizes))
                self._parts[num_rows] = self._capture(num_rows)
        progress(len(sizes), len(sizes))

    def bucket(self, num_rows: int) -> int:
        """The captured number of rows that these take."""
        return min(size for size in self._parts if size >= num_rows)

    def run(self, bucket: int, is_greedy: bool) -> None:
        """Queue a step of what was sent to the rows."""
        parts = self._parts[bucket]
        parts.step()
        (parts.greedy if is_greedy else parts.draw)()

    def _capture(self, num_rows: int) -> _Parts:
        parts = [partial(part, num_rows) for part in (self._step, self._greedy, self._draw)]
        if not self._use_graphs:
            return _Parts(*parts)
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        replays = []
        with torch.cuda.stream(stream):
            for part in parts:
                for _ in range(_NUM_WARM_UPS):
                    part()
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                part()
                graph.capture_end()
                replays.append(graph.replay)
        torch.cuda.current_stream().wait_stream(stream)
        return _Parts(*replays)

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


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures of the process: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


@contextmanager
def _no_collection() -> Iterator[None]:
    """An old engine's graphs and streams are ended before a capture, which forbids that in it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
