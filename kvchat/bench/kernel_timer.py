"""Times kernels on a GPU with cold caches."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

NUM_REPEATS = 15
_FLUSH_BYTES = 256 << 20  # several times any L2


@dataclass(frozen=True)
class KernelTime:
    """One kernel at one shape; num_bytes: that must be read and written; others: microseconds of
    other programs' kernels by name."""

    kernel: str
    shape: str
    us: float
    num_bytes: int
    others: dict[str, float] = field(default_factory=dict)

    @property
    def tb_per_s(self) -> float:
        """Bytes that must be moved over the time."""
        return self.num_bytes / self.us / 1e6


class Timer:
    """Times launches on torch's current stream, with cold caches."""

    def __init__(self) -> None:
        self._other_data = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def us(self, launch: Callable[[], object]) -> float:
        """Median microseconds; the first two launches are not counted."""
        pairs = [self._launch(launch) for _ in range(NUM_REPEATS + 2)]
        torch.cuda.synchronize()
        times: list[float] = [start.elapsed_time(end) for start, end in pairs[2:]]
        return statistics.median(times) * 1e3

    def _launch(self, launch: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(4):  # while the device is at it, the host gets ahead of the events
            self._other_data.amax()  # read, not written: lines to write back would be charged to us
        start.record()
        launch()
        end.record()
        return start, end
