"""What a person sees of the pool: the map in few rows, each ratio by its name, a ledger that adds
up."""

import re
from types import SimpleNamespace

import pytest

from kvchat.config import KVPolicy, KVSpec, SchedulerConfig
from kvchat.engine.build import EngineFacts
from kvchat.engine.ledger import Entry, Ledger
from kvchat.engine.stats import EngineStats, SessionKV
from kvchat.kv.layout import Codec
from kvchat.terminal import memory_views

COLUMNS = 20
NATIVE, INT8, INT4 = Codec


def _facts(num_blocks, mode="native", lowest=NATIVE):
    spec = KVSpec(1, 1, 8, 16, "float32")
    layout_blocks = {NATIVE: (1,), INT8: (1, 4), INT4: (1, 4, 8)}
    policy = KVPolicy(mode, 128, 64, layout_blocks[lowest], 2 if lowest else 0)
    return EngineFacts(
        "cpu", "float32", spec, SchedulerConfig(num_blocks=num_blocks, kv=policy), lowest
    )


def _stats(**changed):
    names = EngineStats.__dataclass_fields__
    numbers = {name: 0 for name in names if name.startswith("num_")}
    return EngineStats(**{**numbers, "num_compressions": {}, "num_blocks_freed": {}, **changed})


def _text(lines):
    return ["".join(text for _, text in line) for line in lines]


def _draw(owners, names, codecs=None, facts=None, columns=COLUMNS, **stats):
    blocks = list(zip(owners, codecs or [NATIVE] * len(owners), strict=True))
    facts = facts or _facts(len(owners))
    return _text(memory_views.pool_lines(blocks, names, facts, _stats(**stats), columns))


def test_a_large_pool_draws_what_is_held_and_counts_the_rest():
    owners = ["null", 7, 7, "shared", "cached", 7, *["free"] * 100_000]

    lines = _draw(owners, {7: "chat-1"})

    assert lines[0] == "AA*=A" + "." * 15
    assert lines[-3:-1] == [
        "a cell is 1 x 1.0 KiB, 16 tokens a block",
        "99,985 more blocks are free",
    ]


def test_a_small_pool_is_drawn_whole():
    lines = _draw(["null", 1, *["free"] * 29], {1: "a"})

    assert lines[:2] == ["A" + "." * 19, "." * 10]
    assert not any("more blocks" in line for line in lines)


