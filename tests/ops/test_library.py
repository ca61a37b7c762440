"""What torch knows of the operators, what they say to what does not fit when called directly; a missing library."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import ops
from ops import compiled, library, reference
from tests.ops.cases import MODES, Case, make

TENFOLD = torch.ops.tenfold
SHAPES = [6, 4, 3, 8]


def operator(case: Case):
    return TENFOLD.ms_deform_attn if case.mode == "locations" else TENFOLD.fused_ms_deform_attn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode, dtype):
    case = make(mode, dtype=dtype)
    value, *others = (t.requires_grad_() for t in case.tensors)
    opcheck(operator(case).default, (value, SHAPES, *others))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("references_too", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_the_backward(mode, references_too, deterministic):
    case = make(mode, dtype=torch.float32)
    value, *others = case.tensors
    grad = torch.randn(case.run(compiled).shape)
    if mode == "locations":
        opcheck(TENFOLD.ms_deform_attn_backward.default, (grad, value, SHAPES, *others, deterministic))
    else:
        arguments = (grad, value, SHAPES, *others, references_too, deterministic)
        opcheck(TENFOLD.fused_ms_deform_attn_backward.default, arguments)


@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph_for_all_sizes(device, mode):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(sizes_hw, *tensors):
        return Case(mode, sizes_hw, [tensors[0] * 2, *tensors[1:]]).run(ops).sin()

    compiled_run = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for sizes_hw in ([(3, 5), (2, 4)], [(4, 5), (2, 3)], [(6, 7), (8, 3)]):
        case = make(mode, sizes_hw=sizes_hw, Q=sum(h * w for h, w in sizes_hw), dtype=torch.float32)
        leaves = [t.requires_grad_() for t in case.tensors]
        found, expected = compiled_run(sizes_hw, *leaves), run(sizes_hw, *leaves)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(out.sum(), leaves) for out in (found, expected))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", MODES)
def test_double_backward_is_refused(mode):
    case = make(mode)
    leaves = [t.requires_grad_() for t in case.tensors]
    (grad,) = torch.autograd.grad(case.run(compiled).pow(2).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("other_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixed_dtypes_under_autocast(value_dtype, other_dtype):
    """Only the reference points stay as they are: rounded to bfloat16 they would be off by pixels."""
    value, references, offsets, logits = make("points").tensors
    tensors = [value.to(value_dtype), references.float(), offsets.to(other_dtype), logits.to(other_dtype)]
    case = Case("points", [(6, 4), (3, 8)], tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.results(ops)
    expected = case.results(reference)
    assert [t.dtype for t in found] == [t.dtype for t in (tensors[0], *tensors)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-8)


def test_meta_tensors_have_shapes_only():
    case = make("points", dtype=torch.float32)
    out = Case("points", case.sizes_hw, [t.to("meta") for t in case.tensors]).run(ops)
    assert out.device.type == "meta" and out.shape == case.run(ops).shape


VALUE, OTHERS = torch.zeros(2, 48, 3, 5), (torch.zeros(2, 7, 3, 2, 4, 2), torch.zeros(2, 7, 3, 2, 4))
POINTS, LOGITS = torch.zeros(2, 7, 2, 2), torch.zeros(2, 7, 3, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VALUE[0], SHAPES, *OTHERS), r"value: 3 axes, expected \(B, S, M, E\)"),
        ((VALUE.half(), SHAPES, *OTHERS), "value: Half, expected Float, BFloat16 or Double"),
        ((VALUE.long(), SHAPES, *OTHERS), "value: Long, expected"),
        ((VALUE[..., :0], SHAPES, *OTHERS), "value: M = 3, E = 0, expected at least 1"),
        ((VALUE, [], *OTHERS), "spatial_shapes: 0 integers, expected H, W of each level"),
        ((VALUE, [6, 4, 24], *OTHERS), "spatial_shapes: 3 integers"),
        ((VALUE, [6, 4, 3, 7], *OTHERS), "value: S = 48, expected 45"),
        ((VALUE, [-6, -4, 3, 8], *OTHERS), "spatial_shapes: -6 x -4, expected 1 to"),
        ((VALUE, [6, 4, 0, 8], *OTHERS), "spatial_shapes: 0 x 8, expected 1 to"),
        ((VALUE, [2**24, 2**24, 3, 8], *OTHERS), "spatial_shapes: 281474976710656 pixels and more"),
        ((VALUE, [2**62, 4, 3, 8], *OTHERS), "spatial_shapes: 4611686018427387904 x 4"),
        ((VALUE, SHAPES, OTHERS[0][0], OTHERS[1]), "sampling_locations: 5 axes, expected"),
        ((VALUE, SHAPES, OTHERS[0][:1], OTHERS[1]), r"sampling_locations: shape \(1, 7, 3, 2, 4, 2\), expected \(2,"),
        ((VALUE, SHAPES, OTHERS[0].double(), OTHERS[1]), "sampling_locations: Double, expected Float"),
        ((VALUE, SHAPES, OTHERS[0][:, :, :, :, :0], OTHERS[1]), "sampling_locations: L = 2, P = 0, expected"),
        ((VALUE, SHAPES, torch.zeros(2, 7, 3, 2, 257, 2), OTHERS[1]), "P = 257, expected L.P of 1 to 512"),
        ((VALUE, SHAPES, OTHERS[0], OTHERS[1][:, :6]), r"attention_weights: shape \(2, 6, 3, 2, 4\), expected \(2, 7,"),
        ((VALUE, SHAPES, POINTS, OTHERS[0], LOGITS[..., :7]), r"attention_logits: shape \(2, 7, 3, 7\), expected"),
        ((VALUE, SHAPES, POINTS[..., :1], OTHERS[0], LOGITS), "reference_points: 1 numbers each, expected 2 or 4"),
        ((VALUE, SHAPES, POINTS[:, :6], OTHERS[0], LOGITS), r"reference_points: shape \(2, 6, 2, 2\), expected"),
        ((VALUE, SHAPES, POINTS.bfloat16(), OTHERS[0], LOGITS), "reference_points: BFloat16, expected Float"),
    ],
)
def test_called_directly_with_what_does_not_fit(arguments, message):
    run = TENFOLD.ms_deform_attn if len(arguments) == 4 else TENFOLD.fused_ms_deform_attn
    with pytest.raises(RuntimeError, match=message):
        run(*arguments)


def test_gradient_that_does_not_fit():
    with pytest.raises(RuntimeError, match=r"grad: shape \(2, 7, 14\), expected \(2, 7, 15\)"):
        TENFOLD.ms_deform_attn_backward(torch.zeros(2, 7, 14), VALUE, SHAPES, *OTHERS, False)
    with pytest.raises(RuntimeError, match="grad: Double, expected Float"):
        TENFOLD.ms_deform_attn_backward(torch.zeros(2, 7, 15).double(), VALUE, SHAPES, *OTHERS, False)


def test_too_many_points():
    with pytest.raises(ValueError, match=r"sampling_locations: L\*P = 2 \* 300 points, expected at most 512"):
        make("locations", P=300, Q=1).run(ops)


def test_unknown_instruction_set():
    with pytest.raises(ValueError, match="TENFOLD_CPU_ISA: 'sse9', expected one of avx512, avx2, portable"):
        library.choose_cpu_isa("sse9")


def test_cuda_tensors_need_a_library_with_cuda(monkeypatch):
    monkeypatch.setattr(library, "CUDA_ARCHS", "")
    message = r"value: on cuda, but the library was built without CUDA .* `python setup.py build_ext"
    with pytest.raises(RuntimeError, match=message):
        library.check(torch.device("cuda"))


USE = """
import torch, ops
centre, one = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
print(ops.ms_deform_attn(one[0], [(1, 1)], centre, one))
"""


def use(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder)} | environment
    return subprocess.run([sys.executable, "-c", USE], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_missing_library_says_how_to_build_it(tmp_path):
    source = Path(ops.__file__).parent
    shutil.copytree(source, tmp_path / "ops", ignore=shutil.ignore_patterns("*.so", "__pycache__", "csrc"))
    found = use(tmp_path)
    assert found.returncode == 1
    assert "RuntimeError: _C.abi3.so of the package ops is missing: `make build`" in found.stderr
    found = use(tmp_path, TENFOLD_OP="reference")
    assert found.returncode == 0 and "tensor([[[1.]]])" in found.stdout


def test_a_library_that_does_not_load_says_so(tmp_path):
    source = Path(ops.__file__).parent
    shutil.copytree(source, tmp_path / "ops", ignore=shutil.ignore_patterns("*.so", "__pycache__", "csrc"))
    (tmp_path / "ops" / "_C.abi3.so").write_text("no library")
    found = use(tmp_path)
    assert found.returncode == 1
    assert f"RuntimeError: _C.abi3.so does not load beside torch {torch.__version__}" in found.stderr
    assert use(tmp_path, TENFOLD_OP="reference").returncode == 0


@pytest.mark.parametrize(
    ("archs", "found"),
    [
        (None, ["80", "90"]),
        ("80;90", ["80", "90"]),
        ("75, 90a", ["75", "90a"]),
        ("none", []),
        ("sm_80", None),
        ("", None),
    ],
)
def test_architectures_that_the_build_compiles_for(archs, found, monkeypatch):
    monkeypatch.setattr("setuptools.setup", lambda **settings: None)
    names = runpy.run_path(str(Path(ops.__file__).parents[1] / "setup.py"))
    monkeypatch.setitem(names["cuda_archs"].__globals__, "nvcc", lambda: "nvcc")
    monkeypatch.delenv("TENFOLD_CUDA_ARCHS", raising=False)
    if archs is not None:
        monkeypatch.setenv("TENFOLD_CUDA_ARCHS", archs)
    if found is None:
        with pytest.raises(SystemExit, match=f"error: TENFOLD_CUDA_ARCHS: '{archs}', expected numbers like 80 90"):
            names["cuda_archs"]()
    else:
        assert names["cuda_archs"]() == found
        gencodes = [flag for flag in names["nvcc_command"]() if "gencode" in flag] if found else []
        assert [flag.rpartition("_")[2] for flag in gencodes[:-1]] == found  # and PTX of the last
    monkeypatch.setitem(names["cuda_archs"].__globals__, "nvcc", lambda: None)
    assert names["cuda_archs"]() == []  # no toolkit: for the CPU only


def test_environment_chooses(tmp_path):
    root = Path(ops.__file__).parent.parent
    assert use(root, TENFOLD_CPU_ISA="portable").returncode == 0
    for name in ("TENFOLD_CPU_ISA", "TENFOLD_OP"):
        found = use(root, **{name: "wrong"})
        assert found.returncode == 1 and f"ValueError: {name}: 'wrong', expected one of" in found.stderr


def test_the_guide_runs():
    """The Python of docs/op.md, from top to bottom."""
    guide = (Path(__file__).parents[2] / "docs" / "op.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    names: dict = {}
    exec("\n".join(blocks), names)
    assert len(blocks) == 2 and names["out"].shape == (1, 100, 256)
