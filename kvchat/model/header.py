"""What a safetensors file says it holds, checked before anything is allocated. No torch.

The tensors' bytes are read by the safetensors library alone (model/weights). Here only the JSON
header is parsed, for a policy stricter than the library's: it accepts duplicate names, terminal
escapes in names, shapes of a million dimensions and headers that take 19 s to read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from kvchat.errors import ModelError, quoted

MAX_HEADER_BYTES = 25_000_000
MAX_TENSORS = 100_000
_MAX_RANK = 8
_NAME = re.compile(r"[A-Za-z0-9._:/-]{1,256}")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# The format's dtypes in bits; all are measured, only the float ones below are computed with.
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}
FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# The fingerprint reads this many pieces of this size, spread evenly over a file's tensors.
_NUM_SAMPLES = 8
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its file's header declares it; dtype in the format's own words."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes, from the end of the header
    end: int

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name, the file's free-text metadata, and what identifies it."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    fingerprint: bytes  # sha256 of header, size and sampled pieces of the data


def check_readable(path: Path) -> int:
    """The size of a regular file; ModelError for what is not there or cannot be a checkpoint."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise _refused(path, f": {(error.strerror or 'cannot be read').lower()}") from None
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path, ": not a regular file")
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickle(path)
    if path.suffix.lower() == ".gguf":
        raise _gguf(path)
    return found.st_size


def read_header(path: Path) -> Header:
    """The header of one safetensors file; ModelError, one line, for anything out of order."""
    size = check_readable(path)
    try:
        with path.open("rb") as file:
            start = file.read(64)
            num_bytes = _header_bytes(path, start, size)
            file.seek(8)
            raw = file.read(num_bytes)
            tensors, metadata = _parse(path, raw, size - 8 - num_bytes)
            digest = hashlib.sha256(start[:8] + raw + size.to_bytes(8, "little"))
            step = max(_SAMPLE_BYTES, (size - 8 - num_bytes) // _NUM_SAMPLES)
            for offset in range(8 + num_bytes, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise _refused(path, f" cannot be read: {error.strerror}") from None
    return Header(tensors, metadata, digest.digest())


def _refused(path: Path, why: str) -> ModelError:
    return ModelError(f"model refused: {quoted(str(path))}{why}")


def _pickle(path: Path) -> ModelError:
    return _refused(
        path,
        " is a pickle checkpoint. kvchat only reads safetensors; pickle can run code. "
        "Look for the model's .safetensors files",
    )


def _gguf(path: Path) -> ModelError:
    return _refused(
        path, " is a GGUF file. kvchat reads safetensors: use the repository it was made from"
    )


def _header_bytes(path: Path, start: bytes, size: int) -> int:
    """The header's length, with the other formats told apart by their first bytes."""
    if start.startswith(b"version https://git-lfs"):
        raise _refused(path, " is a git-LFS pointer, not the weights; run `git lfs pull` there")
    if start.startswith(b"GGUF"):
        raise _gguf(path)
    is_json = start[8:9] == b"{"  # a header of 640 bytes begins like a pickle does
    if start.startswith(_PICKLE_MAGIC) and not is_json:
        raise _pickle(path)
    num_bytes = int.from_bytes(start[:8], "little")
    if size < 10 or num_bytes > size - 8:
        raise _refused(path, f": header says {num_bytes} bytes, file has {size}")
    if num_bytes > MAX_HEADER_BYTES:
        raise _refused(path, f": header is {num_bytes / 1e6:.0f} MB; limit 25 MB")
    if not is_json:
        raise _refused(path, ": not a strict safetensors header: it does not start with {")
    return num_bytes


def _parse(path: Path, raw: bytes, data_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    # Counted before parsing, which takes 20 times the header's size in memory. A tensor has 1
    # brace and 10 quotes; quotes inside metadata texts are escaped and not counted.
    num_quotes = raw.count(b'"') - raw.count(b'\\"')
    if raw.count(b"{") > 2 * MAX_TENSORS or num_quotes > 11 * MAX_TENSORS:
        raise _refused(path, f": header has too many entries; limit {MAX_TENSORS:,} tensors")
    try:
        entries = json.loads(raw, object_pairs_hook=_without_duplicates)
    except _DuplicateError as error:
        raise _not_strict(path, f'duplicate name "{quoted(error.args[0])}"') from None
    except (ValueError, RecursionError):
        raise _not_strict(path, "it is not JSON") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _not_strict(path, "metadata must be texts by name")
    if len(entries) > MAX_TENSORS:
        raise _refused(path, f": header has {len(entries):,} tensors; limit {MAX_TENSORS:,}")
    tensors = {name: _tensor_info(path, name, entry) for name, entry in entries.items()}
    problem = _misplaced(tensors, data_bytes)
    if problem is not None:
        raise _refused(path, f": {problem}")
    return tensors, metadata


class _DuplicateError(Exception):
    """A JSON object that has a name twice; its argument is the name."""


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise _DuplicateError(name)
        found[name] = value
    return found


def _not_strict(path: Path, why: str) -> ModelError:
    return _refused(path, f": not a strict safetensors header: {why}")


def _tensor_info(path: Path, name: str, entry: object) -> TensorInfo:
    if not _NAME.fullmatch(name) or ".." in name:
        raise _refused(path, f': tensor name not allowed: "{quoted(name, 40)}"')
    shown = f'tensor "{quoted(name, 60)}"'
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _not_strict(path, f"{shown} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise _refused(path, f": {shown}: dtype {quoted(str(dtype), 30)} is not known")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _not_strict(path, f"{shown}: shape and data_offsets must be lists of sizes")
    num_values = 1
    for dim in shape[: _MAX_RANK + 1]:
        num_values *= dim
    if len(shape) > _MAX_RANK or max(shape, default=0) > 2**31 or num_values >= 2**60:
        raise _refused(path, f": {shown}: shape {quoted(str(shape[:9]), 60)} overflows")
    begin, end = offsets
    if begin > end:
        raise _refused(path, f": {shown}: bytes {begin}-{end} are reversed")
    num_bytes = num_values * _DTYPE_BITS[dtype] // 8
    if end - begin != num_bytes:
        raise _refused(path, f": {shown}: {end - begin} bytes, its shape needs {num_bytes}")
    return TensorInfo(path, dtype, tuple(shape), begin, end)


def _are_sizes(values: object) -> bool:
    """Whether this is a list of whole numbers that fit 63 bits."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _misplaced(tensors: dict[str, TensorInfo], data_bytes: int) -> str | None:
    """What is wrong with the order of the tensors' bytes: they must tile the data exactly."""
    at, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        shown = f'tensor "{quoted(name, 60)}": bytes {info.begin}-{info.end}'
        if info.begin < at:
            return f'{shown} overlap tensor "{quoted(before, 60)}"'
        if info.begin > at:
            return f"{shown} leave a hole after {at}"
        if info.end > data_bytes:
            return f"{shown} end past the data ({data_bytes} bytes); the file is cut short"
        at, before = info.end, name
    return None if at == data_bytes else f"{data_bytes - at} bytes of data belong to no tensor"
