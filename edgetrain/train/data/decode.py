"""One encoded image (JPEG, PNG, ...) to pixels, on the assumption that the file may be hostile.

The header is read first: an image that declares more than 64 megapixels is refused before any memory
is taken for it. Only plain raster formats are tried; Pillow's PostScript reader, which starts another program,
is not among them. Photographs are turned upright as their EXIF data say.
"""

from __future__ import annotations

from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from edgetrain.train.data.source import BrokenImage, Pixels

MAX_PIXELS = 64 * 10**6
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def decode_image(file: str | BytesIO, *, path: str, channels: int) -> Pixels:
    """Pixels of an encoded image, (h, w, channels).

    Args:
        file: where it is, or its bytes.
        path: its name in errors.
        channels: 1 or 3; the image is converted.

    Raises:
        BrokenImage: it is no image of a known format, damaged, cut off, or too large.
    """
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BrokenImage(path, _too_large(f"{opened.width}x{opened.height}"))
            image = ImageOps.exif_transpose(opened) if "exif" in opened.info else opened
            pixels = np.asarray(_eight_bit(image, "L" if channels == 1 else "RGB"))
    except (BrokenImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImage(path, _too_large("much more")) from error
    except Exception as error:  # a decoder fed with damaged data raises anything: struct.error, KeyError, ...
        raise BrokenImage(path, f"{type(error).__name__}: {error}") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def header_channels(file: str | BytesIO) -> int | None:
    """1 for a grey image, 3 for a coloured one, None for a broken one; reads the header only."""
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            return 1 if opened.mode in _GREY_MODES else 3
    except MemoryError:
        raise
    except Exception:  # as in decode_image; the loader reports it when the image's turn comes
        return None


def _eight_bit(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _too_large(size: str) -> str:
    return f"declares {size} pixels, the limit is {MAX_PIXELS // 10**6} megapixels"
