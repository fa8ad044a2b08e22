"""The error table: what the public functions refuse, in words that say what to do."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NORMALIZERS = ("mass", "mass_channels", "total_mass", "none")
HEADS = ("sigmoid", "softmax")
GRAD_MODES = ("auto", "forward", "backward")
LARGEST = sys.float_info.max

ADAPT = "bring the student's to the teacher's with frs_kernels.FeatureAdapter"
CLASSES = "both heads must have the same anchors and classes"


def check_option(name: str, value: object, valid: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{name}={value!r} is unknown; the valid ones are {', '.join(map(repr, valid))}")


def check_number(name: str, value: Any, *, positive: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value <= LARGEST or (positive and value == 0):  # math.isfinite takes no symbolic float of Dynamo's
        raise ValueError(f"{name} must be {'positive' if positive else 'zero or more'} and finite, got {value}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_background(background: Any, levels: Sequence[Tensor]) -> None:
    """None, or the number of one of each level's logits, of which there are others."""
    if background is None:
        return
    if isinstance(background, bool) or not isinstance(background, int):
        raise TypeError(f"background must be the number of a logit or None, got {type(background).__name__}")
    for level, z in enumerate(levels):
        k = z.shape[1]
        if k == 1 or not -k <= background < k:
            raise ValueError(
                f"background={background}: teacher_logits[{level}] {tuple(z.shape)} must have that logit, and others"
            )


def check_weight(name: str, value: Any, device: torch.device | None) -> None:
    """A number, zero or more and finite, or a 0-dim floating-point tensor on the device of the levels."""
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be a number or a tensor of one of the levels' dtypes, got {value.dtype}")
        if value.dim() != 0:
            raise ValueError(f"{name} must be a 0-dim tensor or a number, got shape {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, the levels are on {device}; move it there")
        if value.requires_grad:
            raise ValueError(f"{name} requires a gradient, but weights are not trained; give {name}.detach()")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type(value).__name__}")
    elif not 0 <= value <= LARGEST:
        raise ValueError(f"{name} must be zero or more and finite, got {value}")


