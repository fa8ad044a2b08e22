"""What every distiller does with a student and its teacher, whatever framework the two are of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frs_kernels import checks
from frs_kernels.distill.beside import Beside
from frs_kernels.distill.share import GradientShare
from frs_kernels.distill.teacher import fast_dtype, fast_teacher
from frs_kernels.functional import fsr_loss, richness_mask
from frs_kernels.heads import localization_distillation
from frs_kernels.modules import FeatureAdapter, FSRLoss, LocalizationDistillation
from frs_kernels.presets import PRESETS
from frs_kernels.results import FSRTerms

Levels = Sequence[Tensor]
UNTUNED: dict[str, Any] = {"normalizer": "total_mass"}
"""What takes the place of a preset."""
TEACHER_OPTIONS = (*(name for name in fast_teacher.__kwdefaults__ or () if name != "tapped"), "image_scale", "stream")
PADDING = 32
"""Pixels that detectors pad to: sides of other sizes do not come out alike on the way down and up a pyramid."""
WATCHED = {"feat": "feats", "cls": "logits", "box": "boxes"}
"""Which of a tap's tensors carry the gradient of a term."""
UNUSED = 32  # calls, more than anybody adds up before a backward pass


def options_of(preset: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `FSRLoss`: the preset's, and over them those given.

    Raises:
        ValueError: there is no such preset.
    """
    if preset is not None:
        checks.check_option("preset", preset, tuple(PRESETS))
    return {**(PRESETS[preset] if preset else UNTUNED), **given}


def check_weights(options: Mapping[str, Any], shares: nn.ModuleDict, has_feats: bool) -> None:
    """Warn of features whose weight nobody has chosen: what fits depends on their channels and on the denominator."""
    if has_feats and "feat_weight" not in options and "feat" not in shares:
        warnings.warn(
            "feat_weight is 1, which nobody has chosen and no detector was seen to fit: give weights, a preset or "
            "gradient_share=1",
            stacklevel=checks.caller(),
        )


def has_head_term(criterion: FSRLoss) -> bool:
    """A weight of 0 leaves the term out: it would cost a pass over the logits."""
    return isinstance(criterion.cls_weight, Tensor) or criterion.cls_weight != 0


def ramp(iteration: int, warmup: int, steps: int | None = None) -> float:
    """The factor of both losses: up to 1 over `warmup` iterations, and with `steps` along a cosine down to 0 there."""
    rise = min(iteration / warmup, 1.0) if warmup else 1.0
    return rise if steps is None else rise * 0.5 * (1 + math.cos(math.pi * min(iteration / steps, 1.0)))


def strides(levels: Levels, width: int) -> list[int]:
    """Pixels of an image of this width to a cell, one number a level."""
    return [round(width / x.shape[3]) for x in levels]


def choose_levels(levels: Sequence[int] | None, student: Levels, teacher: Levels, width: int) -> list[int]:
    """Which levels are distilled, `levels` or all, where those fit each other.

    Raises:
        TypeError: levels is no list.
        ValueError: levels are no distinct indices; without them, other numbers of levels; other sizes.
    """
    theirs = [f"{len(each)} levels of strides {strides(each, width)}" for each in (student, teacher)]
    found = f"student has {theirs[0]}, teacher {theirs[1]}"
    if levels is not None and not isinstance(levels, Sequence):
        raise TypeError(f"levels must be a list of indices, got {type(levels).__name__}")
    if levels is None:
        if len(student) != len(teacher):
            raise ValueError(f"{found}: other levels; say which with levels=")
        levels = range(len(student))
    most = min(len(student), len(teacher))
    if not levels or len(set(levels)) < len(levels) or not all(type(i) is int and 0 <= i < most for i in levels):
        raise ValueError(f"levels={list(levels)}: give distinct indices from 0 to {most - 1}")
    if [student[i].shape[2:] for i in levels] != [teacher[i].shape[2:] for i in levels]:
        raise ValueError(f"{found}: both must have the same strides")
    return list(levels)


def make_adapter(student: Levels, teacher: Levels, kernel_size: int | None) -> FeatureAdapter | None:
    """An adapter that brings the student's channels to the teacher's; None for a kernel_size of None.

    Raises:
        ValueError: there is to be none, but the channels differ.
    """
    ins, outs = ([x.shape[1] for x in levels] for levels in (student, teacher))
    if kernel_size is not None:
        return FeatureAdapter(ins, outs, len(ins), kernel_size).to(student[0].device, student[0].dtype)
    if ins != outs:
        raise ValueError(f"student has {ins} channels, teacher {outs}: set adapter_kernel=3")
    return None


def make_localization(options: Mapping[str, Any] | None) -> LocalizationDistillation:
    """Raises TypeError for an unknown option, and for one that the distiller sets."""
    if taken := {"process_group", "return_terms"} & set(options or {}):
        raise TypeError(f"box_options has {', '.join(sorted(taken))}, which the distiller sets itself")
    return LocalizationDistillation(**(options or {}))


def check_level_weights(criterion: FSRLoss, localization: LocalizationDistillation | None, levels: int) -> None:
    """Raises TypeError, ValueError: there is not one a level."""
    checks.check_level_weights(criterion.options.level_weights, levels)
    if localization is not None:
        checks.check_level_weights(localization.options.get("level_weights"), levels)


def check_finite(feats: Levels, logits: Levels, boxes: Levels) -> None:
    """Raise ValueError where the teacher's first images show that its dtype is too narrow."""
    for name, levels in (("feats", feats), ("logits", logits), ("boxes", boxes)):
        for level, x in enumerate(levels):
            if not x.isfinite().all():
                raise ValueError(
                    f"the teacher's {name}[{level}] are not finite in {x.dtype}; leave dtype out of fast_teacher="
                )


def resized(levels: Levels, like: Levels) -> list[Tensor]:
    """The levels at the sizes of others; those that have them stay as they are."""
    return [
        x if x.shape[2:] == other.shape[2:] else F.interpolate(x, other.shape[2:], mode="bilinear")
        for x, other in zip(levels, like, strict=True)
    ]


def make_shares(
    target: float | Sequence[float] | None,
    criterion: FSRLoss,
    localization: LocalizationDistillation | None,
    feats: bool,
    logits: bool,
) -> nn.ModuleDict:
    """A `GradientShare` for each term that is distilled, "feat", "cls" and "box", beginning at its weight."""
    if target is None:
        return nn.ModuleDict()
    weights = {"feat": criterion.feat_weight, "cls": criterion.cls_weight}
    wanted = {"feat": feats, "cls": logits}
    if localization is not None:
        weights["box"], wanted["box"] = localization.weight, True
    targets = tuple(target) if isinstance(target, Sequence) else (target,) * len(weights)
    if len(targets) != len(weights):
        each = "the features', the logits' and the boxes'" if localization else "the features' and the logits'"
        raise ValueError(f"gradient_share={target}: give one number, or {each}")
    if any(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError("gradient_share sets the weights; those given, numbers, are where it begins")
    shares = nn.ModuleDict()
    for (name, weight), share in zip(weights.items(), targets, strict=True):
        if wanted[name]:
            checks.check_number("gradient_share", share, positive=True)
            checks.check_number(f"the weight of {name}, where gradient_share begins,", weight, positive=True)
            shares[name] = GradientShare(share, float(weight))
    return shares


class Distilling:
    """A student and its frozen teacher, for a subclass of nn.Module.

    The teacher is kept out of the module tree: it is in no checkpoint, optimiser or DDP bucket, and `.to()`, `.half()`
    and the like move it along.
    """

    student: Any
    teacher: Any
    criterion: FSRLoss
    localization: LocalizationDistillation | None
    """Of box distributions; None where they are not distilled."""
    adapter: FeatureAdapter | None
    shares: nn.ModuleDict
    levels: list[int]
    has_feats: bool
    has_logits: bool
    terms: FSRTerms | None = None
    """Of the last step."""
    channels_last = False
    """Of the teacher's images."""
    image_scale = 1.0
    """Of the teacher's images, to whole multiples of PADDING; its levels are brought to the sizes of the student's."""
    beside = Beside(wanted=False)
    auto_dtype = False
    """Until the first step, which is on the device that counts: mmengine moves a model there after it was built."""
    unseen = False
    """Whether a teacher of a narrower dtype has not yet been looked at on real images."""
    last_ramp = 1.0
    _unused = 0
    _warned: frozenset[str] = frozenset()

    def through(self, process_group: Any = None) -> dict[str, Callable[[list[Tensor]], list[Tensor]]]:
        """For a `Tap` on the student, in a step; takes what the last step's backward pass has shown."""
        found: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {}
        for name, share in self.named_shares():
            share.update(self.last_ramp, process_group)
            found[WATCHED[name]] = share.watch
        return found

    def named_shares(self) -> Iterator[tuple[str, GradientShare]]:
        """ "feat", "cls" and "box", those whose gradient is held."""
        for name, share in self.shares.items():
            assert isinstance(share, GradientShare)
            yield name, share

    def logged(self) -> dict[str, Tensor]:
        """frs_weight_<term>, and frs_share_<term>_<level>, what the term's last gradient was of the rest's."""
        found = {}
        for name, share in self.named_shares():
            found[f"frs_weight_{name}"] = share.weight.clone()
            if share.levels is not None and len(share.levels) == len(self.levels):
                shares = zip(self.levels, share.levels, strict=True)
                found |= {f"frs_share_{name}_{level}": value for level, value in shares}
        return found

    def imitate(
        self,
        student_feats: Levels | None,
        teacher_feats: Levels | None,
        student_logits: Levels | None,
        teacher_logits: Levels | None,
        *,
        mask: Levels | None,
        ramp: float,
        process_group: Any = None,
    ) -> dict[str, Tensor]:
        """ramp * feat_weight * feat as "loss_frs_feat" and ramp * cls_weight * cls as "loss_frs_cls" (`fsr_loss`)."""
        if self.adapter is not None and student_feats is not None:
            student_feats = self.adapter(student_feats)
        weights: dict[str, Any] = {
            "feat": ramp * self.criterion.feat_weight,
            "cls": ramp * self.criterion.cls_weight,
        }
        in_loss = weights
        if self.shares:
            in_loss = {"feat": 1.0, "cls": 1.0}  # numbers, with which the gradient can be stored in the forward pass
            weights |= {name: ramp * share.weight for name, share in self.named_shares()}
        terms = fsr_loss(
            student_feats if self.has_feats else None,
            teacher_feats if self.has_feats else None,
            student_logits if self.has_logits else None,
            teacher_logits,
            mask=mask,
            process_group=process_group,
            return_terms=True,
            feat_weight=in_loss["feat"],
            cls_weight=in_loss["cls"],
            **self.criterion.options._asdict(),
        )
        self.last_ramp = ramp
        self.terms = terms._replace(loss=terms.loss.detach(), feat=terms.feat.detach(), cls=terms.cls.detach())
        losses = {}
        if self.has_feats:
            losses["loss_frs_feat"] = weights["feat"] * terms.feat
        if self.has_logits:
            losses["loss_frs_cls"] = weights["cls"] * terms.cls
        for loss in losses.values():
            if loss.requires_grad:
                self._unused += 1
                loss.register_hook(self._use)
        if self._unused > UNUSED * len(losses):
            self._warn(
                f"none of the last {UNUSED} calls' loss_frs_feat and loss_frs_cls was gone backward through: the "
                "student trains without them; add them to the loss, sum(losses.values()), or take distiller.loss()"
            )
        return losses

    def localize(
        self,
        student: Levels,
        teacher: Levels,
        logits: Levels | None,
        *,
        mask: Levels | None,
        ramp: float,
        process_group: Any = None,
    ) -> dict[str, Tensor]:
        """ramp * weight * `localization_distillation` as "loss_frs_box", after `imitate`, if that was called.

        Without `mask` under that of the other terms, and where they have none, under the richness of the teacher's
        logits.
        """
        assert self.localization is not None
        under: Any = mask or (self.terms and self.terms.mask)
        if not under:
            assert logits is not None
            under = richness_mask(logits, backend=self.criterion.options.backend)
        held = dict(self.named_shares()).get("box")
        weight = ramp * (self.localization.weight if held is None else held.weight)
        options = self.localization.options
        self.last_ramp = ramp
        return {
            "loss_frs_box": localization_distillation(
                student, teacher, under, weight=weight, process_group=process_group, **options
            )
        }

    def _warn(self, message: str) -> None:
        """Once."""
        if message not in self._warned:
            self._warned |= {message}
            warnings.warn(message, stacklevel=checks.caller())

    def quicken(self, run: Callable[[Any], Any], tapped: Sequence[str], fast: bool | dict[str, Any]) -> None:
        """Put a fast copy in the teacher's place, with options of `fast_teacher` and of the distiller; False: none."""
        if fast is False:
            return
        if fast is not True and not isinstance(fast, Mapping):
            raise TypeError(f"fast_teacher must be True, False or a dict of options, got {fast!r}")
        options = {} if fast is True else dict(fast)
        if unknown := set(options) - set(TEACHER_OPTIONS):
            valid = ", ".join(TEACHER_OPTIONS)
            raise ValueError(f"fast_teacher has {', '.join(sorted(unknown))}; the valid ones are {valid}")
        scale, stream = options.pop("image_scale", 1.0), options.pop("stream", False)
        checks.check_number("image_scale", scale, positive=True)
        checks.check_flag("stream", stream)
        self.beside = Beside(stream)
        self.auto_dtype = options.get("dtype") == "auto"
        self.unseen = options.get("dtype") is not None
        self.channels_last = bool(options.get("channels_last"))
        dtype = None if self.auto_dtype else options.get("dtype")
        self.teacher = fast_teacher(self.teacher, run, tapped=tapped, **{**options, "dtype": dtype})
        self.image_scale = scale

    def settle(self) -> None:
        """Before a teacher's pass in training."""
        if self.auto_dtype:
            self.auto_dtype = False
            self.teacher.to(dtype=fast_dtype(next(self.teacher.parameters()).device))

    def images_are_there(self) -> None:
        """What the teacher waits for, where it has a stream of its own; its dtype is settled before."""
        self.settle()
        self.beside.mark(next(self.teacher.parameters(), torch.empty(0)).device)

    def check_first(self, feats: Levels, logits: Levels, boxes: Levels = ()) -> None:
        """After it: once, a dtype that is too narrow is an error."""
        if self.unseen:
            self.unseen = False
            check_finite(feats, logits, boxes)

    def _prepared(self, images: Tensor) -> Tensor:
        """At the teacher's scale, in its dtype and layout."""
        if self.image_scale != 1:
            size = [PADDING * max(1, round(self.image_scale * side / PADDING)) for side in images.shape[2:]]
            images = F.interpolate(images.float(), size, mode="bilinear", antialias=True)
        like = next(self.teacher.parameters(), images)
        if images.is_floating_point() and not like.is_meta:
            images = images.to(like.dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def _use(self, gradient: Tensor) -> None:
        self._unused = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[misc]

    def to_empty(self, *, device: Any, recurse: bool = True) -> Any:
        """nn.Module's, which leaves memory as it is: for a student whose weights come later. The teacher keeps its own.

        Raises:
            ValueError: the teacher has none.
        """
        if any(t.is_meta for t in (*self.teacher.parameters(), *self.teacher.buffers())):
            raise ValueError("the teacher is on the meta device: load its weights before it is given to a distiller")
        kept, self.__dict__["teacher"] = self.teacher.to(device), nn.Module()
        try:
            return super().to_empty(device=device, recurse=recurse)  # type: ignore[misc]
        finally:
            self.__dict__["teacher"] = kept

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":  # past nn.Module's, which would make it a submodule
            self.__dict__[name] = value.eval().requires_grad_(False)
        else:
            super().__setattr__(name, value)
