"""The CUDA kernels: emulated on the CPU everywhere, and run where there is a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from ops import compiled, reference
from tests.ops.cases import MODES, Case, make

HERE = Path(__file__).parent


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_emulated_kernels_equal_those_of_the_cpu(tmp_path):
    sources = [HERE / "emulate_cuda.cpp", HERE.parent.parent / "ops" / "csrc" / "cpu" / "portable.cpp"]
    command = ["g++", "-std=c++17", "-O1", "-Wno-psabi", *sources, "-o", tmp_path / "emulate"]
    subprocess.run(command, check=True)
    found = subprocess.run([tmp_path / "emulate"], capture_output=True, text=True)
    assert found.stdout == "0 of 12 differ\n" and found.returncode == 0


def on_gpu(case: Case) -> Case:
    return Case(case.mode, case.sizes_hw, [t.cuda() for t in case.tensors])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", [dict(B=0), dict(Q=0), dict(B=65, Q=2), dict(sizes_hw=[(1, 1)])], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_shapes_at_the_limits(mode, shape):
    case = make(mode, **shape, dtype=torch.float32)
    for found, expected in zip(on_gpu(case).results(compiled), case.results(compiled), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-4, atol=2e-4)
