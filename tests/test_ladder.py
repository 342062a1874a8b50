"""Which span is compressed next: order, sinks and windows, shared spans, slices, watermarks."""

from __future__ import annotations

import itertools

import pytest

from kvchat.config import KVPolicy, SchedulerConfig
from kvchat.kv.block_pool import BlockPool
from kvchat.kv.ladder import Holder, Ladder, Warmth
from kvchat.kv.layout import Codec

SIZE = 4  # tokens a block
AUTO = KVPolicy("auto", window=8, sink=4, span_blocks=(1, 2), num_reserved=1)
AUTO4 = KVPolicy("auto4", window=8, sink=4, span_blocks=(1, 2, 4), num_reserved=1)
NATIVE, INT8, INT4 = Codec


class Shelf:
    """Sequences over a pool with a ladder, coldest first."""

    def __init__(self, policy: KVPolicy, num_blocks: int = 200):
        self.pool = BlockPool(
            num_blocks, SIZE, span_blocks=policy.span_blocks, num_reserved=policy.num_reserved
        )
        self.holders: list[Holder] = []
        self.num_reads = 0
        self.ladder = Ladder(policy, self.pool, self.read)
        self.ladder.begin_step()

    def read(self):
        self.num_reads += 1
        return self.holders

    def add(self, num_tokens, warmth=Warmth.IDLE, is_pinned=False):
        """A sequence of its own text, computed and sealed."""
        session_id = len(self.holders) + 1
        seq = self.pool.alloc([session_id])
        self.grow(seq, num_tokens, session_id)
        self.put(seq, warmth, is_pinned)
        return seq

    def put(self, seq, warmth=Warmth.IDLE, is_pinned=False):
        self.holders.append(Holder(seq, warmth, is_pinned, len(self.holders) + 1))
        self.ladder.touch(seq)
        self.ladder.refresh()

    def grow(self, seq, num_tokens, token_id):
        self.pool.append(seq, num_tokens)
        end = seq.num_tokens
        self.pool.seal(seq, [token_id] * end, end)
        self.ladder.touch(seq)

    def remove(self, seq):
        self.holders = [holder for holder in self.holders if holder.seq is not seq]
        self.ladder.forget(seq)
        self.ladder.refresh()
        self.pool.free(seq)

    def compress(self):
        """(session ids, first position, codec) of the next span, or None."""
        done = self.ladder.compress()
        self.pool.check_integrity([holder.seq for holder in self.holders])
        return done and (done.session_ids, done.start, done.op.codec)

    def compress_all(self):
        return list(iter(self.compress, None))


def test_old_positions_go_before_new_ones_and_sinks_and_window_never():
    shelf = Shelf(AUTO)
    shelf.add(35)  # sinks [0, 8), the window begins at 32 - 8 = 24

    assert shelf.compress_all() == [([1], 8, INT8), ([1], 16, INT8)]


def test_the_window_moves_when_a_block_is_full():
    shelf = Shelf(AUTO)
    seq = shelf.add(23)
    assert shelf.compress_all() == []

    shelf.grow(seq, 1, 1)

    assert shelf.compress_all() == [([1], 8, INT8)]


def test_idle_sequences_go_before_running_ones_and_the_foreground_last():
    shelf = Shelf(AUTO)
    for warmth in (Warmth.IDLE, Warmth.IDLE, Warmth.RUNNING, Warmth.FOREGROUND):
        shelf.add(24, warmth)

    assert [ids for ids, _, _ in shelf.compress_all()] == [[1], [2], [3], [4]]


def test_all_go_down_one_rung_before_any_goes_down_the_next():
    shelf = Shelf(AUTO4)
    shelf.add(40)
    shelf.add(40)

    done = shelf.compress_all()

    rung = [(ids[0], start, codec) for ids, start, codec in done]
    int8 = [(session, start, INT8) for session in (1, 2) for start in (8, 16, 24)]
    assert rung == [*int8, (1, 16, INT4), (2, 16, INT4)]


def test_a_mode_that_goes_to_int4_at_once_makes_it_of_native_blocks():
    shelf = Shelf(KVPolicy("int4", 8, 4, (1, 2, 4), num_reserved=1))
    shelf.add(40)

    assert shelf.ladder.is_wanted and shelf.compress_all() == [([1], 16, INT4)]
    assert shelf.pool.counters.num_compressions == {(NATIVE, INT4): 1}


