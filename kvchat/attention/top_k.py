"""Launches top_k: each row's largest logits, or a token drawn from them. One object a vocabulary.

Nothing is allocated after the constructor but what the caller gives, so that all may be captured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvchat.attention.cuda_ops import Load
from kvchat.attention.signature import VECTOR_BYTES
from kvchat.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

TOP = 64  # candidates of a row: TOP of top_k.cuh
NUM_DRAW_FIELDS = 5  # of draw.cuh
_THREADS, _PART = 256, 4096  # of top_k.cu: logits of a block of threads
_MAX_PARTS = 31 * _THREADS // TOP
MAX_VOCAB_SIZE = _MAX_PARTS * _PART


class TopK:
    """For logits [rows, vocab_size] of one dtype, contiguous, up to max_rows rows.

    dtype: float16, bfloat16 or float32. `load` gives kernels, as in cuda_ops. Raises UsageError for
    a vocabulary of more than MAX_VOCAB_SIZE.
    """

    def __init__(
        self, vocab_size: int, dtype: str, max_rows: int, load: Load, device: str = "cuda"
    ) -> None:
        import torch

        if vocab_size > MAX_VOCAB_SIZE:
            raise UsageError(
                f"a vocabulary of {vocab_size:,} is more than the {MAX_VOCAB_SIZE:,} tokens that"
                " can be drawn from on a GPU: use --device cpu"
            )
        self._vocab_size, self._dtype = vocab_size, getattr(torch, dtype)
        self._num_parts = -(-vocab_size // _PART)
        shape = (max_rows, self._num_parts, TOP)
        self._keys = torch.empty(shape, dtype=torch.int32, device=device)
        self._ids = torch.empty(shape, dtype=torch.int32, device=device)
        # The kernels leave them at zero.
        self._counters = torch.zeros(max_rows, dtype=torch.int32, device=device)
        defines = {
            "SCALAR_BF16": int(dtype == "bfloat16"),
            "MERGE_ITEMS": -(-self._num_parts * TOP // _THREADS),
        }
        suffix = "_float" if dtype == "float32" else ""
        self._top_k = load("top_k.cu", f"top_k{suffix}_kernel", defines)
        self._largest = load("top_k.cu", f"largest{suffix}_kernel", defines)

    def largest(self, tokens: Tensor, logits: Tensor) -> None:
        """tokens, int64 [rows]: the id of each row's largest logit, the first of equals; -1 for a
        row with NaN or infinity."""
        args = [tokens, self._keys, self._ids, self._counters, logits, self._vocab_size]
        self._largest.launch(self._grid(logits), (_THREADS,), args)

    def top(self, values: Tensor, ids: Tensor, logits: Tensor) -> None:
        """values, float32, and ids, int32, [rows, TOP]: the largest first, of equals the lower id.

        Behind the last of a smaller vocabulary: -infinity. A row with NaN or infinity begins with
        NaN.
        """
        self._launch(None, values, ids, logits, None)

    def draw(self, tokens: Tensor, logits: Tensor, params: Tensor) -> None:
        """tokens, int64 [rows]: drawn by the rules of draw.cuh; -1 as in `largest`.

        params: float64 [rows, NUM_DRAW_FIELDS].
        """
        assert params.shape == (logits.shape[0], NUM_DRAW_FIELDS), f"{params.shape}"
        self._launch(tokens, None, None, logits, params)

    def _launch(
        self,
        tokens: Tensor | None,
        values: Tensor | None,
        ids: Tensor | None,
        logits: Tensor,
        params: Tensor | None,
    ) -> None:
        scratch = [self._keys, self._ids, self._counters]
        args = [tokens, values, ids, *scratch, logits, params, self._vocab_size]
        self._top_k.launch(self._grid(logits), (_THREADS,), args)

    def _grid(self, logits: Tensor) -> tuple[int, int]:
        num_rows, vocab_size = logits.shape
        assert vocab_size == self._vocab_size and logits.dtype == self._dtype, f"{logits.shape}"
        assert num_rows <= self._counters.shape[0], f"{num_rows} rows"
        assert logits.data_ptr() % VECTOR_BYTES == 0, "logits not aligned to vectors"
        return self._num_parts, num_rows
