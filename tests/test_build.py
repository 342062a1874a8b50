"""A model on disk becomes an engine that answers, within the memory there is."""

import json

import pytest
from tiny_model import write_tiny_model

from kvchat.config import SamplingParams
from kvchat.engine.build import EngineOptions, build_engine
from kvchat.engine.request import Request
from kvchat.errors import CapacityError, UsageError
from kvchat.model.families import parse_config
from kvchat.model.source import resolve

OPTIONS = EngineOptions(backend="reference", kv_mem="512KiB")  # 64 blocks of 16 tokens


@pytest.fixture
def folder(tmp_path):
    write_tiny_model(tmp_path)
    return tmp_path


def build(folder, options=OPTIONS):
    """(the engine, what was decided, the events it sends)."""
    events, source = [], resolve(str(folder))
    config = parse_config(source)
    engine, facts = build_engine(
        source, config, options, lambda *at: None, events.extend, frozenset()
    )
    return engine, facts, events


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 2**27},
        {"rope_scaling": {"type": "linear", "factor": 1e6}},
        {"rope_scaling": {"type": "yarn", "factor": 1e6}},
    ],
    ids=["long", "linear", "yarn"],
)
def test_a_context_beyond_all_memory_is_what_the_pool_holds_and_is_used_to_its_end(folder, changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 2**27} | changes)
    )

    engine, facts, events = build(folder)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    prompt = [5] * (facts.pool_tokens - 2)
    engine.submit(Request(1, 1, prompt, len(prompt), sampling))
    while engine.step():
        pass

    assert facts.scheduler.max_request_tokens == facts.pool_tokens == 63 * 16
    assert [event.finish_reason for event in events] == [None, "length"]


def test_a_context_that_was_asked_for_is_given_in_full_or_refused(folder):
    def ask(context):
        return EngineOptions(backend="reference", kv_mem="512KiB", context=context)

    _, facts, _ = build(folder, ask(300))
    assert facts.scheduler.max_request_tokens == 300
    with pytest.raises(UsageError, match="--ctx-size 513 is more than the 512 tokens that"):
        build(folder, ask(513))

    small = EngineOptions(backend="reference", kv_mem="128KiB", context=512)
    with pytest.raises(CapacityError, match=r"pool of 264.0 KiB, and it has 128.0 KiB") as refused:
        build(folder, small)
    words = str(refused.value).split()
    needed, fits = words[words.index("--kv-mem") + 2], words[-1]

    raised = EngineOptions(backend="reference", kv_mem=needed, context=512)
    lowered = EngineOptions(backend="reference", kv_mem="128KiB", context=int(fits))
    assert build(folder, raised)[1].scheduler.max_request_tokens == 512
    assert build(folder, lowered)[1].scheduler.max_request_tokens == int(fits) == 240
