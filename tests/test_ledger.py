"""The ledger of /kv --audit: re-added here from the tensors and the tables, and torn on purpose."""

import sys
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_build import OPTIONS, build
from tiny_model import write_tiny_model

from kvchat.config import SamplingParams
from kvchat.engine.device import GpuBytes
from kvchat.engine.ledger import read_ledger
from kvchat.engine.request import Request
from kvchat.engine.storage import num_bytes, num_bytes_outside, ranges_of
from kvchat.engine.workspace import CUBLAS_BYTES
from kvchat.kv.layout import Codec, unpack_entry
from kvchat.terminal.memory_views import ledger_lines

KV = {"kv_mem": "160KiB", "kv_cache": "auto4", "kv_window": 16, "kv_sink": 16, "force": True}


def _submit(engine, request_id, session_id, prompt, max_tokens=3):
    sampling = SamplingParams(0.0, ignore_eos=True, max_tokens=max_tokens)
    engine.submit(Request(request_id, session_id, list(prompt), len(prompt), sampling))


def _run(engine):
    while engine.step():
        pass


def _audit(engine):
    answer = engine.audit()
    engine.answer_audits()
    return answer.result(timeout=0)


@pytest.fixture(params=["native", "auto4"])
def pressed(request, tmp_path):
    """An engine whose pool is short: two chats, one of them forked, some blocks cached."""
    write_tiny_model(tmp_path)
    kv = {"kv_mem": "192KiB"} if request.param == "native" else KV
    engine, _, _ = build(tmp_path, replace(OPTIONS, **kv))
    _submit(engine, 1, 1, [5 + i % 90 for i in range(150 if request.param == "native" else 400)])
    _run(engine)
    engine.fork(1, 2, 96)
    _submit(engine, 2, 3, [9 + i % 80 for i in range(40)])
    _run(engine)
    engine.release(3)
    return engine


def _bytes(ledger, part):
    return sum(entry.num_bytes for entry in ledger.entries if entry.part == part)


def test_the_ledger_adds_up_to_what_the_tensors_and_tables_are(pressed):
    cache, pool = pressed._runner._cache, pressed._scheduler.pool
    tables = [seq.table for _, seq, _ in pressed._scheduler.sequences()]

    ledger = _audit(pressed)

    assert ledger.problems == ()
    assert _bytes(ledger, "payload") == ledger.totals["payload"] == cache.blocks.nbytes
    assert _bytes(ledger, "side arrays") == ledger.totals["side arrays"] == cache.side.nbytes
    held = {unpack_entry(entry)[:2] for table in tables for entry in table}
    blocks = Counter(f"{codec.label}, held" for _, codec in held)
    blocks.update(
        f"{pool.codec(i).label}, cached" for i, state in enumerate(pool.map()) if state == "cached"
    )
    blocks.update(state for state in pool.map() if state == "free")
    blocks["null block"] = 1
    told = {entry.what: entry.num_blocks for entry in ledger.entries if entry.part == "payload"}
    assert {what: n for what, n in told.items() if n} == blocks
    assert len(tables) == 2 and any(what.endswith("cached") for what in blocks)
    used = Counter(codec for _, codec in held if codec != Codec.NATIVE)
    assert bool(used) == (cache.layout.lowest != Codec.NATIVE)
    for codec, num_blocks in used.items():
        what = f"scales and zeros of {codec.label}"
        entry = next(entry for entry in ledger.entries if entry.what == what)
        assert entry.num_blocks >= num_blocks
        assert entry.num_bytes == entry.num_blocks * (
            cache.block_bytes(codec) - cache.payload[0].nbytes
        )
    assert _bytes(ledger, "block tables") > 8 * sum(map(len, tables))
    assert 0 < ledger.resident < 1 << 40


def test_weights_and_scratch_are_those_of_the_model_and_the_backend(pressed):
    decoder, backend = pressed._runner._decoder, pressed._runner._backend
    weights = {decoder.embedding, decoder.norm}
    for layer in decoder.layers:
        weights |= {layer.attention_norm, layer.mlp_norm}
    num_weight_bytes = sum(weight.nbytes for weight in weights)
    num_weight_bytes += sum(
        linear.weight.nbytes for linear in decoder.linears() if linear.weight not in weights
    )

    ledger = _audit(pressed)

    assert _bytes(ledger, "weights") == num_weight_bytes
    rope = backend._rope.cos.nbytes + backend._rope.sin.nbytes
    assert rope <= _bytes(ledger, "scratch") < rope + (1 << 20)
    assert _bytes(ledger, "host") == 0


