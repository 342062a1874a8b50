"""A chat that is three times as long as its pool: nobody gives way, and nothing is ever unpacked.

20,000 tokens in a pool of 6,000 native ones; 100,000 in 30,000 with KVCHAT_SLOW_TESTS=1.
"""

import os
import random
import re
from pathlib import Path

import pytest
import torch
from compressing_engine import House, forced_policy, make_config, make_spec, random_decoder

from kvchat.attention import AttentionBatch
from kvchat.attention.backends import make_backend
from kvchat.attention.rope import build_rope
from kvchat.kv.layout import Codec, unpack_entry

IS_FULL_RUN = os.environ.get("KVCHAT_SLOW_TESTS") == "1"
NUM_TOKENS, NUM_NATIVE = (100_000, 30_000) if IS_FULL_RUN else (20_000, 6_000)
NUM_TURNS, REPLY = 20, 24
WINDOW, SINK, BUDGET = 128, 64, 512
CONFIG = make_config(
    num_layers=1,
    hidden_size=64,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    max_position=NUM_TOKENS + 4 * REPLY,
)
SPEC = make_spec(CONFIG, 16, "float16")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What a step takes besides K and V of a layer: the masks of 128 queries at a time, as bool and as
# torch makes them float32, what they are made of, and what the allocator keeps.
STEP_SCRATCH = 128 * NUM_TOKENS * (4 + 4) + 16 * 2**20


class Memory:
    """The process's highest resident memory since `begin`, in bytes above what it was then."""

    def begin(self):
        CLEAR_REFS.write_text("5")  # VmHWM begins anew
        self.start = self.read("VmRSS")

    def grown(self):
        return self.read("VmHWM") - self.start

    def read(self, name):
        return int(re.search(rf"{name}:\s+(\d+)", STATUS.read_text())[1]) * 1024


class WatchedRunner:
    """Looks at every step: what it gathers, and how many bytes a decode reads."""

    is_async = False

    def __init__(self, house):
        self.house, self.inner = house, house.engine._runner
        self.max_scratch = self.num_decodes = self.num_bytes_read = 0

    def launch(self, batch):
        backend = self.house.backend
        gathered = backend.bytes_gathered
        step = self.inner.launch(batch)
        if not batch.rows:
            return step
        (row,) = batch.rows
        scratch = backend._scratch.nbytes
        self.max_scratch = max(self.max_scratch, scratch)
        if row.num_tokens == 1:
            assert backend.bytes_gathered == gathered and scratch == 0
            self.num_decodes += 1
            self.num_bytes_read = bytes_read(self.house.cache, row.request.seq.table)
        else:
            assert scratch <= scratch_bytes(row.end + SPEC.block_size)
        return step


def scratch_bytes(num_tokens):
    """One layer's K and V of a sequence in float32."""
    return 2 * num_tokens * CONFIG.num_kv_heads * CONFIG.head_dim * 4


def bytes_read(cache, table):
    """Payload and used side bytes of every block of a table, each once, counted on the tensors."""
    blocks = {unpack_entry(entry)[:2] for entry in table}
    return sum(cache.block_bytes(codec) for _, codec in blocks)


def bytes_promised(layout, codecs):
    """What the codecs say of so many tokens, entry by entry."""
    native = SPEC.bytes_per_block
    return sum(native / layout.block_ratio(codec) if codec else native for codec in codecs)


