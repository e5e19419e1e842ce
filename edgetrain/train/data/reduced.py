"""Images at the size of the model's input, decoded with as little memory as their format allows.

A source of encoded images also has ``decode_reduced(index, size)`` and ``decoding_bytes(index, size)``; of any other an
image is decoded and then resized.
"""

from __future__ import annotations

from edgetrain.train.data.fit import ImageSize, fit_image
from edgetrain.train.data.source import Pixels, Source

_HEADERS = 4000


def decode_fitted(source: Source, index: int, size: ImageSize) -> Pixels:
    """Image ``index`` as (height, width, channels) for ``size`` = (channels, height, width); raises BrokenImage."""
    return fit_image(decode_reduced(source, index, size[1:]), size)


def decode_reduced(source: Source, index: int, size: tuple[int, int]) -> Pixels:
    """Image ``index`` in (height, width) ``size`` where its format allows, else as it is; raises BrokenImage."""
    reduced = getattr(source, "decode_reduced", None)
    pixels: Pixels = source.decode(index) if reduced is None else reduced(index, size)
    return pixels


def decoding_bytes(source: Source, size: ImageSize) -> int:
    """Most bytes that decoding one image of ``source`` for ``size`` takes besides the result.

    From the headers of its images, of some where there are many; 0 where none is encoded.
    """
    of_image = getattr(source, "decoding_bytes", None)
    if of_image is None:
        return 0
    step = -(-len(source) // _HEADERS)
    return max(int(of_image(index, size[1:])) for index in range(0, len(source), step))
