"""`FRSDistiller` with a teacher that costs less: the same losses, or those of smaller images."""

from __future__ import annotations

import pytest
import torch
from detectors import FRS, NAMES, batch, distiller
from torch import nn

from frs_kernels.integrations.mmdet_pair import run

each_detector = pytest.mark.parametrize("name", NAMES)


@each_detector
def test_the_teacher_runs_its_class_branch_alone(rng, teacher_file, name):
    """Bit for bit what the whole teacher emits, where nothing is folded."""
    inputs, _ = batch(rng)
    model = distiller(name, teacher_file(name))
    plain = distiller(name, teacher_file(name), fast_teacher=False)
    with torch.no_grad():
        whole = run(plain.teacher, inputs)
    t = plain.observe_teacher(inputs)
    assert t.outputs == (), "the boxes were not computed"
    assert all(torch.equal(a, b) for a, b in zip(t.logits, whole.logits, strict=True))
    assert sum(isinstance(m, nn.Identity) for m in model.teacher.backbone.modules()) > 10
    for a, b in zip(model.observe_teacher(inputs).logits, whole.logits, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("name", ["gfl", "faster_rcnn"])
def test_a_teacher_of_16_bits_without_its_boxes(rng, teacher_file, name):
    inputs, samples = batch(rng)
    file = teacher_file(name)
    right = distiller(name, file).loss(inputs, samples)
    fast = {"dtype": torch.bfloat16, "channels_last": True, "free": True}
    model = distiller(name, file, fast_teacher=fast)
    losses = model.loss(inputs, samples)
    assert model.observe_teacher(inputs).logits[0].dtype == torch.bfloat16
    boxes = model.teacher.bbox_head.reg_convs if name == "gfl" else model.teacher.roi_head
    assert not any(p.numel() for p in boxes.parameters())
    for key in FRS:
        assert abs(losses[key] - right[key]) <= 0.05 * right[key]


@pytest.mark.parametrize("name", ["gfl", "faster_rcnn"])
def test_a_compiled_teacher(rng, teacher_file, name):
    """The backbone and the neck; the head's class branch runs once a level. The same step, also beside the student."""
    inputs, samples = batch(rng)
    file = teacher_file(name)
    right = distiller(name, file).loss(inputs, samples)
    model = distiller(name, file, fast_teacher={"compile": {"backend": "eager"}, "stream": True})
    parts = [name for name, module in model.teacher.named_modules() if module._compiled_call_impl is not None]
    assert parts == ["backbone", "neck"]
    losses = model.loss(inputs, samples)
    for key in FRS:
        assert abs(losses[key] - right[key]) <= 1e-5 * right[key]


@pytest.mark.parametrize("options", [{}, {"centerness": True}, {"mask": "boxes"}], ids=str)
def test_a_teacher_of_smaller_images(rng, teacher_file, options):
    inputs, samples = batch(rng)
    file = teacher_file("fcos")
    model = distiller("fcos", file, fast_teacher={"image_scale": 0.5}, preset="fcos", **options)
    t = model.observe_teacher(inputs)
    half = 64  # of 96, in whole multiples of 32
    assert t.feats[0].shape[2] == half // 8
    losses = model.loss(inputs, samples)
    assert model.terms.mask[0].shape[1] == inputs.shape[2] // 8
    if not options:
        scores = torch.nn.functional.interpolate(t.logits[0], model.terms.mask[0].shape[1:], mode="bilinear")
        assert torch.allclose(model.terms.mask[0], scores.amax(1).sigmoid(), rtol=1e-5)
    assert all(losses[key].isfinite() and losses[key] > 0 for key in FRS)
