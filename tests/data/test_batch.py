import numpy as np
import torch

from framework.data.batch import Example, collate, images_in, masked_example, padded_pixels


def example(image_id: int, height: int, width: int, boxes: int) -> Example:
    rng = np.random.default_rng(image_id)
    return Example(
        image_HW3=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        image_id=image_id,
        original_size_hw=(2 * height, 2 * width),
        boxes_cxcywh_N4=rng.uniform(size=(boxes, 4)).astype(np.float32),
        labels_N=rng.integers(0, 9, boxes),
    )


def test_collate_puts_images_one_after_another():
    examples = [example(1, 40, 35, 2), masked_example(7, (480, 640), "image 7: gone"), example(2, 33, 50, 3)]
    batch = collate(examples)
    assert batch.pixels_P.shape == (3 * (40 * 35 + 32 * 32 + 33 * 50),) and batch.pixels_P.dtype == torch.uint8
    assert batch.sizes_hw == [(40, 35), (32, 32), (33, 50)]
    assert batch.original_sizes_hw == [(80, 70), (480, 640), (66, 100)]
    assert batch.image_ids == [1, 7, 2]
    assert batch.bad == ["image 7: gone"]
    for image, item in zip(images_in(batch.pixels_P, batch.sizes_hw), examples, strict=True):
        assert np.array_equal(image, item.image_HW3)
    targets = batch.targets.to("cpu")
    assert targets.counts_B == [2, 0, 3]
    assert targets.valid_B.tolist() == [True, False, True]
    assert targets.labels_N.tolist() == [*examples[0].labels_N, *examples[2].labels_N]
    assert targets.labels_N.dtype == torch.int64
    assert np.array_equal(targets.boxes_cxcywh_N4[2:], examples[2].boxes_cxcywh_N4)


def test_pixels_of_a_batch_with_sides_padded_to_a_grain():
    assert padded_pixels([(801, 1200), (640, 1329)], 1) == 2 * 801 * 1329 < padded_pixels([(832, 1280)] * 2, 1)
    assert padded_pixels([(801, 1200), (640, 1329)], 64) == 2 * 832 * 1344 > padded_pixels([(832, 1280)] * 2, 64)


def test_images_of_one_size_have_no_mask():
    images, mask = collate([example(1, 9, 5, 0), example(2, 9, 5, 1)]).inputs("cpu")
    assert images.shape == (2, 3, 9, 5) and mask is None


def test_inputs_are_normalised_and_zero_on_padding():
    examples = [example(1, 9, 5, 0), example(2, 4, 7, 1)]
    images, mask = collate(examples).inputs("cpu")
    assert images.shape == (2, 3, 9, 7) and images.dtype == torch.float32 and images.is_contiguous()
    assert mask.shape == (2, 9, 7) and mask.dtype == torch.bool
    for b, item in enumerate(examples):
        for y in range(9):
            for x in range(7):
                inside = y < item.image_HW3.shape[0] and x < item.image_HW3.shape[1]
                assert mask[b, y, x].item() == (not inside)
                for channel, mean, std in ((0, 0.485, 0.229), (1, 0.456, 0.224), (2, 0.406, 0.225)):
                    plain = (item.image_HW3[y, x, channel] / 255 - mean) / std if inside else 0.0
                    assert abs(images[b, channel, y, x].item() - plain) < 1e-6
