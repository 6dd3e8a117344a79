"""GPTQ (Frantar et al. 2023): the columns of a matrix rounded one after the other, each column's error made good by the
columns to come as far as the inputs' second moments allow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.errors import RequestError
from puna.quantize.rtn import in_groups, nearest_codes, spacing
from puna.tensor.groupwise import Grouped

_BLOCK = 128
_DAMPING = 0.01  # of the mean of the diagonal (section 3.3, step 3)


def gptq(
    values: NDArray[np.float32],
    second: NDArray[np.float64],
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    act_order: bool = True,
    static_groups: bool = True,
) -> Grouped:
    """Quantize a matrix [rows, columns] whose inputs have the second moments [columns, columns].

    With ``act_order`` the columns of the largest inputs come first. With ``static_groups``, groups then stay runs of
    columns, spaced beforehand; else the first columns in that order make up the first group, and so on. Those, and
    groups without ``act_order``, are spaced when their first column is reached, as the errors so far have left them.
    Raises CheckpointError for numbers whose scale float16 cannot hold, RequestError when the moments are not finite.
    """
    rows, columns = values.shape
    size = columns if group_size == -1 else group_size
    w = values.astype(np.float32)
    idle = np.diag(second) <= 0
    w[:, idle] = 0  # columns that the text never used
    order = np.argsort(-np.diag(second), kind="stable") if act_order else np.arange(columns)
    upper = _inverse_factor(second, idle, order)
    groups = np.arange(columns) // size
    spaced_beforehand = act_order and static_groups
    if not spaced_beforehand:
        groups[order] = groups.copy()
    scales, zeros = (part.T.copy() for part in spacing(in_groups(w, group_size), bits, symmetric))
    codes = np.empty((columns, rows), np.uint8)
    w = np.ascontiguousarray(w.T[order])  # a column lies in a row from here on
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = np.empty((stop - start, rows), np.float32)
        for i in range(start, stop):
            column = order[i]
            group = groups[column]
            if not spaced_beforehand and i % size == 0:
                ahead = w[i : i + size].copy()
                if i + size > stop:  # the errors of this block have not yet reached the columns beyond it
                    ahead[stop - i :] -= upper[start:i, stop : i + size].T @ errors[: i - start]
                scales[group], zeros[group] = spacing(ahead.T, bits, symmetric)
            codes[column] = nearest_codes(w[i], scales[group], zeros[group], bits)
            rounded = (codes[column].astype(np.int16) - zeros[group]) * scales[group]
            errors[i - start] = (w[i] - rounded) / upper[i, i]
            w[i + 1 : stop] -= upper[i, i + 1 : stop, None] * errors[i - start]
        w[stop:] -= upper[start:stop, stop:].T @ errors
    return Grouped(np.ascontiguousarray(codes.T), scales.T.copy(), zeros.T.copy(), groups, bits)


def _inverse_factor(
    second: NDArray[np.float64], idle: NDArray[np.bool_], order: NDArray[np.intp]
) -> NDArray[np.float32]:
    """The upper Cholesky factor of the inverse of the damped moments, in that order of columns."""
    if not np.isfinite(second).all():
        raise RequestError("the calibration text gives inputs that are not finite; the model is damaged")
    damped = second.copy()
    diagonal = np.arange(len(damped))
    damped[diagonal[idle], diagonal[idle]] = 1
    damped[diagonal, diagonal] += _DAMPING * np.diag(damped).mean()
    damped = damped[np.ix_(order, order)]
    factor: NDArray[np.float32] = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    return np.ascontiguousarray(factor)
