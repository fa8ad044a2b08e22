"""Where a detector emits what is distilled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from frs_kernels import checks
from frs_kernels.distill.tap import Source

RECIPES = ("torchvision", "ultralytics", "transformers")
OF_TEACHER = ("feats", "logits", "boxes")


def _alone(images: Tensor) -> Sequence[Any]:
    return (images,)


def _whole(model: nn.Module, images: Tensor) -> Any:
    return model(images)


class Recipe(NamedTuple):
    """Where a detector emits what is distilled. `frs_kernels.distill.tap` says what a source is."""

    feats: Source | None = None
    logits: Source | None = None
    images: Source | None = None
    run: Callable[[nn.Module, Tensor], Any] = _whole
    """Runs a model on images that are resized and normalised, at least as far as its taps."""
    example: Callable[[Tensor], Sequence[Any]] = _alone
    """Makes the arguments of a call of a batch of images."""
    normalisation: Any = None
    """What the images are normalised by inside the model: student and teacher must agree."""
    boxes: Source | None = None
    """The distributions of a box's sides, as GFL's head has them."""


Given = str | Recipe | tuple[Recipe, Recipe] | None


def both(
    given: Given, sources: Mapping[str, Source | None], of_teacher: Mapping[str, Source] | None, *models: nn.Module
) -> tuple[Recipe, Recipe]:
    """The student's recipe and the teacher's, of `recipe=` or of the sources that were named instead.

    Raises:
        ValueError: both were given, there is no such recipe, or `of_teacher` has what is not the teacher's.
    """
    if given is None:
        if unknown := set(of_teacher or {}) - set(OF_TEACHER):
            raise ValueError(f"of_teacher has {sorted(unknown)}; it takes {', '.join(map(repr, OF_TEACHER))}")
        other = {**sources, **(of_teacher or {})}
        return (
            Recipe(sources["feats"], sources["logits"], sources["images"], boxes=sources["boxes"]),
            Recipe(other["feats"], other["logits"], boxes=other["boxes"]),
        )
    if of_teacher is not None or any(source is not None for source in sources.values()):
        named = ", ".join(sources)
        raise ValueError(f"recipe= says where the modules are; give {named} instead of it, not beside")
    if isinstance(given, str):
        checks.check_option("recipe", given, RECIPES)
        # By name, since integrations stand on this package.
        make = importlib.import_module(f"frs_kernels.integrations.{given}").recipe
        given = make(models[0]), make(models[1])
    return (given, given) if isinstance(given, Recipe) else given
