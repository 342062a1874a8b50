"""Sizes as people write them, and a pool that fits what they allow."""

import os

import pytest

from kvchat.config import KVSpec
from kvchat.errors import CapacityError, UsageError
from kvchat.kv import planner
from kvchat.kv.layout import BlockLayout, Codec

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=16, block_size=16, dtype="float32")
LAYOUT = BlockLayout(SPEC)
BLOCK = 2 * 2 * 2 * 16 * 16 * 4  # K and V, layers, heads, head_dim, tokens, bytes
GIB = 2**30


def test_a_block_holds_keys_and_values_of_all_layers():
    assert SPEC.bytes_per_block == BLOCK
    assert SPEC.bytes_per_token == BLOCK // 16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GiB", 2 * GIB),
        ("512M", 512 * 2**20),
        ("1.5 gb", 3 * GIB // 2),
        ("1e6", 1_000_000),
        ("70%", 7 * GIB),
        ("4096", 4096),
    ],
)
def test_sizes_are_read_as_written(text, expected):
    assert planner.parse_size(text, total=10 * GIB) == expected


@pytest.mark.parametrize(
    "text", ["", "many", "-1", "0", "2 GiB left", "1..2G", "%", "7e", "1e999", "1e300T"]
)
def test_a_size_that_is_not_one_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match="2GiB, 512MiB or 70%"):
        planner.parse_size(text, total=GIB)


def test_sizes_are_shown_in_the_unit_people_expect():
    shown = [planner.format_size(n) for n in (512, 1536, 5 * 2**20, 4 * GIB, 5000 * GIB)]

    assert shown == ["512 B", "1.5 KiB", "5.0 MiB", "4.0 GiB", "5000.0 GiB"]


def test_the_default_pool_is_the_smaller_of_4_gib_and_40_percent():
    assert planner.plan_num_blocks(LAYOUT, None, available=5 * GIB) == 2 * GIB // BLOCK
    assert planner.plan_num_blocks(LAYOUT, None, available=100 * GIB) == 4 * GIB // BLOCK


def test_a_pool_larger_than_memory_is_refused():
    with pytest.raises(CapacityError, match=r"wants 3.0 GiB but 2.0 GiB are available"):
        planner.plan_num_blocks(LAYOUT, "3GiB", available=2 * GIB)


def test_a_pool_too_small_for_one_chat_names_the_least_that_works():
    with pytest.raises(CapacityError, match=r"at least 40.0 KiB"):
        planner.plan_num_blocks(LAYOUT, "8KiB", available=GIB)

    assert planner.plan_num_blocks(LAYOUT, "40KiB", available=GIB) == 5


@pytest.mark.parametrize(("lowest", "side"), [(Codec.INT8, 256), (Codec.INT4, 368)])
def test_side_arrays_are_part_of_what_a_pool_takes(lowest, side):
    layout = BlockLayout(SPEC, lowest)
    num_pieces = 2 * 2  # layers, kv heads

    assert planner.plan_num_blocks(layout, "1MiB", GIB) == 2**20 // (BLOCK + num_pieces * side)


def test_slots_for_parked_blocks_are_what_fits_into_the_size_asked_for():
    layout = BlockLayout(SPEC, Codec.INT8)

    assert planner.plan_host_slots(layout, None, GIB) == 0
    assert planner.plan_host_slots(layout, "1MiB", GIB) == 2**20 // layout.bytes_per_block
    assert planner.plan_host_slots(layout, "50%", GIB) == GIB // 2 // layout.bytes_per_block
    with pytest.raises(CapacityError, match=r"wants 2\.0 GiB but 1\.0 GiB are available"):
        planner.plan_host_slots(layout, "2GiB", GIB)
    with pytest.raises(CapacityError, match=r"1KiB holds no block of 9\.0 KiB; raise it"):
        planner.plan_host_slots(layout, "1KiB", GIB)


def test_available_memory_is_a_plausible_number():
    assert 2**26 < planner.available_memory() < 2**50


def test_pages_of_files_read_in_a_cgroup_are_available_as_they_can_be_given_back(tmp_path):
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    stat = "anon 200000\nfile 690000\ninactive_file 400000\nactive_file 250000\nslab 10000\n"
    (group / "memory.stat").write_text(stat)

    assert planner.available_memory(tmp_path) == 1_000_000 - 900_000 + 650_000
    (group / "memory.max").write_text("100000\n")
    assert planner.available_memory(tmp_path) == 0
    (group / "memory.max").write_text("max\n")
    assert planner.available_memory(tmp_path) > 1_000_000


def test_the_memory_that_the_process_has(tmp_path):
    assert planner.resident_memory(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/statm").write_text("900 25 7 1 0 60 0\n")

    assert planner.resident_memory(tmp_path) == 25 * os.sysconf("SC_PAGE_SIZE")
