"""Checkpoint files -> the decoder's tensors: mapped, checked, converted one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvchat.config import DTYPE_BYTES, ModelConfig
from kvchat.errors import CapacityError, ModelError, UsageError, quoted
from kvchat.kv.planner import format_size
from kvchat.model.decoder import Decoder
from kvchat.model.families import tensor_shapes
from kvchat.model.header import FLOAT_DTYPES, TensorInfo
from kvchat.model.source import ModelSource

_EMBEDDING, _LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old Llama checkpoints carry and that are computed here.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
# Weights may take this share of the memory available on a CPU before 16 bits are preferred.
_FLOAT32_SHARE = 0.40


def choose_dtype(
    asked: str, source: ModelSource, config: ModelConfig, device: str, available: int
) -> str:
    """The dtype to compute in: `asked`, or for "auto" the checkpoint's on a GPU.

    On a CPU auto is float32 where its weights fit 40 % of the `available` bytes, for without
    AVX512-BF16 or AMX a prompt's matrix products in 16 bits take 4 to 5 times as long there
    (256 x 2048 x 5632: 55 ms against 233 and 285 ms); else the checkpoint's 16 bits.
    Raises CapacityError when the weights alone are more than what is available.
    """
    if asked not in ("auto", *DTYPE_BYTES):
        raise UsageError(f"--dtype {quoted(asked)}: use auto, {', '.join(DTYPE_BYTES)}")
    num_values = sum(size // DTYPE_BYTES[dtype] for dtype, size in source.stored_bytes().items())
    wide_bytes = num_values * DTYPE_BYTES["float32"]
    dtype = config.checkpoint_dtype if asked == "auto" else asked
    if asked == "auto" and device == "cpu" and wide_bytes <= available * _FLOAT32_SHARE:
        dtype = "float32"
    needed = num_values * DTYPE_BYTES[dtype]
    if needed > available:
        way_out = "--dtype bfloat16 or a smaller model" if dtype == "float32" else "a smaller model"
        raise CapacityError(
            f"the weights need {format_size(needed)} as {dtype}, {format_size(available)} are "
            f"available; use {way_out}"
        )
    return dtype


def load_decoder(
    source: ModelSource,
    config: ModelConfig,
    dtype: str,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decoder:
    """The decoder with its weights in `dtype` on `device`.

    `progress` gets (bytes read, bytes in all). Raises ModelError for weights that do not fit the
    config or are not finite. What needs no conversion and no fusing stays mapped on a CPU, so its
    files must not be rewritten in place while the model runs (replacing them is fine).
    """
    tensors = {n: i for n, i in source.tensors.items() if not n.endswith(_IGNORED_SUFFIX)}
    _check_tensors(tensors, config)
    try:
        files = {path: safe_open(path, framework="pt") for path in source.weight_files}
        loader = _Loader(tensors, files, getattr(torch, dtype), torch.device(device), progress)
        return Decoder(loader.untied(config), loader.fetch)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"model refused: {quoted(str(error), 200)}") from None


class _Loader:
    """Brings named tensors into their final dtype and place, at most one conversion at a time."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        files: Mapping[Path, safe_open],
        dtype: torch.dtype,
        device: torch.device,
        progress: Callable[[int, int], None],
    ) -> None:
        self._tensors = tensors
        self._files = files
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._total = sum(info.num_bytes for info in tensors.values())
        self._done = 0

    def untied(self, config: ModelConfig) -> ModelConfig:
        """`config`, not tied if the checkpoint has both ends with different values, as in
        transformers 5."""
        if not config.tie_word_embeddings or not {_EMBEDDING, _LM_HEAD} <= self._tensors.keys():
            return config
        is_same = torch.equal(self._mapped(_EMBEDDING), self._mapped(_LM_HEAD))
        self._total -= is_same * self._tensors[_LM_HEAD].num_bytes  # it is not fetched
        return replace(config, tie_word_embeddings=is_same)

    def fetch(self, *names: str) -> Tensor:
        """The named tensors stacked along their first dimension, in the loader's dtype."""
        names = tuple(map(self._stored_name, names))
        parts = [self._mapped(name) for name in names]
        if len(parts) == 1:
            stacked = parts[0].to(self._device, self._dtype)  # still the mapping if nothing changes
        else:
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            stacked = torch.empty(shape, dtype=self._dtype, device=self._device)
        for name, part, rows in zip(names, parts, stacked.split([*map(len, parts)]), strict=True):
            if len(parts) > 1:
                rows.copy_(part)
            _check_finite(rows, name)
        self._done += sum(part.nbytes for part in parts)
        self._progress(self._done, self._total)
        return stacked

    def _stored_name(self, name: str) -> str:
        """Of tied embeddings a checkpoint may have only the other end."""
        return _LM_HEAD if name == _EMBEDDING and name not in self._tensors else name

    def _mapped(self, name: str) -> Tensor:
        """The tensor as stored, its memory the file's pages."""
        tensor: Tensor = self._files[self._tensors[name].path].get_tensor(name)
        # A file whose tensors lie at odd addresses is legal, but torch computes on aligned ones.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _check_tensors(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
    """The checkpoint has what the config implies: every name, no other, shapes and dtypes."""
    shapes = tensor_shapes(config)
    if config.tie_word_embeddings and _LM_HEAD in tensors:
        shapes[_LM_HEAD] = shapes[_EMBEDDING]
        if _EMBEDDING not in tensors:
            del shapes[_EMBEDDING]
    missing = [name for name in shapes if name not in tensors]
    unexpected = [name for name in tensors if name not in shapes]
    if missing or unexpected:
        found = [
            f"{what} {len(names)} tensors (first: {quoted(names[0], 60)})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ModelError(f"model refused: {'; '.join(found)}; config.json is of another model?")
    for name, shape in shapes.items():
        info = tensors[name]
        if info.shape != shape:
            raise ModelError(
                f'model refused: tensor "{name}" has shape {list(info.shape)}, '
                f"config.json implies {list(shape)}"
            )
        if info.dtype not in FLOAT_DTYPES:
            raise ModelError(
                f'model refused: tensor "{name}" is {info.dtype}; '
                f"kvchat reads {', '.join(FLOAT_DTYPES)}: use the unquantized checkpoint"
            )


def _check_finite(tensor: Tensor, name: str) -> None:
    low, high = tensor.aminmax()  # NaN spreads into both; no copy of a large tensor is made
    if torch.isfinite(low) and torch.isfinite(high):
        return
    num_bad = int((~torch.isfinite(tensor)).sum())
    hint = "the file is damaged or badly converted; fetch it again"
    if tensor.dtype == torch.float16:
        hint = "float16 holds up to 65504: use --dtype bfloat16 or float32"
    raise ModelError(f'tensor "{name}": {num_bad} non-finite values; {hint}')