def assert_codecs(policy, seq, codecs):
    """Native sinks, then INT4, INT8 and native in this order, and a native window."""
    block_size = SPEC.block_size
    num_sink = SINK // block_size
    assert set(codecs[:num_sink]) == {Codec.NATIVE}
    assert codecs[num_sink:] == sorted(codecs[num_sink:], reverse=True)
    for codec in (Codec.INT8, Codec.INT4):
        _, end = policy.compressible(seq.num_sealed * block_size, codec, block_size)
        assert codec not in codecs[end // block_size :]
        # Only whole spans, aligned by position.
        where = [idx for idx, found in enumerate(codecs) if found == codec]
        num_entries = policy.span_blocks[codec]
        assert not where or where[0] % num_entries == (where[-1] + 1) % num_entries == 0


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def make_house(num_native):
    policy = forced_policy("auto4", SPEC, WINDOW, SINK)
    assert policy.span_blocks == (1, 2, 4)
    decoder = random_decoder(CONFIG, "float16")
    house = House(
        decoder, SPEC, policy, num_native // 16 + 1, budget=BUDGET, max_len=NUM_TOKENS + 4 * REPLY
    )
    return house, policy


def chat(house, policy, num_tokens, num_turns):
    """Turns of equal length, up to num_tokens; looks at all codecs after each."""
    rng, text = random.Random(7), []
    for number in range(num_turns):
        length = num_tokens * (number + 1) // num_turns - REPLY
        text = [*text, *(rng.randrange(97) for _ in range(length - len(text)))]
        turn = house.turn(1, text, REPLY)
        # All but the last token is held and not computed again.
        assert turn.num_cached == (number > 0) * (num_tokens * number // num_turns - 1)
        text = house.texts[1]
        assert_codecs(policy, house.seq(1), house.codecs(1))
    return text


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="reads and resets the peak memory in /proc")
def test_a_chat_three_times_as_long_as_its_pool(capsys):
    warm, policy = make_house(16_000)
    chat(warm, policy, 2_000, 2)  # compiles, and lets torch take what it keeps
    warm.close()
    house, _ = make_house(NUM_NATIVE)
    house.engine._runner = watched = WatchedRunner(house)
    memory = Memory()
    memory.begin()

    text = chat(house, policy, NUM_TOKENS, NUM_TURNS)
    grown = memory.grown()
    memory.begin()
    house.turn(1, text, 2 * REPLY)
    text = house.texts[1]
    grown_decoding = memory.grown()

    assert len(text) == NUM_TOKENS + 2 * REPLY
    codecs, layout = house.codecs(1), house.cache.layout
    shares = {codec.name: codecs.count(codec) / len(codecs) for codec in Codec}
    native_bytes = len(text) * SPEC.bytes_per_token
    with capsys.disabled():
        print(
            f" {len(text)} tokens in {NUM_NATIVE} native, {shares}; memory grew by"
            f" {grown / 2**20:.1f} MiB (pool {house.cache.num_bytes / 2**20:.1f}, scratch of a"
            f" layer {watched.max_scratch / 2**20:.1f}), {grown_decoding / 2**20:.1f} in a decode;"
            f" {watched.num_bytes_read} bytes read a token, native {native_bytes}"
        )
    counters = house.scheduler.counters
    assert (counters.num_preemptions, counters.num_drops) == (0, 0)
    assert house.pool.counters.num_evictions == 0
    assert watched.num_decodes == NUM_TURNS * (REPLY - 1) + 2 * REPLY
    # Nothing but the pool, one layer's K and V, and a step's masks and scores.
    assert watched.max_scratch <= scratch_bytes(NUM_TOKENS + SPEC.block_size)
    assert grown <= house.cache.num_bytes + watched.max_scratch + STEP_SCRATCH
    assert grown_decoding < native_bytes / 4
    assert watched.num_bytes_read <= bytes_promised(layout, codecs) + SPEC.bytes_per_block
    assert watched.num_bytes_read < native_bytes / 3
    assert shares["INT4"] > 0.8
    compare_with_reference(house, text)
    house.engine.release(1)
    house.close()


def compare_with_reference(house, text):
    """The next token's logits by the oracle, which decodes everything."""
    seq, decoder = house.seq(1), house.engine._runner.inner._decoder
    num_tokens = seq.num_tokens
    logits = []
    for name in ("cpu", "reference"):
        backend = make_backend(name, CONFIG, house.cache, build_rope(CONFIG, num_tokens))
        backend.plan(AttentionBatch([1], [num_tokens], [seq.table]))
        ids = torch.tensor(text[num_tokens - 1 : num_tokens])
        logits.append(decoder(ids, backend, torch.tensor([0])))
    torch.testing.assert_close(*logits, atol=2e-2, rtol=1e-2)
