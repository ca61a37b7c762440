"""What is recorded is what the attention did: from it and the values the attention's output can be computed again."""

import pytest
import torch

from framework.models.attention import DeformableAttention
from framework.models.look import look, recorded, token_at, unpadded_shapes_hw
from ops import reference
from tests.models.test_build import randomise_zeros, small

# The share of each level's padded map that is the image's own; a level of two lines has no quarter.
OWN_XY = torch.tensor([(2 / 3, 3 / 4), (2 / 3, 3 / 4), (2 / 3, 3 / 4), (2 / 3, 1.0)])


@pytest.fixture
def batch():
    """One image, two thirds of whose width and three quarters of whose height are not padding."""
    images = torch.randn(1, 3, 128, 192, generator=torch.Generator().manual_seed(1))
    padding = torch.ones(1, 128, 192, dtype=torch.bool)
    padding[:, :96, :128] = False
    return images.masked_fill(padding[:, None], 0.0), padding


def detector(kind, **changes):
    model = small(kind, **changes)
    randomise_zeros(model)
    return model


def outputs_of(model, batch, layer=None):
    """The recordings of a forward, and what the recorded attentions put out in it."""
    with torch.no_grad(), recorded(model, layer) as recordings:
        outputs = {}
        hooks = [
            one.attention.register_forward_hook(lambda module, args, out: outputs.__setitem__(module, out))
            for one in recordings
        ]
        model(*batch)
    for hook in hooks:
        hook.remove()
    return recordings, [outputs[one.attention] for one in recordings]


def values_of(sample, tokens_BSD, padding_BS):
    value_BSD = sample.value_proj(tokens_BSD).masked_fill(padding_BS[..., None], 0)
    return value_BSD.unflatten(-1, (sample.num_heads, -1))


@pytest.mark.parametrize("kind, numbers", [("base", 2), ("refine", 4), ("two_stage", 4), ("single_scale", 2)])
def test_points_and_weights_give_the_output_again(kind, numbers, batch):
    model = detector(kind)
    recordings, outputs = outputs_of(model, batch)
    assert [(one.part, one.layer, one.layers) for one in recordings] == [("encoder", 2, 2), ("decoder", 2, 2)]
    for one, out_BQD in zip(recordings, outputs, strict=True):
        assert isinstance(one.attention, DeformableAttention)
        sample, (query_BQD, references_BQn, tokens_BSD, pyramid) = one.attention.sample, one.inputs
        assert references_BQn.shape[-1] == (numbers if one.part == "decoder" else 2)
        with torch.no_grad():
            points, weights = one.attention.looks(*one.inputs)
            value_BSME = values_of(sample, tokens_BSD, pyramid.padding_BS)
            again = sample.output_proj(reference.ms_deform_attn(value_BSME, pyramid.shapes_hw, points, weights))
        torch.testing.assert_close(again, out_BQD, atol=1e-5, rtol=1e-5)

        row = 5
        seen = look(one, row)
        assert seen.shapes_hw == ([(3, 4)] if kind == "single_scale" else [(12, 16), (6, 8), (3, 4), (2, 2)])
        torch.testing.assert_close(seen.weights_MLP, weights[0, row])
        torch.testing.assert_close(seen.weights_MLP.sum((1, 2)), torch.ones(4))
        assert torch.equal(seen.reference_n, references_BQn[0, row])
        own_xy = OWN_XY[2:3] if kind == "single_scale" else OWN_XY
        torch.testing.assert_close(seen.xy_MLP2 * own_xy[:, None], points[0, row])
        if numbers == 4 and one.part == "decoder":
            continue
        # Around a point the offsets are pixels of a level.
        places = torch.tensor([(w, h) for h, w in seen.shapes_hw])[:, None]
        offsets = sample.sampling_offsets(query_BQD[0, row]).view(seen.xy_MLP2.shape)
        torch.testing.assert_close((seen.xy_MLP2 - seen.reference_n) * places, offsets.detach(), atol=1e-4, rtol=1e-4)


