"""kvchat's side: a real engine with a native pool, stepped to the end of all replies."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from comparison.table import Sample, Shape, Timed
from kvchat.bench.arms import Model, make_arm, make_setup
from kvchat.config import SamplingParams
from kvchat.engine.engine import Engine
from kvchat.engine.request import Event, Request

Prompts = list[list[int]]


def draw_prompts(shape: Shape, pair: int, vocab: range) -> Prompts:
    """Ids from a seed, other ones in every pair, so that nothing is found in a cache."""
    rng = random.Random(f"{shape} {pair}")
    return [
        [rng.randrange(vocab.start, vocab.stop) for _ in range(shape.num_prompt)]
        for _ in range(shape.num_sessions)
    ]


class Kvchat:
    """One engine for all shapes. `replies` are those of the last run."""

    def __init__(self, model: Model, shapes: Sequence[Shape]) -> None:
        self.replies: Prompts = []
        self._vocab = model.vocab
        self._events: list[Event] = []
        self._num_requests = 0
        longest = max(shape.num_prompt + shape.num_reply for shape in shapes) + 1
        num_sessions = max(shape.num_sessions for shape in shapes)
        num_blocks = num_sessions * (-(-longest // model.spec.block_size) + 1) + 1
        setup = make_setup(model, "native", num_blocks * model.spec.bytes_per_block, longest)
        arm = make_arm(model, setup, lambda label, done, total: None)
        self._engine: Engine = setup.start(arm.runner, self._events.extend)[0]

    def run(self, shape: Shape, pair: int) -> Sample:
        """All chats are submitted at once."""
        requests = [self._request(ids, shape.num_reply) for ids in self._prompts(shape, pair)]
        num_left = {request.session_id: shape.num_reply for request in requests}
        first_s = 0.0
        num_made = num_early = 0
        started = time.perf_counter()
        for request in requests:
            self._engine.submit(request)
        waiting = set(num_left)
        while any(num_left.values()):
            assert self._engine.step(), "a reply ended early"
            for event in self._events:
                num_left[event.session_id] -= len(event.token_ids)
                num_made += len(event.token_ids)
                waiting -= {event.session_id} if event.token_ids else set()
            self._events.clear()
            if not waiting and not first_s:
                first_s, num_early = time.perf_counter() - started, num_made
        whole_s = time.perf_counter() - started
        for request in requests:
            self._engine.release(request.session_id)
        self.replies = [request.token_ids[shape.num_prompt :] for request in requests]
        return Timed(first_s, whole_s, num_early).sample(shape)

    def _prompts(self, shape: Shape, pair: int) -> Prompts:
        return draw_prompts(shape, pair, self._vocab)

    def _request(self, ids: list[int], num_reply: int) -> Request:
        self._num_requests += 1
        sampling = SamplingParams(temperature=0.0, max_tokens=num_reply, ignore_eos=True)
        return Request(self._num_requests, self._num_requests, [*ids], len(ids), sampling)
