"""transformers: what its RT-DETR (v1, v2) and D-FINE are tapped for. transformers itself is not imported.

top = lambda z: masks.top_k(masks.richness(z), 300)       # as many as the decoder takes
distiller = Distiller(student, teacher, recipe="transformers", mask=top)
outputs = distiller(pixel_values=images, labels=labels)
loss = outputs.loss + distiller.loss()
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from frs_kernels.distill import Input, Output, Recipe


def recipe(model: nn.Module) -> Recipe:
    """The hybrid encoder's levels, and the scores of all their positions from which the decoder takes its queries.

    Raises:
        ValueError: the model has no such encoder.
    """
    names = dict(model.named_modules())
    if not {"model.encoder", "model.enc_score_head", "model.backbone"} <= set(names):
        raise ValueError(
            f"{type(model).__name__} is no RT-DETR or D-FINE of transformers with its head: it has no "
            "'model.enc_score_head'; give feats= and logits="
        )
    return Recipe(
        Output("model.encoder", _levels), "model.enc_score_head", Input("model.backbone", _first), example=_alone
    )


def _levels(returned: Any) -> list[Tensor]:
    levels = returned[0]
    return list(levels)


def _first(arguments: Any) -> Tensor:
    images: Tensor = arguments[0]
    return images


def _alone(images: Tensor) -> tuple[Any, ...]:
    return (images,)
