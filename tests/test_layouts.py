"""`kvchat bench layouts`: each allocator by itself, then all of them under one trace."""

import csv
import io
import json
import random
import struct

import numpy as np
import pytest

from kvchat.bench.layouts.blocks import ChunksLayout, PagedLayout
from kvchat.bench.layouts.cells import SlotsLayout, UnifiedLayout
from kvchat.bench.layouts.compare import LayoutOptions, compare_layouts
from kvchat.bench.layouts.contiguous import DynamicLayout, StaticLayout
from kvchat.bench.layouts.heap import Heap
from kvchat.bench.layouts.replay import STEP_S, replay, trace_steps, words_of
from kvchat.bench.trace import (
    Mix,
    TracedChat,
    Turn,
    clip_trace,
    generate_trace,
    read_trace,
    write_trace,
)
from kvchat.cli import run_cli
from kvchat.config import KVSpec
from kvchat.errors import CapacityError, UsageError
from kvchat.kv.layout import BlockLayout, Codec
from kvchat.terminal.show import Show

SPEC = KVSpec(num_layers=1, num_kv_heads=1, head_dim=64, block_size=16, dtype="bfloat16")
NUM_WORDS, MAX_TOKENS = 2048, 512
LAYOUTS = {
    "static": lambda: StaticLayout(NUM_WORDS, MAX_TOKENS),
    "dynamic": lambda: DynamicLayout(NUM_WORDS),
    "slots": lambda: SlotsLayout(NUM_WORDS, 6),
    "unified": lambda: UnifiedLayout(NUM_WORDS),
    "chunks": lambda: ChunksLayout(NUM_WORDS, 96),
    **{
        f"paged {codec.name}": lambda codec=codec: PagedLayout(
            BlockLayout(SPEC, codec), NUM_WORDS * SPEC.bytes_per_token, MAX_TOKENS
        )
        for codec in Codec
    },
}


