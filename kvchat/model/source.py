"""Where a model's parts are: a target named by a person -> ModelSource. No torch, no network.

A target is a .safetensors file, a folder, a shard index, or a hub id (model/hub fetches it). What
is not beside a single file may be in its metadata, under the file's name: config.json,
generation_config.json, tokenizer_config.json and tokenizer.json as JSON text, tokenizer.model as
base64.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvchat.errors import ModelError, UsageError, quoted
from kvchat.model.header import FLOAT_DTYPES, Header, TensorInfo, check_readable, read_header

# (what is going on, done, total): bytes while loading, kernels while compiling.
Progress = Callable[[str, int, int], None]

INDEX_NAME = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 25_000_000
_MAX_TOKENIZER_BYTES = 64 << 20
_MAX_SHARDS = 1000


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint that passed the loader's checks; the weights themselves are not read yet."""

    name: str
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, object]
    generation_config: Mapping[str, object]  # {} where the model has none, as the next two
    tokenizer_config: Mapping[str, object]
    special_tokens_map: Mapping[str, object]
    tokenizer_json: bytes | None
    tokenizer_model: bytes | None  # a serialised sentencepiece model
    chat_template: str | None  # jinja source
    fingerprint: bytes  # 32 bytes; other weights or another config.json give another one

    def stored_bytes(self) -> dict[str, int]:
        """Bytes of weights per dtype that kvchat computes with (float32, bfloat16, float16)."""
        found: Counter[str] = Counter()
        for info in self.tensors.values():
            if info.dtype in FLOAT_DTYPES:
                found[FLOAT_DTYPES[info.dtype]] += info.num_bytes
        return dict(found)


def resolve(target: str, progress: Progress = lambda what, done, total: None) -> ModelSource:
    """Find and check everything `target` needs. Raises UsageError for a name that is nowhere,
    ModelError for a model that is refused."""
    path = Path(target).expanduser()
    try:
        if path.is_dir():
            return _open(path, _weight_files(path), path.resolve().name)
        if path.exists() or path.is_symlink():
            return _open_file(path)
        if not _HUB_ID.fullmatch(target) or target.endswith((".safetensors", ".json")):
            raise UsageError(f"no such file or folder: {quoted(target)}{_near_names(path)}")
        from kvchat.model.hub import download

        folder = download(target, progress)
        return _open(folder, _weight_files(folder), target)
    except OSError as error:  # a name too long, a folder that may not be read
        raise UsageError(f"{quoted(target)} cannot be opened: {error.strerror}") from None


def _near_names(path: Path) -> str:
    """A suggestion, or where to look; the folder may not exist either."""
    folder = path.parent
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return f"; {quoted(str(folder))} is no folder either"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return "; did you mean " + " or ".join(quoted(str(folder / name)) for name in near) + "?"
    return "; name a .safetensors file, a model folder, a shard index or a hub id (org/name)"


