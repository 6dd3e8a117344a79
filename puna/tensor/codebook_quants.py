"""The ggml encodings of 1 to 3 bits whose codes look up short vectors of levels: IQ1, IQ2 and IQ3.

Layouts: ggml's ``block_iq1_*``, ``block_iq2_*`` and ``block_iq3_*`` structures (ggml-common.h). Each is taken apart
into scales, float32[blocks, groups], and codes, int8[blocks, 256]: a number is its group's scale times its code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.tensor.bits import Scaled, fields, halves, multiply
from puna.tensor.codebooks import codebook

Blocks = NDArray[np.uint8]
Numbers = NDArray[np.float32]

# Seven stored signs; the eighth makes the count of minus signs even.
_SEVEN_SIGNS = np.array([byte | (byte.bit_count() & 1) << 7 for byte in range(128)], np.uint8)


def scaled_iq2_xxs(blocks: Blocks) -> Scaled:
    """Bytes: scale; for each 32 numbers 4 codes, then 4 x 7 signs and a 4-bit scale."""
    pairs = _words(blocks, 2, 64, "<u4").reshape(len(blocks), 8, 2)
    codes = np.ascontiguousarray(pairs[..., 0]).view(np.uint8).reshape(len(blocks), 32)
    scales = halves(blocks, 0) * (np.float32(0.5) + (pairs[..., 1] >> 28).astype(np.float32)) * np.float32(0.25)
    return scales, _signed("IQ2_XXS", codes, _four_sevens(pairs[..., 1]))


def scaled_iq2_xs(blocks: Blocks) -> Scaled:
    """Bytes: scale; for each 8 numbers 9 bits of code and 7 signs; a 4-bit scale for each 16."""
    words = _words(blocks, 2, 64, "<u2")
    scales = halves(blocks, 0) * (np.float32(0.5) + _nibbles(blocks[:, 66:])) * np.float32(0.25)
    return scales, _signed("IQ2_XS", words & 511, _SEVEN_SIGNS[words >> 9])


def scaled_iq2_s(blocks: Blocks) -> Scaled:
    """Bytes: scale; 32 of codes, 32 of signs, 8 of the codes' higher bits; a 4-bit scale for each 16 numbers."""
    codes = blocks[:, 2:34] | fields(blocks[:, 66:74], 2).astype(np.uint16) << 8
    scales = halves(blocks, 0) * (np.float32(0.5) + _nibbles(blocks[:, 74:])) * np.float32(0.25)
    return scales, _signed("IQ2_S", codes, blocks[:, 34:66])


def scaled_iq3_xxs(blocks: Blocks) -> Scaled:
    """Bytes: scale; 64 codes of 4 numbers each; for each 32 numbers 4 x 7 signs and a 4-bit scale."""
    words = _words(blocks, 66, 32, "<u4")
    scales = halves(blocks, 0) * (np.float32(0.5) + (words >> 28).astype(np.float32)) * np.float32(0.5)
    return scales, _signed("IQ3_XXS", blocks[:, 2:66], _four_sevens(words))


def scaled_iq3_s(blocks: Blocks) -> Scaled:
    """Bytes: scale; 64 of codes of 4 numbers each, 8 of their ninth bits, 32 of signs; a 4-bit scale for each 32."""
    codes = blocks[:, 2:66] | fields(blocks[:, 66:74], 1).astype(np.uint16) << 8
    scales = halves(blocks, 0) * (1 + 2 * _nibbles(blocks[:, 106:]))
    return scales, _signed("IQ3_S", codes, blocks[:, 74:106])


def scaled_iq1_s(blocks: Blocks) -> Scaled:
    """Bytes: scale; 32 of codes; for each 32 numbers four times 3 higher bits, a 3-bit scale, the shift's sign."""
    words = _words(blocks, 34, 16, "<u2")
    higher = words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    codes = blocks[:, 2:34] | higher.reshape(len(blocks), 32) << 8
    shift = np.where(words & 0x8000, -1, 1).astype(np.int8)
    return halves(blocks, 0) * (2 * (words >> 12 & 7) + 1) * np.float32(0.125), _shifted(codes, shift)


def scaled_iq1_m(blocks: Blocks) -> Scaled:
    """Bytes: 32 of codes; for each 8 numbers 3 higher bits and the shift's sign; for each 16 a 3-bit scale.

    The block's scale lies in the highest four bits of the four words of scales.
    """
    words = _words(blocks, 48, 8, "<u2")
    parts = (words & 0xF000) >> np.array([12, 8, 4, 0], np.uint16)
    scale = np.bitwise_or.reduce(parts, axis=1, keepdims=True).view("<f2").astype(np.float32)
    small = words[..., None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    nibbles = fields(blocks[:, 32:48], 4)
    codes = blocks[:, :32] | (nibbles & 7).astype(np.uint16) << 8
    shift = np.where(nibbles & 8, -1, 1).astype(np.int8)
    return scale * (2 * small.reshape(len(blocks), 16) + 1) * np.float32(0.125), _shifted(codes, shift)


def decode_iq2_xxs(blocks: Blocks) -> Numbers:
    return multiply(*scaled_iq2_xxs(blocks))


def decode_iq2_xs(blocks: Blocks) -> Numbers:
    return multiply(*scaled_iq2_xs(blocks))


def decode_iq2_s(blocks: Blocks) -> Numbers:
    return multiply(*scaled_iq2_s(blocks))


def decode_iq3_xxs(blocks: Blocks) -> Numbers:
    return multiply(*scaled_iq3_xxs(blocks))


def decode_iq3_s(blocks: Blocks) -> Numbers:
    return multiply(*scaled_iq3_s(blocks))


def decode_iq1_s(blocks: Blocks) -> Numbers:
    return multiply(*scaled_iq1_s(blocks))


def decode_iq1_m(blocks: Blocks) -> Numbers:
    return multiply(*scaled_iq1_m(blocks))


def _signed(name: str, codes: NDArray[np.integer], signs: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The vectors of the codes, each number negated whose bit of ``signs`` is set: int8[blocks, 256]."""
    magnitudes = codebook(name)[codes].reshape(len(codes), 256)
    negative = np.unpackbits(signs.reshape(len(codes), 32), axis=1, bitorder="little").view(bool)
    signed: NDArray[np.int8] = np.where(negative, -magnitudes, magnitudes)
    return signed


def _shifted(codes: NDArray[np.integer], shift: NDArray[np.int8]) -> NDArray[np.int8]:
    """The vectors of the codes in eighths, each shifted by one eighth: int8[blocks, 256]."""
    vectors = codebook("IQ1_S")[codes] * np.int8(8)
    shifted: NDArray[np.int8] = vectors + np.repeat(shift, 32 // shift.shape[1], axis=1)[..., None]
    return shifted.reshape(len(codes), 256)


def _words(blocks: Blocks, at: int, size: int, dtype: str) -> NDArray[np.unsignedinteger]:
    return np.ascontiguousarray(blocks[:, at : at + size]).view(dtype)


def _nibbles(packed: Blocks) -> Numbers:
    return fields(packed, 4).astype(np.float32)


def _four_sevens(words: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """Four fields of seven stored signs: uint8[blocks, words, 4]."""
    signs: NDArray[np.uint8] = _SEVEN_SIGNS[words[..., None] >> np.array([0, 7, 14, 21], np.uint32) & 127]
    return signs
