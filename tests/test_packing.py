"""Packed weights: every weight comes back exactly, in the bits that the hardware's layout has."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpusq_compile.packing import (
    LEGAL_METADATA,
    Packing,
    choose_packing,
    pack,
    pack_nibbles,
    packed_tensors,
    unpack,
    unpack_nibbles,
)
from gpusq_compile.sparsity import PATTERNS, magnitude_mask, violations

LIMITS = {"int8": (-128, 127), "int4": (-8, 7)}


def random_weight(shape: list[int], values: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if values in LIMITS:
        low, high = LIMITS[values]
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)
    return torch.randn(shape, generator=generator).to(getattr(torch, values))


@st.composite
def weights(draw: Any) -> tuple[Tensor, str | None, str]:
    """A weight that its pattern allows, often with fewer non-zeros; pattern and values' type."""
    sparsity = draw(st.sampled_from([None, *PATTERNS]))
    values = draw(st.sampled_from(["int8", "int4", "float16", "float32"]))
    group = PATTERNS[sparsity].group if sparsity else 1
    kernel = draw(st.sampled_from([[], [1, 1], [3, 2]]))
    shape = [draw(st.integers(1, 5)), group * draw(st.integers(1, 9)), *kernel]
    seed = draw(st.integers(0, 2**16))
    weight = random_weight(shape, values, seed)
    if sparsity:
        weight = weight * magnitude_mask(random_weight(shape, "float32", seed), PATTERNS[sparsity])
    keep = draw(st.sampled_from([0.0, 0.3, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    return weight * (torch.rand(shape, generator=generator) < keep), sparsity, values


def bit_identical(first: Tensor, second: Tensor) -> bool:
    """Equal in every bit but the sign of a zero."""
    same_type = first.dtype == second.dtype and first.shape == second.shape
    return same_type and torch.equal(first, second) and second.is_contiguous()


# --- round trips ---------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(weights())
def test_every_weight_comes_back_exactly(case: tuple[Tensor, str | None, str]) -> None:
    weight, sparsity, kind = case
    packing = choose_packing(sparsity, kind, weight.shape[1])
    values, metadata = pack(weight, packing)
    found = [(part.dtype, tuple(part.shape)) for part in (values, metadata) if part is not None]
    assert found == packed_tensors(packing, tuple(weight.shape))
    assert bit_identical(weight, unpack(values, metadata, packing, tuple(weight.shape)))


@settings(max_examples=100, deadline=None)
@given(weights())
def test_packing_is_a_function_of_the_weight_and_its_metadata_is_legal(
    case: tuple[Tensor, str | None, str],
) -> None:
    weight, sparsity, kind = case
    packing = choose_packing(sparsity, kind, weight.shape[1])
    first, again = pack(weight, packing), pack(weight.clone(), packing)
    for part, other in zip(first, again, strict=True):
        assert (part is None and other is None) or torch.equal(part, other)  # type: ignore[arg-type]
    if first[1] is not None:
        groups = weight.shape[1] // packing.group
        nibbles = torch.stack([first[1] & 15, first[1] >> 4], dim=-1).flatten(-2)
        assert set(nibbles[..., :groups].unique().tolist()) <= LEGAL_METADATA
        assert not nibbles[..., groups:].any()


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_nibbles_come_back_in_their_order(rows: int, count: int, seed: int) -> None:
    levels = random_weight([rows, count], "int4", seed)
    packed = pack_nibbles(levels)
    assert packed.shape == (rows, (count + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, count), levels)


def test_the_legal_metadata_are_the_six_ascending_pairs() -> None:
    assert sorted(low | high << 2 for low, high in combinations(range(4), 2)) == sorted(
        LEGAL_METADATA
    )
    # PTX ISA names these four, with equal indices, as undefined.
    assert not LEGAL_METADATA & {0b0000, 0b0101, 0b1010, 0b1111}


# --- bytes by hand -------------------------------------------------------------------------------


def test_2_to_4_int8_by_hand() -> None:
    weight = torch.tensor([[0, 5, 0, -3, 7, 0, 0, 0], [0, 0, 1, 2, 0, 0, 0, 0]], dtype=torch.int8)
    values, metadata = pack(weight, Packing("int8", "2:4"))
    # The second group has one non-zero, at 0: the free place is index 1. The last has none.
    assert values.tolist() == [[5, -3, 7, 0], [1, 2, 0, 0]]
    assert metadata is not None
    # (1, 3) = 0b1101 in the low nibble, (0, 1) = 0b0100 in the high one; (2, 3) = 0b1110.
    assert metadata.tolist() == [[0b0100_1101], [0b0100_1110]]


def test_pairs_of_eight_int4_by_hand() -> None:
    first = [0, 0, 3, -1, 0, 0, 0, 2]
    second = [0, 0, 0, 0, 0, 0, -8, 7]
    weight = torch.tensor([first + second], dtype=torch.int8)
    values, metadata = pack(weight, Packing("int4", "pair4:8"))
    # Kept: 3, -1, 0, 2 and (the free pair 0) 0, 0, -8, 7; low nibble first.
    assert values.tolist() == [[0xF3, 0x20, 0x00, 0x78]]
    assert metadata is not None
    # Pairs (1, 3) = 0b1101, pairs (0, 3) = 0b1100.
    assert metadata.tolist() == [[0b1100_1101]]


def test_2_to_4_int4_by_hand() -> None:
    weight = torch.tensor([[0, 5, 0, -3, 7, 0, 0, 1]], dtype=torch.int8)
    values, metadata = pack(weight, Packing("int4", "2:4"))
    assert values.tolist() == [[0xD5, 0x17]]
    assert metadata is not None
    assert metadata.tolist() == [[0b1100_1101]]


def test_dense_values_by_hand() -> None:
    weight = torch.tensor([[1, -2, 3]], dtype=torch.int8)
    values, metadata = pack(weight, Packing("int4", None))
    assert metadata is None
    assert values.tolist() == [[0xE1, 0x03]]
    values, _ = pack(weight, Packing("int8", None))
    assert torch.equal(values, weight)


def test_a_convolution_is_packed_along_its_input_channels() -> None:
    """Stored as [out, kh, kw, in]: here each of the two positions has its own row."""
    weight = torch.tensor([1, 0, 0, 2, 0, 0, 3, 4], dtype=torch.int8).reshape(1, 4, 1, 2)
    values, metadata = pack(weight, Packing("int8", "2:4"))
    assert values.tolist() == [[[[1, 3], [2, 4]]]]
    assert metadata is not None
    # Column 0 holds 1, 0, 0, 3 at (0, 3); column 1 holds 0, 2, 0, 4 at (1, 3). One group a row.
    assert metadata.tolist() == [[[[0b1100], [0b1101]]]]


# --- sizes ---------------------------------------------------------------------------------------


def bits(parts: tuple[Tensor, Tensor | None]) -> int:
    return 8 * sum(part.nbytes for part in parts if part is not None)


@pytest.mark.parametrize(
    ("sparsity", "values", "group", "expected"),
    [
        ("2:4", "int8", 4, 20),
        ("portable", "int8", 4, 20),
        ("pair4:8", "int4", 8, 20),
        ("portable", "int4", 8, 20),
        ("2:4", "int4", 4, 12),
        ("pair4:8", "int8", 8, 36),
        ("2:4", "float16", 4, 36),
        ("2:4", "float32", 4, 68),
        (None, "int8", 1, 8),
        (None, "int4", 1, 4),
    ],
)
def test_the_size_in_bits_is_exactly_that_of_the_derivation(
    sparsity: str | None, values: str, group: int, expected: int
) -> None:
    shape = [3, 64]
    weight = random_weight(shape, values, 0)
    if sparsity:
        weight = weight * magnitude_mask(weight.float(), PATTERNS[sparsity])
    packing = choose_packing(sparsity, values, 64)
    assert (packing.group, packing.bits_per_group) == (group, expected)
    assert bits(pack(weight, packing)) * group == expected * weight.numel()


def test_a_portable_row_that_no_eight_divides_is_packed_as_2_to_4() -> None:
    assert choose_packing("portable", "int4", 12) == Packing("int4", "2:4")


# --- what cannot be packed, and what cannot be unpacked ------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(["2:4", "pair4:8"]), st.integers(0, 999))
def test_a_weight_that_breaks_its_pattern_is_never_packed(name: str, seed: int) -> None:
    weight = random_weight([2, 16], "int4", seed)
    broken = violations(weight, PATTERNS[name])
    if not broken:
        return
    with pytest.raises(ValueError, match=f"^{broken} groups hold non-zeros in more than 2 units"):
        pack(weight, Packing("int4", name))


@pytest.mark.parametrize(
    ("weight", "packing", "message"),
    [
        (torch.ones(2, 4), Packing("int8", None), "float32 cannot be packed as int8"),
        (torch.ones(2, 4), Packing("float16", None), "float32 cannot be packed as float16"),
        (torch.full((1, 2), 8, dtype=torch.int8), Packing("int4", None), "8 to 8 do not fit"),
        (torch.zeros(2, 6, dtype=torch.int8), Packing("int8", "2:4"), "6 is not a multiple of 4"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight: Tensor, packing: Packing, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(weight, packing)


@pytest.mark.parametrize("entry", sorted(set(range(16)) - LEGAL_METADATA))
def test_illegal_metadata_is_refused(entry: int) -> None:
    values = torch.zeros(1, 4, dtype=torch.int8)
    metadata = torch.tensor([[0b0100 << 4 | entry]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 groups have illegal metadata: equal or descending"):
        unpack(values, metadata, Packing("int8", "2:4"), (1, 8))


def test_bits_behind_the_end_of_a_row_are_refused() -> None:
    values = torch.zeros(1, 2, dtype=torch.int8)
    metadata = torch.tensor([[0b0100_0100]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="behind the end of a row"):
        unpack(values, metadata, Packing("int8", "2:4"), (1, 4))
    with pytest.raises(ValueError, match="behind the end of a row"):
        unpack(torch.tensor([[0x11]], dtype=torch.uint8), None, Packing("int4", None), (1, 1))


@pytest.mark.parametrize(
    ("values", "metadata"),
    [
        (torch.zeros(1, 3, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.uint8)),
        (torch.zeros(1, 4, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)),
        (torch.zeros(1, 4, dtype=torch.int8), torch.zeros(1, 2, dtype=torch.uint8)),
        (torch.zeros(1, 4, dtype=torch.int8), None),
    ],
)
def test_parts_of_another_shape_or_type_are_refused(
    values: Tensor, metadata: Tensor | None
) -> None:
    with pytest.raises(ValueError, match="expected"):
        unpack(values, metadata, Packing("int8", "2:4"), (1, 8))
