"""torchvision's detectors, through `Distiller(recipe="torchvision")`, against their parts called by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from readme import code_after
from torch import Tensor, nn
from torchvision.models import detection

from frs_kernels import PRESETS, Distiller, fsr_loss

MODELS = {"retinanet": "retinanet_resnet50_fpn", "fcos": "fcos_resnet50_fpn", "faster_rcnn": "fasterrcnn_resnet50_fpn"}
each_model = pytest.mark.parametrize("preset", MODELS)


def make(preset: str, **options: Any) -> Any:
    options = {"num_classes": 5, "min_size": (96, 128, 160), "max_size": 224, **options}
    return getattr(detection, MODELS[preset])(weights=None, weights_backbone=None, **options)


def distiller(preset: str, **options: Any) -> Distiller:
    return Distiller(make(preset), make(preset), recipe="torchvision", preset=preset, warmup=0, **options)


def images() -> list[Tensor]:
    return [torch.rand(3, 120, 160), torch.rand(3, 100, 140)]


def targets() -> list[dict[str, Tensor]]:
    box = torch.tensor([[10.0, 10.0, 60.0, 70.0]])
    return [{"boxes": box, "labels": torch.tensor([1])} for _ in range(2)]


def head_of(model: Any) -> nn.Module:
    return model.rpn.head.cls_logits if hasattr(model, "rpn") else model.head.classification_head.cls_logits


def logits_of(model: Any, feats: list[Tensor]) -> list[Tensor]:
    kept = []
    handle = head_of(model).register_forward_hook(lambda module, arguments, out: kept.append(out))
    (model.rpn.head if hasattr(model, "rpn") else model.head.classification_head)(feats)
    handle.remove()
    return kept


@each_model
def test_the_losses_are_fsr_losses_on_the_images_inside(preset):
    d = distiller(preset)
    seen = []
    handle = d.student.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    losses = d(images(), targets())
    handle.remove()
    d.train(False).student.train()  # frozen batch norm: the same in both modes; the towers have none that changes
    s, t = (list(model.backbone(seen[0]).values()) for model in (d.student, d.teacher))
    x, z = logits_of(d.student, s), logits_of(d.teacher, t)
    terms = fsr_loss(d.adapter(s), t, x, [v.detach() for v in z], return_terms=True, **PRESETS[preset])
    expected = {"feat": terms.feat, "cls": terms.cls}
    for name, value in expected.items():
        right = PRESETS[preset][f"{name}_weight"] * value
        assert torch.allclose(losses[f"loss_frs_{name}"], right, rtol=1e-4)


@each_model
def test_a_step(preset):
    d = distiller(preset)
    optimizer = torch.optim.SGD(d.parameters(), 1e-4)
    own = set(make(preset)(images(), targets()))
    losses = d(images(), targets())
    assert set(losses) == own | {"loss_frs_feat", "loss_frs_cls"}
    sum(losses.values()).backward()
    assert not [name for name, p in d.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    make(preset).load_state_dict(d.student.state_dict())
    assert {"boxes", "labels", "scores"} == set(d.eval()(images())[0])


@each_model
def test_the_teacher_runs_no_further_than_its_class_logits(preset):
    d = distiller(preset)
    ran = []
    names = ("bbox_pred", "regression_head", "box_roi_pool", "roi_heads", "anchor_generator")
    for name, module in d.teacher.named_modules():
        if name.rpartition(".")[2] in names:
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    d(images(), targets())
    # the RPN's head has its box branch beside the class logits, a level at a time
    assert set(ran) <= {"rpn.head.bbox_pred"}


def test_the_step_of_the_readme_runs():
    names = {
        "torch": torch, "Distiller": Distiller, "student": make("retinanet"), "teacher": make("retinanet"),
        "images": images(), "targets": targets(),
    }  # fmt: skip
    before = names["student"].backbone.fpn.layer_blocks[0][0].weight.detach().clone()
    exec(code_after("**torchvision**"), names)
    names["optimizer"].step()
    assert names["distiller"].iteration == 1
    assert {"loss_frs_feat", "loss_frs_cls"} < set(names["losses"])
    assert sum(names["losses"].values()).isfinite()
    assert not torch.equal(names["student"].backbone.fpn.layer_blocks[0][0].weight, before)


def test_other_classes():
    with pytest.warns(UserWarning, match="features alone are distilled"):
        d = Distiller(make("retinanet", num_classes=3), make("retinanet"), recipe="torchvision", preset="retinanet")
    assert "loss_frs_cls" not in d(images(), targets())


def test_another_normalisation_is_refused():
    with pytest.raises(ValueError, match=r"normalise otherwise: student .*0\.485.*, teacher .*0\.5"):
        Distiller(make("fcos"), make("fcos", image_mean=[0.5, 0.5, 0.5]), recipe="torchvision")


def test_another_model_is_refused():
    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    with pytest.raises(ValueError, match="SSD is no RetinaNet, FCOS or Faster R-CNN of torchvision"):
        Distiller(model, make("fcos"), recipe="torchvision")
