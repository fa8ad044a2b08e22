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
    frs_mass_l    = M_l,      ramp = min(iteration / warmup, 1)

with s, x the neck's and head's outputs that the student's own losses are made of, and S from `mask`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.models.dense_heads import TOODHead
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MessageHub
from mmengine.runner.checkpoint import _load_checkpoint
from torch import Tensor, nn

from frs_kernels import PRESETS, FeatureAdapter, FSRLoss, FSRTerms, Richness, checks, fsr_loss, richness_mask
from frs_kernels.integrations import mmdet_hooks as mmdet_hooks  # registers them: a config imports this file alone

TERMS = ("both", "features", "head")
MASKS = ("richness", "threshold", "ones", "boxes")
PROBE_SIDE = 128
NORMALISATION = ("mean", "std", "bgr_to_rgb", "rgb_to_bgr")


class Emitted(NamedTuple):
    """What passed through a detector's dense head; one tensor a level."""

    feats: list[Tensor]  # (N, C, H, W), from the neck
    logits: list[Tensor]  # (N, K, H, W), class logits
    outputs: tuple[Any, ...]  # all that the head returned, the logits first


@MODELS.register_module()
class FRSDistiller(BaseDetector):
    """A student detector that is trained with its own losses and `fsr_loss` (arXiv 2111.00674).

    The teacher is kept out of the module tree: it is in no checkpoint, optimiser or DDP bucket, `train()` leaves it in
    eval mode, and `.to()`, `.half()` and the like move it along. The student's neck and head run once a step.

    Args:
        student: the student's model config: a dict, a config file, or "mmdet::<config>".
        teacher: the teacher's, likewise. Its images are normalised as the student's.
        teacher_checkpoint: file or URL of the teacher's weights; every key must fit.
        preset: a name in `frs_kernels.PRESETS`: "retinanet", "gfl", "fcos", "faster_rcnn"; None for weights of 1.
        loss: further keywords of `frs_kernels.FSRLoss` that override the preset's, say dict(feat_weight=0.01,
            cls_loss="kl", level_weights=[...]).
        terms: "both", "features" or "head": the paper's ablation.
        mask: where to imitate: "richness", S_p = max_k sigmoid(z_pk); "threshold", the richness where it is above
            `threshold` and 0 elsewhere; "ones", everywhere alike; "boxes", 1 where a cell meets a ground-truth box.
        threshold: for mask="threshold", a number in [0, 1).
        centerness: multiplies the richness by sigmoid(centerness), for heads that emit it (FCOS, ATSS).
        levels: indices of the levels that are distilled; all by default.
        adapter_kernel: kernel size of the adapter's convolution a level; None for no adapter, where channels agree.
        warmup: iterations over which both losses rise linearly from 0; the iteration is the runner's, so that a resumed
            run goes on where it was. Without a runner there is no warm-up.
        average_mass: average M_l over the processes of `torch.distributed`; each keeps its own by default.
        data_preprocessor: the student's by default.

    Raises (when built, before training):
        ValueError: an unknown option; a student or teacher without neck or sigmoid class logits; other strides, number
            of levels, classes or normalisation; a checkpoint that does not fit the teacher.
        FileNotFoundError: no such config or checkpoint.
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
        mask: str = "richness",
        threshold: float | None = None,
        centerness: bool = False,
        levels: Sequence[int] | None = None,
        adapter_kernel: int | None = 3,
        warmup: int = 500,
        average_mass: bool = False,
        data_preprocessor: dict[str, Any] | nn.Module | None = None,
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
        options = _options(preset, loss)

        student_cfg, teacher_cfg = _model_config("student", student), _model_config("teacher", teacher)
        _check_normalisation(student_cfg, teacher_cfg)
        built: BaseDetector = MODELS.build(student_cfg)
        super().__init__(data_preprocessor or built.data_preprocessor, init_cfg)
        self.student = built
        self.options = options
        self.terms = terms
        self.mask = mask
        self.threshold = threshold
        self.centerness = centerness
        self.warmup = warmup
        self.average_mass = average_mass
        frozen = MODELS.build(teacher_cfg)
        _load(frozen, teacher_checkpoint)
        # Past nn.Module.__setattr__, which would make it a submodule.
        self.__dict__["teacher"] = frozen.eval().requires_grad_(False)

        s, t = _probe("student", self.student), _probe("teacher", self.teacher)
        self.levels = _levels(levels, s, t)
        s, t = self._pick(s), self._pick(t)
        checks.check_level_weights(options.get("level_weights"), len(self.levels))
        self.strides = [PROBE_SIDE // z.shape[-1] for z in t.logits]
        _check_pair(self, s, t)
        channels = [x.shape[1] for x in s.feats], [x.shape[1] for x in t.feats]
        self.adapter = None
        if terms != "head" and adapter_kernel is not None:
            self.adapter = FeatureAdapter(*channels, len(self.levels), adapter_kernel)
        elif terms != "head" and channels[0] != channels[1]:
            raise ValueError(f"student has {channels[0]} channels, teacher {channels[1]}: set adapter_kernel=3")

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[Any]) -> dict[str, Any]:
        """The student's own losses with loss_frs_feat, loss_frs_cls and frs_mass_<level>."""
        # The teacher first: what it needs on the way is freed before the student's graph is there.
        t = self.observe_teacher(batch_inputs)
        with _emitted(dense_head(self.student)) as calls:
            losses: dict[str, Any] = self.student.loss(batch_inputs, batch_data_samples)
        if len(calls) != 1:
            head = type(dense_head(self.student)).__name__
            raise RuntimeError(f"the student's loss called its {head} {len(calls)} times; it must be called once")
        s = self._pick(calls[0])
        ramp = self.ramp()
        weights = {name: ramp * self.options.get(name, 1.0) for name in ("feat_weight", "cls_weight")}
        terms = self.distil(s, t, batch_data_samples, weights)
        if self.terms != "head":
            losses["loss_frs_feat"] = weights["feat_weight"] * terms.feat
        if self.terms != "features":
            losses["loss_frs_cls"] = weights["cls_weight"] * terms.cls
        losses |= {f"frs_mass_{level}": mass for level, mass in zip(self.levels, terms.mass, strict=True)}
        return losses

    def distil(self, s: Emitted, t: Emitted, samples: list[Any], weights: dict[str, float]) -> FSRTerms:
        """`fsr_loss` of what student and teacher emitted at the levels that are distilled."""
        features, head = self.terms != "head", self.terms != "features"
        feats = self.adapter(s.feats) if self.adapter else s.feats
        distributed = self.average_mass and torch.distributed.is_initialized()
        terms: FSRTerms = fsr_loss(
            feats if features else None,
            t.feats if features else None,
            s.logits if head else None,
            t.logits,
            mask=self._mask(t, samples),
            process_group=torch.distributed.group.WORLD if distributed else None,
            return_terms=True,
            **self.options | weights,
        )
        return terms

    def ramp(self) -> float:
        """The warm-up's factor at the runner's iteration; 1 where there is no runner."""
        iteration = MessageHub.get_current_instance().get_info("iter")
        return 1.0 if iteration is None or self.warmup == 0 else min(iteration / self.warmup, 1.0)

    @torch.no_grad()
    def observe_teacher(self, batch_inputs: Tensor) -> Emitted:
        """What the teacher emits for preprocessed images (N, 3, H, W), at the levels that are distilled."""
        return self._pick(_run(self.teacher, batch_inputs))

    def richness(self, batch_inputs: Tensor) -> Richness:
        """The teacher's richness scores (N, H, W) a level, and masses, for preprocessed images (N, 3, H, W)."""
        return richness_mask(self.observe_teacher(batch_inputs).logits, backend=self.options.get("backend", "auto"))

    def _mask(self, t: Emitted, samples: list[Any]) -> list[Tensor] | None:
        """(N, H, W) a level; None for the richness itself, which `fsr_loss` makes."""
        if self.mask == "ones":
            return [torch.ones_like(z[:, 0], dtype=torch.float32) for z in t.logits]
        if self.mask == "boxes":
            boxes = [get_box_tensor(sample.gt_instances.bboxes) for sample in samples]
            return [box_mask(boxes, z, stride) for z, stride in zip(t.logits, self.strides, strict=True)]
        if self.mask == "richness" and not self.centerness:
            return None
        with torch.no_grad():
            scores = richness_mask(t.logits, backend=self.options.get("backend", "auto")).scores
            if self.centerness:
                scores = [s * t.outputs[2][i].sigmoid().amax(1) for s, i in zip(scores, self.levels, strict=True)]
            return scores if self.threshold is None else [s * (s > self.threshold) for s in scores]

    def _pick(self, emitted: Emitted) -> Emitted:
        feats, logits, outputs = emitted
        return Emitted([feats[i] for i in self.levels], [logits[i] for i in self.levels], outputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        self.teacher._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def predict(self, batch_inputs: Tensor, batch_data_samples: list[Any], rescale: bool = True) -> Any:
        return self.student.predict(batch_inputs, batch_data_samples, rescale=rescale)

    def _forward(self, batch_inputs: Tensor, batch_data_samples: list[Any] | None = None) -> Any:
        return self.student._forward(batch_inputs, batch_data_samples)

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        return self.student.extract_feat(batch_inputs)


def dense_head(detector: BaseDetector) -> Any:
    """The head whose class logits are distilled: the RPN's of a two-stage detector, as the paper's authors did."""
    head = getattr(detector, "rpn_head", None)
    return getattr(detector, "bbox_head", None) if head is None else head


def box_mask(boxes: Sequence[Tensor], like: Tensor, stride: int) -> Tensor:
    """1 where a cell of `like` (N, K, H, W) meets one of its image's boxes (G, 4) as x0, y0, x1, y1, else 0: (N, H, W).

    Cell (h, w) covers the pixels [w * stride, (w + 1) * stride) by [h * stride, (h + 1) * stride).
    """
    masks = []
    for corners in boxes:
        x0, y0, x1, y1 = (corners.to(like.device, torch.float32) / stride).unbind(-1)
        w, h = (torch.arange(n, device=like.device) for n in (like.shape[3], like.shape[2]))
        columns = (w < x1[:, None]) & (w + 1 > x0[:, None])
        rows = (h < y1[:, None]) & (h + 1 > y0[:, None])
        masks.append((rows[:, :, None] & columns[:, None, :]).any(0))
    return torch.stack(masks).float()


@contextmanager
def _emitted(head: nn.Module) -> Iterator[list[Emitted]]:
    """Fills a list with one `Emitted` a call of `head`."""
    calls: list[Emitted] = []

    def keep(_: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        calls.append(Emitted(list(args[0]), list(outputs[0]), outputs))

    handle = head.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


def _run(detector: BaseDetector, images: Tensor) -> Emitted:
    feats = detector.extract_feat(images)
    outputs = dense_head(detector)(feats)
    return Emitted(list(feats), list(outputs[0]), outputs)


def _options(preset: str | None, loss: Any) -> dict[str, Any]:
    """The keywords of `fsr_loss`: the preset's, and over them the config's own."""
    if preset is not None:
        checks.check_option("preset", preset, tuple(PRESETS))
    if loss is not None and not isinstance(loss, dict):
        raise TypeError(f"loss must be a dict of keywords of FSRLoss, got {type(loss).__name__}")
    options = {**(PRESETS[preset] if preset else {}), **(loss or {})}
    if taken := {"return_terms", "process_group"} & set(options):
        raise ValueError(f"loss has {', '.join(sorted(taken))}: set by FRSDistiller itself (average_mass=True)")
    FSRLoss(**options)  # refuses an unknown option
    return options


def _model_config(name: str, config: dict[str, Any] | str | Path) -> Any:
    """The `model` of a config file, "mmdet::" included, or a dict as it is; a copy, as building changes it."""
    if isinstance(config, dict):
        return copy.deepcopy(Config({"model": config.get("model", config)}).model)
    if "::" in str(config):
        return get_config(str(config)).model
    if not Path(config).is_file():
        raise FileNotFoundError(f"{name}={str(config)!r} is no file; give a config file, 'mmdet::<config>' or a dict")
    return Config.fromfile(config).model


def _check_normalisation(student: Any, teacher: Any) -> None:
    s, t = ({key: cfg.get("data_preprocessor", {}).get(key) for key in NORMALISATION} for cfg in (student, teacher))
    if s != t:
        raise ValueError(
            f"student and teacher see the same images, but are normalised otherwise: student {s}, teacher {t}; take a "
            "teacher that was trained with the student's data_preprocessor"
        )


def _load(teacher: BaseDetector, checkpoint: str | Path) -> None:
    try:
        state = _load_checkpoint(str(checkpoint), map_location="cpu")
    except OSError as error:
        raise FileNotFoundError(f"teacher_checkpoint={str(checkpoint)!r} cannot be read: {error}") from error
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"teacher_checkpoint={str(checkpoint)!r} is no checkpoint: {error}") from error
    state = state.get("state_dict", state)
    try:
        teacher.load_state_dict(state, strict=True)
    except RuntimeError as error:
        hint = "; export its student first" if any(key.startswith("student.") for key in state) else ""
        lines = [line.strip() for line in str(error).splitlines()]
        shown = " ".join(line if len(line) < 300 else line[:300] + " ..." for line in lines[:4])
        raise ValueError(f"teacher_checkpoint={str(checkpoint)!r} does not fit the teacher{hint}: {shown}") from error


@torch.no_grad()
def _probe(name: str, detector: BaseDetector) -> Emitted:
    """What a detector emits for an empty image: levels, channels and strides, measured and not read from configs."""
    kind = type(detector).__name__
    head = dense_head(detector)
    if not detector.with_neck:
        raise ValueError(f"{name} ({kind}) has no neck: the loss needs the levels of a feature pyramid (FPN)")
    # TOOD's head emits probabilities; softmax heads have a background class.
    logits = hasattr(head, "cls_out_channels") and getattr(head, "use_sigmoid_cls", True)
    if not logits or isinstance(head, TOODHead):
        raise ValueError(f"{name} ({kind}) has the head {type(head).__name__}, which emits no sigmoid class logits")
    training = detector.training
    emitted = _run(detector.eval(), torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE))
    detector.train(training)
    return emitted