@pytest.mark.parametrize("lowest", Codec)
@pytest.mark.parametrize("extent", [1, 19, 20, 21, 239, 240, 241, 999, 4_800, 5_000])
def test_the_map_keeps_to_its_rows_and_loses_no_block(extent, lowest):
    owners = ["null", *[1] * extent, *["free"] * (5_000 - extent)]
    facts = _facts(5_001, "auto4" if lowest else "native", lowest)

    lines = _draw(owners, {1: "a"}, facts=facts)

    width = 1 if lowest == NATIVE else 2
    drawn = [line for line in lines if set(line) <= {"A", "a", ".", " "}]
    scale = next(line for line in lines if line.startswith("a cell is"))
    per_cell = int(scale.split()[3])
    more = [line for line in lines if "more blocks" in line]
    hidden = int(more[0].split()[0].replace(",", "")) if more else 0
    num_cells = sum(len(line) // width for line in drawn)
    assert len(drawn) <= 12
    assert len(lines) <= 22
    assert "".join(drawn).lower().count("a") == -(-extent // per_cell)
    assert per_cell * (num_cells - 1) < 5_000 - hidden <= per_cell * num_cells


def test_owner_and_codec_are_told_apart_without_colour():
    owners = ["null", 1, 1, 2, "shared", "shared", "cached", "cached", "free"]
    codecs = [NATIVE, NATIVE, INT8, INT4, NATIVE, INT4, NATIVE, INT8, INT8]

    lines = _draw(owners, {1: "a", 2: "b"}, codecs, _facts(9, "auto4", INT4), columns=80)

    assert lines[0] == "A A8B4* *4= =8. "
    assert lines[2] == "a cell is 1 x 1.3 KiB, 16 tokens a block, 8: 64 as INT8, 4: 128 as INT4"


def test_a_cell_of_many_blocks_shows_the_codec_of_most_that_its_owner_has():
    owners = ["null", *[1] * 4_000]
    codecs = [NATIVE, *[INT8, INT8, NATIVE] * 1_333, INT8]

    lines = _draw(owners, {1: "a"}, codecs, _facts(4_001, "auto", INT8), columns=20)

    assert set(lines[0]) == {"A", "8"}


def test_counts_bytes_and_the_three_ratios_each_under_its_name():
    facts = _facts(11, "auto", INT8)
    owners = ["null", 1, 1, "shared", 2, "cached", *["free"] * 5]
    codecs = [NATIVE, NATIVE, INT8, INT8, NATIVE, INT8, *[NATIVE] * 5]

    lines = _draw(owners, {1: "a", 2: "b"}, codecs, facts, columns=80)

    # a block: 1,024 bytes of K and V; 64 tokens as INT8 have 64 * 4 bytes of scales
    table = [re.split(r"  +", line) for line in lines[-6:-3]]
    assert table == [
        ["codec", "blocks", "for tokens", "bytes", "block ratio", "pool ratio"],
        ["native", "2", "32", "2.0 KiB", "1.00x", "0.80x"],
        ["INT8", "2", "128", "2.5 KiB", "3.20x", "3.20x"],
    ]
    native, reserved = (32 + 128) * 64, 4 * 1280
    assert lines[-3] == (
        f"effective ratio {native / reserved:.2f}x: 10.0 KiB as native, 5.0 KiB reserved"
    )


def test_what_was_compressed_and_what_gave_way():
    stats = {
        "num_compressions": {(INT8, INT4): 2, (NATIVE, INT8): 1_000},
        "num_blocks_freed": {(INT8, INT4): 2, (NATIVE, INT8): 3_000},
        "num_evictions": 4,
        "num_drops": 3,
        "num_preemptions": 1,
        "num_recomputed_tokens": 48,
    }

    lines = _draw(["null", "free"], {}, facts=_facts(2, "auto4", INT4), **stats)

    assert lines[-2:] == [
        "compressed  1,000 spans native -> INT8 (3,000 blocks freed), "
        "2 spans INT8 -> INT4 (2 blocks freed)",
        "pressure    4 evictions, 3 idle chats dropped, 1 preemption, 48 tokens recomputed",
    ]


def test_what_is_parked():
    stats = {"num_host_blocks": 9, "num_host_blocks_used": 4, "num_parks": 2, "num_resumes": 1}
    chat, other = SimpleNamespace(num_context_tokens=60), SimpleNamespace(num_context_tokens=0)
    chat.name, other.name = "chat-1", "chat-2"

    lines = _draw(["null", "free"], {}, **stats)
    table = memory_views.kv_lines(
        [(chat, SessionKV(0, 0, 0, {}, (), 60, 4)), (other, SessionKV(0, 0, 0))], _facts(2)
    )

    assert lines[-2] == ("parked      4 of 9 blocks in main memory, 2 chats went, 1 came back")
    assert _text(table)[-1] == "chat-1: 60 tokens in 4 blocks parked in main memory"
    assert len(table) == 4


@pytest.mark.parametrize(
    ("facts", "summary"),
    [
        (_facts(101), "pool 101.0 KiB, kv-cache native: 1,600 tokens"),
        # 98 blocks: 4 and 11 native ones, and 83 of 64 tokens as INT8 between
        (
            _facts(101, "auto", INT8),
            "pool 126.2 KiB, kv-cache auto: 1,568 tokens native, about 5,552 as INT8",
        ),
    ],
)
def test_the_banner_says_what_the_pool_holds(facts, summary):
    assert memory_views.pool_summary(facts) == summary


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (61, "1:01 min"), (7_300, "2:01 h")]
)
def test_times_since_the_start(seconds, text):
    assert memory_views.format_since_start(seconds) == text


def test_a_ledger_that_does_not_add_up_says_so():
    entries = (Entry("payload", "native, held", 2, 2_048), Entry("weights", "the model", None, 5))
    whole = Ledger(entries, {"payload": 2_048}, (), 1 << 20)
    torn = whole._replace(problems=("payload: 2,048 bytes in blocks, the tensor has 4,096",))

    lines, torn_lines = (_text(memory_views.ledger_lines(each)) for each in (whole, torn))

    assert lines[:4] == [
        "part     what          blocks  bytes",
        "payload  native, held       2  2,048",
        "weights  the model                 5",
        "all      2.0 KiB               2,053",
    ]
    assert lines[4] == "adds up: the tensors have 2,048 of payload;"
    assert torn_lines[4:] == [f"does not add up: {torn.problems[0]}"]