def test_weights_of_every_token_give_the_output_again(batch):
    recordings, outputs = outputs_of(detector("detr"), batch)
    for one, out_BQD in zip(recordings, outputs, strict=True):
        attend, (_, _, tokens_BSD, pyramid) = one.attention.attend, one.inputs
        with torch.no_grad():
            _, weights_BQM1S = one.attention.looks(*one.inputs)
            weight_D, bias_D = attend.in_proj_weight.chunk(3)[2], attend.in_proj_bias.chunk(3)[2]
            value_BSME = (tokens_BSD @ weight_D.T + bias_D).unflatten(-1, (4, -1))
            again = attend.out_proj(torch.einsum("bqms,bsme->bqme", weights_BQM1S[:, :, :, 0], value_BSME).flatten(2))
        torch.testing.assert_close(again, out_BQD, atol=1e-5, rtol=1e-5)

        seen = look(one, 3)
        assert seen.xy_MLP2 is None and seen.shapes_hw == [(3, 4)] and pyramid.shapes_hw == [(4, 6)]
        torch.testing.assert_close(seen.weights_MLP.sum((1, 2)), torch.ones(4))  # none of it is on the padding
        whole_M46 = weights_BQM1S[0, 3, :, 0].unflatten(-1, (4, 6))
        torch.testing.assert_close(seen.weights_MLP.view(4, 3, 4), whole_M46[:, :3, :4])


@pytest.mark.parametrize("kind", ["two_stage", "detr"])
def test_recording_changes_nothing_and_leaves_nothing(kind, batch):
    model = detector(kind)
    with torch.no_grad():
        before = model(*batch)
        state = torch.get_rng_state()
        with recorded(model) as recordings:
            during = model(*batch)
            for one in recordings:
                look(one, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(before.logits_KBQC, during.logits_KBQC) and torch.equal(before.boxes_KBQ4, during.boxes_KBQ4)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(KeyError), recorded(model):
        raise KeyError
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["refine", "detr"])
def test_while_training_with_layers_computed_again(kind, batch):
    """Gradients and records are those of a plain forward."""
    model = detector(kind).train()
    gradients, looks = [], []
    for run_again in (False, True):
        if run_again:
            model.recompute_activations()
        model.zero_grad()
        with recorded(model) as recordings:
            model(*batch).logits_KBQC.square().sum().backward()
        looks += [[look(one, 1).weights_MLP for one in recordings]]
        gradients += [[p.grad.clone() for p in model.parameters() if p.grad is not None]]
    for a, b in zip(*looks, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_records_are_float32_and_those_of_the_forward(batch):
    model = detector("base")
    with torch.autocast("cpu", torch.bfloat16):
        recordings, outputs = outputs_of(model, batch)
        with torch.no_grad():
            for one, out_BQD in zip(recordings, outputs, strict=True):
                seen, (_, _, tokens_BSD, pyramid) = look(one, 4), one.inputs
                assert seen.xy_MLP2.dtype == seen.weights_MLP.dtype == torch.float32
                points, weights = one.attention.looks(*one.inputs)
                value_BSME = values_of(one.attention.sample, tokens_BSD, pyramid.padding_BS)
                sampled = reference.ms_deform_attn(value_BSME, pyramid.shapes_hw, points, weights)
                projected = one.attention.sample.output_proj(sampled)
                torch.testing.assert_close(projected, out_BQD, atol=0.01, rtol=0.02)  # two bfloat16 roundings


def test_a_layer_is_chosen_and_a_part_without_it_left_out(batch):
    def chosen(model, layer):
        return [(one.part, one.layer, one.layers) for one in outputs_of(model, batch, layer)[0]]

    model = detector("base", encoder_layers=1, decoder_layers=3)
    assert chosen(model, None) == [("encoder", 1, 1), ("decoder", 3, 3)]
    assert chosen(model, 1) == [("encoder", 1, 1), ("decoder", 1, 3)]
    assert chosen(model, 2) == [("decoder", 2, 3)]
    assert chosen(detector("base", encoder_layers=0), None) == [("decoder", 2, 2)]
    (_, first), (_, third) = ((one.attention for one in outputs_of(model, batch, k)[0]) for k in (1, None))
    assert first is model.decoder.layers[0].cross_attention and third is model.decoder.layers[2].cross_attention


def test_the_token_under_a_point(batch):
    (one, _), _ = outputs_of(detector("base"), batch)
    assert one.pyramid.shapes_hw[0] == (16, 24) and unpadded_shapes_hw(one.pyramid)[0] == (12, 16)
    for x, y, line, column in ((0.0, 0.0, 0, 0), (0.5, 0.5, 6, 8), (0.99, 0.49, 5, 15), (1.0, 1.0, 11, 15)):
        token = token_at(one.pyramid, x, y)
        assert token == 24 * line + column
        centre = look(one, token).reference_n  # where the token's query stands
        torch.testing.assert_close(centre, torch.tensor([(column + 0.5) / 16, (line + 0.5) / 12]))
