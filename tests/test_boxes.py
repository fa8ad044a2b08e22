"""A `Distiller` of box distributions: `localization_distillation` beside, or without, the other losses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import relative
from torch import Tensor, nn
from toy_detectors import Detector, images

from frs_kernels import Distiller, localization_distillation, masks, richness_mask
from frs_kernels.distill import Output, Recipe

BINS = 5


class Boxed(Detector):
    """With a distribution for each side of a box, a list of levels or packed; `learns`: its own loss is of them too."""

    def __init__(
        self, channels: int = 6, bins: int = BINS, packed: bool = False, learns: bool = False, **options: Any
    ) -> None:
        super().__init__(channels, **options)
        self.head.box = nn.Conv2d(channels, 4 * bins, 1)
        self.boxes = nn.Identity()
        self.packed = packed
        self.learns = learns

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        feats = self.neck(images)
        logits, boxes = self.head(feats), [self.head.box(x) for x in feats]
        boxes = torch.cat([b.flatten(2) for b in boxes], 2) if self.packed else boxes
        self.boxes(boxes)
        own = sum(z.square().mean() for z in logits)
        if self.learns:
            own = own + (boxes if self.packed else torch.cat([b.flatten(2) for b in boxes], 2)).square().mean()
        return {"loss_cls": own} if self.training and self.returns == "losses" else own


def pair(**options: Any) -> tuple[Boxed, Boxed]:
    torch.manual_seed(0)
    return Boxed(**options), Boxed(9)


def made(*models: nn.Module, **options: Any) -> Distiller:
    student, teacher = models or pair()
    named: dict[str, Any] = {"feats": "neck", "logits": "head.cls", "boxes": "boxes", "warmup": 0}
    if "preset" not in options:
        named["feat_weight"] = 1.0
    return Distiller(student, teacher, example=(images(n=1),), **named | options)


def emitted(d: Distiller, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The student's and the teacher's boxes, and the teacher's logits, by hand."""
    with torch.no_grad():
        of_teacher = d.teacher.neck(x)
        z, theirs = [d.teacher.head.cls(v) for v in of_teacher], [d.teacher.head.box(v) for v in of_teacher]
    return [d.student.head.box(v) for v in d.student.neck(x)], theirs, z


@pytest.mark.parametrize("packed", [False, True], ids=["levels", "packed"])
def test_the_loss_is_localization_distillation_under_the_richness(packed):
    d, x = made(*pair(packed=packed), box_options={"weight": 0.25, "temperature": 3.0}), images()
    losses = d(x)
    assert set(losses) == {"loss_cls", "loss_frs_feat", "loss_frs_cls", "loss_frs_box"}
    mine, theirs, z = emitted(d, x)
    right = localization_distillation(mine, theirs, richness_mask(z), weight=0.25, temperature=3.0)
    assert relative(losses["loss_frs_box"].detach(), right.detach()) <= 1e-5
    (got,) = torch.autograd.grad(losses["loss_frs_box"], d.student.head.box.weight)
    (grad,) = torch.autograd.grad(right, d.student.head.box.weight)
    assert relative(got, grad) <= 1e-5
    assert d.student.head.cls.weight.grad is None


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({"mask": "ones"}, lambda z: None),
        ({"mask": lambda z: [v.amax(1) > 0 for v in z]}, lambda z: [v.amax(1) > 0 for v in z]),
        (
            {"mask": lambda z: masks.threshold(masks.richness(z), 0.5)},
            lambda z: masks.threshold(masks.richness(z), 0.5),
        ),
        ({"preset": "pkd"}, richness_mask),
        ({"feats": None, "adapter_kernel": None}, richness_mask),
        ({"feats": None, "logits": None, "mask": "ones"}, lambda z: None),
        ({"cls_weight": 0.0}, richness_mask),
    ],
)
def test_it_has_the_mask_of_the_others(options, mask):
    d, x = made(**options), images()
    losses = d(x)
    mine, theirs, z = emitted(d, x)
    right = localization_distillation(mine, theirs, mask(z))
    assert relative(losses["loss_frs_box"].detach(), right.detach()) <= 1e-5