def stored(layout, chat_id, num_tokens):
    """Whether the chat's words come back, of compressed ones the low bits."""
    words, at = words_of(chat_id, MAX_TOKENS), 0
    for part in layout.read(chat_id):
        assert (part == words[at : at + len(part)].astype(part.dtype)).all()
        at += len(part)
    return at >= num_tokens


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_random_walk_keeps_every_chat_whole_and_every_byte_accounted_for(name):
    for seed in range(4):
        rng, layout = random.Random(seed), LAYOUTS[name]()
        all_bytes, lengths, num_opened = layout.free_bytes, {}, 0
        for _ in range(200):
            action = rng.random()
            if action < 0.2:
                num_new = rng.choice((1, 5, 16, 40, 150, 400))
                chat_id, num_opened = num_opened, num_opened + 1
                if layout.open(chat_id, words_of(chat_id, num_new)):
                    lengths[chat_id] = num_new
            elif action < 0.93 and lengths:
                chat_id = rng.choice(list(lengths))
                at = lengths[chat_id]
                end = min(MAX_TOKENS, at + rng.choice((1, 1, 1, 7, 60, 200)))
                if end > at:
                    added = words_of(chat_id, MAX_TOKENS)[at:end]
                    is_placed = layout.append(chat_id, added)
                    if not is_placed and not layout.is_fixed and len(lengths) > 1:
                        other = rng.choice([i for i in lengths if i != chat_id])
                        layout.close(other)
                        del lengths[other]
                        is_placed = layout.append(chat_id, added)
                    if is_placed:
                        lengths[chat_id] = end
            elif lengths:
                chat_id = rng.choice(list(lengths))
                layout.close(chat_id)
                del lengths[chat_id]

            layout.check()
            assert all(stored(layout, chat_id, n) for chat_id, n in lengths.items())
            assert layout.num_slots >= sum(lengths.values())
            assert layout.num_scanned() >= sum(lengths.values())
        for chat_id in lengths:
            layout.close(chat_id)
        layout.check()
        assert (layout.free_bytes, layout.num_slots) == (all_bytes, 0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_refused_holds_nothing_and_freed_bytes_serve_again(name):
    layout, num_open = LAYOUTS[name](), 0
    while layout.open(num_open, words_of(num_open, 300)):
        num_open += 1
    free, held = layout.free_bytes, layout.num_slots

    assert num_open >= 4
    assert not layout.open(num_open + 1, words_of(num_open + 1, 300))
    assert (layout.free_bytes, layout.num_slots) == (free, held)

    layout.close(1)
    assert layout.open(99, words_of(99, 300))
    layout.check()
    assert all(stored(layout, chat_id, 300) for chat_id in (99, 0, 2))


def test_a_heap_takes_the_smallest_extent_that_is_big_enough_and_joins_neighbours():
    heap = Heap(100)
    a, b, c, d, e = (heap.take(n) for n in (10, 20, 30, 5, 35))

    heap.give(b)
    heap.give(d)
    assert (heap.num_free, heap.largest_free) == (25, 20)
    assert heap.take(25) is None  # 25 are free, in two places
    assert heap.take(4) == d
    heap.give(a)
    heap.give(c)
    assert heap.largest_free == 60
    assert heap.take(60) == 0
    heap.check()
    assert e == 65


def test_overlapping_extents_do_not_go_unnoticed(monkeypatch):
    """The check of the checks: an allocator that hands out the same place twice."""
    monkeypatch.setattr(Heap, "take", lambda self, length: self._used.update({0: length}) or 0)
    chats = [TracedChat(0.0, (Turn(20, 20),)), TracedChat(0.5, (Turn(20, 20),))]

    with pytest.raises(AssertionError, match="chat 0 at 0"):
        replay(chats, ChunksLayout(NUM_WORDS, 96), 100)


def test_paged_int8_and_int4_really_hold_more():
    """One chat of 512 tokens: sinks and window native, the spans between in few blocks."""
    blocks = {}
    for codec in Codec:
        layout = LAYOUTS[f"paged {codec.name}"]()
        free = layout.free_bytes
        assert layout.open(0, words_of(0, 512))
        blocks[codec] = (free - layout.free_bytes) // (16 * 8)

    # INT8 spans of 32 from 64 to 384: 10; INT4 spans of 64: 5. The rest is 12 native blocks.
    assert blocks == {Codec.NATIVE: 32, Codec.INT8: 12 + 10, Codec.INT4: 12 + 5}


# --- the replay


class Counting:
    """A layout of sums: units of some tokens from one supply, no arena, no allocator."""

    def __init__(self, unit, num_units, takes_part):
        self.name, self.is_fixed, self.num_copied = f"units of {unit}", False, 0
        self.unit, self.num_free, self.takes_part = unit, num_units, takes_part
        self.units, self.tokens = {}, {}

    @property
    def free_bytes(self):
        return self.num_free * self.unit * 8

    @property
    def num_slots(self):
        return sum(self.units.values()) * self.unit

    def num_scanned(self):
        return sum(self.tokens.values())

    def open(self, chat_id, words):
        self.units[chat_id], self.tokens[chat_id] = 0, 0
        if self.append(chat_id, words):
            return True
        self.close(chat_id)
        return False

    def append(self, chat_id, words):
        end = self.tokens[chat_id] + len(words)
        wanted = -(-end // self.unit) - self.units[chat_id]
        if wanted <= self.num_free or self.takes_part:
            taken = min(wanted, self.num_free)
            self.num_free -= taken
            self.units[chat_id] += taken
            wanted -= taken
        if wanted:
            return False
        self.tokens[chat_id] = end
        return True

    def close(self, chat_id):
        self.num_free += self.units.pop(chat_id)
        self.length = self.tokens.pop(chat_id)

    def read(self, chat_id):
        yield words_of(chat_id, self.tokens[chat_id])


CHATS = clip_trace(generate_trace(Mix(num_chats=60, chats_a_second=1.5), 3), MAX_TOKENS)


def counts(found):
    fields = ("num_admitted", "num_refused", "num_cut", "num_finished", "num_tokens", "samples")
    return [getattr(found, field) for field in fields]


@pytest.mark.parametrize(
    ("layout", "tally"),
    [
        (LAYOUTS["paged NATIVE"], Counting(16, NUM_WORDS // 16 - 1, takes_part=False)),
        (LAYOUTS["chunks"], Counting(96, NUM_WORDS // 96, takes_part=True)),
    ],
)
def test_counts_are_those_of_an_independent_tally(layout, tally):
    steps = trace_steps(CHATS)

    found, expected = replay(CHATS, layout(), steps), replay(CHATS, tally, steps)

    assert counts(found) == counts(expected)
    assert found.num_cut and found.num_refused
    if layout().name.startswith("paged"):  # of 2048 words no chunk of 96 has the last 32
        assert found.num_refused_with_room == found.num_cut_with_room == 0


def test_full_length_reservations_are_those_of_a_count_of_places():
    """Nobody is ever cut, so who is admitted follows from times alone."""
    leaves, admitted, finished, end = [], 0, 0, trace_steps(CHATS)
    for chat in CHATS:
        step = int(chat.arrival_s / STEP_S)
        if sum(leave > step for leave in leaves) == NUM_WORDS // MAX_TOKENS:
            continue
        admitted += 1
        for turn in chat.turns:
            start = step + int(turn.think_s / STEP_S)
            step = start + turn.reply  # it ends in step - 1, and the next turn may begin in step
        leaves.append(step)
        finished += step <= end

    found = replay(CHATS, LAYOUTS["static"](), end)

    assert (found.num_admitted, found.num_cut) == (admitted, 0)
    assert found.num_refused == len(CHATS) - admitted
    assert found.num_finished == finished


def test_growth_by_copying_copies_all_that_stood_before():
    chats = [TracedChat(0.0, (Turn(10, 5), Turn(7, 2)))]

    found = replay(chats, DynamicLayout(100), 100)

    lengths_before = [10, 11, 12, 13, 14, 15, 22, 23]  # five tokens, a prompt, two tokens
    assert found.num_finished == 1
    assert found.num_copied == 8 * sum(lengths_before)


def test_a_chat_that_cannot_grow_ends_the_one_that_came_last():
    first = TracedChat(0.0, (Turn(100, 60),))
    others = [TracedChat(0.1 * i, (Turn(100, 100),)) for i in (1, 2)]
    layout = UnifiedLayout(320)

    found = replay([first, *others], layout, 400)

    assert (found.num_admitted, found.num_cut, found.num_finished) == (3, 1, 2)
    # 320 are full after 109, 107 and 104: the third asks, and is the last that came.
    assert found.num_tokens == 160 + 200 + 104
    layout.check()


def options(**changes):
    values = {"num_bytes": 2**30, "max_tokens": 2048, "mix": Mix(num_chats=20)}
    return LayoutOptions(**values | changes)


def test_the_same_seed_gives_the_same_figures_and_another_seed_others():
    runs = [compare_layouts(options(seed=s), lambda *at: None).replays for s in (1, 1, 2)]

    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_paged_wastes_under_four_percent_of_its_slots_on_the_default_mix():
    found = compare_layouts(LayoutOptions(mix=Mix(num_chats=80)), lambda *at: None)

    by_name = {replayed.name: replayed for replayed in found.replays}
    paged = [r for name, r in by_name.items() if name.startswith("paged")]
    assert [len(found.replays), len(paged)] == [8, 3]
    assert all(0 < r.waste < 0.04 for r in paged)
    assert all(r.num_refused_with_room == r.num_cut_with_room == 0 for r in paged)
    assert by_name["contiguous, full length"].waste > 0.5
    for r in found.replays:
        assert r.num_admitted + r.num_refused == 80
        assert r.num_verified == r.num_tokens  # all that was placed was compared
        assert r.peak_live <= found.demand.peak_live


# --- traces


def test_a_trace_comes_back_as_it_was_written(tmp_path):
    chats = generate_trace(Mix(num_chats=30), 5)

    write_trace(tmp_path / "chats.jsonl", chats)

    assert read_trace(tmp_path / "chats.jsonl") == chats


def test_drawn_lengths_have_the_medians_and_the_tail_of_the_mix():
    mix = Mix(num_chats=3000)

    turns = [turn for chat in generate_trace(mix, 0) for turn in chat.turns]

    assert np.median([t.prompt for t in turns]) == pytest.approx(mix.prompt_median, rel=0.05)
    assert np.median([t.reply for t in turns]) == pytest.approx(mix.reply_median, rel=0.05)
    assert len(turns) / 3000 == pytest.approx(mix.mean_turns, rel=0.05)
    assert max(t.prompt for t in turns) > 20 * mix.prompt_median


def test_a_clipped_chat_ends_where_it_reaches_the_context():
    chat = TracedChat(0.0, (Turn(50, 50), Turn(20, 30), Turn(10, 10)))

    assert clip_trace([chat], 130)[0].turns == (Turn(50, 50), Turn(20, 10))
    assert clip_trace([chat], 101)[0].turns == (Turn(50, 50),)
    assert clip_trace([chat], 40)[0].turns == (Turn(39, 1),)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{}",
        "nonsense",
        '{"arrival_s": 0, "turns": []}',
        '{"arrival_s": -1, "turns": [{"prompt": 1, "reply": 1}]}',
        '{"arrival_s": NaN, "turns": [{"prompt": 1, "reply": 1}]}',
        '{"arrival_s": 0, "turns": [{"prompt": 0, "reply": 1}]}',
        '{"arrival_s": 0, "turns": [{"prompt": 1.5, "reply": 1}]}',
        '{"arrival_s": 0, "turns": [{"prompt": 1, "reply": 1, "think_s": "2"}]}',
    ],
)
def test_a_line_that_is_no_chat_is_named(tmp_path, line):
    good = '{"arrival_s": 0, "turns": [{"prompt": 1, "reply": 1}]}'
    (tmp_path / "bad.jsonl").write_text(f"{good}\n\n{line}\n")

    with pytest.raises(UsageError, match=r"bad.jsonl line 3 is no chat; write \{"):
        read_trace(tmp_path / "bad.jsonl")


# --- the command

SMALL = ("--kv-mem", "256MiB", "--ctx", "512", "--chats", "20")


def command(*arguments):
    out, err = io.StringIO(), io.StringIO()
    code = run_cli(["bench", "layouts", *map(str, arguments)], Show(out, err))
    return code, out.getvalue(), err.getvalue()


def test_the_three_outputs_say_the_same(tmp_path):
    trace = tmp_path / "chats.jsonl"
    _, markdown, _ = command(*SMALL, "--record", trace)
    _, as_json, _ = command(*SMALL, "--trace", trace, "-o", "json")
    _, as_csv, _ = command(*SMALL, "--trace", trace, "-o", "csv")

    found = json.loads(as_json)
    rows = list(csv.DictReader(io.StringIO(as_csv)))
    cells = [[c.strip() for c in x.split("|")] for x in markdown.splitlines() if x.startswith("| ")]
    assert found["setup"]["num_chats"] == 20
    for layout, row, cell in zip(found["layouts"], rows, cells[1:], strict=True):
        assert layout["layout"] == row["layout"] == cell[1]
        assert layout["num_admitted"] == int(row["num_admitted"]) == int(cell[2])
        assert f"{layout['waste']:.1%}" == cell[8]
        assert layout["samples"]


def test_a_plot_is_a_picture_of_readable_size(tmp_path):
    code, _, err = command(*SMALL, "--plot", tmp_path / "found.png")
    assert (code, err) == (0, "")
    command(*SMALL, "--plot", tmp_path / "found.svg")

    png = (tmp_path / "found.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG") and width > 900 and height > 700
    svg = (tmp_path / "found.svg").read_text()
    assert "<svg" in svg


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--plot", "found.pdf"), 2, "name a .png or .svg file"),
        (("--plot", "/nowhere/found.png"), 2, "there is no such folder"),
        (("--shape", "llama9"), 2, "no shape llama9"),
        (("--kv-mem", "1MiB"), 4, "1.0 MiB hold 8 tokens of llama3-8b; give"),
        (("--trace", "/nowhere.jsonl"), 2, "--trace /nowhere.jsonl cannot be read"),
        (("--record", "/nowhere/chats.jsonl"), 2, "/nowhere/chats.jsonl cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments, code, words):
    got_code, out, err = command(*SMALL, *arguments)

    assert (got_code, out) == (code, "")
    assert err.count("\n") == 1
    assert words in err


def test_without_matplotlib_a_plot_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    code, _, err = command("--plot", "found.png")

    assert code == 2
    assert "pip install 'kvchat[plot]'" in err


def test_too_little_memory_names_the_least_that_works():
    with pytest.raises(CapacityError, match=r"give 256.1 MiB to"):
        compare_layouts(options(num_bytes=2**27), lambda *at: None)
