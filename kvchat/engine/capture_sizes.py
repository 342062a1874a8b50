"""Which numbers of rows and of tokens a GPU's steps are captured for. No torch."""

from __future__ import annotations

# Of a step of chunks. With more, what a GPU has to do takes longer than launching it.
_MIN_TOKENS, _MAX_TOKENS = 16, 2048
# From here on there is a size between two powers of two: what is padding is computed, too.
_ROW_HALVES_FROM, _TOKEN_HALVES_FROM = 16, 256


def row_sizes(max_rows: int) -> list[int]:
    """Rows that decode; the last is max_rows or more."""
    return _sizes(1, max_rows, _ROW_HALVES_FROM)


def chunk_sizes(max_tokens: int) -> list[int]:
    """New tokens of chunks; the last is the most that are captured."""
    return _sizes(_MIN_TOKENS, min(max_tokens, _MAX_TOKENS), _TOKEN_HALVES_FROM)


def _sizes(first: int, most: int, halves_from: int) -> list[int]:
    sizes = [first]
    while sizes[-1] < most:
        last = sizes[-1]
        is_power = last & (last - 1) == 0
        has_half = is_power and last >= halves_from
        sizes.append(last + last // 2 if has_half else 1 << last.bit_length())
    return sizes
