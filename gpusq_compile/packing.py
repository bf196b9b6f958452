"""Packed weights: the values that a pattern keeps, and where they stood, as two plain tensors.

What is kept and how the places are written is that of PTX ISA, "Matrix multiply-accumulate
operation using mma.sp instruction with sparse matrix A", section "Sparse matrix storage": of each
four (2:4, for .u8/.s8 and the half types) two values, of each eight (4:8 in pairs, for .u4/.s4) two
pairs, and two 2-bit indices in ascending order from the least significant bit on. Rows follow the
reduction axis; `docs/packed-weights.md` has the layout bit by bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gpusq_compile.sparsity import PATTERNS, REDUCTION_AXIS, Pattern

INDEX_BITS = 4
"""Bits of the two indices of a group."""

NIBBLE = 0xF
ILLEGAL = 0xFF
INT4_MIN, INT4_MAX = -8, 7

BITS = {"int8": 8, "int4": 4, "float16": 16, "float32": 32}
"""The types of values and how many bits one takes."""

_STORED = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Packing:
    """How one weight is packed: the type of its values, and the pattern of its metadata.

    `values` is a key of `BITS`; `pattern` is "2:4", "pair4:8", or None for a dense weight.
    """

    values: str
    pattern: str | None

    @property
    def group(self) -> int:
        """Weights that share one metadata entry."""
        return 1 if self.pattern is None else PATTERNS[self.pattern].group

    @property
    def bits_per_group(self) -> int:
        """Bits of values and metadata for one group."""
        if self.pattern is None:
            return BITS[self.values]
        pattern = PATTERNS[self.pattern]
        return pattern.keep * pattern.unit * BITS[self.values] + INDEX_BITS


def choose_packing(sparsity: str | None, values: str, size: int) -> Packing:
    """The smallest packing that hardware reads, of a weight that was pruned to `sparsity`.

    "portable" weights are legal as 2:4 and as pairs of eight: 4-bit values take the latter, which
    is what `mma.sp` wants of them, as long as `size`, the reduction axis, is a multiple of eight;
    all others take the former.
    """
    if sparsity != "portable":
        return Packing(values, sparsity)
    pairs = values == "int4" and size % PATTERNS["pair4:8"].group == 0
    return Packing(values, "pair4:8" if pairs else "2:4")


def pack(weight: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The kept values of a weight and their metadata.

    Args:
        weight: [out, in] or [out, in, kh, kw]; int8 where the values are int8 or int4 (then within
            [-8, 7]), else of the values' own type.

    Returns:
        values: [out, (kh, kw,) kept] of the values' type; of int4 uint8 with two values a byte.
        metadata: uint8 [out, (kh, kw,) bytes], two groups a byte; None for a dense weight.
        Zeros are restored as positive zeros.

    Raises:
        ValueError: the weight breaks the pattern, or its type or range is not that of the values.
    """
    expected = torch.int8 if packing.values == "int4" else _STORED[packing.values]
    if weight.dtype != expected:
        raise ValueError(f"a weight of {weight.dtype} cannot be packed as {packing.values}")
    if weight.shape[REDUCTION_AXIS] % packing.group:
        size = weight.shape[REDUCTION_AXIS]
        raise ValueError(f"reduction axis {size} is not a multiple of {packing.group}")
    kept, metadata = weight.movedim(REDUCTION_AXIS, -1).contiguous(), None
    if packing.pattern is not None:
        kept, metadata = _compress(kept, PATTERNS[packing.pattern])
    if packing.values == "int4":
        lowest, highest = int(kept.amin()), int(kept.amax())
        if lowest < INT4_MIN or highest > INT4_MAX:
            raise ValueError(f"values from {lowest} to {highest} do not fit in 4 bits")
        kept = pack_nibbles(kept)
    return kept, metadata


def unpack(
    values: torch.Tensor, metadata: torch.Tensor | None, packing: Packing, shape: tuple[int, ...]
) -> torch.Tensor:
    """The weight that `pack` was given, exactly.

    Args:
        shape: the weight's shape, [out, in] or [out, in, kh, kw].

    Raises:
        ValueError: shapes or types are not those of `packed_shapes`, or the metadata is illegal.
    """
    found = [(str(values.dtype), tuple(values.shape))]
    if metadata is not None:
        found.append((str(metadata.dtype), tuple(metadata.shape)))
    wanted = [(str(dtype), size) for dtype, size in packed_tensors(packing, shape)]
    if found != wanted:
        raise ValueError(f"found {found}, expected {wanted} for a weight of shape {list(shape)}")
    size = shape[REDUCTION_AXIS]
    if packing.values == "int4":
        values = unpack_nibbles(values, _kept(packing, size))
    if metadata is not None and packing.pattern is not None:
        values = _decompress(values, metadata, PATTERNS[packing.pattern], size)
    return values.movedim(-1, REDUCTION_AXIS).contiguous()


