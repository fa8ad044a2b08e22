"""The four small detectors of examples/mmdet, batches for them, and the paper's loss written out as its formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from torch import Tensor

from frs_kernels.integrations.mmdet import FRSDistiller
from frs_kernels.integrations.mmdet_pair import Emitted

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "mmdet" / "configs"
NAMES = ("retinanet", "gfl", "fcos", "faster_rcnn")
CLASSES = 10
FRS = ("loss_frs_feat", "loss_frs_cls")


def forget_runners() -> None:
    """mmengine keeps a runner's hub, logger and visualizer, by name, for the life of the process."""
    for kind in (MessageHub, MMLogger, Visualizer, DetLocalVisualizer):
        kind._instance_dict.clear()


def config_of(name: str) -> Config:
    return Config.fromfile(CONFIGS / "digits" / f"{name}.py")


def student_of(name: str, **changes: Any) -> Any:
    return changed(config_of(name), changes)


def teacher_of(name: str, **changes: Any) -> Any:
    return changed(config_of(f"{name}_teacher"), changes)


def changed(config: Config, changes: dict[str, Any]) -> Any:
    """The model of a config; a key of `changes` is a path in it with "__" for ".": bbox_head__num_classes=7."""
    config.merge_from_dict({f"model.{key.replace('__', '.')}": value for key, value in changes.items()})
    return config.model


def distiller(name: str, checkpoint: str, *, student: Any = None, teacher: Any = None, **options: Any) -> FRSDistiller:
    """A distiller with random weights, the same at every call, in training mode."""
    torch.manual_seed(0)
    defaults = {"preset": name, "warmup": 0, "teacher": teacher or teacher_of(name), "teacher_checkpoint": checkpoint}
    model = MODELS.build({"type": "FRSDistiller", "student": student or student_of(name)} | defaults | options)
    model.init_weights()
    return model.train()


def batch(rng: torch.Generator, images: int = 2) -> tuple[Tensor, list[Any]]:
    """Normalised images (N, 3, 96, 128) with random boxes."""
    data = demo_mm_inputs(images, [(3, 96, 128)] * images, num_items=[3] * images, num_classes=CLASSES)
    inputs = torch.randn(images, 3, 96, 128, generator=rng)
    for sample in data["data_samples"]:
        corners = torch.rand(3, 2, generator=rng) * torch.tensor([80.0, 50.0])
        sides = 8 + torch.rand(3, 2, generator=rng) * 36
        sample.gt_instances.bboxes = torch.cat((corners, corners + sides), 1)
        sample.set_metainfo({"batch_input_shape": (96, 128), "pad_shape": (96, 128), "img_shape": (96, 128)})
    return inputs, data["data_samples"]


def recorded(model: FRSDistiller, inputs: Tensor, samples: list[Any]) -> tuple[dict[str, Any], Emitted, Emitted]:
    """The losses of one step, and what student and teacher emitted in it."""
    seen: list[Emitted] = []
    distil = model.distil

    def record(s: Emitted, t: Emitted, *rest: Any) -> Any:
        seen.extend((s, t))
        return distil(s, t, *rest)

    model.distil = record
    try:
        losses = model.loss(inputs, samples)
    finally:
        del model.distil
    return losses, *seen


def by_formula(
    model: FRSDistiller,
    s: Emitted,
    t: Emitted,
    weights: tuple[float, float],
    dtype: torch.dtype,
    masks: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Section 2 of the paper's method, a loop over the levels in `dtype`: features' loss, head's loss, masses."""
    feat = cls = torch.zeros((), dtype=dtype)
    masses = []
    adapted = model.adapter(s.feats) if model.adapter else s.feats
    for level, (f, g, x, z) in enumerate(zip(adapted, t.feats, s.logits, t.logits, strict=True)):
        f, g, x, z = (v.to(dtype) for v in (f, g, x, z))
        richness = z.sigmoid().max(1).values if masks is None else masks[level].to(dtype)
        mass = richness.sum()
        bce = F.softplus(x) - x * z.sigmoid()
        if mass > 0:
            feat = feat + (richness[:, None] * (f - g) ** 2).sum() / mass
            cls = cls + (richness[:, None] * bce).sum() / mass
        masses.append(mass)
    return weights[0] * feat, weights[1] * cls, masses


def student_parameters(model: FRSDistiller) -> list[Tensor]:
    """Those that a distillation loss reaches: trunk, neck, class branch, adapter."""
    return [p for p in model.parameters() if p.requires_grad]


def gradients(loss: Tensor, model: FRSDistiller, **options: Any) -> Tensor:
    """Of the loss, by all the student's and adapter's parameters, as one fp64 vector; 0 where none reaches one."""
    parameters = student_parameters(model)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, **options)
    flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    return torch.cat(flat).double()
