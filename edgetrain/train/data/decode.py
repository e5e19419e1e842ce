"""One encoded image (JPEG, PNG, ...) to pixels, on the assumption that the file may be hostile.

The header is read first: an image that declares more than 64 megapixels is refused before any memory
is taken for it. Only plain raster formats are tried; Pillow's PostScript reader, which starts another program,
is not among them. Photographs are turned upright as their EXIF data say.

A large photograph takes far more memory than what is made of it (12 megapixels: 48 MB as Pillow holds them), so it is
made small before it is copied, and what decoding takes can be asked beforehand.
"""

from __future__ import annotations

import itertools
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from edgetrain.train.data.source import BrokenImage, Pixels

MAX_PIXELS = 64 * 10**6
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def decode_image(file: str | BytesIO, *, path: str, channels: int, size: tuple[int, int] | None = None) -> Pixels:
    """Pixels of an encoded image, (h, w, channels).

    Args:
        file: where it is, or its bytes.
        path: its name in errors.
        channels: 1 or 3; the image is converted.
        size: (height, width) to which it is resized, as :func:`edgetrain.train.data.fit.fit_image` would. A JPEG image
            is decoded at the part of its resolution, 1/2 to 1/8, that is still twice that at least.

    Raises:
        BrokenImage: it is no image of a known format, damaged, cut off, or too large.
    """
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise BrokenImage(path, _too_large(f"{opened.width}x{opened.height}"))
            if size is not None:
                opened.draft(None, _drafted(size))  # the mode stays
            image = ImageOps.exif_transpose(opened) if "exif" in opened.info else opened
            image = _eight_bit(image, "L" if channels == 1 else "RGB")
            if size is not None and (image.height, image.width) != size:
                image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
            pixels = np.asarray(image)
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


def decoding_bytes(file: str | BytesIO, *, channels: int, size: tuple[int, int]) -> int:
    """Most bytes that :func:`decode_image` takes at once for ``size``, from the header alone; 0 for a broken image."""
    try:
        with Image.open(file, formats=_FORMATS) as opened:
            pixels = opened.width * opened.height
            if pixels > MAX_PIXELS:
                return 0
            kind, mode, info = opened.format or "", opened.mode, opened.info
            # a progressive JPEG holds its coefficients, two bytes each, at full resolution
            standing = pixels * 2 * len(opened.getbands()) if info.get("progressive") else 0
            opened.draft(None, _drafted(size))
            pixels = opened.width * opened.height
    except MemoryError:
        raise
    except Exception:  # as in decode_image
        return 0
    wanted = "L" if channels == 1 else "RGB"
    copies = [mode] if "exif" in info else []
    if mode == "P" and "transparency" in info:
        copies.append("RGBA")
    if mode != wanted:
        copies.append(wanted)
    # what is opened stays; of what is made from it, one after the other, two are there at once
    made = max((sum(map(_pixel_bytes, pair)) for pair in itertools.pairwise([*copies, None])), default=0)
    if mode.startswith("I"):  # as arrays, shifted and clipped
        made = max(made, 2 * _pixel_bytes(mode) + 1)
    if kind == "TIFF":  # read as a whole where it is compressed
        made += _pixel_bytes(mode)
    if kind == "WEBP":  # the canvas and the one before it, and the decoder's planes
        made += _WEBP_BYTES
    return standing + pixels * (_pixel_bytes(mode) + made)


def _pixel_bytes(mode: str | None) -> int:
    """Bytes of a pixel in Pillow: four where there are several bands."""
    return 0 if mode is None else 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


_WEBP_BYTES = 13


def _drafted(size: tuple[int, int]) -> tuple[int, int]:
    """The least size at which a JPEG may be decoded for ``size``, upright or not."""
    return 2 * max(size), 2 * max(size)


def _eight_bit(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _too_large(size: str) -> str:
    return f"declares {size} pixels, the limit is {MAX_PIXELS // 10**6} megapixels"