def _open_file(path: Path) -> ModelSource:
    """A file that was named itself: a shard index, a shard of one, or a whole checkpoint."""
    if path.name.endswith(".safetensors.index.json"):
        return _open(path.parent, _indexed_files(path), path.resolve().parent.name)
    index = path.with_name(INDEX_NAME)
    if _SHARD.search(path.name) and index.exists():
        return _open(path.parent, _indexed_files(index), path.resolve().parent.name)
    return _open(path.parent, (path,), path.stem)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The weights of a model folder: one file, or the shards that its index names."""
    whole = folder / "model.safetensors"
    if whole.exists():
        return (_inside(whole, folder),)
    index = folder / INDEX_NAME
    if index.exists():
        return _indexed_files(index)
    entries = sorted(folder.iterdir())
    found = [entry for entry in entries if entry.suffix == ".safetensors"]
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{quoted(str(folder))} is a LoRA adapter; merge it into its base model first"
        )
    if len(found) == 1:
        return (_inside(found[0], folder),)
    if found:
        names = ", ".join(quoted(entry.name, 40) for entry in found[:3])
        raise ModelError(f"{quoted(str(folder))} has {len(found)} weight files; name one: {names}")
    for entry in entries:
        if entry.is_file():
            check_readable(entry)  # a pickle or GGUF is refused by name
    raise ModelError(
        f"no weights in {quoted(str(folder))}: looked for model.safetensors, {INDEX_NAME} "
        "and one *.safetensors file"
    )


def _indexed_files(index: Path) -> tuple[Path, ...]:
    """The shards of an index, each a plain name beside it."""
    weight_map = _read_json(index, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{quoted(str(index))}: no weight_map, so it names no shards")
    names = sorted({str(name) for name in weight_map.values()})
    if len(names) > _MAX_SHARDS:
        raise ModelError(f"index: {len(names)} shards; limit {_MAX_SHARDS}")
    for name in names:
        if "/" in name or "\\" in name or ".." in name or not name.endswith(".safetensors"):
            raise ModelError(f'index: shard "{quoted(name)}" is outside the model directory')
    absent = [name for name in names if not (index.parent / name).exists()]
    if absent:
        raise ModelError(
            f'index: {len(absent)} of {len(names)} shards are missing, first "{quoted(absent[0])}"'
        )
    return tuple(_inside(index.parent / name, index.parent) for name in names)


def _inside(path: Path, folder: Path) -> Path:
    """`path` unless it is a link out of its folder; the hub cache is made of links and is meant."""
    real, home = path.resolve(), folder.resolve()
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        home = home.parents[2]
    if real.is_relative_to(home):
        return path
    raise ModelError(
        f"model refused: {quoted(str(path))}: not a regular file, a link to {quoted(str(real))}"
    )


class _Parts:
    """The texts beside the weights, or in the metadata of a single weight file."""

    def __init__(self, folder: Path, metadata: Mapping[str, str]) -> None:
        self.folder = folder
        self.metadata = metadata

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """The file's bytes, None when the model has no such part."""
        path = self.folder / name
        if path.exists():
            return _read(_inside(path, self.folder), max_bytes)
        text = self.metadata.get(name)
        if text is None or not name.endswith(".model"):
            return None if text is None else text.encode("utf-8", "surrogatepass")
        try:
            return base64.b64decode(text, validate=True)
        except binascii.Error:
            raise ModelError(f"{name} in the file's metadata is not base64") from None

    def json(self, name: str) -> dict[str, object]:
        """The JSON object, {} when the model has no such part."""
        raw = self.read(name, _MAX_TOKENIZER_BYTES if "token" in name else _MAX_CONFIG_BYTES)
        return {} if raw is None else _parse_json(raw, name)


def _open(folder: Path, weight_files: tuple[Path, ...], name: str) -> ModelSource:
    headers = [read_header(path) for path in weight_files]
    parts = _Parts(folder, headers[0].metadata if len(headers) == 1 else {})
    config = parts.json("config.json")
    if not config:
        raise ModelError(
            f"no config.json in {quoted(str(folder))} nor in the file's metadata; "
            "copy the model's config.json and tokenizer.json (or tokenizer.model) beside it"
        )
    tokenizer_config = parts.json("tokenizer_config.json")
    return ModelSource(
        name=name,
        weight_files=weight_files,
        tensors=_merged(headers),
        config=config,
        generation_config=parts.json("generation_config.json"),
        tokenizer_config=tokenizer_config,
        special_tokens_map=parts.json("special_tokens_map.json"),
        tokenizer_json=parts.read("tokenizer.json", _MAX_TOKENIZER_BYTES),
        tokenizer_model=parts.read("tokenizer.model", _MAX_TOKENIZER_BYTES),
        chat_template=_chat_template(parts, tokenizer_config),
        fingerprint=_fingerprint(headers, config),
    )


def _merged(headers: list[Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for header in headers:
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise ModelError(f'index: two shards have tensor "{quoted(min(twice))}"')
        tensors |= header.tensors
    return tensors


def _chat_template(parts: _Parts, tokenizer_config: Mapping[str, object]) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json has; of several the default one."""
    raw = parts.read("chat_template.jinja", _MAX_CONFIG_BYTES)
    if raw is not None:
        return raw.decode("utf-8", "replace")
    found = tokenizer_config.get("chat_template")
    if found is None:
        found = parts.json("chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _fingerprint(headers: list[Header], config: Mapping[str, object]) -> bytes:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for header in headers:
        digest.update(header.fingerprint)
    return digest.digest()


def _read(path: Path, max_bytes: int) -> bytes:
    size = check_readable(path)
    if size > max_bytes:
        limit = max_bytes / 1e6
        raise ModelError(f"{quoted(str(path))} is {size / 1e6:.0f} MB; limit {limit:.0f} MB")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{quoted(str(path))} cannot be read: {error.strerror}") from None


def _read_json(path: Path, max_bytes: int) -> dict[str, object]:
    return _parse_json(_read(path, max_bytes), quoted(str(path)))


def _parse_json(raw: bytes, shown: str) -> dict[str, object]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{shown} is not JSON: {quoted(str(error))}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{shown} is not a JSON object")
    return found
