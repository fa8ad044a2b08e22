"""`check`: what looks wrong in the tensors of a call, for once at the beginning of a training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from frs_kernels import checks
from frs_kernels.functional import richness_mask
from frs_kernels.levels import Levels
from frs_kernels.options import Options, Weight
from frs_kernels.pairs import plain_mask
from frs_kernels.results import Richness

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from frs_kernels.options import LossOptions

OFTEN = 0.5
"""A teacher that sees an object at more than this part of a level's positions has seldom been understood."""


class LevelReport(NamedTuple):
    """One level of the teacher's."""

    shape: tuple[int, ...]  # of the logits, else of the mask
    mass: float  # the sum of the mask: scores, or the mask given
    above_half: float  # the part of the positions where the mask is above 0.5
    low: float  # of the teacher's logits; NaN without any
    high: float


class Diagnosis(NamedTuple):
    """What `check` found; `str()` of it is a table."""

    levels: list[LevelReport]
    findings: list[str]

    def __str__(self) -> str:
        lines = [f"{'level':>5}  {'shape':<22} {'mass':>10}  {'above 0.5':>9}  {'logits':>18}"]
        for number, level in enumerate(self.levels):
            logits = "" if level.low != level.low else f"{level.low:.3g} to {level.high:.3g}"
            shape = str(level.shape)
            lines.append(f"{number:>5}  {shape:<22} {level.mass:>10.4g}  {level.above_half:>9.2%}  {logits:>18}")
        return "\n".join([*lines, *(self.findings or ["nothing looks wrong"])])


@torch.no_grad()
def check(
    student_feats: Levels | None,
    teacher_feats: Levels | None,
    student_logits: Levels | None,
    teacher_logits: Levels | None,
    *,
    mask: Levels | Richness | None = None,
    feat_weight: Weight = 1.0,
    cls_weight: Weight = 1.0,
    **options: Unpack[LossOptions],
) -> Diagnosis:
    """Look at the numbers of a call of `fsr_loss`, which looks at shapes alone: that would make the host wait.

        print(frs_kernels.check(student_feats, teacher_feats, student_logits, teacher_logits))

    Finds: NaN and inf; probabilities given as logits; the logits of a softmax; a teacher that sees an object at most
    positions, as one with a background class among its logits does; a teacher that sees nothing; negative numbers in a
    mask; weights that are NaN, inf or negative; a student that is its own teacher.

    Args:
        student_feats, teacher_feats, student_logits, teacher_logits, mask, feat_weight, cls_weight: as in `fsr_loss`.
        options: further keywords of `FSRLoss`, checked alone.

    Returns:
        For each level the mask's mass, the part of its positions above 0.5 and the range of the teacher's logits; and
        what looks wrong, a sentence each.

    Raises:
        TypeError, ValueError: as `fsr_loss`.
    """
    Options.of(**options)
    scores = plain_mask(mask)
    checks.check_given(student_feats, teacher_feats, student_logits, teacher_logits, scores)
    checks.check_pyramid(student_feats, teacher_feats, student_logits, teacher_logits, scores)
    device = next(levels[0].device for levels in (teacher_logits, teacher_feats) if levels is not None)
    if device.type == "meta":
        raise ValueError("the tensors are on the meta device, where there are no numbers to look at")
    for name, weight in (("feat_weight", feat_weight), ("cls_weight", cls_weight)):
        checks.check_weight(name, weight, device)
    given = {
        "student_feats": student_feats, "teacher_feats": teacher_feats, "student_logits": student_logits,
        "teacher_logits": teacher_logits, "mask": scores,
    }  # fmt: skip
    findings = [text for name, levels in given.items() for text in _not_finite(name, levels)]
    of_softmax = options.get("cls_loss") == "softmax_kl"
    for name in ("student_logits", "teacher_logits"):
        findings += _no_logits(name, given[name], of_softmax)
    for name, student, teacher in (
        ("feats", student_feats, teacher_feats),
        ("logits", student_logits, teacher_logits),
    ):
        if student is not None and teacher is not None and _same(student, teacher):
            findings.append(f"student_{name} are teacher_{name}, number by number: the student would imitate itself")
    shares = scores if teacher_logits is None or scores is not None else richness_mask(teacher_logits).scores
    levels = []
    for level, share in enumerate(shares):
        z = teacher_logits[level] if teacher_logits is not None else None
        levels.append(_report(share, z))
        findings += _mass(level, levels[-1], given=scores is not None)
        if share.numel() and share.amin() < 0:
            findings.append(f"mask[{level}] has negative numbers, down to {float(share.amin()):.3g}: they push away")
    for name, weight in (("feat_weight", feat_weight), ("cls_weight", cls_weight)):
        if not 0 <= float(weight) < float("inf"):
            findings.append(f"{name} is {float(weight)}; it must be zero or more and finite")
    return Diagnosis(levels, findings)


def _not_finite(name: str, levels: Levels | None) -> Iterator[str]:
    for level, x in enumerate(levels or ()):
        bad = ~x.isfinite()
        if name == "teacher_logits":
            bad &= x != float("-inf")  # a class that is masked out
        if count := int(bad.sum()):
            yield f"{name}[{level}] has {count} numbers that are NaN or inf, of {x.numel()}"


def _no_logits(name: str, levels: Levels | None, of_softmax: bool) -> Iterator[str]:
    """A softmax over channels sums to 1; its logarithm has a log-sum-exp of 0; probabilities are in [0, 1].

    The logarithm is as good as the logits `of_softmax`, whose loss a constant in all of them does not change.
    """
    filled = [z.double() for z in levels or () if z.numel()]
    if not filled or levels is None:
        return
    slack = 1e-3 + 4 * torch.finfo(levels[0].dtype).eps
    low, high = min(z.min() for z in filled), max(z.max() for z in filled)
    several = filled[0].shape[1] > 1
    if several and all(torch.logsumexp(z, 1).abs().max() < slack for z in filled):
        if not of_softmax:
            yield f"{name} are the logarithm of a softmax; the loss is for sigmoid heads"
    elif low >= 0 and high <= 1 and high > low:
        sums = several and all((z.sum(1) - 1).abs().max() < slack for z in filled)
        kind = "a softmax's probabilities; the loss is for sigmoid heads" if sums else "probabilities"
        yield f"{name} are all within [0, 1] and look like {kind}: give what the head emits before the sigmoid"


def _same(a: Levels, b: Levels) -> bool:
    filled = [(x, z) for x, z in zip(a, b, strict=True) if x.numel()]
    return bool(filled) and all(x.dtype == z.dtype and torch.equal(x, z) for x, z in filled)


def _report(share: Tensor, z: Tensor | None) -> LevelReport:
    empty = z is None or z.numel() == 0
    low, high = (float("nan"),) * 2 if empty or z is None else (float(z.min()), float(z.max()))
    half = float((share > 0.5).float().mean()) if share.numel() else 0.0
    return LevelReport(tuple(share.shape if z is None else z.shape), float(share.double().sum()), half, low, high)


def _mass(level: int, found: LevelReport, *, given: bool) -> Iterator[str]:
    if found.mass == 0:
        yield f"level {level} has no mass, so that it adds nothing"
    elif found.above_half > OFTEN and not given:
        yield (
            f"level {level}: the teacher sees an object at {found.above_half:.0%} of the positions; is there a "
            "background class among its logits, or are they probabilities?"
        )