def check_learns(pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
    """Of student and teacher in each pair: warns where gradients are enabled and no student's tensor requires one.

    Raises:
        ValueError: a teacher's tensor does.
    """
    if not torch.is_grad_enabled() or any(x.requires_grad for student, _ in pairs for x in student):
        return
    if any(z.requires_grad for _, teacher in pairs for z in teacher):
        raise ValueError(
            "the teacher's tensors require a gradient, the student's do not: are student and teacher swapped? If not, "
            "the student is frozen or was detached"
        )
    if not is_compiling():
        warnings.warn(
            "no tensor of the student's requires a gradient, so that the loss trains nothing: the student is frozen, "
            "was detached, ran under no_grad or inside checkpoint(use_reentrant=True); if it is only evaluated, call "
            "this under torch.no_grad()",
            stacklevel=caller(),
        )


def caller() -> int:
    """The stacklevel of the first frame outside of this package: modules and functions stand between in any number."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("frs_kernels.", "torch.")):
        frame, level = frame.f_back, level + 1
    return level


def check_group_size(size: Any, name: str, levels: Sequence[Tensor]) -> None:
    """A number of channels that divides those of every level."""
    check_count("group_size", size)
    for level, x in enumerate(levels):
        if x.shape[1] % size:
            raise ValueError(
                f"group_size={size} does not divide the {x.shape[1]} channels of {name}[{level}] {tuple(x.shape)}"
            )


def check_sides(sides: Any, name: str, levels: Sequence[Tensor]) -> None:
    """A number of distributions among the channels, of which every level has as many."""
    check_count("sides", sides)
    for level, x in enumerate(levels):
        if x.shape[1] % sides or x.shape[1] != levels[0].shape[1]:
            raise ValueError(
                f"{name}[{level}] {tuple(x.shape)} must have sides * bins channels, sides={sides}, the same on every "
                "level"
            )


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def check_group(group: Any) -> None:
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}; "
            "torch.distributed.group.WORLD is that of all processes"
        )


def check_transforms() -> None:
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "frs_kernels works with backward() and torch.autograd.grad, not inside torch.func's grad, vmap, jvp and "
            "the like"
        )


def check_level_weights(value: Any, levels: int | None) -> None:
    """None, or a number a level; `levels` is None where their number is not known yet."""
    if value is None:
        return
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"level_weights must be a list of numbers, one a level, got {type(value).__name__}")
    if levels is not None and len(value) != levels:
        raise ValueError(f"level_weights has {len(value)} entries, there are {levels} levels")
    for level, weight in enumerate(value):
        check_number(f"level_weights[{level}]", weight, positive=False)


def check_levels(name: str, levels: Any, dims: int = 4) -> None:
    """A non-empty list of floating-point tensors, (N, C, H, W), or (N, H, W) where dims is 3."""
    axes = "(N, C, H, W)" if dims == 4 else "(N, H, W)"
    if isinstance(levels, Tensor) or not isinstance(levels, Sequence):
        raise TypeError(f"{name} must be a list of {axes} tensors, one a level, got {type(levels).__name__}")
    if len(levels) == 0:
        raise ValueError(f"{name} is empty; it needs one {axes} tensor a level")
    for level, x in enumerate(levels):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{level}] must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            valid = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name}[{level}] is {x.dtype}; call .float(), floating-point tensors are needed: {valid}")
        if x.layout != torch.strided:
            raise TypeError(f"{name}[{level}] is {x.layout}; call .to_dense()")
        shape = x.shape
        if len(shape) != dims:
            raise ValueError(f"{name}[{level}] must be {axes}, got shape {tuple(shape)}")
        if dims == 4 and shape[1] == 0:
            raise ValueError(f"{name}[{level}] has no channels, shape {tuple(shape)}")
        if x.device != levels[0].device:
            raise ValueError(f"{name}[{level}] is on {x.device}, {name}[0] on {levels[0].device}; one device is needed")


def check_given(
    student_feats: Any,
    teacher_feats: Any,
    student_logits: Any,
    teacher_logits: Any,
    mask: Any,
    masked_feats: bool = True,
) -> None:
    """Which of the lists of `fsr_loss` are there; `masked_feats`: the features' loss has a mask."""
    if student_feats is None and student_logits is None:
        raise ValueError("nothing to imitate: give student_feats with teacher_feats, or student_logits, or both")
    if (student_feats is None) != (teacher_feats is None):
        missing = "student_feats" if student_feats is None else "teacher_feats"
        raise ValueError(f"{missing} is missing: give both student_feats and teacher_feats, or None for both")
    if teacher_logits is None and ((mask is None and masked_feats) or student_logits is not None):
        raise ValueError("teacher_logits is missing: it makes the mask (or give mask=) and is what cls imitates")


def check_pyramid(student_feats: Any, teacher_feats: Any, student_logits: Any, teacher_logits: Any, mask: Any) -> None:
    """The lists of `fsr_loss` that are there."""
    if student_feats is not None:
        check_levels("student_feats", student_feats)
        check_levels("teacher_feats", teacher_feats)
        check_pair("student_feats", student_feats, "teacher_feats", teacher_feats, ADAPT)
    if teacher_logits is not None:
        check_levels("teacher_logits", teacher_logits)
        if student_feats is not None:
            check_positions("teacher_feats", teacher_feats, "teacher_logits", teacher_logits)
    if student_logits is not None:
        check_levels("student_logits", student_logits)
        check_pair("student_logits", student_logits, "teacher_logits", teacher_logits, CLASSES)
    if mask is not None:
        check_levels("mask", mask, dims=3)
        name, like = ("teacher_logits", teacher_logits) if student_feats is None else ("teacher_feats", teacher_feats)
        check_positions("mask", mask, name, like)


def check_imitation(names: tuple[str, str], student: Any, teacher: Any, mask: Any, *, takes_logits: bool) -> None:
    """The tensors of one term under a mask."""
    check_levels(names[0], student)
    check_levels(names[1], teacher)
    check_pair(names[0], student, names[1], teacher, CLASSES if takes_logits else ADAPT)
    check_levels("mask", mask, dims=3)
    check_positions("mask", mask, names[1], teacher)


def check_pair(a_name: str, a: Sequence[Tensor], b_name: str, b: Sequence[Tensor], hint: str) -> None:
    """Two lists of (N, C, H, W) levels that must agree in everything but dtype and strides."""
    if a[0].device == b[0].device and [x.shape for x in a] == [z.shape for z in b]:
        return
    check_positions(a_name, a, b_name, b)
    for level, (x, z) in enumerate(zip(a, b, strict=True)):
        if x.shape[1] != z.shape[1]:
            raise ValueError(
                f"{a_name}[{level}] {tuple(x.shape)} and {b_name}[{level}] {tuple(z.shape)} have {x.shape[1]} and "
                f"{z.shape[1]} channels; {hint}"
            )


def check_positions(a_name: str, a: Sequence[Tensor], b_name: str, b: Sequence[Tensor]) -> None:
    """Two lists of levels that must agree in N, H and W."""
    if len(a) != len(b):
        raise ValueError(f"{a_name} has {len(a)} levels, {b_name} has {len(b)}; give the same levels to both")
    if a[0].device != b[0].device:
        raise ValueError(f"{a_name} is on {a[0].device}, {b_name} on {b[0].device}; move them to one device")
    for level, (x, z) in enumerate(zip(a, b, strict=True)):
        if _place(x) != _place(z):
            raise ValueError(
                f"{a_name}[{level}] {tuple(x.shape)} and {b_name}[{level}] {tuple(z.shape)} differ in N, H or W; "
                "all must come from the same images at the same strides"
            )


def _place(level: Tensor) -> tuple[int, int, int]:
    """(N, H, W); a slice of a torch.Size takes three times as long as the whole of this."""
    shape = level.shape
    return shape[0], shape[-2], shape[-1]
