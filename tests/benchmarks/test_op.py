"""The operator's benchmarks, on the small one of their shapes."""

import sys
import types

import pytest
import torch
from PIL import Image

from benchmarks import op, op_gpu, precision, rivals
from framework.errors import UsageError
from ops import reference


def test_columns_are_times_and_their_ratios(tmp_path):
    rows = op.compare("decoder", op.arguments(op.QUERIES["decoder"], torch.float32), repeats=1)
    assert [row["isa"] for row in rows][-1] == "portable"
    for row in rows:
        for way in ("forward", "backward"):
            for side in ("reference", "stacked"):
                times_faster = row[f"{way}, {side} ms"] / row[f"{way} ms"]
                assert row[f"{way}, times faster than {side}"] == times_faster > 0
            assert row[f"{way} limit ms"] > 0
    op.draw(rows, "title", tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > 600


def test_limit_is_the_longer_of_memory_and_arithmetic():
    numbers = 2 * op.S * 256 + 3 * op.S * 128  # value and output, offsets and logits
    assert op.limit_ms(op.S, 4, bytes_per_s=4e3, flop_per_s=1e30)[0] == numbers
    flop = 2 * 4 * op.S * 128 * 32
    assert op.limit_ms(op.S, 4, bytes_per_s=1e30, flop_per_s=1e3) == [flop, 2 * flop]


def test_all_sides_compute_the_same():
    tensors = op.arguments(op.QUERIES["decoder"], torch.float32)
    results = [side(tensors) for side in op.sides().values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-4)


def test_errors_are_within_the_bound():
    """bfloat16: at most 1.5 times that of rounded value and weights with exact coordinates."""
    exact = [tensor.double() for tensor in op.arguments(op.QUERIES["decoder"], torch.float32)]
    others = precision.of_others(exact, [torch.bfloat16])
    double, single, low, autocast = precision.of_operator(exact, [torch.float64, torch.float32, torch.bfloat16])
    errors = [others[row]["bfloat16"] for row in others]
    assert errors == sorted(errors)
    assert double["output"] < 1e-13 < single["output"] < 1e-5
    assert low["output"] < 1.5 * others["value and weights"]["bfloat16"]
    assert low["output"] < autocast["output"] < others["and locations in [0, 1]"]["bfloat16"]


CEILINGS = {"copy, GB/s": 1.0} | {
    f"{what} {where}, {unit}": 1.0
    for where in ("near each other", "anywhere in a head")
    for what, unit in [
        ("gather 64 byte rows", "GB/s"),
        ("gather 128 byte rows", "GB/s"),
        ("add 128 byte rows by four", "G numbers/s"),
    ]
}


def test_sides_on_a_gpu_take_turns(monkeypatch):
    """On the CPU, where the settings change nothing and every side has the same inputs."""
    monkeypatch.setattr(op_gpu, "REPEATS", 1)

    def broken(tensors):
        raise RuntimeError("no kernel for this GPU\nand more")

    rivals = {"broken": (broken, (torch.float32,)), "narrow": (broken, (torch.float16,))}
    sides = op_gpu.sides(1, torch.float32, rivals)
    rows = op_gpu.rows_of("decoder", 1, torch.float32, torch.device("cpu"), CEILINGS, sides)
    assert [row["side"] for row in rows][:3] == ["fused", "by corners", "deterministic"] and len(rows) == 6
    assert rows[0]["fused is faster, forward"] == 1
    *rows, failed = rows
    assert all(row["forward us"] > 0 and row["backward us"] > 0 for row in rows)
    assert failed["says"] == "no kernel for this GPU" and failed["forward us"] is None
    assert not torch.are_deterministic_algorithms_enabled()


def test_shares_of_ceilings():
    """At one number of each ceiling in a nanosecond."""
    tensors = op.arguments(op.QUERIES["decoder"], torch.bfloat16)
    shares = op_gpu.shares_of("decoder", tensors, CEILINGS)
    numbers, moved = 4 * 300 * 128 * 32, 2 * (op.S + 300) * 256 + 4 * 300 * 128 * 3
    assert shares["backward"]["adds"] == pytest.approx(numbers / 1e9)
    assert shares["forward"]["gathers"] == pytest.approx(2 * numbers / 1e9)
    assert shares["forward"]["memory"] == pytest.approx(moved / 1e9)


def core_of_rival(value, shapes, starts, locations, weights, *rest):
    assert starts.tolist() == [0, 16700, 20900, 21950] and shapes.tolist()[0] == [100, 167]
    return reference.ms_deform_attn(value, op.SIZES_HW, locations, weights)


class FunctionOfRival:
    def apply(value, shapes, starts, locations, weights, im2col_step):
        return core_of_rival(value, shapes, starts, locations, weights)


class FlashFunction:
    def apply(value, shapes, starts, both, im2col_step, points):
        locations = both[..., :-16].view(*both.shape[:3], 4, points, 2)
        weights = both[..., -16:].float().softmax(-1).view(*both.shape[:3], 4, points)
        return core_of_rival(value, shapes, starts, locations, weights)


@pytest.mark.parametrize(
    ("name", "module", "content"),
    [
        ("published", "MultiScaleDeformableAttention", dict(ms_deform_attn_forward=core_of_rival)),
        ("mmcv", "mmcv.ops.multi_scale_deform_attn", dict(MultiScaleDeformableAttnFunction=FunctionOfRival)),
        (
            "triton",
            "msda_triton.frontend",
            dict(
                triton_multiscale_deformable_attention=lambda value, shapes, locations, weights, padding, corners: (
                    reference.ms_deform_attn(value, op.SIZES_HW, locations, weights).unflatten(-1, (8, 32))
                )
            ),
        ),
        ("dcnv4", "DCNv4.functions", dict(FlashDeformAttnFunction=FlashFunction)),
    ],
)
def test_rivals_get_the_same_problem(name, module, content, monkeypatch, tmp_path):
    """Their signatures as published, in front of plain torch."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for i in range(module.count(".") + 1):
        package = module.rsplit(".", i)[0]
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    vars(sys.modules[module]).update(content)
    tensors = op.arguments(op.QUERIES["decoder"], torch.float32)
    run, dtypes = rivals.load({name: tmp_path}, torch.device("cpu"))[name]
    expected = op.sides()["reference"](tensors)
    close = dict(rtol=5e-2, atol=0.2) if torch.float32 not in dtypes else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(tensors), expected, **close)


def test_a_rival_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UsageError, match=f"--published {tmp_path}: not built there, or for another torch: No module"):
        rivals.load({"published": tmp_path}, torch.device("cpu"))


def test_input_sets_differ_in_where_they_look():
    cpu = torch.device("cpu")
    near, far, anywhere = (
        op_gpu.input_sets(f"encoder, {kind}", 1, torch.bfloat16, cpu) for kind in ("noise 1", "noise 4", "anywhere")
    )
    assert sum(one[0].nbytes for one in near) > op_gpu.CACHES_BYTES
    assert near[0][2].std() < far[0][2].std()
    assert not torch.equal(anywhere[0][1], near[0][1])
