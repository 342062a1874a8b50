"""The shipped model on a GPU, built as `kvchat run` builds it: memory as the ledger says, int8."""

from pathlib import Path

import pytest
from test_build import build

from kvchat.config import SamplingParams
from kvchat.engine.build import EngineOptions
from kvchat.engine.request import Request
from kvchat.model.families import parse_config
from kvchat.model.sizes import weight_bytes
from kvchat.model.source import resolve

SPROUT = Path(__file__).parent.parent / "models" / "sprout"
PROMPT = [1, *range(100, 400)]


def reply(engine, events, num_tokens=24):
    sampling = SamplingParams(0.0, ignore_eos=True, max_tokens=num_tokens)
    engine.submit(Request(1, 1, list(PROMPT), len(PROMPT), sampling))
    while engine.step():
        pass
    assert events[-1].finish_reason == "length"
    return [token_id for event in events for token_id in event.token_ids]


def ledger(engine):
    answer = engine.audit()
    engine.answer_audits()
    return answer.result(timeout=0)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_every_byte_of_a_gpu_is_known_and_graphs_change_nothing(weights):
    options = EngineOptions("cuda", weights=weights, kv_mem="1GiB", max_num_seqs=16)
    engine, facts, events = build(SPROUT, options)

    with_graphs = reply(engine, events)
    found = ledger(engine)

    assert facts.device.startswith("cuda (") and facts.dtype == "bfloat16"
    assert found.problems == ()
    config = parse_config(resolve(str(SPROUT)))
    held = next(entry.num_bytes for entry in found.entries if entry.part == "weights")
    assert held == weight_bytes(config, "bfloat16", weights)
    assert sum(e.num_bytes for e in found.entries if e.part not in ("block tables", "host")) == (
        found.gpu.used
    )
    eager, _, events = build(SPROUT, EngineOptions(**{**vars(options), "use_graphs": False}))
    assert reply(eager, events) == with_graphs


@pytest.mark.gpu
def test_without_a_choice_the_pool_takes_what_is_left_of_the_gpu():
    engine, facts, events = build(SPROUT, EngineOptions("cuda"))

    gpu = ledger(engine).gpu
    assert facts.scheduler.max_num_batched_tokens == 2048 and facts.scheduler.max_num_seqs == 256
    assert facts.pool_bytes > 0.5 * gpu.used
    assert len(reply(engine, events)) == 24


@pytest.mark.gpu
def test_of_what_torch_has_given_out_the_ledger_knows_all_but_a_hundredth():
    engine, _, _ = build(SPROUT, EngineOptions("cuda", kv_mem="8GiB", max_num_seqs=16))

    found = ledger(engine)

    parts = {"payload", "side arrays", "scratch", "weights"}
    known = sum(entry.num_bytes for entry in found.entries if entry.part in parts)
    assert known == pytest.approx(found.gpu.allocated + found.gpu.cupy, rel=0.01)
