"""The codecs against their bounds on synthetic keys and values, and against llama.cpp's kind."""

import io

import pytest
import torch

from kvchat.bench import codecs as codec_bench
from kvchat.bench.codecs import ErrorRow, SizeRow, SpeedRow
from kvchat.bench.key_families import FAMILIES, SEED, make_keys, make_values
from kvchat.cli import run_cli
from kvchat.terminal.show import Show

# Worst family of each kind of keys.
KEY_BOUNDS = {
    "INT8": {"gauss": 0.007, "llama": 0.0135, "qwen": 0.085},
    "INT4": {"gauss": 0.10, "llama": 0.115, "qwen": 0.40},
}
INT4_VALUE_BOUNDS = {"gauss": 0.105, "laplace": 0.14}
# What is published for such keys, in the order of FAMILIES: the generator must come close.
PUBLISHED = {
    "q8_0": (0.0053, 0.0173, 0.0176, 0.108, 0.163),
    "q4 abs/7": (0.097, 0.31, 0.35, 0.97, 1.10),
}
LEAST_RATIOS = {128: (1.95, 3.7), 64: (1.9, 3.6)}


@pytest.fixture(scope="module")
def errors() -> dict[str, ErrorRow]:
    return {row.codec: row for row in codec_bench.measure_errors()}


def kind(family: str) -> str:
    return family.split("-")[0]


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
@pytest.mark.parametrize("codec", KEY_BOUNDS)
def test_logit_errors_keep_their_bounds(errors, codec, family):
    assert errors[codec].by_keys[family] <= KEY_BOUNDS[codec][kind(family)]


@pytest.mark.parametrize("values", INT4_VALUE_BOUNDS)
def test_errors_of_int4_values_keep_their_bounds(errors, values):
    assert errors["INT4"].by_values[values] <= INT4_VALUE_BOUNDS[values]


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
@pytest.mark.parametrize(
    ("codec", "other"), [("INT8", "q8_0"), ("INT4", "q4_0"), ("INT4", "q4 abs/7")]
)
def test_ours_beat_groups_of_32_on_keys_with_outliers(errors, codec, other, family):
    ratio = errors[codec].by_keys[family] / errors[other].by_keys[family]

    assert errors[codec].bits < errors[other].bits
    assert ratio <= (1.25 if kind(family) == "gauss" else 0.999)


@pytest.mark.parametrize("codec", PUBLISHED)
def test_the_families_err_about_as_published(errors, codec):
    measured = [errors[codec].by_keys[family.name] for family in FAMILIES]

    for ours, published in zip(measured, PUBLISHED[codec], strict=True):
        assert ours == pytest.approx(published, rel=0.15)


def test_keys_and_values_are_the_same_on_every_call():
    qwen = FAMILIES[-1]

    assert SEED == 20_240_501
    assert torch.equal(make_keys(qwen, 64), make_keys(qwen, 64))
    assert torch.equal(make_values("laplace"), make_values("laplace"))
    assert make_values("laplace").std().item() == pytest.approx(2**0.5, rel=0.01)


def test_a_slow_pair_is_an_offset_and_a_fast_one_runs_through_its_values():
    noise = make_keys(FAMILIES[0])
    low, mix = (make_keys(family) - noise for family in FAMILIES[3:])

    slow = low[:, :64].std(1).amax()
    fast = mix[:, :64].std(1).amax()
    assert low.abs().amax() > 60
    assert slow < 2
    assert fast > 50


def test_blocks_keep_their_ratios_counted_on_tensors():
    rows = [row for row in codec_bench.measure_sizes() if row.head_dim in LEAST_RATIOS]

    assert len(rows) == 4
    for row in rows:
        int8, int4 = LEAST_RATIOS[row.head_dim]
        assert min(row.int8_block, row.int8_pool) >= int8
        assert min(row.int4_block, row.int4_pool) >= int4


def test_speeds_are_those_of_the_blocks_read(monkeypatch):
    monkeypatch.setattr(codec_bench, "_NUM_NATIVE", 4)

    rows = codec_bench.measure_speed(num_repeats=1)

    assert [row.name for row in rows] == [
        "copy",
        "native to INT8",
        "native to INT4",
        "INT8 to INT4",
        "decode INT8",
        "decode INT4",
    ]
    assert rows[0].copy_share == 1.0
    assert all(row.mb_per_s == pytest.approx(row.copy_share * rows[0].mb_per_s) for row in rows)


def test_the_command_prints_three_tables(monkeypatch):
    row = ErrorRow("INT8", 8.125, {"gauss": 0.00641}, {"laplace": 0.0089})
    monkeypatch.setattr(codec_bench, "measure_errors", lambda: [row])
    sizes = [SizeRow(128, 16, 1.9692, 3.7030, 1.96, 3.70)]
    monkeypatch.setattr(codec_bench, "measure_sizes", lambda: sizes)
    speeds = [SpeedRow("copy", 8200.0, 1.0), SpeedRow("native to INT8", 317.2, 0.0387)]
    monkeypatch.setattr(codec_bench, "measure_speed", lambda: speeds)

    out = io.StringIO()

    code = run_cli(["bench", "codecs"], Show(out, io.StringIO()))

    shown = out.getvalue()
    assert code == 0
    assert "| codec | bits | K gauss | V laplace |\n|---|---:|---:|---:|" in shown
    assert "| INT8 | 8.12 | 0.0064 | 0.0089 |" in shown
    assert "| 128 | 16 | 1.969x | 3.703x | 1.960x | 3.700x |" in shown
    assert "| native to INT8 | 317 | 3.9% |" in shown