def _levels(levels: Sequence[int] | None, s: Emitted, t: Emitted) -> list[int]:
    if levels is None:
        if len(s.logits) != len(t.logits):
            raise ValueError(f"student has {_strides(s)}, teacher {_strides(t)}: other levels; say which with levels=")
        return list(range(len(s.logits)))
    most = min(len(s.logits), len(t.logits))
    if not levels or len(set(levels)) < len(levels) or not all(isinstance(i, int) and 0 <= i < most for i in levels):
        raise ValueError(f"levels={list(levels)}: give distinct indices from 0 to {most - 1}")
    return list(levels)


def _strides(emitted: Emitted) -> str:
    return f"{len(emitted.logits)} levels of strides {[PROBE_SIDE // z.shape[-1] for z in emitted.logits]}"


def _check_pair(distiller: FRSDistiller, s: Emitted, t: Emitted) -> None:
    """Student and teacher fit each other at the levels that are distilled."""
    if [z.shape[-2:] for z in s.logits] != [z.shape[-2:] for z in t.logits]:
        raise ValueError(f"student has {_strides(s)}, teacher {_strides(t)}: both must have the same strides")
    if distiller.terms != "features":
        classes = [_classes(detector) for detector in (distiller.student, distiller.teacher)]
        channels = [[z.shape[1] for z in emitted.logits] for emitted in (s, t)]
        if classes[0] != classes[1] or channels[0] != channels[1]:
            raise ValueError(
                f"student has {classes[0]} classes and {channels[0]} class logits a level, teacher {classes[1]} and "
                f"{channels[1]}; both heads must have the same classes and anchors (not so with terms='features')"
            )
    emits = len(t.outputs) > 2 and all(t.outputs[2][i].shape[1] == 1 for i in distiller.levels)
    if distiller.centerness and not emits:
        head = type(dense_head(distiller.teacher)).__name__
        raise ValueError(f"centerness=True, but the teacher's {head} emits none")


def _classes(detector: BaseDetector) -> int:
    """Classes that a detector tells apart; of a two-stage detector its second stage's, the RPN's being always 1."""
    heads = getattr(getattr(detector, "roi_head", None), "bbox_head", None)
    if isinstance(heads, nn.ModuleList):  # a cascade's stages
        heads = heads[0]
    head: Any = dense_head(detector) if heads is None else heads
    return int(head.num_classes)