def test_pinned_sequences_and_what_they_share_stay_until_they_are_unpinned():
    shelf = Shelf(AUTO)
    parent = shelf.add(40, is_pinned=True)
    shelf.put(shelf.pool.fork(parent, 40))
    assert shelf.compress_all() == []

    shelf.holders[0] = shelf.holders[0]._replace(is_pinned=False)
    shelf.ladder.refresh()
    shelf.ladder.touch(parent)

    done = [(ids, start) for ids, start, _ in shelf.compress_all()]
    assert done == [([1, 2], 8), ([1, 2], 16), ([1, 2], 24)]


@pytest.mark.parametrize("how", ["it grows", "it is freed", "it is cut"])
def test_a_shared_span_waits_until_it_leaves_the_last_window(how):
    shelf = Shelf(AUTO)
    parent = shelf.add(40)
    child = shelf.pool.fork(parent, 24)  # its window begins at 16
    shelf.put(child)
    assert shelf.compress_all() == [([1, 2], 8, INT8), ([1], 24, INT8)]

    if how == "it grows":
        shelf.grow(child, 12, 9)
    elif how == "it is freed":
        shelf.remove(child)
    else:
        shelf.ladder.forget(child)
        shelf.pool.truncate(child, 8)
        shelf.ladder.touch(child)
    done = shelf.compress_all()

    holders = [1, 2] if how == "it grows" else [1]
    assert done[0] == (holders, 16, INT8)


def test_a_shared_span_is_as_warm_as_the_warmest_who_holds_it():
    shelf = Shelf(AUTO)
    cold = shelf.add(40)
    shelf.add(24, Warmth.RUNNING)
    shelf.put(shelf.pool.fork(cold, 40), Warmth.FOREGROUND)

    done = [(ids, start) for ids, start, _ in shelf.compress_all()]
    assert done == [([2], 8), ([1, 3], 8), ([1, 3], 16), ([1, 3], 24)]


def test_a_span_of_which_another_holds_a_part_frees_nothing_and_waits():
    shelf = Shelf(AUTO)
    parent = shelf.add(40)
    child = shelf.pool.fork(parent, 20)  # the half of [16, 24), and its own text after it
    shelf.put(child)
    shelf.grow(child, 40, 9)

    done = shelf.compress_all()

    assert ([1, 2], 8, INT8) in done
    assert not any(start == 16 for _, start, _ in done)
    shelf.remove(child)
    assert shelf.compress_all() == [([1], 16, INT8)]


def test_a_step_compresses_no_more_than_its_slice_and_says_that_there_is_more():
    shelf = Shelf(KVPolicy("auto", 8, 4, (1, 2), num_reserved=1, slice_tokens=20))
    shelf.add(100)

    assert len(shelf.compress_all()) == 2 and shelf.ladder.is_spent
    shelf.ladder.begin_step()
    assert not shelf.ladder.is_spent and len(shelf.compress_all()) == 2


def test_a_span_longer_than_the_slice_is_compressed_alone():
    shelf = Shelf(KVPolicy("auto", 8, 4, (1, 8), num_reserved=1, slice_tokens=20))
    shelf.add(200)

    assert len(shelf.compress_all()) == 1 and shelf.ladder.is_spent


def test_a_span_that_many_share_takes_more_of_the_slice():
    shelf = Shelf(KVPolicy("auto", 8, 4, (1, 2), num_reserved=1, slice_tokens=64))
    parent = shelf.add(100)
    for _ in range(3):
        shelf.put(shelf.pool.fork(parent, 100))

    assert len(shelf.compress_all()) == 1 and shelf.ladder.is_spent


def test_an_eager_mode_compresses_at_once_all_spans_that_end_in_one_step():
    shelf = Shelf(KVPolicy("int4", 8, 4, (1, 2, 4), num_reserved=1, slice_tokens=1))
    seqs = [shelf.add(39) for _ in range(6)]
    shelf.ladder.begin_step()
    assert shelf.compress_all() == []
    for session_id, seq in enumerate(seqs, 1):
        shelf.grow(seq, 1, session_id)

    shelf.ladder.begin_step()

    assert shelf.compress_all() == [([session_id], 16, INT4) for session_id in range(1, 7)]


def test_a_backlog_of_an_eager_mode_is_compressed_in_slices():
    shelf = Shelf(KVPolicy("int8", 8, 4, (1, 2), num_reserved=1, slice_tokens=20))
    shelf.add(100)
    shelf.ladder.begin_step()  # 20, and a span for each of two touches

    assert len(shelf.compress_all()) == 4 and shelf.ladder.is_spent
    shelf.ladder.begin_step()
    assert len(shelf.compress_all()) == 2 and shelf.ladder.is_spent


