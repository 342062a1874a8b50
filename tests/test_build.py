"""A model on disk becomes an engine that answers, within the memory there is."""

import json
from dataclasses import replace

import pytest
from tiny_model import write_tiny_model

from kvchat.config import KVSpec, SamplingParams
from kvchat.engine.build import EngineOptions, build_engine
from kvchat.engine.device import Choice
from kvchat.engine.gate import GateResult, remember
from kvchat.engine.kv_mode import choose_kv_mode
from kvchat.engine.request import Request
from kvchat.errors import CapacityError, UsageError
from kvchat.kv.codecs import CODEC_FINGERPRINT
from kvchat.kv.layout import Codec
from kvchat.model.families import parse_config
from kvchat.model.source import resolve

# 64 blocks
OPTIONS = EngineOptions("cpu", backend="reference", kv_mem="512KiB", kv_cache="native")


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
        return replace(OPTIONS, context=context)

    _, facts, _ = build(folder, ask(300))
    assert facts.scheduler.max_request_tokens == 300
    with pytest.raises(UsageError, match="--ctx-size 513 is more than the 512 tokens that"):
        build(folder, ask(513))

    small = replace(OPTIONS, kv_mem="128KiB", context=512)
    with pytest.raises(CapacityError, match=r"pool of 264.0 KiB, and it has 128.0 KiB") as refused:
        build(folder, small)
    words = str(refused.value).split()
    needed, fits = words[words.index("--kv-mem") + 2], words[-1]

    raised = replace(OPTIONS, kv_mem=needed, context=512)
    lowered = replace(OPTIONS, kv_mem="128KiB", context=int(fits))
    assert build(folder, raised)[1].scheduler.max_request_tokens == 512
    assert build(folder, lowered)[1].scheduler.max_request_tokens == int(fits) == 240


@pytest.mark.parametrize(
    ("mode", "kv_mem", "lowest"),
    [
        ("auto", "128KiB", Codec.INT8),
        ("auto4", "160KiB", Codec.INT4),
        ("int8", "128KiB", Codec.INT8),
    ],
)
def test_a_request_alone_goes_to_the_end_of_what_the_pool_holds(folder, mode, kv_mem, lowest):
    kv = {"kv_mem": kv_mem, "kv_cache": mode, "kv_window": 16, "kv_sink": 16, "force": True}

    engine, facts, events = build(folder, replace(OPTIONS, **kv))
    limit = facts.scheduler.max_request_tokens
    prompt = [5 + i % 90 for i in range(limit - 2)]
    engine.submit(Request(1, 1, prompt, len(prompt), SamplingParams(0.0, ignore_eos=True)))
    while engine.step():
        pass

    assert [event.finish_reason for event in events] == [None, "length"]
    assert facts.lowest == lowest and 1.3 * facts.pool_tokens < limit <= 512
    kv = engine.session_kv(1)
    assert kv.num_tokens == limit - 1 and max(kv.shares) == lowest
    assert kv.history and engine.stats().num_preemptions == 0
    assert facts.pool_bytes == facts.scheduler.num_blocks * facts.layout.bytes_per_block


def test_a_compressed_context_that_was_asked_for_is_given_in_full_or_refused(folder):
    small = replace(OPTIONS, kv_mem="64KiB", kv_cache="auto", kv_window=16, kv_sink=16, context=512)
    with pytest.raises(CapacityError, match="--ctx-size 512 needs a KV pool") as refused:
        build(folder, small)
    words = str(refused.value).split()
    needed, fits = int(words[words.index("--kv-mem") + 2]), int(words[-1])

    assert build(folder, replace(small, kv_mem=str(needed)))[1].scheduler.max_request_tokens == 512
    with pytest.raises(CapacityError):
        build(folder, replace(small, kv_mem=str(needed - 1)))
    assert build(folder, replace(small, context=fits))[1].scheduler.max_request_tokens == fits


def test_auto4_obeys_the_probe_unless_forced_and_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fingerprint = resolve(str(folder)).fingerprint
    good, bad = (0.001, 0.99), (0.2, 0.5)  # KL mean, agreement

    def lowest(mode="auto4", force=False, **results):
        probed = [GateResult(Codec[name], *result) for name, result in results.items()]
        remember(fingerprint + CODEC_FINGERPRINT, probed)
        facts = build(folder, replace(OPTIONS, kv_cache=mode, force=force))[1]
        return facts.lowest, " ".join(facts.warnings)

    assert lowest() == (
        Codec.INT8,
        "auto4 stops at INT8: the model has not been probed (kvchat probe measures it);"
        " --force goes on to INT4",
    )
    assert lowest(INT8=good, INT4=good) == (Codec.INT4, "")
    codec, warning = lowest(INT8=good, INT4=bad)
    assert codec == Codec.INT8 and "INT4 fails the probe: KL 0.2000" in warning
    codec, warning = lowest("auto4", INT8=bad, INT4=bad)
    assert codec == Codec.NATIVE and warning.count("INT8") == 1 and "auto4" not in warning
    codec, warning = lowest("auto", INT8=bad, INT4=bad)
    assert codec == Codec.NATIVE and "stays native: INT8 fails the probe" in warning
    assert lowest(force=True, INT8=bad, INT4=bad) == (Codec.INT4, "")
    assert lowest("int4", INT8=bad, INT4=bad) == (Codec.INT4, "")


def test_a_head_dim_that_cannot_be_compressed_is_refused_when_asked_for_and_native_by_default():
    spec = KVSpec(1, 1, 12, 16, "float32")

    mode = choose_kv_mode(None, 128, 64, spec, Codec.INT8)
    with pytest.raises(UsageError, match="head_dim is 12"):
        choose_kv_mode("auto", 128, 64, spec, Codec.INT8)

    assert mode.policy.mode == "native" and mode.lowest == Codec.NATIVE
    assert mode.warnings[0].startswith("the KV cache stays native: this model's head_dim is 12")
    assert not choose_kv_mode("native", 128, 64, spec, Codec.INT8).warnings


def test_parking_in_main_memory_is_refused_where_the_pool_is_there_already(folder):
    with pytest.raises(UsageError, match="on a CPU the KV pool is there already: raise --kv-mem"):
        build(folder, replace(OPTIONS, host_mem="1GiB"))


def test_where_the_device_has_memory_of_its_own_slots_are_reserved_for_idle_chats(
    folder, monkeypatch
):
    monkeypatch.setattr("kvchat.engine.build.choose_device", lambda *asked: Choice("cpu"))

    engine, facts, _ = build(folder, replace(OPTIONS, host_mem="100KiB"))

    assert facts.scheduler.num_host_slots == 100 * 1024 // facts.layout.bytes_per_block
    assert facts.host_bytes == facts.scheduler.num_host_slots * facts.layout.bytes_per_block
    assert engine.stats().num_host_blocks == facts.scheduler.num_host_slots
    assert engine._runner.count_bytes().host == facts.host_bytes
