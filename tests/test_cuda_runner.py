"""The runner for a GPU, its kernels on the emulator: the tokens are those of the plain runner."""

import itertools
import math

import pytest
import torch
from compressing_engine import random_decoder
from emulator import load_emulated
from plain_flash import plain_flash

from kvchat.attention import AttentionBatch
from kvchat.attention.backends import make_backend
from kvchat.attention.cuda import CudaBackend
from kvchat.attention.rope import build_rope
from kvchat.config import KVSpec, ModelConfig, SamplingParams, SchedulerConfig
from kvchat.engine.capture_sizes import chunk_sizes, row_sizes
from kvchat.engine.cuda_runner import CudaRunner, PendingStep
from kvchat.engine.engine import Engine
from kvchat.engine.request import Request
from kvchat.engine.runner import Runner
from kvchat.engine.sampler import Sampler
from kvchat.engine.scheduler import Scheduler
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.cache import KVCache
from kvchat.model.cuda_ops import CudaOps

MODEL = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_position=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
)
NUM_BLOCKS, DTYPE = 60, "float16"
GREEDY = SamplingParams(temperature=0.0, max_tokens=9)
DRAWN = SamplingParams(temperature=0.7, top_k=20, max_tokens=7)
ON_HOST = SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=11)


def make_engine(is_cuda: bool, told: list, flash=None) -> Engine:
    config = SchedulerConfig(
        NUM_BLOCKS, max_model_len=128, max_num_seqs=3, max_num_batched_tokens=32
    )
    decoder = random_decoder(MODEL, DTYPE)
    cache = KVCache(KVSpec(1, 1, 64, config.block_size, DTYPE), NUM_BLOCKS)
    cache.blocks[1:] = math.nan
    rope = build_rope(MODEL, 128)
    if not is_cuda:
        runner = Runner(decoder, cache, make_backend("reference", MODEL, cache, rope), Sampler())
    else:
        decoder.ops = CudaOps(DTYPE, load_emulated)
        rows = row_sizes(config.max_num_seqs)[-1]
        backend = CudaBackend(MODEL, cache, rope, rows, 128, load_emulated, flash)
        runner = CudaRunner(decoder, cache, backend, Sampler(), config, load=load_emulated)
    runner.warm_up(lambda done, total: None)
    pool = BlockPool(NUM_BLOCKS, config.block_size)
    return Engine(Scheduler(config, pool), runner, told.extend)


def play(is_cuda: bool, flash=None) -> dict[int, list[int]]:
    """Five chats through three rows: they come and go, one is forked while it generates."""
    told: list = []
    engine = make_engine(is_cuda, told, flash)
    for session_id, (num_prompt, sampling) in enumerate(
        [(40, GREEDY), (3, DRAWN), (17, ON_HOST), (1, GREEDY), (33, DRAWN)]
    ):
        prompt = [(7 * i * i + 3 + session_id) % 97 for i in range(num_prompt)]
        engine.submit(Request(session_id, session_id, prompt, num_prompt, sampling, seed=4))
    for _ in range(6):
        engine.step()
    engine.fork(0, 7, 35)  # its tail is copied when either goes on
    prompt = [(7 * i * i + 3) % 97 for i in range(36)]
    engine.submit(Request(7, 7, prompt, 36, GREEDY))
    while engine.step():
        pass
    engine.close()
    said: dict[int, list[int]] = {}
    for event in told:
        assert event.finish_reason in (None, "length"), event
        said.setdefault(event.request_id, []).extend(event.token_ids)
    return said


@pytest.mark.parametrize("flash", [None, plain_flash], ids=["eager chunks", "captured chunks"])
def test_replies_are_those_of_the_plain_runner(flash):
    said = play(is_cuda=True, flash=flash)

    assert said == play(is_cuda=False)
    assert sorted(map(len, said.values())) == [7, 7, 9, 9, 9, 11]


@pytest.mark.parametrize("max_rows", [1, 2, 3, 16, 17, 100, 1000])
def test_sizes_end_at_what_holds_all(max_rows):
    sizes = row_sizes(max_rows)

    assert sizes[0] == 1 and sizes[-1] >= max_rows and max_rows > (sizes[-2] if sizes[1:] else 0)
    assert all(2 * small >= large > small for small, large in itertools.pairwise(sizes))


def test_a_step_of_chunks_is_captured_up_to_2048_tokens():
    assert chunk_sizes(8192) == [16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048]
    assert chunk_sizes(505)[-1] == 512 and chunk_sizes(1) == [16]


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "can_run"),
    [
        ([8, 8], [100, 16], True),  # 7 blocks and one, of the 8 that a request may have
        ([8, 8], [100, 17], False),
        ([2] * 4, [2] * 4, True),
        ([2] * 5, [2] * 5, False),  # chunks
        ([32], [32], True),
        ([33], [33], False),  # tokens
    ],
)
def test_what_a_captured_step_of_chunks_has_no_room_for(query_lens, seq_lens, can_run):
    chunks = make_engine(True, [], plain_flash)._runner._chunks
    tables = [[1 + i for i in range(8)] for _ in seq_lens]

    assert chunks._backend.max_entries == 8
    assert chunks.can_run(AttentionBatch(query_lens, seq_lens, tables)) == can_run


def test_a_step_is_waited_for_even_where_nothing_is_sampled():
    waits = []

    class Event:
        def synchronize(self):
            waits.append(self)

    assert PendingStep(torch.zeros(2, dtype=torch.int64), [], Event()).tokens() == []
    assert len(waits) == 1
