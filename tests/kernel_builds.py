"""The constants with which tests compile each file of kernels_cu/: the 8B shape and a far one."""

_USUAL = [
    {"HEAD_DIM": 128, "BLOCK_SIZE": 16, "MAX_CODEC": 2, "SCALAR_BF16": 1},
    {"HEAD_DIM": 64, "BLOCK_SIZE": 32, "MAX_CODEC": 1, "SCALAR_BF16": 0},
]
_SCALARS = [{"SCALAR_BF16": 1}, {"SCALAR_BF16": 0}]
_SKINNY = {"WARPS": 8, "DEPTH": 4, "TOKEN_TILES": 1, "MIN_BLOCKS": 1, "GATED": 0}
_BUILDS = {
    "copy_blocks.cu": [{}],
    "plan_decode.cu": [{}],
    "top_k.cu": [{"MERGE_ITEMS": 8, **scalar} for scalar in _SCALARS],
    "rms_norm.cu": _SCALARS,
    "silu_mul.cu": _SCALARS,
    # 5 s a piece, so one shape here; its own tests compile others
    "paged_decode.cu": [{**_USUAL[0], "WARPS": 8, "TEAMS": 2, "SHARED_BYTES": 220000}],
    "skinny_gemm.cu": [{**_SKINNY, **scalar} for scalar in _SCALARS],
    "skinny_gemm_int8.cu": [{**_SKINNY, **scalar} for scalar in _SCALARS],
}


def builds(file_name: str) -> list[dict[str, int]]:
    """Sets of constants for a file, the one to report about first."""
    return _BUILDS.get(file_name, _USUAL)
