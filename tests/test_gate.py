"""What a model was measured to stand is remembered, and nothing else is believed."""

import json
import math

import pytest

from kvchat.engine.gate import GateResult, decisive, gate_path, recall, remember
from kvchat.kv.layout import Codec

FINGERPRINT = bytes(range(32))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("kl_mean", "agreement", "passes"),
    [(0.03, 0.95, True), (0.0301, 1.0, False), (0.0, 0.9499, False), (math.nan, 1.0, False)],
)
def test_both_limits_count_and_nan_fails(kl_mean, agreement, passes):
    assert GateResult(Codec.INT4, kl_mean, agreement).passes is passes


def test_what_is_remembered_is_recalled_for_that_model_alone():
    results = [GateResult(Codec.INT8, 0.001, 0.999, 64, 128), GateResult(Codec.INT4, 0.5, 0.7)]

    remember(FINGERPRINT, results)

    assert recall(FINGERPRINT) == results
    assert recall(bytes(32)) == []


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"version": 2}', '{"version": 2, "results": [{}]}', "\xff"]
)
def test_a_file_that_makes_no_sense_means_not_probed(content):
    remember(FINGERPRINT, []).write_text(content, encoding="latin-1")

    assert recall(FINGERPRINT) == []


def test_a_file_of_another_version_is_not_believed():
    path = remember(FINGERPRINT, [GateResult(Codec.INT4, 0.0, 1.0)])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))

    assert recall(FINGERPRINT) == []


def test_the_sentence_names_value_and_limit():
    sentence = GateResult(Codec.INT4, 0.5, 0.7).sentence()

    assert sentence == (
        "INT4 fails the probe: KL 0.5000 (at most 0.03), agreement 70.0% (at least 95%)"
    )


def test_the_path_is_one_file_a_model_in_the_cache_folder(tmp_path):
    assert gate_path(FINGERPRINT).parent == tmp_path / "kvchat" / "probes"
    assert gate_path(FINGERPRINT) != gate_path(bytes(32))


def test_the_nearest_result_decides_that_keeps_no_more_tokens_native():
    kept, bare = (
        GateResult(Codec.INT4, kl, 1.0, *kept) for kl, kept in ((0.1, (64, 128)), (0, ()))
    )
    results = [GateResult(Codec.INT8, 0.0, 1.0), bare, kept]

    assert decisive(results, Codec.INT4, 64, 128) is kept
    assert decisive(results, Codec.INT4, 100, 500) is kept
    assert decisive(results, Codec.INT4, 64, 127) is bare
    assert decisive(results, Codec.INT4, 0, 128) is bare
    assert decisive([kept], Codec.INT4, 63, 128) is None
    assert decisive([], Codec.INT8, 64, 128) is None
