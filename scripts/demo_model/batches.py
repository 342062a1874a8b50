"""Worker processes that write batches, in an order that depends on the seed alone. Knows numpy;
never torch."""

import multiprocessing as mp
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np

from .corpus import SOURCES, Encoded
from .generator import Generator, Mix, RowSource
from .tokens import Encoder

_QUEUE_DEPTH = 4  # batches a worker may be ahead


@dataclass(frozen=True)
class Feed:
    """What the workers write."""

    tokenizer: Path
    dialogues: Path
    length: int
    rows: int
    num_batches: int
    first_batch: int  # batches a resumed stage already had
    long_share: float
    mix: Mix
    passes: dict[str, int]  # how often each real dialogue is learned, by source
    seed: int


def due_dialogues(real: Encoded, passes: dict[str, int], seed: int) -> np.ndarray:
    """Every dialogue as often as its source says, in random order."""
    rng = np.random.default_rng(seed)
    chosen = [real.of(source) for source in SOURCES for _ in range(passes.get(source, 0))]
    return rng.permutation(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def _work(
    feed: Feed, worker: int, num_workers: int, queue: "Queue[tuple[np.ndarray, np.ndarray]]"
) -> None:
    real = Encoded.load(feed.dialogues)
    due = due_dialogues(real, feed.passes, feed.seed)[worker::num_workers]
    seed = feed.seed * 1_000 + worker + 1_000_000 * feed.first_batch
    generator = Generator(Encoder(feed.tokenizer), real, feed.mix, seed)
    num_rows = feed.num_batches * feed.rows // num_workers
    source = RowSource(generator, feed.length, feed.long_share, num_rows, due)
    source.skip(feed.first_batch * feed.rows // num_workers)
    while True:
        rows = [source.next_row() for _ in range(feed.rows)]
        queue.put((np.stack([ids for ids, _ in rows]), np.stack([weights for _, weights in rows])))


class Batches:
    """Iterates over (ids, weights) arrays [rows, length + 1]; close() ends the workers."""

    def __init__(self, feed: Feed, num_workers: int) -> None:
        context = mp.get_context("spawn")
        self._queues = [context.Queue(_QUEUE_DEPTH) for _ in range(num_workers)]
        self._workers = [
            context.Process(target=_work, args=(feed, i, num_workers, queue), daemon=True)
            for i, queue in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            for queue in self._queues:
                yield queue.get(timeout=120)

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
