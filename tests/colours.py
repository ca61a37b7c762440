"""A set that a detector of three lines solves: grey images with one red and one blue rectangle."""

import torch
from PIL import Image

from framework.models.detector import Predictions

RED, BLUE = (255, 0, 0), (0, 0, 255)


def painted(size, red=None, blue=None):
    image = Image.new("RGB", size, (90, 90, 90))
    for box, colour in ((red, RED), (blue, BLUE)):
        if box:
            image.paste(colour, box)
    return image


class FindsColours(torch.nn.Module):
    """Two queries: the red rectangle with a score of 0.95, the blue one with 0.5, and no other class."""

    def __init__(self, num_classes, red_label, blue_label):
        super().__init__()
        self.logits_QC = torch.full((2, num_classes), -9.0)
        self.logits_QC[0, red_label], self.logits_QC[1, blue_label] = 3.0, 0.0

    def forward(self, images_B3HW, mask_BHW=None):
        if mask_BHW is None:
            mask_BHW = torch.zeros(images_B3HW[:, 0].shape, dtype=torch.bool)
        boxes = [
            [self.box(image[0] - image[2], mask), self.box(image[2] - image[0], mask)]
            for image, mask in zip(images_B3HW, mask_BHW, strict=True)
        ]
        boxes_BQ4 = torch.tensor(boxes)
        there_BQ1 = boxes_BQ4.any(dim=-1, keepdim=True)
        return Predictions(torch.where(there_BQ1, self.logits_QC, -9.0)[None], boxes_BQ4[None])

    def box(self, contrast_HW, mask_HW):
        """cxcywh, fractions of the unpadded image; all zero where there is no such rectangle."""
        height, width = int((~mask_HW[:, 0]).sum()), int((~mask_HW[0]).sum())
        rows, columns = (contrast_HW > 2.0).nonzero(as_tuple=True)
        if not len(rows):
            return [0.0] * 4
        y1, y2 = int(rows.min()) / height, (int(rows.max()) + 1) / height
        x1, x2 = int(columns.min()) / width, (int(columns.max()) + 1) / width
        return [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
