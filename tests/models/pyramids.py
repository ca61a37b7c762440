"""Small pyramids whose images have different sizes."""

import torch

from framework.models.attention import Pyramid

SIZES_HW = [(5, 7), (3, 4), (2, 3)]
UNPADDED_HW = [[(5, 4), (3, 2), (2, 2)], [(3, 7), (2, 4), (1, 3)]]  # of each image, of each level


def make_pyramid(sizes_hw=SIZES_HW, unpadded_hw=UNPADDED_HW, width=8):
    paddings = []
    for image in unpadded_hw:
        masks = [torch.ones(size, dtype=torch.bool) for size in sizes_hw]
        for mask, (rows, columns) in zip(masks, image, strict=True):
            mask[:rows, :columns] = False
        paddings.append(torch.cat([mask.flatten() for mask in masks]))
    padding_BS = torch.stack(paddings)
    ratios_BL2 = torch.tensor(unpadded_hw).flip(-1) / torch.tensor(sizes_hw).flip(-1)
    return Pyramid(sizes_hw, torch.randn(*padding_BS.shape, width), padding_BS, ratios_BL2)