def test_nothing_is_spent_when_there_is_nothing_to_compress():
    shelf = Shelf(AUTO)
    shelf.add(23)

    assert shelf.compress_all() == [] and not shelf.ladder.is_spent


def test_compression_begins_at_the_low_mark_and_goes_on_to_the_high_one():
    policy = KVPolicy("auto", 8, 4, (1, 2), num_reserved=0, low_share=0.1, high_share=0.2)
    shelf = Shelf(policy, num_blocks=101)
    for _ in range(11):
        shelf.add(32)  # 8 blocks of 100, of which compression frees 2
    assert shelf.pool.num_free == 12 and not shelf.ladder.is_wanted
    shelf.add(32)
    assert shelf.pool.num_free == 4 and shelf.ladder.is_wanted

    while shelf.ladder.is_wanted:
        assert shelf.compress()

    assert shelf.pool.num_free == 20
    shelf.add(32)
    assert shelf.pool.num_free == 12 and not shelf.ladder.is_wanted


def test_a_full_pool_compresses_with_its_reserve():
    shelf = Shelf(KVPolicy("auto", 8, 4, (1, 2), num_reserved=1), num_blocks=12)
    seq = shelf.add(40)
    assert shelf.pool.num_free == 0 and shelf.pool.append(seq, 1) is None

    assert len(shelf.compress_all()) == 3 and shelf.pool.num_free == 3


def test_a_native_pool_has_no_ladder():
    shelf = Shelf(KVPolicy())
    shelf.add(100)

    assert not shelf.ladder.is_wanted and not shelf.ladder.is_spent and not shelf.compress()
    assert shelf.num_reads == 0


def test_nobody_is_looked_at_again_when_nothing_has_happened():
    shelf = Shelf(AUTO4, num_blocks=4000)
    seqs = [shelf.add(60) for _ in range(100)]
    while shelf.ladder.compress() or shelf.ladder.is_spent:
        shelf.ladder.begin_step()
    num_reads = shelf.num_reads

    for _ in range(10):
        shelf.ladder.begin_step()
        assert shelf.compress() is None and not shelf.ladder.is_spent

    assert shelf.num_reads == num_reads
    shelf.ladder.touch(seqs[50])
    assert shelf.compress() is None and shelf.num_reads == num_reads + 1


# --- what the pool holds ---


@pytest.mark.parametrize("mode", ["native", "auto", "auto4", "int8", "int4"])
@pytest.mark.parametrize("span_blocks", [(1, 2, 4), (1, 4, 8)], ids=str)
def test_the_longest_sequence_is_the_first_that_needs_a_block_too_many(mode, span_blocks):
    lowest = {"native": 1, "auto": 2, "int8": 2}.get(mode, 3)
    for window, sink, num_blocks in itertools.product((0, 5, 8, 40), (0, 3, 33), (3, 10, 17)):
        policy = KVPolicy(mode, window, sink, span_blocks[:lowest])
        length = 0
        while most_blocks(policy, length + 1) <= num_blocks:
            length += 1

        assert policy.max_tokens(num_blocks, SIZE) == length, f"{policy} {num_blocks=}"


def most_blocks(policy, num_tokens):
    """Blocks of a sequence whose last slot is claimed, all but it computed and compressed."""
    table = list(range(-(-num_tokens // SIZE)))  # one number a block
    num_sealed = (num_tokens - 1) // SIZE
    for src, codec in policy.rungs:
        span = policy.span_blocks[codec]
        for start in range(0, num_sealed - span + 1, span):
            is_sink = start * SIZE < policy.sink
            is_recent = (start + span) * SIZE > num_sealed * SIZE - policy.window
            part = table[start : start + span]
            if not is_sink and not is_recent and len({*part}) == span // policy.span_blocks[src]:
                table[start : start + span] = [part[0]] * span
    return len({*table})


def test_a_pinned_session_can_have_what_the_pool_holds_native():
    config = SchedulerConfig(101, 4, 10_000, kv=AUTO4)

    assert config.num_request_blocks == 99
    assert config.max_native_tokens == 396 < config.max_request_tokens
    assert SchedulerConfig(101, 4, 300, kv=AUTO4).max_request_tokens == 300
