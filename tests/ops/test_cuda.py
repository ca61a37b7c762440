"""The CUDA kernels: emulated on the CPU and compiled everywhere, and run where there is a GPU."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from ops import compiled, library, reference
from tests.ops.cases import MODES, Case, make

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "ops" / "csrc"


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_emulated_kernels_equal_those_of_the_cpu(tmp_path):
    sources = [HERE / "emulate_cuda.cpp", CSRC / "cpu" / "portable.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-Wno-psabi", *sources, "-o", tmp_path / "emulate"]
    subprocess.run(command, check=True)
    found = subprocess.run([tmp_path / "emulate"], capture_output=True, text=True)
    differ, fewer = found.stdout.splitlines()
    assert differ == "0 differ" and found.returncode == 0
    assert float(fewer.partition(" times fewer adds by pixels")[0]) > 4


# Registers of a thread at most. 64 let 1024 threads of 256 a block live on a multiprocessor, 128 let 512.
REGISTERS = {"tiled_forward": 64, "tiled_backward": 128, "forward_kernel": 72, "backward_kernel": 160}


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_kernels_spill_nothing_and_keep_to_their_registers(tmp_path):
    """What ptxas says of every kernel, for both architectures that are built unless others are named."""

    def compile_for(arch: str) -> str:
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", code, "-cubin", "-o", tmp_path / arch]
        return subprocess.run(
            [*command, CSRC / "cuda" / "kernels.cu"], check=True, capture_output=True, text=True
        ).stderr

    with ThreadPoolExecutor() as pool:
        reports = dict(zip(("80", "90"), pool.map(compile_for, ("80", "90")), strict=True))
    for arch, report in reports.items():
        kernels = re.findall(
            r"entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", report, re.DOTALL
        )
        assert (
            sum("tiled" in name for name, _, _ in kernels) == 3 * 3 * 2 * 4
        )  # dtypes, widths, points; a forward, three backwards
        for name, spilled, registers in kernels:
            limit = next((most for kernel, most in REGISTERS.items() if kernel in name), 64)
            assert (int(spilled), int(registers) <= limit) == (0, True), f"sm_{arch} {name}: {registers} registers"


def on_gpu(case: Case) -> Case:
    return Case(case.mode, case.sizes_hw, [t.cuda() for t in case.tensors])


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [5, 16, 32, 64])
@pytest.mark.parametrize("mode", MODES)
def test_kernels_against_float64(mode, width, dtype):
    case = make(mode, E=width, Q=19)
    exact = case.results(reference)
    low = case.to(dtype)
    for found, plain, truth in zip(on_gpu(low).results(compiled), on_gpu(low).results(reference), exact, strict=True):
        norm = truth.norm()
        error, plain_error = ((t.cpu().double() - truth).norm() / norm for t in (found, plain))
        assert found.dtype == plain.dtype
        assert error <= 2 * plain_error + 10 * torch.finfo(torch.promote_types(plain.dtype, torch.float32)).eps


@on_a_gpu
@pytest.mark.parametrize("shape", [dict(B=0), dict(Q=0), dict(B=65, Q=2), dict(sizes_hw=[(1, 1)])], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_shapes_at_the_limits(mode, shape):
    case = make(mode, **shape, dtype=torch.float32)
    for found, expected in zip(on_gpu(case).results(compiled), case.results(compiled), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-4, atol=2e-4)


@pytest.fixture(params=[True, False], ids=["by pixels", "by corners"])
def sum_pixels(request):
    library.sum_pixels_on_gpu(request.param)
    yield
    library.sum_pixels_on_gpu(True)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("points", [1, 8, 16, 25])
@pytest.mark.parametrize("mode", MODES)
def test_a_query_for_each_pixel(mode, points, dtype, sum_pixels):
    """Tiles of pixels, of levels that tiles do not divide; more points than the tiled kernels take, too."""
    sizes_hw = [(9, 31), (11, 5)]
    case = make(mode, E=32, Q=9 * 31 + 11 * 5, P=points, sizes_hw=sizes_hw)
    exact, low = case.results(reference), case.to(dtype)
    for found, plain, truth in zip(on_gpu(low).results(compiled), on_gpu(low).results(reference), exact, strict=True):
        error, plain_error = ((t.cpu().double() - truth).norm() / truth.norm() for t in (found, plain))
        assert error <= 2 * plain_error + 10 * torch.finfo(torch.promote_types(plain.dtype, torch.float32)).eps


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [5, 32])
@pytest.mark.parametrize("mode", MODES)
def test_deterministic_backward(mode, width, dtype):
    """The same bits in every run, and numbers as near as those of the fast one."""
    case = on_gpu(make(mode, E=width, Q=400, dtype=dtype))
    fast = case.results(compiled)
    torch.use_deterministic_algorithms(True)
    try:
        first = case.results(compiled)
        for _ in range(20):
            assert all(map(torch.equal, case.results(compiled), first))
    finally:
        torch.use_deterministic_algorithms(False)
    for found, expected in zip(first, fast, strict=True):
        tolerance = 2e-2 if found.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@on_a_gpu
def test_unaligned_value():
    """An address that is no multiple of 16 bytes is for the generic kernels."""
    case = on_gpu(make("points", E=32, dtype=torch.float32))
    value, *others = case.tensors
    moved = torch.empty(value.numel() + 1, device="cuda")[1:].view_as(value).copy_(value)
    found = Case("points", case.sizes_hw, [moved, *others]).run(compiled)
    torch.testing.assert_close(found, case.run(compiled), rtol=1e-4, atol=1e-4)


@on_a_gpu
def test_stream_and_graph():
    case = on_gpu(make("boxes", E=32, Q=300, dtype=torch.float32))
    expected = case.run(compiled)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        value, *others = case.tensors
        doubled = Case("boxes", case.sizes_hw, [value * 2, *others]).run(compiled)
    stream.synchronize()
    torch.testing.assert_close(doubled, 2 * expected)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run(compiled)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected)
