"""Kernels from source to launch, as far as a machine without a GPU can show it: signatures,
argument checks, compiling for every architecture, the cubin cache, what a launch hands to CuPy."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_builds import builds

from kvchat import paths
from kvchat.attention import kernels, nvrtc, signature
from kvchat.attention.signature import ArgumentCheck, Parameter
from kvchat.errors import UsageError

ARCHS = (75, 80, 89, 90)
SOURCES = sorted(path.name for path in paths.data_dir("kernels_cu").glob("*.cu"))


@pytest.fixture(scope="module")
def compiler():
    try:
        return nvrtc.load_nvrtc()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "kvchat" / "cubin"


@pytest.mark.parametrize("name", SOURCES)
def test_a_kernel_file_compiles_for_every_architecture(name, compiler, capsys):
    """Prints registers, shared memory and spills of the first constants on sm_90."""
    source, (first, *others) = signature.inline_source(name), builds(name)
    wanted = [(first, arch) for arch in ARCHS] + [(other, 75) for other in others]

    def compile_one(defines, arch):
        options = [*kernels.compile_options(defines, arch), "--ptxas-options=-v"]
        cubin, log = compiler.compile(source, name, options)
        assert cubin[:4] == b"\x7fELF"
        return log

    with ThreadPoolExecutor(2) as threads:
        logs = list(threads.map(lambda build: compile_one(*build), wanted))

    rows = ptxas_rows(logs[ARCHS.index(90)])
    with capsys.disabled():
        for kernel, registers, shared_bytes, spilled_bytes in rows:
            print(
                f"\n{kernel}: {registers} registers, {shared_bytes} bytes of static shared memory,"
                f" {spilled_bytes} bytes spilled",
                end="",
            )
    assert [row[0] for row in rows] == sorted(signature.kernel_names(name))
    if name == "paged_decode.cu":
        assert [row[3] for row in rows] == [0]


def ptxas_rows(log):
    """(kernel, registers, bytes of static shared memory, bytes spilled) from ptxas -v."""
    rows = []
    for part in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part).group(1)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        shared = re.search(r"(\d+) bytes smem", part)
        spills = int(re.search(r"(\d+) bytes spill stores", part).group(1))
        rows.append((name, registers, int(shared.group(1)) if shared else 0, spills))
    return sorted(rows)


def test_a_source_that_does_not_compile_shows_the_compilers_words(compiler):
    with pytest.raises(nvrtc.CompileError, match=r"(?s)bad.cu -arch=sm_80.*bad.cu\(1\): error"):
        compiler.compile('extern "C" __global__ void k(', "bad.cu", ["-arch=sm_80"])


def test_a_missing_compiler_is_told_with_what_to_install():
    with pytest.raises(UsageError, match=r"NVRTC.*CUDA 99, was not found.*kvchat\[cuda99\]"):
        nvrtc.load_nvrtc(99)


def test_a_cubin_is_compiled_once(compiler, cache, monkeypatch):
    first = kernels.compile_kernel_file("silu_mul.cu", {"SCALAR_BF16": 0}, 80)
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", None)  # a second call would fail

    assert kernels.compile_kernel_file("silu_mul.cu", {"SCALAR_BF16": 0}, 80) == first
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


def test_a_cubins_key_covers_source_constants_architecture_and_compiler(cache, monkeypatch):
    compiled = []

    class Compiler:
        version = (13, 0)

        def compile(self, source, file_name, options):
            compiled.append(options)
            return repr((source, options)).encode(), ""

    compiler = Compiler()
    monkeypatch.setattr(kernels, "load_nvrtc", lambda major: compiler)
    source = "one"
    monkeypatch.setattr(kernels, "inline_source", lambda name: source)

    def compile_file(defines=None, arch=80):
        return kernels.compile_kernel_file("x.cu", defines or {"A": 1}, arch)

    compile_file()
    compile_file({"A": 2})
    compile_file(arch=90)
    source = "two"
    compile_file()
    compiler.version = (13, 1)
    compile_file()
    compile_file()

    assert len(compiled) == 5
    assert len(list(cache.iterdir())) == 5


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(compiler, monkeypatch, tmp_path):
    (tmp_path / "kvchat").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    cubin = kernels.compile_kernel_file("silu_mul.cu", {"SCALAR_BF16": 0}, 80)

    assert cubin[:4] == b"\x7fELF"


def test_includes_are_put_in_place_once_and_the_emulator_left_out():
    source = signature.inline_source("gather_blocks.cu")

    assert source.count("constexpr u32 FULL_MASK") == 1
    assert source.count("constexpr int PART_BYTES") == 1
    assert not re.search(r"^#include", source.replace('#include "emulator', ""), re.MULTILINE)
    assert "namespace emulator" not in source


def test_signatures_are_read_from_the_source():
    parameters = signature.signature("silu_mul.cu", "silu_mul_kernel", {"SCALAR_BF16": 1})

    assert parameters == (
        Parameter("out", "bfloat16", is_array=True, is_const=False),
        Parameter("gate_up", "bfloat16", is_array=True, is_const=True),
        Parameter("gate_up_stride", "int64", is_array=False, is_const=True),
        Parameter("size", "int32", is_array=False, is_const=True),
    )
    for name in SOURCES:
        for kernel in signature.kernel_names(name):
            assert signature.signature(name, kernel, {})


PARAMETERS = signature.signature("silu_mul.cu", "silu_mul_kernel", {"SCALAR_BF16": 0})


CHECK = ArgumentCheck(PARAMETERS)


def args(**changed):
    gate_up = torch.zeros(2, 64).half()
    given = {"out": torch.zeros(2, 32).half(), "gate_up": gate_up, "gate_up_stride": 64, "size": 32}
    return list({**given, **changed}.values())


ROWS = torch.zeros(4, 128).half()[::2]  # 256 elements apart


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (
            {"out": torch.zeros(2, 32)},
            TypeError,
            "out must be a tensor of torch.float16, not torch.float32",
        ),
        ({"out": 3}, TypeError, "out must be a tensor of torch.float16, not 3"),
        ({"out": torch.zeros(32, 2).half().mT}, ValueError, "out is not contiguous"),
        ({"out": torch.zeros(65).half()[1:]}, ValueError, "out is not aligned to 16 bytes"),
        ({"gate_up": ROWS}, ValueError, "rows 256 elements apart, not 64"),
        ({"gate_up": ROWS[:, ::2], "gate_up_stride": 256}, ValueError, "gate_up is not contiguous"),
        ({"gate_up": torch.zeros(2, 68).half(), "gate_up_stride": 68}, ValueError, "not aligned"),
        ({"size": 32.0}, TypeError, "size must be int, not 32.0"),
        ({"size": True}, TypeError, "size must be int"),
        ({"size": 2**31}, ValueError, "size = 2147483648 does not fit in 32 bits"),
        ({"gate_up_stride": np.int64(64)}, TypeError, "gate_up_stride must be int"),
        ({"more": 1}, TypeError, "5 arguments for 4 parameters"),
    ],
)
def test_an_argument_that_is_not_what_the_kernel_declares_is_refused(changed, error, text):
    with pytest.raises(error, match=re.escape(text)):
        CHECK(args(**changed))


def test_arguments_as_declared_pass():
    CHECK(args())
    CHECK(args(out=None))
    CHECK(args(gate_up=ROWS, gate_up_stride=256))
    CHECK(args(gate_up=ROWS[:1]))  # of one row no stride is seen


class FakeTensor:
    """What a launch reads of a CUDA tensor."""

    dtype, shape, device = torch.float16, (2, 64), SimpleNamespace(type="cuda")

    def data_ptr(self):
        return 0x7F00_0000_0040

    def element_size(self):
        return 2

    def stride(self):
        return (64, 1)


def test_a_launch_packs_arguments_at_their_width_on_torchs_stream(monkeypatch):
    launched = []
    monkeypatch.setattr(kernels, "current_stream", lambda: "torch's stream")
    kernel = kernels.Kernel("k", PARAMETERS, 1000, lambda *call: launched.append(call))
    tensor = FakeTensor()

    kernel.launch((4, 1, 1), (32, 1, 1), [None, tensor, 64, 32], 1000)

    grid, block, packed, shared_bytes, stream = launched[0]
    assert (grid, block, shared_bytes, stream) == ((4, 1, 1), (32, 1, 1), 1000, "torch's stream")
    assert [(type(x), int(x)) for x in packed] == [
        (np.uint64, 0),
        (np.uint64, 0x7F00_0000_0040),
        (np.int64, 64),
        (np.int32, 32),
    ]


def test_a_launch_refuses_tensors_of_the_host_and_more_memory_than_was_allowed(monkeypatch):
    monkeypatch.setattr(kernels, "current_stream", lambda: None)
    kernel = kernels.Kernel("k", PARAMETERS, 1000, lambda *call: pytest.fail("launched"))

    with pytest.raises(ValueError, match="a tensor on cpu was given to a kernel"):
        kernel.launch((1,), (32,), args())
    with pytest.raises(TypeError, match="k: size must be int"):
        kernel.launch((1,), (32,), args(size=1.5))
    with pytest.raises(AssertionError, match="1001 shared bytes"):
        kernel.launch((1,), (32,), args(), 1001)


@pytest.fixture
def cuda(monkeypatch):
    """A torch for CUDA 13 with an H100, and a CuPy whose version the test sets."""
    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=lambda: 13000))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P40")
    kernels.check_cuda.cache_clear()
    yield cupy
    kernels.check_cuda.cache_clear()


def test_torch_and_cupy_of_one_cuda_pass(cuda):
    assert kernels.check_cuda() == 13


def test_two_cuda_versions_are_told_with_the_way_out(cuda):
    cuda.cuda.runtime.runtimeGetVersion = lambda: 12090

    with pytest.raises(UsageError, match=r"CUDA 13 and CuPy for CUDA 12.*uninstall cupy-cuda12x"):
        kernels.check_cuda()


def test_a_missing_cupy_is_told_with_the_extra(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)

    with pytest.raises(UsageError, match=r"CuPy is missing.*kvchat\[cuda13\]"):
        kernels.check_cuda()


def test_a_torch_without_cuda_and_an_old_gpu_are_told(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    with pytest.raises(UsageError, match="Tesla P40 is sm_61; kvchat's CUDA kernels need sm_75"):
        kernels.check_cuda()

    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match="a build without CUDA"):
        kernels.check_cuda()


def test_compiling_needs_neither_torch_nor_cupy():
    import subprocess

    code = (
        "import sys; from kvchat.attention import kernels, signature, cuda_ops;"
        "print([m for m in ('torch', 'cupy', 'numba') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parent.parent
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)

    assert out.stdout.strip() == "[]", out.stderr
