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
from tests.ops.conftest import GPU

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "ops" / "csrc"


def on_a_gpu(test):
    for mark in GPU:
        test = mark(test)
    return test


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
SPILLED_BYTES = 16  # at most, of a tiled backward in other shapes than the usual one
USUAL = "Li32ELi16E"  # channels of a head, points at most
REGISTERS = {"tiled_forward": 64, "tiled_backward": 160, "forward_kernel": 72, "backward_kernel": 160}


def said_when_built() -> str:
    """What ptxas said when the library was built; nothing where that was before a source changed, or without nvcc."""
    report, sources = CSRC.parent.parent / "build" / "ptxas.txt", [path for path in CSRC.rglob("*") if path.is_file()]
    fresh = report.exists() and report.stat().st_mtime >= max(path.stat().st_mtime for path in sources)
    return report.read_text() if fresh else ""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
def test_kernels_keep_to_their_registers(tmp_path):
    """What ptxas says of every kernel, for both architectures that are built unless others are named."""

    def report_of(arch: str) -> str:
        built = [part for part in said_when_built().split("ptxas info    : Compiling ") if f"for 'sm_{arch}'" in part]
        if built:
            return "".join(built)
        code = f"-gencode=arch=compute_{arch},code=sm_{arch}"  # takes a core for a minute
        command = ["nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", code, "-cubin", "-o", tmp_path / arch]
        run = subprocess.run([*command, CSRC / "cuda" / "kernels.cu"], check=True, capture_output=True, text=True)
        return run.stderr

    with ThreadPoolExecutor() as pool:
        reports = dict(zip(("80", "90"), pool.map(report_of, ("80", "90")), strict=True))
    for arch, report in reports.items():
        kernels = re.findall(
            r"entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", report, re.DOTALL
        )
        tiled = [name for name, _, _ in kernels if "tiled" in name]
        assert len(tiled) == 3 * 3 * 2 * 4  # dtypes, widths, most points; a forward, three backwards
        for name, spilled, registers in kernels:
            limit = next((most for kernel, most in REGISTERS.items() if kernel in name), 64)
            said = f"sm_{arch} {name}: {registers} registers, {spilled} bytes spilled"
            may_spill = SPILLED_BYTES if "tiled_backward" in name and USUAL not in name else 0
            assert int(registers) <= limit and int(spilled) <= may_spill, said


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc")
@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_program_that_measures_ceilings_compiles(arch, tmp_path):
    source = HERE.parent.parent / "benchmarks" / "ceilings.cu"
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", "-std=c++17", "-O3", "-Werror=all-warnings", code, "-cubin", "-o", tmp_path / "cubin", source]
    subprocess.run(command, check=True)


def on_gpu(case: Case) -> Case:
    return Case(case.mode, case.sizes_hw, [t.cuda() for t in case.tensors])


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
        # float64 is compared with itself: nothing but the order of operations differs.
        slack = 1e-13 if plain.dtype == torch.float64 else 10 * torch.finfo(torch.float32).eps
        assert error <= 2 * plain_error + slack


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


@on_a_gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graph_of_the_backward_too(deterministic):
    """Of an encoder in bfloat16, whose kernel needs more shared memory than is there without asking."""
    case = on_gpu(make("points", E=32, Q=17 * 23, M=2, sizes_hw=[(17, 23)], dtype=torch.bfloat16))
    torch.use_deterministic_algorithms(deterministic)
    try:
        expected = case.results(compiled)
        leaves = [t.detach().clone().requires_grad_() for t in case.tensors]
        grad = torch.randn(2, 17 * 23, 64, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        grad = grad.to(device="cuda", dtype=torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = Case("points", case.sizes_hw, leaves).run(compiled)
            captured = [out, *torch.autograd.grad(out, leaves, grad)]
        for tensor in captured:
            tensor.detach().zero_()
        graph.replay()
    finally:
        torch.use_deterministic_algorithms(False)
    for found, one in zip(captured, expected, strict=True):
        torch.testing.assert_close(found.detach(), one, rtol=2e-2, atol=2e-2)


@on_a_gpu
def test_deterministic_sums_at_their_limits():
    """Large gradients lose nothing to the integers, and what is no number stays none."""
    case = on_gpu(make("points", E=32, Q=40, dtype=torch.float32))
    leaves = [t.detach().clone().requires_grad_() for t in case.tensors]
    for factor in (1e-30, 1.0, 1e34):
        out = Case("points", case.sizes_hw, leaves).run(compiled)
        expected = torch.autograd.grad(out, leaves[0], torch.full_like(out, factor), retain_graph=True)[0]
        torch.use_deterministic_algorithms(True)
        try:
            [found] = torch.autograd.grad(out, leaves[0], torch.full_like(out, factor))
        finally:
            torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(found / factor, expected / factor, rtol=1e-4, atol=1e-5)
    leaves[3].data[0, 0, 0, 0] = float("nan")
    torch.use_deterministic_algorithms(True)
    try:
        [found] = torch.autograd.grad(Case("points", case.sizes_hw, leaves).run(compiled).sum(), leaves[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.isnan().any()


@on_a_gpu
def test_indices_past_two_to_the_31st():
    """Values, offsets and outputs of more numbers than 31 bits count: the last image has what it has alone."""
    sizes_hw, images = [(100, 167), (50, 84), (25, 42), (13, 21)], 400
    queries = sum(height * width for height, width in sizes_hw)
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of a GPU")
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, dtype=torch.float32):
        return torch.empty(images, *shape, dtype=dtype, device="cuda").normal_(generator=draw)

    value, offsets = normal(queries, 8, 32, dtype=torch.bfloat16), normal(queries, 8, 4, 4, 2)
    references, logits = normal(queries, 4, 2).sigmoid_(), normal(queries, 8, 16)
    assert min(value.numel(), offsets.numel()) > 2**31
    leaves = [t.requires_grad_() for t in (value, offsets, logits)]
    alone = [t[-1:].detach().clone().requires_grad_() for t in leaves]
    outs = [
        compiled.fused_ms_deform_attn(value, sizes_hw, where, offsets, logits)
        for (value, offsets, logits), where in ((leaves, references), (alone, references[-1:]))
    ]
    torch.testing.assert_close(outs[0][-1:], outs[1], rtol=0, atol=0)
    torch.autograd.backward(outs[0], outs[0].detach())
    torch.autograd.backward(outs[1], outs[1].detach())
    for tensor, one in zip(leaves, alone, strict=True):
        torch.testing.assert_close(tensor.grad[-1:], one.grad, rtol=2e-2, atol=2e-2)


@on_a_gpu
def test_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    case = make("points", E=32, dtype=torch.float32)
    second = Case("points", case.sizes_hw, [t.to("cuda:1") for t in case.tensors])
    for found, expected in zip(second.results(compiled), case.results(compiled), strict=True):
        assert found.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-4, atol=2e-4)


@on_a_gpu
def test_more_levels_than_kernels_are_told_of():
    case = on_gpu(make("points", sizes_hw=[(1, 1)] * 65, P=1, dtype=torch.float32))
    with pytest.raises(RuntimeError, match="spatial_shapes: more than 64 levels, expected at most that on a GPU"):
        case.run(compiled)
