"""NVIDIA's run-time compiler through ctypes: CUDA source in, cubin out; no GPU, no toolkit.

The library comes with the CUDA builds of torch and CuPy, or alone as a wheel (tests). Its C
interface is in "NVRTC, CUDA Runtime Compilation", chapter 3.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from kvchat.errors import UsageError

CUDA_MAJORS = (13, 12)  # that kvchat supports, newest first


class CompileError(Exception):
    """A source that does not compile: our own mistake, with the compiler's log."""


class Nvrtc:
    """One loaded libnvrtc; `version` is (major, minor)."""

    def __init__(self, path: str) -> None:
        # It looks for its second half by name alone, which finds one that is loaded already.
        for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def compile(self, source: str, file_name: str, options: Sequence[str]) -> tuple[bytes, str]:
        """The cubin and the compiler's log; options name the architecture as sm_XX.

        Raises CompileError with the log.
        """
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), source.encode(), file_name.encode(),
            0, None, None,
        )  # fmt: skip
        try:
            listed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            has_failed = self._library.nvrtcCompileProgram(program, len(options), listed)
            log = self._get(program, "nvrtcGetProgramLog").decode(errors="replace").rstrip("\0")
            if has_failed:
                raise CompileError(f"{file_name} {' '.join(options)}\n{log}")
            return self._get(program, "nvrtcGetCUBIN"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program: ctypes.c_void_p, getter: str) -> bytes:
        """What `getter` returns, after asking for its size."""
        size = ctypes.c_size_t()
        self._call(f"{getter}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(getter, program, buffer)
        return buffer.raw

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            raise CompileError(f"{name}: {self._library.nvrtcGetErrorString(code).decode()}")


@functools.cache
def load_nvrtc(cuda_major: int | None = None) -> Nvrtc:
    """The compiler of this CUDA major version, or the newest there is. Raises UsageError."""
    majors = (cuda_major,) if cuda_major else CUDA_MAJORS
    for major in majors:
        for path in (*_wheel_libraries(major), f"libnvrtc.so.{major}"):
            try:
                return Nvrtc(path)
            except OSError:
                continue
    names = " or ".join(str(major) for major in majors)
    raise UsageError(
        f"NVRTC, the compiler of CUDA {names}, was not found; it comes with CUDA builds of torch:"
        f" pip install 'kvchat[cuda{majors[0]}]'"
    )


def _wheel_libraries(major: int) -> list[str]:
    """Where NVIDIA's wheels put the library, for this CUDA major version."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    return [
        str(path)
        for folder in folders or ()
        for path in sorted(Path(folder).glob(f"*/lib/libnvrtc.so.{major}"))
    ]
