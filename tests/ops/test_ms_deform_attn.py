"""The module, and what the public functions say to arguments that do not fit."""

import pytest
import torch

from ops import MSDeformAttn, fused_ms_deform_attn, ms_deform_attn

SIZES_HW = [(3, 2), (1, 4)]
S, L = 10, 2


def module(width: int = 24, num_heads: int = 4) -> MSDeformAttn:
    torch.manual_seed(0)
    return MSDeformAttn(width, num_levels=L, num_heads=num_heads, num_points=3)


def module_inputs(width: int = 24, numbers: int = 2) -> dict:
    return dict(
        query_BQD=torch.randn(2, 5, width),
        references_BQLN=torch.rand(2, 5, L, numbers),
        memory_BSD=torch.randn(2, S, width),
        spatial_shapes=SIZES_HW,
    )


def test_published_names_and_shapes():
    shapes = {name: tuple(parameter.shape) for name, parameter in module().named_parameters()}
    assert shapes == {
        "sampling_offsets.weight": (4 * L * 3 * 2, 24), "sampling_offsets.bias": (4 * L * 3 * 2,),
        "attention_weights.weight": (4 * L * 3, 24), "attention_weights.bias": (4 * L * 3,),
        "value_proj.weight": (24, 24), "value_proj.bias": (24,),
        "output_proj.weight": (24, 24), "output_proj.bias": (24,),
    }  # fmt: skip


def test_published_initialisation():
    attention = MSDeformAttn(width=32, num_levels=2, num_heads=8, num_points=4)
    star_MLP2 = attention.sampling_offsets.bias.detach().view(8, 2, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(directions):
        for point in range(4):
            expected = torch.tensor(direction, dtype=torch.float32) * (point + 1)
            torch.testing.assert_close(star_MLP2[head, :, point], expected.expand(2, 2), rtol=0, atol=1e-5)
    for zeros in (attention.sampling_offsets.weight, *attention.attention_weights.parameters()):
        assert not zeros.any()
    for projection in (attention.value_proj, attention.output_proj):
        limit = (6 / (32 + 32)) ** 0.5
        assert not projection.bias.any()
        assert 0.9 * limit < projection.weight.abs().max() <= limit
        assert projection.weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1)


@pytest.mark.parametrize("numbers", [2, 4])
def test_forward_is_the_fused_op_between_projections(numbers):
    attention, inputs = module(), module_inputs(numbers=numbers)
    torch.nn.init.normal_(attention.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(attention.attention_weights.weight, std=0.1)
    query = inputs["query_BQD"]
    sampled = fused_ms_deform_attn(
        attention.value_proj(inputs["memory_BSD"]).view(2, S, 4, 6),
        SIZES_HW,
        inputs["references_BQLN"],
        attention.sampling_offsets(query).view(2, 5, 4, L, 3, 2),
        attention.attention_weights(query).view(2, 5, 4, L * 3),
    )
    torch.testing.assert_close(attention(**inputs), attention.output_proj(sampled))


def test_padding_reads_as_zeros_and_gets_no_gradient():
    attention, inputs = module(), module_inputs()
    torch.nn.init.ones_(attention.value_proj.bias)
    mask_BS = torch.zeros(2, S, dtype=torch.bool)
    mask_BS[0, 4:] = True
    memory = inputs["memory_BSD"].requires_grad_()
    out = attention(**inputs, padding_mask_BS=mask_BS)
    out.sum().backward()
    assert not memory.grad[0, 4:].any() and memory.grad[0, :4].any() and memory.grad[1].any()
    with torch.no_grad():
        inputs["memory_BSD"] = memory.masked_fill(mask_BS[..., None], 1e3)
        torch.testing.assert_close(attention(**inputs, padding_mask_BS=mask_BS), out)
        assert not torch.allclose(attention(**inputs)[0], out[0])


def test_module_under_autocast():
    attention, inputs = module(), module_inputs()
    expected = attention(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(**inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in attention.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query_BQD=torch.zeros(2, 5, 23)), r"query: shape \(2, 5, 23\), expected \(B, Q, D=24\)"),
        (dict(memory_BSD=torch.zeros(1, S, 24)), r"memory: shape \(1, 10, 24\), expected \(B=2, S, D=24\)"),
        (dict(memory_BSD=torch.zeros(2, 11, 24)), r"value: S = 11, expected 10, the sum of H\*W"),
        (dict(spatial_shapes=[(5, 2)]), r"spatial_shapes: 1 levels, expected num_levels = 2"),
        (dict(references_BQLN=torch.rand(2, 5, L, 3)), r"references: 3 numbers each, expected 2 .* or 4"),
        (dict(references_BQLN=torch.rand(2, 4, L, 2)), r"references: .* expected \(B=2, Q=5, L=2, N\)"),
        (dict(padding_mask_BS=torch.zeros(2, S)), r"padding_mask: torch.float32 .*, expected torch.bool"),
        (dict(padding_mask_BS=torch.zeros(2, 9).bool()), r"padding_mask: .* \(2, 9\) .*, expected .* \(2, 10\)"),
        (dict(padding_mask_BS=[True]), r"padding_mask: list, expected torch.bool of shape \(2, 10\) on cpu"),
        (dict(spatial_shapes=None), r"spatial_shapes: None, expected integers \(H, W\) >= 1 for each level"),
    ],
)
def test_module_names_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        module()(**module_inputs() | change)


