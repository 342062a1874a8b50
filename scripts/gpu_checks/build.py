"""python -m gpu_checks.build [ARCH]: every kernel file into the cubin cache, a line of JSON each.

ARCH: as in 90; without it, the GPU's. Files compile side by side, one a core.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from kernel_builds import builds

from kvchat import paths
from kvchat.attention.kernels import compile_kernel_file, compile_options
from kvchat.attention.nvrtc import load_nvrtc
from kvchat.attention.paged_decode import HEAD_DIMS, decode_defines, default_tuning
from kvchat.attention.signature import inline_source
from kvchat.config import KVSpec
from kvchat.kv.layout import BlockLayout, Codec

Build = tuple[str, dict[str, int]]


def all_builds(max_shared: int = 227 << 10) -> Iterator[Build]:
    """(file, constants): those that tests compile, and decode attention for every pool."""
    for dim, dtype, lowest in itertools.product(HEAD_DIMS, ("bfloat16", "float16"), Codec):
        layout = BlockLayout(KVSpec(1, 8, dim, 16, dtype), lowest)
        yield "paged_decode.cu", decode_defines(layout, default_tuning(layout, max_shared))
    for path in sorted(paths.data_dir("kernels_cu").glob("*.cu")):
        if path.name != "paged_decode.cu":
            yield from ((path.name, defines) for defines in builds(path.name))


def compile_one(build: Build, arch: int, cuda_major: int | None) -> list[dict[str, Any]]:
    """A row a kernel: seconds of its file, registers, spilled bytes."""
    file_name, defines = build
    started = time.perf_counter()
    compile_kernel_file(file_name, defines, arch, cuda_major)
    seconds = round(time.perf_counter() - started, 2)
    options = [*compile_options(defines, arch), "--ptxas-options=-v"]
    _, log = load_nvrtc(cuda_major).compile(inline_source(file_name), file_name, options)
    return [
        {"kernel": name, "seconds": seconds, "registers": registers, "spilled_bytes": spilled}
        | {"constants": defines}
        for name, registers, spilled in resources(log)
    ]


def resources(log: str) -> Iterator[tuple[str, int, int]]:
    """(kernel, registers, bytes spilled) from what ptxas -v says."""
    for part in log.split("Compiling entry function")[1:]:
        found = [
            re.search(pattern, part)
            for pattern in (r"'(\w+)'", r"Used (\d+) registers", r"(\d+) bytes spill stores")
        ]
        name, registers, spilled = (match[1] if match else "0" for match in found)
        yield name, int(registers), int(spilled)


def _device() -> tuple[int, int | None, int]:
    """(architecture, CUDA major, shared memory of a block) of the GPU."""
    import torch

    from kvchat.attention.kernels import check_cuda
    from kvchat.attention.paged_decode import _max_shared

    cuda_major = check_cuda()
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor, cuda_major, _max_shared("cuda")


def main() -> None:
    """Prints the rows as they come."""
    given = sys.argv[1:]
    arch, cuda_major, max_shared = (int(given[0]), None, 227 << 10) if given else _device()
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        jobs = [
            processes.submit(compile_one, build, arch, cuda_major)
            for build in all_builds(max_shared)
        ]
        for job in jobs:
            for row in job.result():
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
