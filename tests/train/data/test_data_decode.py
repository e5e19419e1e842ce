"""Encoded images: conversions, damage, hostile headers."""

import contextlib
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from edgetrain.train.data import BrokenImage
from edgetrain.train.data.decode import decode_image, header_channels


def encoded(image: Image.Image, kind: str, **options: object) -> BytesIO:
    file = BytesIO()
    image.save(file, kind, **options)
    return BytesIO(file.getvalue())


def png_header(width: int, height: int) -> BytesIO:
    """A PNG that declares a size and holds hardly any pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" * 99))]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in [*chunks, (b"IEND", b"")]:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return BytesIO(data)


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (8_001, 8_000), (10_000, 10_000)])
def test_bomb_is_refused_from_its_header(width, height, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("pixels were read"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # as in a program of a user
        with pytest.raises(BrokenImage, match="limit is 64 megapixels"):
            decode_image(png_header(width, height), path="bomb.png", channels=3)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image(data):
    with pytest.raises(BrokenImage, match=r"x\.jpg"):
        decode_image(BytesIO(data), path="x.jpg", channels=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_damage_anywhere_is_a_broken_image_or_pixels(kind):
    """Flipped bytes must not raise anything else, whatever the decoder makes of them."""
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)), kind).getvalue()
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, len(data), 4):
            data[at] = rng.integers(0, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(BrokenImage):
                assert decode_image(BytesIO(data), path="x", channels=3).ndim == 3


def test_channels():
    grey = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    assert decode_image(encoded(grey, "PNG"), path="x", channels=1).shape == (3, 4, 1)
    repeated = decode_image(encoded(grey, "PNG"), path="x", channels=3)
    assert np.array_equal(repeated, np.repeat(np.asarray(grey)[:, :, None], 3, axis=2))
    assert header_channels(encoded(grey, "PNG")) == 1
    assert header_channels(encoded(grey.convert("RGB"), "PNG")) == 3
    assert header_channels(BytesIO(b"")) is None


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.array([[0, 256, 32768, 65535]], np.uint16)
    file = encoded(Image.fromarray(deep), "PNG")
    assert decode_image(file, path="x", channels=1)[:, :, 0].tolist() == [[0, 1, 128, 255]]


def test_palette_with_transparency():
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).convert("P")
    file = encoded(image, "PNG", transparency=b"\x00\x80")
    assert decode_image(file, path="x", channels=3).shape == (4, 4, 3)


def test_exif_turns_the_image_upright():
    image = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    assert decode_image(encoded(image, "JPEG", exif=exif), path="x", channels=3).shape == (6, 4, 3)
