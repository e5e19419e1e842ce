"""Large photographs: decoded small, and what that takes is known before."""

from __future__ import annotations

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetrain.train.data import Subset, decoding_bytes, open_source
from edgetrain.train.data.decode import decode_image
from edgetrain.train.data.fit import fit_image
from edgetrain.train.data.reduced import decode_fitted

SIDES = (300, 200)


def photograph(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> BytesIO:
    file = BytesIO()
    image.save(file, kind, **options)
    return BytesIO(file.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_is_what_resizing_afterwards_gives(kind: str, channels: int) -> None:
    image = photograph(*SIDES)
    late = fit_image(decode_image(encoded(image, kind), path="x", channels=channels), (channels, 32, 48))
    early = decode_image(encoded(image, kind), path="x", channels=channels, size=(32, 48))
    assert np.array_equal(early, late)


@pytest.mark.parametrize("turned", [False, True])
def test_jpeg_at_part_of_its_resolution_is_close(turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    file = encoded(photograph(1200, 800), "JPEG", quality=95, exif=exif)
    whole = decode_image(file, path="x", channels=3)
    assert whole.shape == ((1200, 800, 3) if turned else (800, 1200, 3))
    file.seek(0)
    reduced = decode_image(file, path="x", channels=3, size=(64, 64))
    difference = reduced.astype(int) - fit_image(whole, (3, 64, 64))
    assert np.abs(difference).mean() < 1.5


CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "jpeg": ("RGB", "JPEG", {}),
    "progressive": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "png": ("RGB", "PNG", {"compress_level": 1}),
    "transparent": ("RGBA", "PNG", {"compress_level": 1}),
    "grey": ("L", "PNG", {"compress_level": 1}),
    "webp": ("RGB", "WEBP", {"method": 0}),
    "deflated": ("RGB", "TIFF", {"compression": "tiff_adobe_deflate"}),
    "bmp": ("RGB", "BMP", {}),
}
"""Name -> mode, format and options of a file."""

MEASURE = """
import json, sys
from pathlib import Path
from edgetrain.targets import return_large_blocks
from edgetrain.train.data.decode import decode_image, decoding_bytes

def kib(name):
    return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])

return_large_blocks(2**20)
found = {}
for name in sys.argv[2:]:
    small, large = f"{sys.argv[1]}/{name} small", f"{sys.argv[1]}/{name}"
    decode_image(small, path=small, channels=3, size=(32, 32))
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    decode_image(large, path=large, channels=3, size=(64, 64))
    found[name] = (kib("VmHWM") - before) * 1024, decoding_bytes(large, channels=3, size=(64, 64))
print(json.dumps(found))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_what_decoding_takes_is_predicted(tmp_path: Path) -> None:
    """Six megapixels; never less than measured, but for what is below a MiB."""
    for name, (mode, kind, options) in CASES.items():
        photograph(40, 40).convert(mode).save(tmp_path / f"{name} small", kind, **options)
        photograph(3000, 2000).convert(mode).save(tmp_path / name, kind, **options)
    command = [sys.executable, "-c", MEASURE, str(tmp_path), *CASES]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for name, (measured, predicted) in found.items():
        assert measured - 2**20 <= predicted <= 1.4 * measured + 2 * 2**20, name


def test_the_largest_image_of_a_folder_counts(tmp_path: Path) -> None:
    for name, size in (("a/1", (40, 40)), ("a/2", (800, 600)), ("b/1", (40, 40)), ("b/2", (64, 20))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photograph(*size).save(tmp_path / f"{name}.png")
    (tmp_path / "b" / "broken.png").write_bytes(b"nothing")
    from edgetrain.train.data.folder import open_undivided

    source = open_undivided(tmp_path)
    assert decoding_bytes(source, (3, 32, 32)) == 4 * 800 * 600
    small = Subset(source, np.array([0, 2, 3]))
    assert decoding_bytes(small, (3, 32, 32)) == 4 * 40 * 40
    assert np.array_equal(decode_fitted(small, 1, (3, 32, 32)), decode_fitted(source, 2, (3, 32, 32)))
    assert decoding_bytes(open_source("digits", split="train"), (1, 32, 32)) == 0
