"""What a quantized folder is to be, and which wishes contradict each other or the model."""

from __future__ import annotations

from dataclasses import dataclass

from puna.checkpoint import Checkpoint
from puna.checkpoint.hf_quantized.write import is_quantized_matrix
from puna.errors import CheckpointError, RequestError

METHODS = ("int8", "int4", "nf4", "fp8", "gptq", "awq", "w8a8")
CALIBRATED = ("gptq", "awq", "w8a8")
LAYOUTS = ("compressed-tensors", "gptq", "awq")
ZERO_POINTS = ("v1", "v2")


@dataclass(frozen=True)
class FolderSettings:
    """What to make. ``method`` is one of METHODS: ``int8`` has a scale for each row; ``int4`` is rounded plainly;
    ``w8a8`` is SmoothQuant's int8, for programs that round inputs to 8 bits as well.

    ``group_size`` (32, 64, 128, or -1 for rows) and ``symmetric`` are of int4 and GPTQ (AWQ is not symmetric);
    ``act_order``, ``static_groups`` and ``true_sequential`` of GPTQ. ``layout``, one of LAYOUTS, says whose tensors
    hold int4, GPTQ and AWQ, by default the method's own; ``zero_points``, one of ZERO_POINTS, how the layout gptq has
    them: less 1 (``v1``, which every loader reads) or as they are. ``requantize`` accepts weights that are quantized
    already, and their further loss.
    """

    method: str
    group_size: int = 128
    symmetric: bool = False
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = True
    layout: str | None = None
    zero_points: str = "v1"
    requantize: bool = False

    @property
    def reorders(self) -> bool:
        """Whether groups are no runs of columns."""
        return self.method == "gptq" and self.act_order and not self.static_groups

    @property
    def stored_as(self) -> str:
        """The layout of the folder."""
        own = self.method if self.method in LAYOUTS else "compressed-tensors"
        return self.layout or own


def check_settings(checkpoint: Checkpoint, settings: FolderSettings, *, has_text: bool) -> None:
    """Raise RequestError for settings that contradict each other, CheckpointError for weights that they don't fit."""
    if settings.method not in METHODS:
        raise RequestError(f"unknown method {settings.method!r}; known: {', '.join(METHODS)}")
    if settings.stored_as not in LAYOUTS:
        raise RequestError(f"unknown layout {settings.layout!r}; known: {', '.join(LAYOUTS)}")
    if settings.layout and settings.method not in ("int4", "gptq", "awq"):
        raise RequestError(f"{settings.method} has a layout of its own; leave out the layout {settings.layout}")
    if settings.zero_points not in ZERO_POINTS:
        raise RequestError(f"unknown zero points {settings.zero_points!r}; known: {', '.join(ZERO_POINTS)}")
    if settings.zero_points != "v1" and settings.stored_as != "gptq":
        raise RequestError(
            f"the layout {settings.stored_as} has one form of zero points; {settings.zero_points} is of gptq"
        )
    if settings.method != "gptq" and not (settings.act_order and settings.static_groups and settings.true_sequential):
        raise RequestError(f"act-order, static groups and true-sequential are of GPTQ, not of {settings.method}")
    if settings.reorders and settings.stored_as != "gptq":
        raise RequestError(f"the layout {settings.stored_as} keeps groups in order; without static groups, choose gptq")
    if settings.group_size != -1 and settings.group_size <= 0:
        raise RequestError(f"the group size is {settings.group_size}; expected 32, 64, 128, or -1 for rows")
    if settings.method in CALIBRATED and not has_text:
        raise RequestError(f"{settings.method} needs a calibration text; give one (--calibrate)")
    if has_text and settings.method not in CALIBRATED:
        raise RequestError(
            f"{settings.method} is rounded without a calibration text; leave it out, or choose GPTQ, AWQ or W8A8"
        )
    if settings.symmetric and settings.method == "awq":
        raise RequestError("AWQ weights have zero points; leave out the symmetric setting")
    for name, weight in checkpoint.tensors.items():
        if not is_quantized_matrix(name):
            continue
        if weight.type.block_size > 1 and not settings.requantize:
            raise CheckpointError(
                f"{name} is quantized already ({weight.type.name}); quantize the original model, or accept the further "
                "loss (--requantize)"
            )
        grouped = settings.method in ("int4", "gptq", "awq") and settings.stored_as != "gptq"
        if grouped and settings.group_size != -1 and weight.shape[1] % settings.group_size:
            raise CheckpointError(
                f"{name}: rows of {weight.shape[1]} numbers are not whole groups of {settings.group_size}; "
                "choose another group size, or the layout gptq, which allows it"
            )
