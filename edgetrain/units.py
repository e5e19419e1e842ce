"""Sizes in bytes: ints inside, text only where a person reads or writes them.

``MiB`` is 2**20 bytes and ``MB`` is 10**6 bytes, as IEC 80000-13 has them.
"""

from __future__ import annotations

import re

from edgetrain.errors import UsageError

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")


def parse_size(text: str | int) -> int:
    """Bytes meant by ``text``: ``"400MiB"``, ``"1.5GB"``, ``"1048576"`` or a plain int.

    Raises:
        UsageError: the text is no size, its unit is unknown, or it is not above zero.
    """
    if isinstance(text, int):
        size_bytes = text
    else:
        match = _SIZE.fullmatch(text)
        if match is None or match.group(2).upper() not in _FACTORS:
            raise UsageError(
                found=f"{text!r} is not a size",
                expected="a number of bytes, or a number with one of B, KB, MB, GB, KiB, MiB, GiB",
                action="write it like 400MiB or 1.5GB",
            )
        size_bytes = int(float(match.group(1)) * _FACTORS[match.group(2).upper()])
    if size_bytes <= 0:
        raise UsageError(found=f"a size of {text}", expected="more than zero bytes", action="write it like 400MiB")
    return size_bytes


def format_mib(size_bytes: float) -> str:
    """``size_bytes`` as MiB with one decimal: ``"347.2 MiB"``."""
    return f"{size_bytes / MIB:.1f} MiB"
