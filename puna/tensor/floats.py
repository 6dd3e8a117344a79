"""IEEE and bfloat16 floats as one-number blocks."""

import numpy as np
from numpy.typing import NDArray


def decode_f32(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return blocks.view("<f4")


def encode_f32(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    return blocks.astype("<f4", copy=False).view(np.uint8)


def decode_f16(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return blocks.view("<f2").astype(np.float32)


def encode_f16(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    with np.errstate(over="ignore"):  # a value past 65504 becomes infinity, as the format has it
        return blocks.astype("<f2").view(np.uint8)


def decode_bf16(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def encode_bf16(blocks: NDArray[np.float32]) -> NDArray[np.uint8]:
    bits = blocks.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(blocks), quiet_nan, rounded).astype("<u2").view(np.uint8)