def test_levels_warm_up_and_a_teacher_that_names_its_modules():
    d = made(levels=[0, 2], warmup=4, of_teacher={"boxes": Output("head.box")})
    x = images()
    for step in range(3):
        losses = d(x)
        mine, theirs, z = ([levels[i] for i in (0, 2)] for levels in emitted(d, x))
        right = step / 4 * localization_distillation(mine, theirs, richness_mask(z))
        assert losses["loss_frs_box"].item() == pytest.approx(right.item(), rel=1e-5)


@pytest.mark.parametrize(("packed", "alone"), [(False, False), (True, False), (False, True)])
def test_its_gradient_is_held_at_a_share(packed, alone):
    options = {"feats": None, "logits": None, "mask": "ones"} if alone else {}
    shares = 0.3 if alone else (0.2, 0.2, 0.3)
    box_options = {"weight": 0.25, "normalizer": "total_mass"}
    d = made(*pair(packed=packed, learns=True), gradient_share=shares, box_options=box_options, warmup=4, **options)
    assert set(d.shares) == ({"box"} if alone else {"feat", "cls", "box"})
    assert d.shares["box"].weight == 0.25
    for _ in range(60):
        sum(d(images()).values()).backward()
    losses = d(images())
    share = d.shares["box"]
    assert torch.allclose(share.term.norm() / share.own.norm(), torch.tensor(0.3), rtol=0.01)
    mine, theirs, z = emitted(d, images())
    right = localization_distillation(mine, theirs, None if alone else richness_mask(z), normalizer="total_mass")
    assert relative(losses["loss_frs_box"].detach(), (share.weight * right).detach()) <= 1e-5
    assert d.logged()["frs_weight_box"] == share.weight


def test_a_recipe_names_boxes_and_the_sum_is_handed_out():
    recipe = Recipe("neck", "head.cls", boxes="boxes")
    d = made(*pair(returns="sum"), feats=None, logits=None, boxes=None, recipe=recipe)
    d(images())
    total = d.loss()
    both = made(*pair())(images())
    assert total.item() == pytest.approx(sum(v.item() for k, v in both.items() if "frs" in k), rel=1e-5)


def test_a_copy_and_a_pickle_go_on():
    d, x = made(box_options={"weight": 0.5}), images()
    right = d(x)["loss_frs_box"]
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert torch.equal(other(x)["loss_frs_box"], right)


def test_boxes_without_a_gradient_are_said():
    d = made()
    d.student.head.box.requires_grad_(False)
    d.student.neck.requires_grad_(False)
    with pytest.warns(UserWarning, match="the student's boxes carry no gradient"):
        d(images())


def test_a_teacher_in_half_the_bits_whose_boxes_overflow_is_refused():
    d = made(fast_teacher={"dtype": torch.bfloat16})
    d.teacher.head.box.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"the teacher's boxes\[0\] are not finite"):
        d(images())


@pytest.mark.parametrize(
    ("models", "options", "error", "words"),
    [
        ({"bins": 4}, {}, ValueError, r"student has \[16, 16, 16\] channels of boxes a level, teacher \[20, 20, 20\]"),
        ({}, {"box_options": {"sides": 3}}, ValueError, r"boxes\[0\] .* must have sides \* bins channels, sides=3"),
        ({}, {"boxes": None, "box_options": {}}, ValueError, "box_options without boxes"),
        ({}, {"box_options": {"return_terms": True}}, TypeError, "box_options has return_terms"),
        ({}, {"box_options": {"beta": 1.0}}, TypeError, "LocalizationDistillation takes no beta"),
        ({}, {"box_options": {"level_weights": [1.0]}}, ValueError, "level_weights has 1 entries, there are 3 levels"),
        ({}, {"box_options": {"weight": -1.0}}, ValueError, "weight must be zero or more"),
        ({}, {"boxes": "head.boxes"}, ValueError, "boxes: Boxed has no module 'head.boxes'"),
        ({}, {"boxes": "neck", "of_teacher": {"boxen": "neck"}}, ValueError, "takes 'feats', 'logits', 'boxes'"),
        ({}, {"gradient_share": (1.0, 1.0)}, ValueError, "the features', the logits' and the boxes'"),
        ({}, {"gradient_share": 1.0, "box_options": {"weight": torch.ones(())}}, ValueError, "sets the weights"),
        ({}, {"logits": None}, ValueError, "the richness is made of the teacher's class logits"),
    ],
)
def test_what_does_not_fit_is_refused(models, options, error, words):
    with pytest.raises(error, match=words):
        made(*pair(**models), **options)
