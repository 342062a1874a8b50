"""What a GPU's instructions gave for fixed inputs, in a file that the emulator is held against.

On a machine with a GPU, from the checkout:

    PYTHONPATH=. python3 tests/primitive_vectors.py tests/primitive_vectors.npz

The file has inputs and outputs of kernels_cu/emulator/primitives.cu, as bits, and the GPU's name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvchat.attention.cuda_ops import Load

FILE = Path(__file__).with_suffix(".npz")
_LANES = 32
_SCALARS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SCALAR = "scalar"  # in place of a dtype: the case's
_OUTPUTS: dict[str, list[tuple[str | torch.dtype, tuple[int, ...]]]] = {
    "mma": [(torch.float32, (_LANES, 4))],
    "ldmatrix": [(torch.int32, (7, _LANES, 4))],
    "codes": [(torch.int32, (_LANES, 6))],
    "numbers": [
        (_SCALAR, (_LANES, 2)),
        (torch.float32, (_LANES, 2)),
        (torch.int32, (_LANES, 3)),
        (torch.float32, (_LANES, 2)),
    ],
    "warp": [(torch.int32, (_LANES, 7))],
    "cp_async": [(torch.int32, (_LANES, 5))],
}
_NUM_DRAWS = 6
_MMA_ERROR = 2.0**-20  # of the sum of magnitudes: a tensor core rounds in an order of its own
_EXP2_ERROR = 4e-7  # of ex2.approx, relative
_POWERS = 3  # which output of `numbers` that is


@dataclass(frozen=True)
class Case:
    """One launch of an instruction's kernel; inputs: tensors and numbers, in the kernel's order."""

    kernel: str
    dtype: str
    draw: int
    inputs: tuple[Tensor | int, ...]

    @property
    def name(self) -> str:
        """As in mma-float16-0."""
        return f"{self.kernel}-{self.dtype}-{self.draw}"

    def run(self, load: Load) -> list[Tensor]:
        """The outputs; what is not written stays all ones."""
        outputs = []
        for dtype, size in _OUTPUTS[self.kernel]:
            kind = _SCALARS[self.dtype] if dtype == _SCALAR else dtype
            outputs.append(torch.full(size, -1, dtype=torch.int64).to(kind))
        defines = {"SCALAR_BF16": int(self.dtype == "bfloat16")}
        kernel = load("emulator/primitives.cu", f"{self.kernel}_kernel", defines)
        kernel.launch((1, 1, 1), (_LANES, 1, 1), [*outputs, *self.inputs])
        return outputs


def cases() -> Iterator[Case]:
    """Random numbers of many sizes, and the corners that are easy to get wrong."""
    for draw in range(_NUM_DRAWS):
        generator = torch.Generator().manual_seed(draw)

        def bits(*size: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randint(-(2**31), 2**31, size, generator=generator).to(torch.int32)

        yield Case("ldmatrix", "float16", draw, (bits(_LANES, 4),))
        yield Case("codes", "float16", draw, (bits(_LANES),))
        yield Case("warp", "float16", draw, (bits(_LANES),))
        yield Case("cp_async", "float16", draw, (bits(_LANES, 4),))
        for dtype, scalar in _SCALARS.items():

            def draws(
                *size: int, generator: torch.Generator = generator, draw: int = draw
            ) -> Tensor:
                spread = 2.0 ** (draw * torch.randn(size, generator=generator))
                return torch.randn(size, generator=generator) * spread

            a, b = (
                draws(_LANES, 2 * n).clamp(-200, 200).to(scalar).view(torch.int32) for n in (4, 2)
            )
            yield Case("mma", dtype, draw, (a, b, draws(_LANES, 4)))
            x = 4 * draws(_LANES, 2)
            x[:4] = torch.tensor(
                [[65519.9, 65520.0], [torch.inf, -0.0], [1 + 2.0**-11, 1 + 3 * 2.0**-11],
                 [2.0**-25, 3 * 2.0**-25]]
            )  # fmt: skip
            y = draws(_LANES, 6).clamp(-200, 200).to(scalar)  # no infinity less another
            y = y.view(torch.int32)
            yield Case("numbers", dtype, draw, (x, y, draw + 1))


def record(load: Load, device: str) -> dict[str, np.ndarray]:
    """Inputs and outputs of all cases, by name."""
    found = {"device": np.array(device)}
    for case in cases():
        found |= {f"{case.name}/in{i}": _bits(x) for i, x in enumerate(case.inputs)}
        found |= {f"{case.name}/out{i}": _bits(x) for i, x in enumerate(case.run(load))}
    return found


def differences(load: Load, recorded: dict[str, np.ndarray]) -> list[str]:
    """Where what `load` gives for the recorded inputs is not what was recorded, in words."""
    wrong = []
    for case in cases():
        stored = [recorded[f"{case.name}/in{i}"] for i in range(len(case.inputs))]
        inputs = tuple(
            int(bits) if isinstance(x, int) else _tensor(bits, x.dtype)
            for bits, x in zip(stored, case.inputs, strict=True)
        )
        again = Case(case.kernel, case.dtype, case.draw, inputs)
        for i, out in enumerate(again.run(load)):
            expected = _tensor(recorded[f"{case.name}/out{i}"], out.dtype)
            allowed = _allowed(again, i, expected)
            if not _is_close(out, expected, allowed):
                wrong.append(f"{case.name}, output {i}: {out.tolist()} for {expected.tolist()}")
    return wrong


def _allowed(case: Case, output_idx: int, expected: Tensor) -> Tensor | None:
    """The error that an output may have; None: it must be equal bit for bit."""
    if case.kernel == "numbers" and output_idx == _POWERS:
        return _EXP2_ERROR * expected.abs() + 2.0**-126
    if case.kernel != "mma":
        return None
    a, b, c = case.inputs
    scalar = _SCALARS[case.dtype]
    # a bound that needs no knowledge of which lane holds what: every sum has 16 products
    largest = a.view(scalar).float().abs().max() * b.view(scalar).float().abs().max()
    return _MMA_ERROR * (16 * largest + c.abs())


def _is_close(out: Tensor, expected: Tensor, allowed: Tensor | None) -> bool:
    if allowed is None:
        return np.array_equal(_bits(out), _bits(expected))
    is_same = out == expected  # infinities
    return bool((is_same | ((out.double() - expected).abs() <= allowed)).all())


def _bits(x: Tensor | int) -> np.ndarray:
    """As integers of the same width."""
    if isinstance(x, int):
        return np.array(x)
    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.contiguous().view(kind).numpy()


def _tensor(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(bits.copy()).view(dtype)


def main() -> None:
    """Record on the GPU."""
    from machines import load_on_gpu

    found = record(load_on_gpu, torch.cuda.get_device_name())
    np.savez_compressed(sys.argv[1], **found)
    print(f"{len(found)} arrays in {Path(sys.argv[1]).stat().st_size} bytes")


if __name__ == "__main__":
    main()
