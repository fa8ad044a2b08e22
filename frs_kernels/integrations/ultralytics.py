"""Ultralytics: what its detection models (v8, v10, 11, 26) are tapped for. Ultralytics itself is not imported.

distiller = Distiller(student.model, teacher.model, recipe="ultralytics", preset="ultralytics")
loss, items = distiller(batch)                        # the student's own
loss = loss.sum() + batch_size * distiller.loss()
"""

from __future__ import annotations

from typing import Any

from torch import nn

from frs_kernels.distill import Input, Mean, Recipe
from frs_kernels.distill.tap import Source


def recipe(model: nn.Module) -> Recipe:
    """The head's input, and its class logits; where it has a one-to-one branch beside the one-to-many, their mean.

    Raises:
        ValueError: the model has no such head.
    """
    layers = getattr(model, "model", None)
    head = f"model.{len(layers) - 1}" if isinstance(layers, nn.Sequential) else ""
    found: Any = dict(model.named_modules()).get(head)
    if not head or not hasattr(found, "cv3"):
        raise ValueError(
            f"{type(model).__name__} is no detection model of Ultralytics: its last layer has no class branch cv3; "
            "give a YOLO(...).model, or feats= and logits="
        )
    branches = [name for name in ("cv3", "one2one_cv3") if getattr(found, name, None) is not None]
    levels: list[Source] = [[f"{head}.{name}.{i}" for i in range(len(getattr(found, name)))] for name in branches]
    return Recipe(Input(head), levels[0] if len(levels) == 1 else Mean(*levels), Input("model.0"))
