"""How the cpu kernels are compiled, and where the result is kept. Imports numba; no torch."""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import njit
from numpy import float32, int32, uint8, uint16
from numpy.typing import NDArray

from kvchat import paths

Floats = NDArray[float32]
Ints = NDArray[np.int64]
Table = NDArray[int32]
Bytes = NDArray[uint8]
Halves = NDArray[uint16]  # bits of float16
Elements = NDArray[float32] | NDArray[uint16]  # the pool's kind: bits of 16-bit floats

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
# Reassociation lets a sum use lanes, contraction makes fused multiply-adds. NaN and infinity keep
# their meaning: a bad number must reach the sampler as one.
_FAST = {"reassoc", "contract", "nsz"}


@cache
def _cache_folder() -> Path:
    """The user's folder for these sources: numba itself would look at a kernel's own file alone,
    and miss a change in a function that it calls."""
    sources = sorted(Path(__file__).parent.glob("cpu_*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return paths.cache_dir() / "numba" / digest[:16]


def _is_cache_writable() -> bool:
    """Point numba at the user's cache folder; False where nothing can be written there."""
    folder = _cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        return False
    # Read when njit(cache=True) decorates, below. numba's settings are module attributes.
    numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    return True


kernel = njit(cache=_is_cache_writable(), nogil=True, error_model="numpy", fastmath=_FAST)
fast = njit(error_model="numpy", fastmath=_FAST)  # parts of kernels, compiled into them
exact = njit(error_model="numpy")  # its own flags hold wherever LLVM inlines it


def compile_all(
    jobs: list[tuple[Any, tuple[Any, ...]]], progress: Callable[[int, int], None]
) -> None:
    """Compile each (kernel, signature), or load it from the user's cache."""
    for num_done, (job, signature) in enumerate(jobs):
        progress(num_done, len(jobs))
        # The kernel is there before it is saved: a full disk costs the next start some seconds.
        with suppress(OSError):
            try:
                job.compile(signature)
            except (EOFError, pickle.UnpicklingError):  # a file of the cache was cut short
                for path in _cache_folder().rglob("*.nb?"):
                    path.unlink(missing_ok=True)
                job.compile(signature)
    progress(len(jobs), len(jobs))
