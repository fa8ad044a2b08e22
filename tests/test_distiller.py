"""`Distiller`: the losses it adds, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from toy_detectors import EXAMPLE, Detector, by_hand, distiller, images, pair

from frs_kernels import PRESETS, fsr_loss
from frs_kernels.distill import Distiller, masks
from frs_kernels.distill.pairing import UNUSED
from frs_kernels.distill.recipe import Recipe


def test_a_dict_of_losses_gets_two_more():
    d, x = distiller(preset="gfl"), images()
    own = d.student(x)
    losses = d(x)
    terms = by_hand(d, x)
    assert set(losses) == {"loss_cls", "loss_frs_feat", "loss_frs_cls"}
    assert torch.equal(losses["loss_cls"], own["loss_cls"])
    for name, value in (("feat", terms.feat), ("cls", terms.cls)):
        expected = PRESETS["gfl"][f"{name}_weight"] * value
        assert torch.allclose(losses[f"loss_frs_{name}"], expected, rtol=1e-6)
    assert torch.equal(d.terms.mass, terms.mass)
    with pytest.raises(RuntimeError, match="no loss is kept: it is in the dict"):
        d.loss()
    sum(losses.values()).backward()
    assert all(p.grad is not None for name, p in d.named_parameters() if "box" not in name)
    assert all(p.grad is None for p in d.teacher.parameters())


def test_another_return_is_left_alone_and_the_loss_is_handed_out_once():
    student, teacher = pair(returns="logits")
    d, x = distiller(student, teacher, cls_weight=0.5), images()
    with pytest.raises(RuntimeError, match="there was no call in training mode"):
        d.loss()
    returned = d(x)
    assert all(torch.equal(a, b) for a, b in zip(returned, student(x), strict=True))
    loss, terms = d.loss(), by_hand(d, x)
    assert torch.allclose(loss, terms.feat + 0.5 * terms.cls, rtol=1e-6)
    with pytest.raises(RuntimeError, match="has been handed out already"):
        d.loss()


def test_eval_mode_is_the_student_alone():
    d, x = distiller(), images()
    ran = []
    d.teacher.register_forward_hook(lambda *_: ran.append(1))
    d.eval()
    assert all(torch.equal(a, b) for a, b in zip(d(x), d.student(x), strict=True))
    assert not ran


def test_the_teacher_is_no_part_of_the_tree():
    d = distiller()
    assert not any("teacher" in name for name, _ in [*d.named_parameters(), *d.named_modules(), *d.named_buffers()])
    assert not any("teacher" in key for key in d.state_dict())
    d.train()
    assert not d.teacher.training
    assert not any(p.requires_grad for p in d.teacher.parameters())
    d.double()
    assert next(d.teacher.parameters()).dtype == torch.float64
    d(images().double())


def test_the_students_state_is_the_plain_models():
    d, (plain, _) = distiller(), pair()
    plain.load_state_dict(d.student.state_dict())


def test_the_head_alone_needs_no_adapter():
    d, x = distiller(feats=None), images()
    losses = d(x)
    assert set(losses) == {"loss_cls", "loss_frs_cls"}
    assert d.adapter is None
    z = [d.teacher.head.cls(v).detach() for v in d.teacher.neck(x)]
    right = fsr_loss(None, None, [d.student.head.cls(v) for v in d.student.neck(x)], z)
    assert torch.allclose(losses["loss_frs_cls"], right, rtol=1e-6)


def test_features_alone_take_the_richness_of_the_teacher():
    d, x = distiller(logits=None, of_teacher={"logits": "head.cls"}), images()
    losses = d(x)
    assert set(losses) == {"loss_cls", "loss_frs_feat"}
    assert torch.allclose(losses["loss_frs_feat"], by_hand(d, x).feat, rtol=1e-6)
    d = distiller(logits=None, mask="ones")
    ones = masks.ones(d.teacher.neck(x))
    assert torch.allclose(d(x)["loss_frs_feat"], by_hand(d, x, mask=ones).feat, rtol=1e-6)


def test_a_mask_of_the_teachers_logits():
    def best(z: list[torch.Tensor]) -> list[torch.Tensor]:
        return masks.top_k(masks.richness(z), 5)

    d, x = distiller(mask=best), images()
    with torch.no_grad():
        mask = best([d.teacher.head.cls(v) for v in d.teacher.neck(x)])
    losses, terms = d(x), by_hand(d, x, mask=mask)
    assert torch.allclose(losses["loss_frs_feat"], terms.feat, rtol=1e-6)
    assert torch.allclose(losses["loss_frs_cls"], terms.cls, rtol=1e-6)


def test_without_a_preset_all_levels_have_one_denominator():
    s, t = pair()
    x = images()
    d = Distiller(s, t, feats="neck", logits="head.cls", warmup=0, feat_weight=1.0, example=EXAMPLE)
    assert torch.allclose(d(x)["loss_frs_feat"], by_hand(d, x, normalizer="total_mass").feat, rtol=1e-6)
    assert distiller(preset="gfl").criterion.options.normalizer == "mass"


def test_levels_that_are_chosen():
    d, x = distiller(levels=[2, 0], level_weights=[1.0, 3.0]), images()
    feats, t_feats = d.student.neck(x), d.teacher.neck(x)
    z = [d.teacher.head.cls(v) for v in t_feats]
    adapted = d.adapter([feats[2], feats[0]])
    right = fsr_loss(adapted, [t_feats[2], t_feats[0]], None, [z[2], z[0]], level_weights=[1.0, 3.0])
    assert torch.allclose(d(x)["loss_frs_feat"], right, rtol=1e-6)
    assert len(d.terms.mass) == 2


def test_warmup_and_schedule():
    d, x = distiller(warmup=4, schedule="cosine", steps=10), images()
    full = by_hand(d, x)
    for i in range(12):
        expected = min(i / 4, 1) * 0.5 * (1 + math.cos(math.pi * min(i / 10, 1)))
        assert d.ramp() == pytest.approx(expected)
        assert d(x)["loss_frs_feat"].item() == pytest.approx(expected * full.feat.item(), rel=1e-5, abs=1e-12)
    resumed = distiller(warmup=4)
    resumed.load_state_dict(d.state_dict())
    assert resumed.iteration == 12


def test_the_teacher_stops_once_it_has_been_seen():
    d, x = distiller(), images()
    ran = []
    d.teacher.head.register_forward_hook(lambda *_: ran.append(1))
    d(x)
    assert not ran


class Resizing(nn.Module):
    """A model that draws its images' size and normalises inside, as torchvision's do."""

    def __init__(self, inner: Detector) -> None:
        super().__init__()
        self.inner = inner
        self.side = 64

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner((nn.functional.interpolate(x, (self.side, self.side)) - 0.5) / 0.2)


def test_the_teacher_sees_the_images_that_the_student_saw():
    s, t = map(Resizing, pair())
    recipe = Recipe("inner.neck", "inner.head.cls", "inner.neck", lambda model, x: model.inner(x))
    d = distiller(s, t, feats=None, logits=None, recipe=recipe)
    s.side = 96  # the teacher keeps 64
    losses = d(images(side=50))
    inside = (nn.functional.interpolate(images(side=50), (96, 96)) - 0.5) / 0.2
    with torch.no_grad():
        feats = t.inner.neck(inside)
    right = fsr_loss(d.adapter(s.inner.neck(inside)), feats, None, [t.inner.head.cls(v) for v in feats])
    assert torch.allclose(losses["loss_frs_feat"], right, rtol=1e-6)


def test_other_classes_mean_features_alone_said_once():
    with pytest.warns(UserWarning, match="student has .* class logits a level, teacher .*; features alone"):
        d = distiller(Detector(classes=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = d(images())
    assert set(losses) == {"loss_cls", "loss_frs_feat"}
    with pytest.raises(ValueError, match="other classes or anchors, and no features to distil"):
        distiller(Detector(classes=3), feats=None)


def test_accumulation_and_autocast():
    d = distiller()
    optimizer = torch.optim.SGD(d.parameters(), 1e-3)
    for seed in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            losses = d(images(seed))
        sum(losses.values()).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in d.parameters())


def test_a_copy_trains_on_its_own():
    d, x = distiller(), images()
    other = copy.deepcopy(d)
    sum(other(x).values()).backward()
    assert all(p.grad is None for p in d.parameters())
    assert torch.equal(other(x)["loss_frs_feat"], d(x)["loss_frs_feat"])


def test_nothing_is_kept_from_step_to_step():
    """With the collector of cycles off: what a step has seen is freed by counting."""
    d = distiller(*pair(returns="logits"))
    seen = []
    for model in (d.student, d.teacher):
        model.neck.convs[0].register_forward_hook(lambda module, given, out: seen.append(weakref.ref(out)))
    gc.disable()
    try:
        for seed in range(3):
            d(images(seed))
            d.loss().backward()
        assert [r() is None for r in seen] == [True] * 6
    finally:
        gc.enable()


def test_a_loss_is_of_the_last_call_or_none():
    d, x = distiller(*pair(returns="logits")), images()
    d(x)
    with pytest.warns(UserWarning, match="the losses of the last call were never taken"):
        d.eval()(x)
    with pytest.raises(RuntimeError, match="no loss is kept"):
        d.loss()
    d.train()(x)
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        with pytest.raises(RuntimeError, match="no loss is kept"):
            other.loss()


def test_a_teacher_set_later_is_frozen_and_no_submodule():
    d = distiller()
    d.teacher = Detector(channels=9)
    d.train()
    assert not d.teacher.training
    assert not any("teacher" in name for name, _ in d.named_parameters())
    d.teacher.train()
    d(images())
    assert not d.teacher.training


def test_the_modes_of_the_students_modules_stay():
    s, t = pair()
    s.head.eval()
    distiller(s, t)
    assert s.training
    assert not s.head.training


def test_a_weight_that_is_a_tensor_follows():
    d = distiller(feat_weight=torch.tensor(0.5)).double()
    d(images().double())["loss_frs_feat"].backward()
    assert d.criterion.feat_weight.dtype == torch.float64


class Returning(Detector):
    """Returns what `wrap` makes of its losses."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, x: torch.Tensor, targets: Any = None) -> Any:
        returned = super().forward(x, targets)
        return self.wrap(returned) if self.training else returned


