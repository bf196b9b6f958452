"""Small PNG files for the page, as data addresses.

PNG, third edition (W3C 2025): signature and chunks (section 5), IHDR, PLTE, tRNS and IDAT (11.2 and
11.3), zlib streams of rows with filter type 0 (section 9 and 10).
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

GRAY, RGB, INDEXED = 0, 2, 3
SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {GRAY: 1, RGB: 3, INDEXED: 1}


def png(
    pixels: bytes,
    width: int,
    height: int,
    kind: int,
    palette: Sequence[tuple[int, int, int, int]] = (),
) -> bytes:
    """8-bit pixels, row after row, as a PNG file; `palette` are RGBA colours of an indexed one."""
    stride = width * CHANNELS[kind]
    if len(pixels) != stride * height:
        raise ValueError(f"{len(pixels)} bytes are no {width} x {height} pixels")
    rows = b"".join(b"\0" + pixels[row * stride : (row + 1) * stride] for row in range(height))
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    if kind == INDEXED:
        chunks.append(_chunk(b"PLTE", bytes(value for color in palette for value in color[:3])))
        chunks.append(_chunk(b"tRNS", bytes(color[3] for color in palette)))
    chunks += [_chunk(b"IDAT", zlib.compress(rows, 9)), _chunk(b"IEND", b"")]
    return SIGNATURE + b"".join(chunks)


def as_address(file: bytes) -> str:
    """A `data:` address that holds a PNG file."""
    return "data:image/png;base64," + base64.b64encode(file).decode()


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
