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
from kvchat.model.families import EMBEDDING, LM_HEAD, auto_dtype, check_tensors
from kvchat.model.header import TensorInfo
from kvchat.model.linear import Quantised
from kvchat.model.sizes import is_quantised
from kvchat.model.source import ModelSource

_PIECE_VALUES = 2**24  # of a matrix that is made int8, at a time


def choose_dtype(
    asked: str, source: ModelSource, config: ModelConfig, device: str, available: int
) -> str:
    """The dtype to compute in: `asked`, or for "auto" what families.auto_dtype says.

    Raises CapacityError when the weights alone are more than what is available on a CPU; whether a
    GPU has room for all that a run needs, engine/fit says.
    """
    if asked not in ("auto", *DTYPE_BYTES):
        raise UsageError(f"--dtype {quoted(asked)}: use auto, {', '.join(DTYPE_BYTES)}")
    num_values = sum(size // DTYPE_BYTES[dtype] for dtype, size in source.stored_bytes().items())
    dtype = asked
    if asked == "auto":
        dtype = auto_dtype(num_values, config.checkpoint_dtype, device, available)
    needed = num_values * DTYPE_BYTES[dtype]
    if device == "cpu" and needed > available:
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
    weights: str = "auto",
) -> Decoder:
    """The decoder with its weights in `dtype` on `device`, or with weights "int8" its matrices as
    int8 (model/sizes says which), made so piece by piece on the device.

    `progress` gets (bytes read, bytes in all). Raises ModelError for weights that do not fit the
    config or are not finite. What needs no conversion and no fusing stays mapped on a CPU, so its
    files must not be rewritten in place while the model runs (replacing them is fine).
    """
    tensors = check_tensors(source, config)
    try:
        files = {path: safe_open(path, framework="pt") for path in source.weight_files}
        is_int8 = weights == "int8"
        loader = _Loader(
            tensors, files, getattr(torch, dtype), torch.device(device), progress, is_int8
        )
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
        is_int8: bool,
    ) -> None:
        self._tensors = tensors
        self._files = files
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._is_int8 = is_int8
        self._total = sum(info.num_bytes for info in tensors.values())
        self._done = 0

    def untied(self, config: ModelConfig) -> ModelConfig:
        """`config`, not tied if the checkpoint has both ends with different values, as in
        transformers 5."""
        if not config.tie_word_embeddings or not {EMBEDDING, LM_HEAD} <= self._tensors.keys():
            return config
        is_same = torch.equal(self._mapped(EMBEDDING), self._mapped(LM_HEAD))
        self._total -= is_same * self._tensors[LM_HEAD].num_bytes  # it is not fetched
        return replace(config, tie_word_embeddings=is_same)

    def fetch(self, *names: str) -> Tensor | Quantised:
        """The named tensors stacked along their first dimension, in the loader's dtype; matrices
        as int8 if it was told so."""
        is_int8 = self._is_int8 and is_quantised(names[0])
        names = tuple(map(self._stored_name, names))
        parts = [self._mapped(name) for name in names]
        fetched = self._quantised(names, parts) if is_int8 else self._stacked(names, parts)
        self._done += sum(part.nbytes for part in parts)
        self._progress(self._done, self._total)
        return fetched

    def _stacked(self, names: tuple[str, ...], parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            stacked = parts[0].to(self._device, self._dtype)  # still the mapping if nothing changes
        else:
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            stacked = torch.empty(shape, dtype=self._dtype, device=self._device)
        for name, part, rows in zip(names, parts, stacked.split([*map(len, parts)]), strict=True):
            if len(parts) > 1:
                rows.copy_(part)
            _check_finite(rows, name)
        return stacked

    def _quantised(self, names: tuple[str, ...], parts: list[Tensor]) -> Quantised:
        """As int8, from what is stored: a piece of it at a time is on the device as float32."""
        num_in = parts[0].shape[1]
        made = Quantised.empty(sum(map(len, parts)), num_in, self._device)
        first = 0
        for name, part in zip(names, parts, strict=True):
            for piece in part.split(max(1, _PIECE_VALUES // num_in)):
                wide = piece.to(self._device).float()
                _check_finite(wide, name)
                made.put(first, wide)
                first += len(piece)
        return made

    def _stored_name(self, name: str) -> str:
        """Of tied embeddings a checkpoint may have only the other end."""
        return LM_HEAD if name == EMBEDDING and name not in self._tensors else name

    def _mapped(self, name: str) -> Tensor:
        """The tensor as stored, its memory the file's pages."""
        tensor: Tensor = self._files[self._tensors[name].path].get_tensor(name)
        # A file whose tensors lie at odd addresses is legal, but torch computes on aligned ones.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _check_finite(tensor: Tensor, name: str) -> None:
    low, high = tensor.aminmax()  # NaN spreads into both; no copy of a large tensor is made
    if torch.isfinite(low) and torch.isfinite(high):
        return
    num_bad = int((~torch.isfinite(tensor)).sum())
    hint = "the file is damaged or badly converted; fetch it again"
    if tensor.dtype == torch.float16:
        hint = "float16 holds up to 65504: use --dtype bfloat16 or float32"
    raise ModelError(f'tensor "{name}": {num_bad} non-finite values; {hint}')
