"""torchvision: what its RetinaNet, FCOS and Faster R-CNN are tapped for. torchvision itself is not imported.

distiller = Distiller(student, teacher, recipe="torchvision", preset="retinanet")
losses = distiller(images, targets)        # torchvision's own, with loss_frs_feat and loss_frs_cls
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from frs_kernels.distill import Input, Recipe


def recipe(model: nn.Module) -> Recipe:
    """The pyramid, the class logits (of Faster R-CNN the RPN's objectness, as the paper's authors did), and the images
    that the backbone is given: torchvision resizes inside the model, to a size that it draws.

    Raises:
        ValueError: the model is none of the three.
    """
    names = dict(model.named_modules())
    transform: Any = names.get("transform")
    norms = transform and {name: list(getattr(transform, name)) for name in ("image_mean", "image_std")}
    if "rpn.head.cls_logits" in names:
        return Recipe("backbone", "rpn.head.cls_logits", Input("backbone"), _run_rpn, _as_list, norms)
    if "head.classification_head.cls_logits" in names:
        return Recipe("backbone", "head.classification_head.cls_logits", Input("backbone"), _run_head, _as_list, norms)
    raise ValueError(
        f"{type(model).__name__} is no RetinaNet, FCOS or Faster R-CNN of torchvision: it has neither "
        "'head.classification_head.cls_logits' nor 'rpn.head.cls_logits'; give feats= and logits="
    )


def _run_rpn(model: Any, images: Tensor) -> None:
    model.rpn.head(list(model.backbone(images).values()))


def _run_head(model: Any, images: Tensor) -> None:
    model.head.classification_head(list(model.backbone(images).values()))


def _as_list(images: Tensor) -> tuple[Any, ...]:
    return (list(images),)
