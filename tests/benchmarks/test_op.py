"""The operator's benchmarks, on the small one of their shapes."""

import torch
from PIL import Image

from benchmarks import op, op_gpu, precision


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


def test_sides_on_a_gpu_take_turns(monkeypatch):
    """On the CPU, where the settings change nothing and every side has the same inputs."""
    monkeypatch.setattr(op_gpu, "REPEATS", 1)
    monkeypatch.setattr(torch, "compile", lambda run: run)
    cpu = torch.device("cpu")
    rows = op_gpu.rows_of("decoder", 2, torch.float32, cpu, op_gpu.speed_of_copy(cpu), None)
    assert [row["side"] for row in rows][:3] == ["fused", "by corners", "deterministic"] and len(rows) == 6
    assert rows[0]["fused is faster, forward"] == 1
    assert all(row["forward us"] > 0 and row["backward us"] > 0 for row in rows)
    assert not torch.are_deterministic_algorithms_enabled()


def test_input_sets_differ_in_where_they_look():
    cpu = torch.device("cpu")
    near, far, anywhere = (
        op_gpu.input_sets(f"encoder, {kind}", 1, torch.bfloat16, cpu) for kind in ("noise 1", "noise 4", "anywhere")
    )
    assert sum(one[0].nbytes for one in near) > op_gpu.CACHES_BYTES
    assert near[0][2].std() < far[0][2].std()
    assert not torch.equal(anywhere[0][1], near[0][1])
