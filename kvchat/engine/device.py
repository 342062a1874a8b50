"""Which device a run is on, and what memory it has. A GPU that is there and cannot be used is never
passed over in silence. torch is imported when it is asked."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from kvchat.errors import UsageError
from kvchat.kv.planner import available_memory


class Choice(NamedTuple):
    """What choose_device says: "cpu" or "cuda", and why not the GPU, if there is one."""

    device: str
    warning: str = ""


def choose_device(
    asked: str = "auto", dtype: str = "auto", weights: str = "auto", host_mem: str | None = None
) -> Choice:
    """The device to run on. "auto" is the GPU where there is one that can do what is asked.

    cuda:N makes that GPU the only one this process sees, so it must come before anything else has
    looked for one. Raises UsageError where the device, or what only a GPU has, cannot be had.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", asked):
        raise UsageError(f"--device {asked}: choose auto, cpu, cuda or cuda:N")
    choice = Choice("cpu") if asked == "cpu" else _choose_gpu(asked, dtype)
    if choice.device == "cpu":
        _refuse_on_cpu(weights, host_mem, choice.warning)
    return choice


def _choose_gpu(asked: str, dtype: str) -> Choice:
    if ":" in asked:
        _see_only(int(asked.partition(":")[2]))
    if asked == "auto" and not has_gpu():
        return Choice("cpu")
    problem = gpu_problem()
    if not problem and dtype == "float32":
        problem = "on a GPU kvchat computes in float16 or bfloat16, and --dtype float32 was asked"
    if not problem:
        return Choice("cuda")
    if asked == "auto":
        return Choice("cpu", f"running on the CPU, not on the GPU: {problem}")
    raise UsageError(f"--device {asked}: {problem}")


def _refuse_on_cpu(weights: str, host_mem: str | None, why_cpu: str) -> None:
    """UsageError for what makes sense on a GPU alone."""
    behind = f" ({why_cpu})" if why_cpu else ""
    if host_mem is not None:
        raise UsageError(
            "--host-mem parks idle chats of a GPU in main memory; on a CPU the KV pool is there"
            f" already: raise --kv-mem instead{behind}"
        )
    if weights == "int8":
        raise UsageError(
            "--weights int8 is for a GPU; on a CPU use --dtype bfloat16, which takes half of"
            f" float32{behind}"
        )


def _see_only(idx: int) -> None:
    """Hide all GPUs but one from CUDA, which reads this when it starts."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else None
    if names is not None and idx >= len(names):
        raise UsageError(f"--device cuda:{idx}: CUDA_VISIBLE_DEVICES={shown} shows {len(names)}")
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts them
    os.environ["CUDA_VISIBLE_DEVICES"] = names[idx] if names else str(idx)


def has_gpu(root: Path = Path("/")) -> bool:
    """Whether this machine shows an NVIDIA GPU, usable or not."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):  # somebody wants it hidden
        return False
    if any((root / "dev").glob("nvidia[0-9]*")):
        return True
    is_wsl = (root / "dev/dxg").exists()
    return is_wsl and shutil.which("nvidia-smi") is not None


def gpu_problem() -> str:
    """Why the first GPU cannot be used, with what to install; "" where it can."""
    import torch

    from kvchat.attention.kernels import check_cuda
    from kvchat.attention.nvrtc import load_nvrtc

    if torch.version.cuda is not None and not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU that it can use; there is none, it is hidden,"
            f" or its driver is too old for CUDA {torch.version.cuda} (nvidia-smi shows both)"
        )
    try:
        load_nvrtc(check_cuda())
    except UsageError as error:
        return str(error)
    return ""


def device_memory(device: str) -> int:
    """Bytes that this process may still take there: free ones, and those torch holds unused."""
    if device == "cpu":
        return available_memory()
    import torch

    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


class GpuBytes(NamedTuple):
    """What stands in a GPU's memory, as those tell who hand it out."""

    allocated: int  # torch: given out
    reserved: int  # torch: taken from the driver
    cupy: int  # CuPy's pool
    used: int  # of all the memory: these, the CUDA context, loaded modules, other programs


def gpu_bytes() -> GpuBytes:
    """Asked of torch, CuPy and the driver; a CuPy that is not in use has nothing."""
    import torch

    cupy = sys.modules.get("cupy")
    free, total = torch.cuda.mem_get_info()
    return GpuBytes(
        torch.cuda.memory_allocated(),
        torch.cuda.memory_reserved(),
        cupy.get_default_memory_pool().total_bytes() if cupy else 0,
        total - free,
    )


def device_name(device: str) -> str:
    """As a person knows it: cpu, or cuda (NVIDIA H200)."""
    if device == "cpu":
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name()})"
