"""The stories260K checkpoint through pool, scheduler and runner: transformers' ids, id for id.

All in float32. Matrix products of 1, of 2 or 3, and of 4 and more rows differ in their low-order
bits here (MKL takes other kernels), so replies in other company are compared by ids.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from kvchat.attention.backends import make_backend
from kvchat.attention.rope import build_rope
from kvchat.config import KVSpec, SamplingParams, SchedulerConfig
from kvchat.engine.engine import Engine
from kvchat.engine.request import Request
from kvchat.engine.runner import Runner
from kvchat.engine.sampler import Sampler
from kvchat.engine.scheduler import Scheduler
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.cache import KVCache
from kvchat.model.families import parse_config
from kvchat.model.source import resolve
from kvchat.model.weights import load_decoder

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "weights" / "stories260K"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs ../shared/weights/stories260K beside the checkout"
)
CASES = json.loads((FOLDER / "reference.json").read_text())["cases"] if FOLDER.is_dir() else []
PROMPTS = [case["prompt_ids"] for case in CASES]
REPLIES = [case["greedy_ids"] for case in CASES]
NUM_REPLY = 128
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_REPLY)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def decoder():
    source = resolve(str(FOLDER / "hf"))
    return load_decoder(source, parse_config(source), "float32")


class Stack:
    """A whole engine over the checkpoint, stepped by hand; `replies` by session id."""

    def __init__(self, decoder, backend="cpu", block_size=16, num_blocks=200, budget=512):
        spec = KVSpec(5, 4, 8, block_size, "float32")
        self.decoder = decoder
        self.cache = KVCache(spec, num_blocks)
        self.cache.blocks[1:] = float("nan")  # what is read unwritten ends the reply
        rope = build_rope(decoder.config, 512)
        self.backend = make_backend(backend, decoder.config, self.cache, rope)
        self.pool = BlockPool(num_blocks, block_size)
        config = SchedulerConfig(num_blocks, block_size, 512, max_num_batched_tokens=budget)
        self.scheduler = Scheduler(config, self.pool)
        runner = Runner(decoder, self.cache, self.backend, Sampler())
        self.engine = Engine(self.scheduler, runner, self.receive)
        self.replies, self.reasons = {}, {}

    def receive(self, events):
        for event in events:
            assert not event.error, event
            self.replies[event.session_id] += event.token_ids
            if event.finish_reason:
                self.reasons[event.session_id] = event.finish_reason

    def submit(self, session_id, prompt, sampling=GREEDY, **fields):
        self.replies[session_id] = []
        request = Request(session_id, session_id, [*prompt], len(prompt), sampling, **fields)
        self.engine.submit(request)
        return request

    def run(self):
        while self.engine.step():
            pass
        return self.replies


# The backend that people run in full; the oracle, which is slow, so that each value occurs.
GRID = [("cpu", block_size, budget) for block_size in (16, 32) for budget in (1, 7, 16, 512)]
GRID += [("reference", 16, 1), ("reference", 16, 512), ("reference", 32, 7), ("reference", 32, 16)]


@pytest.mark.parametrize(("backend", "block_size", "budget"), GRID)
def test_all_cases_id_for_id_alone_and_with_eight_interleaved(decoder, backend, block_size, budget):
    stack = Stack(decoder, backend, block_size, budget=budget)
    for session_id, prompt in enumerate(PROMPTS):
        stack.submit(session_id, prompt)
        stack.run()
    assert [stack.replies[i] for i in range(5)] == REPLIES
    assert stack.scheduler.counters.num_steps >= 5 * NUM_REPLY

    stack = Stack(decoder, backend, block_size, budget=budget)
    for session_id in range(8):
        stack.submit(session_id, PROMPTS[session_id % 5])
        stack.engine.step()
    stack.run()
    assert [stack.replies[i] for i in range(8)] == [REPLIES[i % 5] for i in range(8)]
    assert set(stack.reasons.values()) == {"length"}
    stack.pool.check_integrity([seq for _, seq, _ in stack.scheduler.sequences()])


@pytest.mark.parametrize(("backend", "block_size", "budget"), GRID)
def test_all_cases_id_for_id_after_forced_preemption(decoder, backend, block_size, budget):
    # Eight replies need 70 blocks of 16 tokens (36 of 32); the pool has about half of that.
    stack = Stack(decoder, backend, block_size, num_blocks=600 // block_size, budget=budget)
    requests = [stack.submit(i, PROMPTS[i % 5]) for i in range(8)]

    # Who comes to the foreground takes another's place, even where one token a step is all.
    for session_id in (7, 2, 6, 1, 5):
        stack.engine.set_foreground(session_id)
        for _ in range(60):
            stack.engine.step()
    stack.run()

    assert [stack.replies[i] for i in range(8)] == [REPLIES[i % 5] for i in range(8)]
    assert sum(request.num_preemptions for request in requests) >= 3


@pytest.mark.parametrize(
    ("grid", "num_kept"), [*zip(GRID[:8] + GRID[9:], [1, 16, 23, 100] * 3, strict=False)], ids=str
)
def test_all_cases_id_for_id_after_fork(decoder, grid, num_kept):
    backend, block_size, budget = grid
    stack = Stack(decoder, backend, block_size, budget=budget)
    for session_id, prompt in enumerate(PROMPTS):
        stack.submit(session_id, prompt)
    while min(len(reply) for reply in stack.replies.values()) < num_kept + 2:
        stack.engine.step()

    # The parents go on while each child writes into its copy of the shared tail.
    num_cached = {}
    for session_id, (prompt, reply) in enumerate(zip(PROMPTS, REPLIES, strict=True)):
        text = prompt + reply[:num_kept]
        shared = stack.engine.fork(session_id, 10 + session_id, len(text) - 1)
        assert shared == (len(text) - 1, 0)
        rest = SamplingParams(temperature=0.0, max_tokens=NUM_REPLY - num_kept)
        child = stack.submit(10 + session_id, text, rest)
        num_cached[child] = len(text) - 1
        stack.engine.step()
    stack.run()

    assert [stack.replies[i] for i in range(5)] == REPLIES
    assert [stack.replies[10 + i] for i in range(5)] == [reply[num_kept:] for reply in REPLIES]
    assert {child: child.num_cached_tokens for child in num_cached} == num_cached


def random_prompts(seed):
    rng = random.Random(seed)
    return [[1, *(rng.randrange(3, 512) for _ in range(rng.randrange(1, 60)))] for _ in range(8)]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0, max_tokens=100),
        SamplingParams(temperature=1.0, top_k=0, top_p=0.9, repetition_penalty=1.1, max_tokens=100),
    ],
    ids=["greedy", "sampled"],
)
def test_a_reply_is_the_same_alone_and_among_seven_others(decoder, sampling):
    prompts = random_prompts(seed=2)
    together = Stack(decoder, budget=48)
    for session_id, prompt in enumerate(prompts):
        together.submit(session_id, prompt, sampling, seed=session_id, branch=3)
        together.engine.step()
    together.run()

    for session_id, prompt in enumerate(prompts):
        alone = Stack(decoder)
        alone.submit(session_id, prompt, sampling, seed=session_id, branch=3)
        assert alone.run()[session_id] == together.replies[session_id]

    other_branch = Stack(decoder)
    other_branch.submit(0, prompts[0], sampling, seed=0, branch=4)
    is_same = other_branch.run()[0] == together.replies[0]
    assert is_same == (sampling.temperature == 0)


def test_eight_running_chats_share_every_step(decoder):
    stack = Stack(decoder)
    reads = [linear.num_reads for linear in decoder.linears()]
    for session_id in range(8):
        stack.submit(session_id, PROMPTS[session_id % 5])
    stack.engine.step()
    gathered = stack.backend.bytes_gathered

    stack.run()

    stats = stack.engine.stats()
    assert stats.mean_decode_batch == 8 >= 7.5
    assert stats.num_steps == NUM_REPLY
    new_reads = {linear.num_reads - n for linear, n in zip(decoder.linears(), reads, strict=True)}
    assert new_reads == {stats.num_steps}
    assert stack.backend.bytes_gathered == gathered  # by no step that only decodes


def test_the_reference_backend_gathers_every_context_and_it_shows(decoder):
    stack = Stack(decoder, "reference")
    stack.submit(0, PROMPTS[1], SamplingParams(temperature=0.0, max_tokens=3))
    block_bytes = stack.cache.spec.bytes_per_block

    stack.run()

    assert stack.backend.bytes_gathered == 3 * block_bytes  # one block, in each of three steps


def test_sessions_join_and_leave_at_every_step_and_no_block_of_another_moves(decoder):
    stack, rng = Stack(decoder, num_blocks=120, budget=64), random.Random(6)
    watched = {}  # session id -> (its table, what its full blocks hold)
    num_left = 0
    for session_id in range(150):
        stack.submit(session_id, PROMPTS[rng.randrange(5)] + [rng.randrange(3, 512)] * 20)
        stack.engine.step()
        running = {i: seq for i, seq, _ in stack.scheduler.sequences() if i not in stack.reasons}
        for running_id, seq in running.items():
            table, held = watched.get(running_id, ([], []))
            assert seq.table[: len(table)] == table
            for block_id, content in zip(table, held, strict=False):
                assert torch.equal(stack.cache.blocks[block_id], content)
            full = seq.table[: (seq.num_tokens - 1) // 16]
            watched[running_id] = [*seq.table], [stack.cache.blocks[i].clone() for i in full]
        if len(running) > 6:
            leaving = rng.choice([*running])
            stack.engine.release(leaving)
            del watched[leaving]
            num_left += 1
        stack.pool.check_integrity([seq for _, seq, _ in stack.scheduler.sequences()])

    assert num_left > 100 and stack.engine.stats().mean_decode_batch > 4
