"""CUDA graphs, all captured on one stream into one memory: their replays never overlap."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Captures:
    """use_graphs False, or a CPU: what would be captured is run as it is."""

    def __init__(self, device: torch.device, use_graphs: bool) -> None:
        self._is_on = use_graphs and device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._is_on else None

    def capture(self, part: Callable[[], None]) -> Callable[[], None]:
        """What does `part` again, on the tensors it uses now. Within `quiet`; what takes the most
        memory comes first, and the others use that again."""
        if not self._is_on:
            return part
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            part()  # libraries set themselves up in the first run
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            part()
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        replay: Callable[[], None] = graph.replay
        return replay

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No collection of garbage: an old engine's graphs and streams are ended before a capture,
        which forbids that in it. Memory of the runs before captures is given back at the end."""
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()
            if self._is_on:
                torch.cuda.empty_cache()


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures of the process: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()
