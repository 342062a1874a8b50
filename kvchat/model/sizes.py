"""Bytes that a model's weights take, by their shapes alone. No torch."""

from __future__ import annotations

import math

from kvchat.config import DTYPE_BYTES, ModelConfig
from kvchat.model.families import LM_HEAD, tensor_shapes

WEIGHTS = ("auto", "int8")  # of --weights: the model's dtype, or one byte a value
# For products of many rows int8 weights are made wide in pieces of so many values, whole rows; of
# more where a row is longer.
DEQUANTISED_VALUES = 2**25
_SCALE_BYTES = 4  # float32, one for each output channel


def is_quantised(name: str) -> bool:
    """Whether --weights int8 stores this tensor as int8: the matrices of the layers, and an output
    matrix of its own. Embeddings, norms and biases stay as they are."""
    return name.endswith("_proj.weight") or name == LM_HEAD


def num_values(config: ModelConfig) -> int:
    """Weights that a running model holds, a tied matrix once."""
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def weight_bytes(config: ModelConfig, dtype: str, weights: str = "auto") -> int:
    """Bytes of them in `dtype`, with --weights as given."""
    assert weights in WEIGHTS, weights
    total = 0
    for name, shape in tensor_shapes(config).items():
        if weights == "int8" and is_quantised(name):
            total += math.prod(shape) + shape[0] * _SCALE_BYTES
        else:
            total += math.prod(shape) * DTYPE_BYTES[dtype]
    return total
