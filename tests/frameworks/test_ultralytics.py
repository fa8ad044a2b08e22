"""Ultralytics' detection models, through `Distiller(recipe="ultralytics")`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from readme import GUIDE, code_after
from torch import Tensor
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from frs_kernels import Distiller, fsr_loss

MODELS = ("yolov8", "yolov10", "yolo11", "yolo26")
each_model = pytest.mark.parametrize("name", MODELS)


def make(name: str, size: str, classes: int = 5) -> Any:
    model = DetectionModel(f"{name}{size}.yaml", nc=classes, verbose=False)
    model.args = get_cfg()
    return model.train()


def batch() -> dict[str, Tensor]:
    return {
        "img": torch.rand(2, 3, 128, 160), "cls": torch.tensor([[1.0], [2.0]]), "batch_idx": torch.tensor([0.0, 1.0]),
        "bboxes": torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.4, 0.4, 0.2, 0.2]]),
    }  # fmt: skip


def distiller(name: str, **options: Any) -> Distiller:
    return Distiller(make(name, "n"), make(name, "s"), recipe="ultralytics", preset="ultralytics", warmup=0, **options)


@each_model
def test_a_step(name):
    d, inputs = distiller(name), batch()
    own, _ = d(inputs)
    loss = d.loss()
    (own.sum() + 2 * loss).backward()
    assert not [n for n, p in d.named_parameters() if p.requires_grad and p.grad is None]
    make(name, "n").load_state_dict(d.student.state_dict())


def test_the_step_of_the_guide_runs(tmp_path, monkeypatch):
    """Of loaded checkpoints: what YOLO() loads is frozen and in eval mode."""
    monkeypatch.chdir(tmp_path)
    for size in "ns":
        YOLO(f"yolo11{size}.yaml", verbose=False).save(f"yolo11{size}.pt")
    names: dict[str, Any] = {"YOLO": YOLO, "get_cfg": get_cfg, "Distiller": Distiller, "batch": batch()}
    exec(code_after("of your own for Ultralytics (v8, v10, 11, 26),", GUIDE), names)
    names["loss"].backward()
    d = names["distiller"]
    # dfl, a fixed sum, is left out by Ultralytics' trainer
    unused = [n for n, p in d.named_parameters() if p.requires_grad and p.grad is None]
    assert all(".dfl." in name for name in unused)


@each_model
def test_the_mask_is_of_the_mean_of_both_branches(name):
    d, inputs = distiller(name), batch()
    d(inputs)
    head = d.teacher.model[-1]
    kept: dict[str, list[Tensor]] = {}
    for branch in ("cv3", "one2one_cv3"):
        for module in getattr(head, branch, None) or ():
            module.register_forward_hook(lambda m, a, out, b=branch: kept.setdefault(b, []).append(out))
    with torch.no_grad():
        d.teacher(inputs["img"])
    branches = list(kept.values())
    assert len(branches) == (2 if name in ("yolov10", "yolo26") else 1)
    z = [torch.stack(levels).mean(0) for levels in zip(*branches, strict=True)]
    right = fsr_loss(None, None, z, z, return_terms=True)
    assert torch.allclose(d.terms.mass, right.mass, rtol=1e-4)


def test_the_head_may_change_the_list_that_it_is_given():
    d = distiller("yolov8")
    d(batch())
    assert [conv.in_channels for conv in d.adapter.convs] == [64, 128, 256]


def test_other_classes_are_no_matter_to_features_alone():
    d = Distiller(make("yolo11", "n", 3), make("yolo11", "s"), recipe="ultralytics", preset="ultralytics")
    d(batch())
    assert not d.has_logits


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="Sequential is no detection model of Ultralytics"):
        Distiller(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)), make("yolov8", "s"), recipe="ultralytics")