def test_what_counts_as_a_dict_of_losses():
    d = distiller(Returning(OrderedDict))
    assert list(d(images())) == ["loss_cls", "loss_frs_feat", "loss_frs_cls"]
    for wrap in (lambda losses: {**losses, "boxes": 3}, lambda losses: {"loss": losses["loss_cls"].view(1)}):
        d = distiller(Returning(wrap))
        assert not any("frs" in name for name in d(images()))
        d.loss()
    d = distiller(Returning(lambda losses: {**losses, "loss_frs_feat": losses["loss_cls"]}))
    with pytest.raises(RuntimeError, match=r"the student returns \['loss_frs_feat'\] itself"):
        d(images())


def test_features_without_a_gradient_are_said():
    s, t = pair()
    s.neck.requires_grad_(False)
    d = distiller(s, t)
    with pytest.warns(UserWarning, match="the student's features carry no gradient"):
        d(images())


def test_a_loss_that_nobody_goes_backward_through_is_said():
    """A student's own total in the dict, which training takes instead of the sum."""
    d, x = distiller(Returning(lambda losses: {"loss": losses["loss_cls"]})), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(UNUSED):
            d(x)["loss"].backward()
    with pytest.warns(UserWarning, match="none of the last 32 calls' loss_frs_feat and loss_frs_cls"):
        d(x)["loss"].backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d = distiller()
        for _ in range(UNUSED // 8):
            sum(sum(d(x).values()) for _ in range(8)).backward()
            with torch.no_grad():
                d(x)
        for _ in range(UNUSED + 1):
            sum(d(x).values()).backward()


def test_a_weight_of_the_features_that_nobody_has_chosen_is_said():
    named = {"feats": "neck", "logits": "head.cls", "example": EXAMPLE}
    with pytest.warns(UserWarning, match="feat_weight is 1, which nobody has chosen") as found:
        Distiller(*pair(), **named)
    assert [w.filename for w in found] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"feat_weight": 1.0}, {"preset": "gfl"}, {"gradient_share": 1}, {"feats": None}):
            Distiller(*pair(), **named | options)


def test_to_empty_leaves_the_teacher_its_weights():
    d = distiller()
    before = copy.deepcopy(d.teacher.state_dict())
    d.to_empty(device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), d.teacher.state_dict().values(), strict=True))
    d.student.load_state_dict(pair()[0].state_dict())
    d.teacher.to("meta")
    with pytest.raises(ValueError, match="the teacher is on the meta device: load its weights"):
        d.to_empty(device="cpu")


class InPlace(Detector):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: torch.Tensor, targets: Any = None) -> Any:
        if self.where == "images":
            x.sub_(0.5)
        feats = self.neck(x)
        if self.where == "feats":
            feats[1].mul_(2)
        if self.where == "list":
            feats[1] = torch.zeros_like(feats[1])
        logits = self.head(feats)
        return {"loss_cls": logits[0].mean()} if self.training else logits


def test_changes_in_place_are_seen():
    assert distiller(InPlace("list"))(images())["loss_frs_feat"] > 0
    with pytest.raises(RuntimeError, match="the student changed its images in place; name the module"):
        distiller(InPlace("images"))(images())
    with pytest.raises(ValueError, match="feats: what 'neck' emitted was changed in place afterwards"):
        distiller(InPlace("feats"))
