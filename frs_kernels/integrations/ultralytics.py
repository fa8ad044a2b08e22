"""Ultralytics: what its detection models (v8, v10, 11, 26) are tapped for, and its trainer. It is imported nowhere here
but where a teacher is loaded from a file.

class Trainer(DistillingTrainer, DetectionTrainer):
    teacher = "yolo11s.pt"

YOLO("yolo11n.yaml").train(trainer=Trainer, data="coco8.yaml")

or in a loop of one's own:

distiller = Distiller(student.model, teacher.model, recipe="ultralytics", preset="ultralytics")
loss, items = distiller(batch)                        # the student's own
loss = loss.sum() + batch_size * distiller.loss()
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from frs_kernels.distill import Distiller, Input, Mean, Recipe
from frs_kernels.distill.tap import Source

if TYPE_CHECKING:
    from ultralytics.engine.trainer import BaseTrainer as Base
else:
    Base = object


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
    logits = levels[0] if len(levels) == 1 else Mean(*levels)
    return Recipe(Input(head), logits, Input("model.0"), _run_class_branches)


class _Done(BaseException):
    """Ends a pass before the head."""


def _run_class_branches(model: Any, images: Tensor) -> None:
    """Up to the head, and of it the class branches alone: the boxes' branch, which runs first, costs as much."""
    head = model.model[-1]

    def classify(_: nn.Module, arguments: Any) -> None:
        for name in ("cv3", "one2one_cv3"):
            for branch, x in zip(getattr(head, name, None) or (), arguments[0], strict=False):
                branch(x)
        raise _Done

    handle = head.register_forward_pre_hook(classify)
    try:
        model(images)
    except _Done:
        pass
    finally:
        handle.remove()


class Wrapped(Distiller):
    """What the trainer calls in place of the student: one more loss, with the others times the batch size.

    As behind DDP, the trainer finds the plain student in `module`: that is what it averages, validates and saves.
    """

    @property
    def module(self) -> nn.Module:
        student: nn.Module = self.student
        return student

    @property
    def stride(self) -> Any:
        return self.student.stride

    def forward(self, batch: Any) -> Any:
        if not isinstance(batch, dict) or not self.training:
            return self.student(batch)
        own, items = super().forward(batch)
        distilled = self.loss()
        if isinstance(items, dict):  # a tensor in older releases: their names are fixed
            items = {**items, "frs_loss": distilled.detach()}
        return torch.cat([own.view(-1), len(batch["img"]) * distilled.view(1)]), items


class DistillingTrainer(Base):
    """A mixin for Ultralytics' `DetectionTrainer`, before it in the list of bases.

    Checkpoints are those of the plain student, its moving average. The adapter and the place in the warm-up go to
    `distiller.pt` beside them, for resuming. For several GPUs the class has to stand in a module that can be imported.

    teacher: a checkpoint, or a model.
    distiller: keywords of `Distiller`, over the preset "ultralytics".

    Raises (when training begins):
        ValueError: `compile`, `distill_model` or `quantize` is set as well.
    """

    teacher: str | Path | nn.Module
    distiller: Mapping[str, Any] = {}
    model: Any

    def set_model_attributes(self) -> None:
        """The first of the trainer's steps after the student is made: what follows sees student and adapter."""
        super().set_model_attributes()
        for name in ("compile", "distill_model", "quantize"):
            if getattr(self.args, name, None):
                raise ValueError(f"{name}={getattr(self.args, name)!r} does not go together with distilling here")
        student = self.model
        options: dict[str, Any] = {"recipe": "ultralytics", "preset": "ultralytics", **self.distiller}
        teacher = _loaded(self.teacher).to(self.device, next(student.parameters()).dtype)
        self.model = Wrapped(student, teacher, **options)
        if self.resume and self._kept.is_file():
            self.model.load_state_dict(torch.load(self._kept, map_location=self.device), strict=False)

    @property
    def _kept(self) -> Path:
        return Path(self.wdir) / "distiller.pt"

    def build_optimizer(self, model: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        wrapped = model if isinstance(model, Wrapped) else model.module
        if wrapped.adapter is not None:
            like = [group for group in optimizer.param_groups if group.get("param_group") in ("weight", None)][-1]
            optimizer.add_param_group({**like, "params": list(wrapped.adapter.parameters())})
        return optimizer

    def save_model(self) -> Any:
        saved = super().save_model()
        wrapped = self.model if isinstance(self.model, Wrapped) else self.model.module
        state = wrapped.state_dict()
        torch.save({name: state[name] for name in state if not name.startswith("student.")}, self._kept)
        return saved


def _loaded(teacher: str | Path | nn.Module) -> nn.Module:
    if isinstance(teacher, nn.Module):
        return teacher
    from ultralytics import YOLO

    model: nn.Module = YOLO(teacher).model
    return model