def test_blocks_that_map_and_tables_tell_differently_are_named(pressed):
    tensors, scheduler = pressed._runner.count_bytes(), pressed._scheduler
    torn = tensors._replace(payload=tensors.payload + 1, num_blocks=tensors.num_blocks + 1, host=5)

    payload, host, blocks = read_ledger(scheduler, torn).problems
    assert payload.endswith(f"the tensor has {tensors.payload + 1:,}")
    assert host == "host: 0 bytes in blocks, the tensor has 5"
    assert blocks.endswith(f"blocks, the tensor {tensors.num_blocks + 1:,}")
    seq = next(seq for _, seq, _ in scheduler.sequences())
    last = seq.table.pop()
    problems = read_ledger(scheduler, tensors).problems
    assert problems[-1] == f"references to 1 blocks are not those in the tables: [{last}]"
    seq.table.append(last)
    assert read_ledger(scheduler, tensors).problems == ()


def test_a_running_engine_answers_between_its_steps(pressed):
    steps, launch = [], pressed._runner.launch
    count = pressed._runner.count_bytes

    def watched_launch(batch):
        steps.append("start")
        result = launch(batch)
        steps.append("end")
        return result

    def watched_count():
        steps.append(threading.current_thread().name)
        return count()

    pressed._runner.launch, pressed._runner.count_bytes = watched_launch, watched_count
    pressed.start()
    _submit(pressed, 9, 9, range(5, 45), max_tokens=10)

    ledgers = [pressed.audit().result(timeout=20) for _ in range(5)]
    pressed.close()

    assert all(ledger.problems == () for ledger in ledgers)
    counted = [i for i, step in enumerate(steps) if step == "kvchat-engine"]
    assert len(counted) == 5
    assert all(steps[:i].count("start") == steps[:i].count("end") for i in counted)


def test_a_closed_engine_answers_nobody(pressed):
    waiting = pressed.audit()

    pressed.close()

    assert waiting.cancelled()


def test_of_a_gpu_every_byte_in_use_has_a_row(pressed):
    """As if the tensors were on one."""
    tensors, scheduler = pressed._runner.count_bytes(), pressed._scheduler
    named = tensors.payload + tensors.side + tensors.scratch + tensors.weights
    gpu = GpuBytes(named + 5_000, named + 2_000_000, 512, named + 700_000_000)

    ledger = read_ledger(scheduler, tensors._replace(gpu=gpu))

    assert ledger.problems == ()
    beside = {"block tables", "host"}  # in main memory
    on_gpu = [entry for entry in ledger.entries if entry.part not in beside]
    assert sum(entry.num_bytes for entry in on_gpu) == gpu.used
    told = {entry.what: entry.num_bytes for entry in on_gpu if entry.part in ("torch", "CUDA")}
    assert [*told.values()] == [5_000, 1_995_000, 700_000_000 - 2_000_000 - 512]
    lines = ["".join(text for _, text in line) for line in ledger_lines(ledger)]
    assert any(line.startswith("CUDA ") and "context, kernels" in line for line in lines)
    assert f"of the GPU {gpu.used:,} are in use, {gpu.allocated:,} of them given" in lines[-2]


def test_gpu_memory_that_nobody_knows_of_is_a_problem(pressed):
    tensors, scheduler = pressed._runner.count_bytes(), pressed._scheduler
    named = tensors.payload + tensors.side + tensors.scratch + tensors.weights

    def problems(allocated):
        gpu = GpuBytes(allocated, allocated, 0, allocated)
        return read_ledger(scheduler, tensors._replace(gpu=gpu)).problems

    most = int(1.01 * named) + CUBLAS_BYTES
    assert problems(named) == problems(most) == ()
    assert problems(most + 1)[0].endswith(f"torch has given out {most + 1:,}")
    assert problems(named - 1)[0].startswith(f"GPU: {named:,} bytes are known of")


class Holder:
    """Of kvchat's own, as far as the walk knows."""

    __slots__ = ("kept",)

    def __init__(self, kept):
        self.kept = kept


Holder.__module__ = "kvchat.tests"


def test_memory_is_counted_once_however_often_it_is_seen():
    tensor, array = torch.zeros(100), np.zeros(50)
    seen = {"a": [tensor, tensor[3:]], "b": (array[::2], tensor.numpy()), "c": Holder([array])}

    assert num_bytes(ranges_of(seen)) == 400 + 400
    assert num_bytes_outside(ranges_of(seen), ranges_of(tensor[1:])) == 400
    assert num_bytes([(0, 10), (5, 7), (9, 12), (20, 21)]) == 13
    assert num_bytes(ranges_of(sys)) == 0
    assert ranges_of(seen, on_gpu=True) == []
