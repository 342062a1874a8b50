"""The cuda backend over whole steps: on the emulator, and on a GPU where there is one."""

import itertools

import pytest
import torch
from attention_world import Shape, World, assert_close
from emulator import load_emulated
from plain_flash import plain_flash

from kvchat.attention import AttentionBatch, cuda_ops, flash
from kvchat.attention.cuda import MAX_ROWS_OF_CHUNK, CudaBackend, RowTensors
from kvchat.attention.flash import ChunkTensors, find_flash
from kvchat.attention.slots import plan_positions, plan_slots
from kvchat.kv.layout import Codec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MAX_ROWS, MAX_LEN = 40, 1200
ALL_CODECS = (Codec.NATIVE, Codec.INT8, Codec.INT4)


def make_backend(world: World, device: str) -> CudaBackend:
    """The backend over the world's pool, which is moved to the device; a CPU's is the emulator."""
    rows = MAX_ROWS, MAX_LEN
    if device == "cpu":
        args = world.config, world.cache, world.rope, *rows
        return CudaBackend(*args, load_emulated, plain_flash)
    world.move(device)
    return CudaBackend(world.config, world.cache, world.rope, *rows)


def run_and_check(world: World, device: str) -> CudaBackend:
    out, backend = world.run_with(make_backend(world, device))
    world.move("cpu")
    assert_close(out.cpu(), world.expected()[1], world.shape.dtype)
    return backend


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("codecs", [(Codec.NATIVE,), ALL_CODECS])
@pytest.mark.parametrize("window", [0, 50])
def test_rows_and_chunks_in_one_step(device, codecs, window):
    lens = [(1, 97), (40, 140), (1, 1), (MAX_ROWS_OF_CHUNK, 33), (60, 60), (3, 300)]
    shape = Shape(head_dim=64, num_kv_heads=2, group=2, dtype="float16", window=window)
    backend = run_and_check(World(shape, lens, codecs=codecs, sink=16), device)

    assert backend.has_decode_kernel
    assert backend.bytes_gathered > 0


@pytest.mark.parametrize("device", DEVICES)
def test_rows_alone_gather_nothing(device):
    shape = Shape(head_dim=64, num_kv_heads=2, group=2, dtype="float16")
    world = World(shape, [(1, 97), (1, 16), (4, 17)], codecs=ALL_CODECS)

    assert run_and_check(world, device).bytes_gathered == 0


@pytest.mark.parametrize("device", DEVICES)
def test_more_rows_than_there_is_room_for_are_gathered(device):
    shape = Shape(head_dim=64, num_kv_heads=2, group=2, dtype="float16")
    lens = [(8, 24)] * 6  # 48 rows of 40

    assert run_and_check(World(shape, lens), device).bytes_gathered > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 24])
def test_a_head_dim_without_a_decode_kernel(device, window):
    shape = Shape(head_dim=8, num_kv_heads=4, group=2, dtype="float16", window=window)
    backend = run_and_check(World(shape, [(1, 97), (1, 1), (40, 140)]), device)

    assert not backend.has_decode_kernel
    assert backend.bytes_gathered > 0


@pytest.mark.parametrize("device", DEVICES)
def test_rows_planned_from_tensors_are_those_of_a_batch(device):
    """Two rows and a padding one, in buffers that are filled after they were given."""
    lens = [(1, 97), (1, 300)]
    shape = Shape(head_dim=64, num_kv_heads=2, group=2, dtype="float16")
    world = World(shape, lens, codecs=ALL_CODECS)
    backend = make_backend(world, device)
    rows = RowTensors(
        *(torch.zeros(4, dtype=torch.int32, device=device) for _ in range(3)),
        torch.zeros(4, 30, dtype=torch.int32, device=device),
    )
    for row, ((_, seq_len), table) in enumerate(zip(lens, world.tables, strict=True)):
        position = seq_len - 1
        rows.positions[row], rows.seq_lens[row] = position, seq_len
        rows.slots[row] = table[position // 16] * 16 + position % 16
        rows.tables[row, : len(table)] = torch.tensor(table)
    new = [torch.cat((x, x[:1])) for x in world.qkv]  # what the padding row has does not matter
    null_block = world.cache.blocks[0].clone()

    backend.plan_rows(rows.first(3))
    out = backend.attend(1, backend.write_kv(1, *new))

    world.move("cpu")
    assert_close(out[:2].cpu(), world.expected()[1], "float16")
    assert torch.equal(world.cache.blocks[0], null_block.cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(("head_dim", "codecs"), [(64, ALL_CODECS), (8, (Codec.NATIVE,))])
def test_chunks_planned_from_tensors_are_those_of_a_batch(
    device, window, head_dim, codecs, monkeypatch
):
    """Three chunks where there is room for five, in more blocks than the kernel's grid has."""
    monkeypatch.setattr(cuda_ops, "_GATHER_BLOCKS", 7)
    lens = [(1, 97), (40, 540), (12, 12)]
    shape = Shape(head_dim=head_dim, num_kv_heads=2, group=2, dtype="float16", window=window)
    world = World(shape, lens, codecs=codecs, sink=16)
    backend = make_backend(world, device)
    batch = AttentionBatch(*map(list, zip(*lens, strict=True)), world.tables)
    entries = [
        table[: -(-seq_len // 16)] for (_, seq_len), table in zip(lens, world.tables, strict=True)
    ]

    def ints(*numbers, pad=0):
        return torch.tensor([*numbers, *[0] * pad], dtype=torch.int32, device=device)

    chunks = ChunkTensors(
        ints(*plan_positions(batch), pad=7),
        ints(*plan_slots(batch, 16), pad=7),
        ints(0, 1, 41, 53, 53, 53),
        ints(0, *(16 * n for n in (7, 7 + 34, 7 + 34 + 1)), *[16 * 42] * 2),
        ints(97, 540, 12, pad=2),
        ints(*itertools.chain(*entries), pad=backend.max_entries - 42),
        ints(42),
    )
    new = [torch.cat((x, x[:7])) for x in world.qkv]  # what the padding has does not matter
    null_block = world.cache.blocks[0].clone()

    backend.plan_chunks(chunks)
    out = backend.attend(1, backend.write_kv(1, *new))
    backend.count_gathered(batch.seq_lens, batch.used_tables(16))

    world.move("cpu")
    assert_close(out[:53].cpu(), world.expected()[1], "float16")
    assert torch.equal(world.cache.blocks[0], null_block.cpu())
    assert backend.bytes_gathered > 0


def test_a_row_does_not_depend_on_its_neighbours():
    lens = [(1, 700), (1, 40), (3, 90)]
    shape = Shape(head_dim=64, num_kv_heads=2, group=2, dtype="float16")
    together, _ = (world := World(shape, lens)).run_with(make_backend(world, "cpu"))

    world = World(shape, lens)
    backend = make_backend(world, "cpu")
    alone, first = [], 0
    for (num_new, seq_len), table in zip(lens, world.tables, strict=True):
        backend.plan(AttentionBatch([num_new], [seq_len], [table]))
        rows = slice(first, first + num_new)
        alone.append(backend.attend(1, backend.write_kv(1, *(x[rows] for x in world.qkv))))
        first += num_new

    assert torch.equal(torch.cat(alone), together)


def test_this_torch_has_the_flash_attention_that_is_called():
    schema = torch.ops.aten._flash_attention_forward.default._schema

    assert {argument.name for argument in schema.arguments}.issuperset(flash._ARGUMENTS)
    assert find_flash(torch.device("cpu"), 64) is None
