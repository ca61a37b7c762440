"""Pixels as converting and decoding both take them: 8 bits a channel."""

import numpy as np
from PIL import Image

# What Pillow may be asked to read (of JPEG come MPO, too). Not all it can: to load an EPS it starts another program.
Image.init()  # or it would know some of these only after the first file of that kind
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")


def to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bit, where Image.convert would clip to 255; any other image as it is."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
