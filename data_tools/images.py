"""Images as they go into shards: read with mistrust, kept as they are when they are JPEG, re-encoded otherwise."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from data_tools.pixels import FORMATS, to_8_bit
from data_tools.sample import Sample
from framework.errors import InputError

JPEG_FORMATS = ("JPEG", "MPO")  # MPO: cameras that append a second picture to a JPEG file


def read_image(path: Path, sample: Sample, verify: bool, reencode: bool, repairs: Counter[str]) -> bytes:
    """The file's own bytes when they are JPEG; others re-encoded, if so wished. What is not plain RGB is counted.

    Raises:
        InputError: missing, empty, not an image, truncated, not of the size that the annotations say, or not JPEG and
            not to be re-encoded.
    """
    with _faults_named(path, f"mend it, or take image {sample.image_id} out of the annotations"):
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kept = image.format in JPEG_FORMATS
            check_size(image, sample)
            if not kept and not reencode:
                raise InputError(f"is {image.format}, shards hold JPEG; --reencode makes it one of quality 95")
            count_repairs(image, kept, repairs)
            if verify:
                image.load()
            return data if kept else to_jpeg(image)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height, for annotations that do not tell them.

    Raises:
        InputError: missing, empty, not an image, or one that EXIF would turn: nobody knows which way was annotated.
    """
    with _faults_named(path, "mend it, or take it out"), Image.open(path, formats=FORMATS) as image:
        if image.format != "PNG" and _is_turned(image):  # of a PNG it would decode all pixels to know
            raise InputError("EXIF would turn it, and its annotations do not say which way they mean; save it upright")
        return image.size


@contextlib.contextmanager
def _faults_named(path: Path, advice: str) -> Iterator[None]:
    """Raises InputError with path and advice for whatever goes wrong inside, or before when the file has no byte."""
    try:
        if not path.is_file():
            raise InputError("missing")
        if path.stat().st_size == 0:
            raise InputError("an empty file, 0 bytes")
        yield
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image that Pillow reads; {advice}") from None
    except MemoryError:  # says nothing of the file
        raise
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes make them stumble over
        raise InputError(f"{path}: {error}; {advice}") from error


def check_size(image: Image.Image, sample: Sample) -> None:
    if image.size != (sample.width, sample.height):
        found, expected = "{}x{}".format(*image.size), f"{sample.width}x{sample.height}"
        hint = " (EXIF would turn it, which boxes do not follow)" if _is_turned(image) else ""
        raise InputError(f"is {found}{hint}, the annotations say {expected}")


def count_repairs(image: ImageFile.ImageFile, kept: bool, repairs: Counter[str]) -> None:
    if kept and image.mode != "RGB":
        repairs[f"{'greyscale' if image.mode == 'L' else image.mode} JPEG to be read as RGB"] += 1
    if not kept:
        repairs[f"{image.format} re-encoded as JPEG"] += 1
    if ";16" in str(image.tile):  # Pillow's name of the stored bits; the mode alone hides 16-bit colour
        repairs["16-bit image scaled to 8 bit"] += 1


def to_jpeg(image: Image.Image) -> bytes:
    """8 bit, grey or RGB, quality 95. Raises InputError: floating-point pixels, whose range nobody knows."""
    if image.mode == "F":
        raise InputError("has floating-point pixels, expected 8 or 16 bit")
    image = to_8_bit(image)
    buffer = io.BytesIO()
    image.convert("L" if image.mode in ("1", "L", "LA") else "RGB").save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(ExifTags.Base.Orientation, 1) > 1
