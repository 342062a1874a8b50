"""The emulator's instructions against what a GPU gave for the same inputs, recorded in a file."""

import numpy as np
import pytest
from emulator import load_emulated
from machines import load_on_gpu
from primitive_vectors import FILE, cases, differences, record

INSTRUCTIONS = {"mma", "ldmatrix", "codes", "numbers", "warp", "cp_async"}
needs_file = pytest.mark.skipif(
    not FILE.exists(), reason=f"nothing recorded: see the top of {FILE.with_suffix('.py').name}"
)


@pytest.fixture
def recorded():
    with np.load(FILE) as found:
        return dict(found)


@needs_file
def test_the_emulator_gives_what_a_gpu_gave(recorded):
    assert differences(load_emulated, recorded) == []


@needs_file
@pytest.mark.gpu
def test_a_gpu_gives_what_a_gpu_gave(recorded):
    assert differences(load_on_gpu, recorded) == []


@pytest.mark.gpu
def test_the_emulator_gives_what_this_gpu_gives():
    assert differences(load_emulated, record(load_on_gpu, "this one")) == []


def test_every_instruction_is_recorded_small_and_a_wrong_bit_shows():
    recorded = record(load_emulated, "the emulator")

    assert differences(load_emulated, recorded) == []
    assert {case.kernel for case in cases()} == INSTRUCTIONS
    assert sum(x.nbytes for x in recorded.values()) < 200_000
    for name in INSTRUCTIONS:
        key = next(key for key in recorded if key.startswith(f"{name}-") and key.endswith("out0"))
        broken = recorded | {key: recorded[key] ^ (1 << 12)}
        assert [x.split("-")[0] for x in differences(load_emulated, broken)] == [name]
