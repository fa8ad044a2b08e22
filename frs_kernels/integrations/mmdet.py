"""mmdetection: `FRSDistiller` trains any student config with the paper's losses beside its own.

    custom_imports = dict(imports=["frs_kernels.integrations.mmdet"])
    model = dict(
        type="FRSDistiller",
        student=_base_.model,
        teacher="mmdet::retinanet/retinanet_r101_fpn_2x_coco.py",
        teacher_checkpoint="retinanet_r101_fpn_2x_coco.pth",
        preset="retinanet",
    )

One training step, over the levels l of the neck that feed the dense head (the RPN's of a two-stage detector):

    loss_frs_feat = ramp * feat_weight * sum_l w_l / M_l sum_p S_p sum_c (adapter(s)_pc - t_pc)^2
    loss_frs_cls  = ramp * cls_weight  * sum_l w_l / M_l sum_p S_p sum_k BCE(x_pk, sigmoid(z_pk))
    loss_frs_box  = ramp * `localization_distillation`, with box_options
    frs_mass_l    = M_l,      ramp = min(iteration / warmup, 1)

with s, x the neck's and head's outputs that the student's own losses are made of, and S from `mask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from mmengine.logging import MessageHub
from torch import Tensor

from frs_kernels import FSRLoss, Richness, checks, richness_mask
from frs_kernels.distill import Tap, masks
from frs_kernels.distill.pairing import (
    Distilling,
    check_level_weights,
    check_weights,
    choose_levels,
    has_head_term,
    make_adapter,
    make_localization,
    make_shares,
    options_of,
    ramp,
    resized,
    strides,
)
from frs_kernels.integrations import mmdet_hooks as mmdet_hooks  # registers them: a config imports this file alone
from frs_kernels.integrations.mmdet_pair import (
    PROBE_SIDE,
    Emitted,
    check_boxes,
    check_normalisation,
    check_pair,
    dense_head,
    empty_image,
    has_class_branch,
    load_teacher,
    model_config,
    probe,
    run,
    run_class_branch,
    sources,
)

TERMS = ("both", "features", "head")
MASKS = ("richness", "threshold", "ones", "boxes")


@MODELS.register_module()
class FRSDistiller(Distilling, BaseDetector):
    """A student detector that is trained with its own losses and `fsr_loss` (arXiv 2111.00674).

    The teacher is kept out of the module tree: it is in no checkpoint, optimiser or DDP bucket, `train()` leaves it in
    eval mode, and `.to()`, `.half()` and the like move it along. The student's neck and head run once a step.

    Args:
        student: the student's model config: a dict, a config file, or "mmdet::<config>".
        teacher: the teacher's, likewise. Its images are normalised as the student's.
        teacher_checkpoint: file or URL of the teacher's weights; every key must fit.
        preset: a name in `frs_kernels.PRESETS`: "retinanet", "gfl", "fcos", "faster_rcnn", "pkd", "cwd"; None for
            normalizer="total_mass" (docs/math.md), and weights in `loss` or gradient_share.
        loss: further keywords of `frs_kernels.FSRLoss` that override the preset's, say dict(feat_weight=0.01,
            cls_loss="kl", level_weights=[...]).
        terms: "both", "features" or "head": the paper's ablation.
        box_options: adds `localization_distillation` (LD, CVPR 2022) under the same mask, for heads of GFL's kind: a
            dict of its options, dict(weight=0.25), or dict() for its defaults.
        mask: where to imitate: "richness", S_p = max_k sigmoid(z_pk); "threshold", the richness where it is above
            `threshold` and 0 elsewhere; "ones", everywhere alike; "boxes", 1 where a cell meets a ground-truth box.
        threshold: for mask="threshold", a number in [0, 1).
        centerness: multiplies the richness by sigmoid(centerness), for heads that emit it (FCOS, ATSS).
        levels: indices of the levels that are distilled; all by default.
        adapter_kernel: kernel size of the adapter's convolution a level; None for no adapter, where channels agree.
        gradient_share: hold each term where its gradient, at the neck's or the head's output, is this part of that of
            all other losses: one number, (features', head's), or with box_options (features', head's, boxes'). Each
            begins at its weight; frs_weight_* and frs_share_* are logged.
        warmup: iterations over which both losses rise linearly from 0, by the iteration of the runner made last: a
            resumed run goes on where it was. Where there has been no runner there is no warm-up.
        average_mass: average M_l, and what gradient_share looks at, over the processes of `torch.distributed`; each
            keeps its own by default.
        fast_teacher: fold the teacher's batch norms; a dict has options of `frs_kernels.distill.fast_teacher`,
            dict(dtype="auto", free=True) for 16 bits where that is faster and without the box tower, and two of the
            distiller's own: stream=True runs the teacher on a CUDA stream beside the student; image_scale=0.5 gives it
            smaller images and resizes what it emits, another method than the paper's. False: as it is.
        trust_checkpoint: read a checkpoint that holds more than weights and what mmengine puts beside them. Such a file
            may run any code.
        data_preprocessor: the student's by default.

    Raises (when built, before training):
        ValueError: an unknown value of an option; a student or teacher without neck or sigmoid class logits; other
            strides, number of levels, number of classes, anchors or normalisation; a checkpoint that does not fit.
        TypeError: an unknown keyword in `loss`, or a value that is no number where one is needed.
        FileNotFoundError: no such config or checkpoint.

    A checkpoint of the plain student (`load_from`) is taken as the student's. What is asked of the distiller and is not
    its own (`bbox_head`, `set_epoch`, ...: mmdet's hooks do) is the student's.
    """

    def __init__(
        self,
        student: dict[str, Any] | str | Path,
        teacher: dict[str, Any] | str | Path,
        teacher_checkpoint: str | Path,
        preset: str | None,
        *,
        loss: dict[str, Any] | None = None,
        terms: str = "both",
        box_options: dict[str, Any] | None = None,
        mask: str = "richness",
        threshold: float | None = None,
        centerness: bool = False,
        levels: Sequence[int] | None = None,
        adapter_kernel: int | None = 3,
        gradient_share: float | tuple[float, ...] | None = None,
        warmup: int = 500,
        average_mass: bool = False,
        fast_teacher: bool | dict[str, Any] = True,
        trust_checkpoint: bool = False,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        checks.check_option("terms", terms, TERMS)
        checks.check_option("mask", mask, MASKS)
        checks.check_number("warmup", warmup, positive=False)
        if (mask == "threshold") != (threshold is not None):
            raise ValueError(f"mask={mask!r} with threshold={threshold}: threshold= goes with mask='threshold' alone")
        if threshold is not None:
            checks.check_number("threshold", threshold, positive=False)
            if threshold >= 1:
                raise ValueError(f"threshold={threshold}: no richness is above it; give a number from 0 to below 1")
        if centerness and mask in ("ones", "boxes"):
            raise ValueError(f"centerness=True multiplies the richness, which mask={mask!r} does not use")
        chosen = _options(preset, loss)
        criterion = FSRLoss(**chosen)  # refuses an unknown option
        localization = None if box_options is None else make_localization(box_options)

        student_cfg, teacher_cfg = model_config("student", student), model_config("teacher", teacher)
        if isinstance(data_preprocessor, dict):
            student_cfg["data_preprocessor"] = data_preprocessor
        check_normalisation(student_cfg, teacher_cfg)
        built: BaseDetector = MODELS.build(student_cfg)
        super().__init__(built.data_preprocessor, init_cfg)
        self.student = built
        self.criterion = criterion
        self.localization = localization
        self.has_feats, self.has_logits = terms != "head", terms != "features" and has_head_term(criterion)
        self.mask = mask
        self.threshold = threshold
        self.centerness = centerness
        self.warmup = warmup
        self.average_mass = average_mass
        frozen = MODELS.build(teacher_cfg)
        load_teacher(frozen, teacher_checkpoint, trust_checkpoint)
        self.teacher = frozen

        s, t = probe("student", self.student), probe("teacher", self.teacher)
        self.levels = choose_levels(levels, s.logits, t.logits, PROBE_SIDE)
        self._run = run
        if not centerness and localization is None and has_class_branch(frozen, t, empty_image()):
            self._run = run_class_branch
        self.quicken(lambda model: self._run(model, empty_image()), [], fast_teacher)
        s, t = self._pick(s), self._pick(t)
        check_level_weights(criterion, localization, len(self.levels))
        self.strides = strides(t.logits, PROBE_SIDE)
        check_pair(self.student, frozen, s, t, self.levels, self.has_logits, centerness)
        if localization is not None:
            check_boxes(self.student, frozen, s, t, localization.options["sides"])
        self.adapter = make_adapter(s.feats, t.feats, adapter_kernel) if self.has_feats else None
        self.shares = make_shares(gradient_share, criterion, localization, self.has_feats, self.has_logits)
        check_weights(chosen, self.shares, self.has_feats)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[Any]) -> dict[str, Any]:
        """The student's own losses with loss_frs_feat, loss_frs_cls, loss_frs_box and frs_mass_<level>."""
        # The teacher first: what it needs on the way is freed before the student's graph is there.
        self.images_are_there()
        t = self.beside.run(self.observe_teacher, batch_inputs)
        of_student = sources(self.student, self.localization is not None)
        with Tap(self.student, **of_student, through=self.through(self._group())) as tap:
            losses: dict[str, Any] = self.student.loss(batch_inputs, batch_data_samples)
        if set(tap.counts) != {1}:
            head = type(dense_head(self.student)).__name__
            raise RuntimeError(f"the student's loss called its {head} {tap.counts[0]} times; it must be called once")
        s = self._pick(Emitted(tap.feats, tap.logits, (), tap.boxes if self.localization is not None else ()))
        self.beside.join(t)
        if self.image_scale != 1:
            t = Emitted(resized(t.feats, s.feats), resized(t.logits, s.logits), t.outputs, resized(t.boxes, s.boxes))
        losses |= self.distil(s, t, batch_data_samples)
        assert self.terms is not None
        if self.terms.mask:
            losses |= {f"frs_mass_{level}": mass for level, mass in zip(self.levels, self.terms.mass, strict=True)}
        return losses

    def distil(self, s: Emitted, t: Emitted, samples: list[Any]) -> dict[str, Tensor]:
        """The losses of what student and teacher emitted at the levels that are distilled."""
        how: dict[str, Any] = {"mask": self._mask(t, samples), "ramp": self.ramp(), "process_group": self._group()}
        losses = self.imitate(s.feats, t.feats, s.logits, t.logits, **how)
        if self.localization is not None:
            losses |= self.localize(s.boxes, t.boxes, t.logits, **how)
        return losses | self.logged()

    def _group(self) -> Any:
        distributed = self.average_mass and torch.distributed.is_initialized()
        return torch.distributed.group.WORLD if distributed else None

    def ramp(self) -> float:
        """The warm-up's factor at the runner's iteration; 1 where there is no runner."""
        iteration = MessageHub.get_current_instance().get_info("iter")
        return 1.0 if iteration is None else ramp(iteration, self.warmup)

    @torch.no_grad()
    def observe_teacher(self, batch_inputs: Tensor) -> Emitted:
        """What the teacher emits for preprocessed images (N, 3, H, W), at the levels that are distilled."""
        self.settle()
        t = self._pick(self._run(self.teacher, self._prepared(batch_inputs)))
        self.check_first(t.feats, t.logits, t.boxes)
        return t

    def richness(self, batch_inputs: Tensor) -> Richness:
        """The teacher's richness scores (N, H, W) a level, and masses, for preprocessed images (N, 3, H, W)."""
        return self._score(self.observe_teacher(batch_inputs))

    def _score(self, t: Emitted) -> Richness:
        return richness_mask(t.logits, backend=self.criterion.options.backend)

    def _mask(self, t: Emitted, samples: list[Any]) -> list[Tensor] | None:
        """(N, H, W) a level; None for the richness itself, which `fsr_loss` makes."""
        if self.mask == "ones":
            return masks.ones(t.logits)
        if self.mask == "boxes":
            boxes = [get_box_tensor(sample.gt_instances.bboxes) for sample in samples]
            return masks.boxes(boxes, t.logits, self.strides)
        if self.mask == "richness" and not self.centerness:
            return None
        scores = self._score(t).scores
        if self.centerness:
            scores = masks.centerness(scores, resized([t.outputs[2][i] for i in self.levels], t.logits))
        return scores if self.threshold is None else masks.threshold(scores, self.threshold)

    def _pick(self, emitted: Emitted) -> Emitted:
        """The levels that are distilled; boxes only where they are."""
        feats, logits, outputs, boxes = emitted
        boxes = [boxes[i] for i in self.levels] if self.localization is not None else ()
        return Emitted([feats[i] for i in self.levels], [logits[i] for i in self.levels], outputs, boxes)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith((f"{prefix}student.", f"{prefix}adapter.")) for key in state_dict):
            for key in [key for key in state_dict if key.startswith(prefix)]:
                state_dict[f"{prefix}student.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "student" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.student, name)

    def predict(self, batch_inputs: Tensor, batch_data_samples: list[Any], rescale: bool = True) -> Any:
        return self.student.predict(batch_inputs, batch_data_samples, rescale=rescale)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: list[Any] | None = None) -> Any:
        return self.student._forward(batch_inputs, batch_data_samples)

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        return self.student.extract_feat(batch_inputs)


def _options(preset: str | None, loss: Any) -> dict[str, Any]:
    """The keywords of `fsr_loss`: the preset's, and over them the config's own."""
    if loss is not None and not isinstance(loss, dict):
        raise TypeError(f"loss must be a dict of keywords of FSRLoss, got {type(loss).__name__}")
    options = options_of(preset, loss or {})
    if taken := {"return_terms", "process_group"} & set(options):
        raise ValueError(f"loss has {', '.join(sorted(taken))}: set by FRSDistiller itself (average_mass=True)")
    return options
