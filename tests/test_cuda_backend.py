"""The cuda backend over whole steps: on the emulator, and on a GPU where there is one."""

import pytest
import torch
from attention_world import Shape, World, assert_close
from emulator import load_emulated

from kvchat.attention import AttentionBatch
from kvchat.attention.cuda import MAX_ROWS_OF_CHUNK, CudaBackend, RowTensors
from kvchat.kv.layout import Codec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MAX_ROWS, MAX_LEN = 40, 1200
ALL_CODECS = (Codec.NATIVE, Codec.INT8, Codec.INT4)


def make_backend(world: World, device: str) -> CudaBackend:
    """The backend over the world's pool, which is moved to the device; a CPU's is the emulator."""
    rows = MAX_ROWS, MAX_LEN
    if device == "cpu":
        return CudaBackend(world.config, world.cache, world.rope, *rows, load_emulated)
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