def packed_tensors(
    packing: Packing, shape: tuple[int, ...]
) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of the values, and where there is a pattern of the metadata.

    Raises:
        ValueError: the reduction axis is no multiple of the pattern's group.
    """
    size = shape[REDUCTION_AXIS]
    if size % packing.group:
        raise ValueError(f"reduction axis {size} is not a multiple of {packing.group}")
    rows = (*shape[:REDUCTION_AXIS], *shape[REDUCTION_AXIS + 1 :])
    kept = _kept(packing, size)
    columns = math.ceil(kept / 2) if packing.values == "int4" else kept
    tensors = [(_STORED[packing.values], (*rows, columns))]
    if packing.pattern is not None:
        groups = size // PATTERNS[packing.pattern].group
        tensors.append((torch.uint8, (*rows, math.ceil(groups / 2))))
    return tensors


def _kept(packing: Packing, size: int) -> int:
    """Values that stay of a row of `size`."""
    if packing.pattern is None:
        return size
    pattern = PATTERNS[packing.pattern]
    return size // pattern.group * pattern.keep * pattern.unit


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """[..., n] of 4-bit values -> uint8 [..., ceil(n / 2)], the first in the low nibble.

    An odd row ends with a high nibble of zero. That is the order of ONNX INT4.
    """
    nibbles = values.view(torch.uint8) & NIBBLE
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    """uint8 [..., ceil(count / 2)] -> int8 [..., count] in [-8, 7].

    Raises:
        ValueError: the nibble behind an odd row is not zero.
    """
    nibbles = _split_nibbles(packed, count)
    return (nibbles ^ 8).view(torch.int8) - 8


def _split_nibbles(packed: torch.Tensor, count: int) -> torch.Tensor:
    nibbles = torch.stack([packed & NIBBLE, packed >> 4], dim=-1).flatten(-2)
    if bool(nibbles[..., count:].any()):
        raise ValueError("there are bits behind the end of a row")
    return nibbles[..., :count]


def _metadata_of_masks() -> torch.Tensor:
    """The nibble of two ascending indices for each set of non-zero units, given as four bits.

    Free places go to the lowest units that are zero. Sets of three or four units have none.
    """
    table = torch.full((16,), ILLEGAL, dtype=torch.uint8)
    for mask in range(16):
        used = [unit for unit in range(4) if mask >> unit & 1]
        free = [unit for unit in range(4) if unit not in used]
        if len(used) <= 2:
            low, high = sorted((used + free)[:2])
            table[mask] = low | high << 2
    return table


_METADATA = _metadata_of_masks()
LEGAL_METADATA = frozenset(int(entry) for entry in _METADATA if entry != ILLEGAL)
"""The six nibbles whose first index is below the second."""


def _compress(rows: torch.Tensor, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., in] -> the kept values [..., in / 2] and the metadata [..., bytes]."""
    groups = rows.shape[-1] // pattern.group
    units = rows.reshape(*rows.shape[:-1], groups, pattern.units, pattern.unit)
    used = units.ne(0).any(dim=-1) if pattern.unit > 1 else units.ne(0).squeeze(-1)
    bits = used.view(torch.uint8)
    masks = bits[..., 0] | (bits[..., 1] << 1) | (bits[..., 2] << 2) | (bits[..., 3] << 3)
    entries = _METADATA.index_select(0, masks.flatten().int()).reshape(masks.shape)
    broken = int(entries.eq(ILLEGAL).sum())
    if broken:
        raise ValueError(f"{broken} groups hold non-zeros in more than {pattern.keep} units")
    kept = units.gather(-2, _indices(entries, pattern))
    return kept.flatten(-3), pack_nibbles(entries)


def _decompress(
    kept: torch.Tensor, metadata: torch.Tensor, pattern: Pattern, size: int
) -> torch.Tensor:
    groups = size // pattern.group
    entries = _split_nibbles(metadata, groups)
    illegal = int((entries & 3).ge(entries >> 2).sum())
    if illegal:
        raise ValueError(f"{illegal} groups have illegal metadata: equal or descending indices")
    values = kept.reshape(*kept.shape[:-1], groups, pattern.keep, pattern.unit)
    units = kept.new_zeros((*values.shape[:-2], pattern.units, pattern.unit))
    return units.scatter_(-2, _indices(entries, pattern), values).flatten(-3)


def _indices(entries: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Metadata nibbles [..., groups] -> unit indices [..., groups, keep, unit] for gather."""
    pair = torch.stack([entries & 3, entries >> 2], dim=-1).long()
    return pair.unsqueeze(-1).expand(*pair.shape, pattern.unit)