def test_module_of_impossible_sizes():
    with pytest.raises(ValueError, match=r"width: 30, expected a multiple of num_heads \(8\)"):
        MSDeformAttn(30, num_levels=1, num_heads=8, num_points=4)
    with pytest.raises(ValueError, match="num_points: 0, expected an integer of at least 1"):
        MSDeformAttn(32, num_levels=1, num_heads=8, num_points=0)


VALUE, LOCATIONS, WEIGHTS = torch.zeros(2, S, 3, 6), torch.zeros(2, 5, 3, L, 4, 2), torch.zeros(2, 5, 3, L, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(value=VALUE[0]), r"value: shape \(10, 3, 6\), expected \(B, S, M, E\)"),
        (dict(value=VALUE[..., :0]), r"value: shape \(2, 10, 3, 0\), expected"),
        (dict(value=VALUE.long()), r"value: torch.int64, expected a floating-point tensor"),
        (dict(value=VALUE.half()), r"value: torch.float16 on cpu, expected one of \[torch.float32"),
        (dict(value=VALUE.tolist()), r"value: list, expected a floating-point tensor"),
        (dict(spatial_shapes=[(3, 2), (4, 2)]), r"value: S = 10, expected 14, .* \[\(3, 2\), \(4, 2\)\]"),
        (dict(spatial_shapes=[]), r"spatial_shapes: \[\], expected integers \(H, W\) >= 1"),
        (dict(spatial_shapes=[(5, 2), (0, 4)]), r"spatial_shapes: \[\(5, 2\), \(0, 4\)\], expected integers"),
        (dict(spatial_shapes=torch.tensor([[5.0, 2.0]])), r"spatial_shapes: \[\[5.0, 2.0\]\], expected int"),
        (dict(spatial_shapes=[10]), r"spatial_shapes: \[10\], expected integers"),
        (dict(sampling_locations=LOCATIONS[:1]), r"sampling_locations: .* \(B=2, Q, M=3, L=2, P, xy=2\)"),
        (dict(sampling_locations=LOCATIONS[..., :1]), r"sampling_locations: shape \(2, 5, 3, 2, 4, 1\)"),
        (dict(sampling_locations=LOCATIONS.to("meta")), r"sampling_locations: on meta, expected cpu"),
        (dict(attention_weights=WEIGHTS[:, :4]), r"attention_weights: .* \(B=2, Q=5, M=3, L=2, P=4\)"),
    ],
)
def test_op_names_what_does_not_fit(change, message):
    fitting = dict(value=VALUE, spatial_shapes=SIZES_HW, sampling_locations=LOCATIONS, attention_weights=WEIGHTS)
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(**fitting | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sampling_offsets=LOCATIONS[0]), r"sampling_offsets: .* expected \(B=2, Q, M=3, L=2, P, xy=2\)"),
        (dict(reference_points=torch.zeros(2, 5, L, 5)), r"reference_points: 5 numbers each, expected 2"),
        (dict(reference_points=torch.zeros(2, 5, 2)), r"reference_points: shape \(2, 5, 2\), expected"),
        (dict(reference_points=torch.zeros(())), r"reference_points: shape \(\), expected"),
        (dict(attention_logits=WEIGHTS), r"attention_logits: .* expected \(B=2, Q=5, M=3, LP=8\)"),
    ],
)
def test_fused_op_names_what_does_not_fit(change, message):
    fitting = dict(
        value=VALUE,
        spatial_shapes=SIZES_HW,
        reference_points=torch.zeros(2, 5, L, 4),
        sampling_offsets=LOCATIONS,
        attention_logits=torch.zeros(2, 5, 3, L * 4),
    )
    with pytest.raises(ValueError, match=message):
        fused_ms_deform_attn(**fitting | change)
