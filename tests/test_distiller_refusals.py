"""What `Distiller` refuses, when it is made and when it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from toy_detectors import EXAMPLE, Detector, distiller, images, pair

from frs_kernels.distill import Distiller
from frs_kernels.distill.recipe import Recipe


class Branching(Detector):
    def forward(self, x: torch.Tensor, targets: Any = None) -> Any:
        if self.training:
            self.head(self.neck(x))
        return super().forward(x, targets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: distiller(s, s), "the same module; it would learn from itself"),
        (lambda s, t: distiller(s.requires_grad_(False), t), "swapped"),
        (lambda s, t: distiller(s, t, feats="neck.fpn"), "feats: Detector has no module 'neck.fpn'"),
        (lambda s, t: distiller(s, t, logits="head.box"), "'head.box' emitted nothing"),
        (lambda s, t: distiller(s, t, adapter_kernel=None), r"student has \[6, 6, 6\] channels, teacher \[9, 9, 9\]"),
        (lambda s, t: distiller(s, t, logits=None), "name logits, or take mask='ones'"),
        (lambda s, t: distiller(s, t, schedule="cosine"), "steps= goes with schedule='cosine' alone"),
        (lambda s, t: distiller(s, t, steps=5), "steps= goes with schedule='cosine' alone"),
        (lambda s, t: distiller(s, t, mask="box"), "mask='box' is unknown"),
        (lambda s, t: distiller(s, t, preset="yolo"), "preset='yolo' is unknown"),
        (lambda s, t: distiller(s, t, cls_loss="ce"), "cls_loss='ce' is unknown"),
        (lambda s, t: distiller(s, t, recipe=Recipe("neck")), "not beside"),
        (lambda s, t: Distiller(s, t, recipe="detectron2"), "recipe='detectron2' is unknown"),
        (lambda s, t: Distiller(s, t, recipe="torchvision"), "Detector is no RetinaNet, FCOS or Faster R-CNN"),
        (lambda s, t: Distiller(s, t, recipe="ultralytics"), "Detector is no detection model of Ultralytics"),
        (lambda s, t: Distiller(s, t, recipe="transformers"), "Detector is no RT-DETR or D-FINE"),
        (lambda s, t: distiller(s, t, level_weights=[1.0]), "level_weights has 1 entries, there are 3 levels"),
        (lambda s, t: distiller(s, t, of_teacher={"feats": ["neck.convs.0", "neck.convs.1"]}), "with levels="),
        (lambda s, t: distiller(s, t, of_teacher={"feats": [f"neck.convs.{i}" for i in (1, 0, 2)]}), "same strides"),
        (lambda s, t: distiller(s, t, levels=[0, 3]), "give distinct indices from 0 to 2"),
        (lambda s, t: distiller(s, t, gradient_share=0), "gradient_share must be positive"),
        (lambda s, t: distiller(s, t, gradient_share=1, feat_weight=0.0), "the weight of feat, .* must be"),
        (lambda s, t: distiller(s, t, gradient_share=(1.0, 1.0, 1.0)), "one number, or the features' and the logits'"),
        (lambda s, t: distiller(s, t, gradient_share=0.1, feat_weight=torch.ones(())), "sets the weights"),
        (lambda s, t: distiller(s, t, example=[[EXAMPLE[0]]]), "cannot be run on the example"),
        (lambda s, t: Distiller(s, t), "nothing to collect"),
        (lambda s, t: distiller(nn.DataParallel(s), t), "wrap the distiller"),
        (lambda s, t: (setattr(t, "neck", s.neck), distiller(s, t)), "share parameters"),
        (lambda s, t: distiller(s, t, return_terms=True), "return_terms is the distiller's own"),
        (lambda s, t: distiller(s, t, of_teacher={"images": "neck"}), r"of_teacher has \['images'\]"),
        (lambda s, t: distiller(s, t, feats=None, cls_weight=0), "nothing to distil: cls_weight is 0"),
        (lambda s, t: (setattr(t.neck.convs, "0", nn.Conv2d(4, 9, 3)), distiller(s, t)), "the teacher cannot be run"),
        (lambda s, t: distiller(s, t, mask=lambda z: None)(images()), "mask= returned None"),
    ],
)  # fmt: skip
def test_refused_when_made(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(*pair())


def test_refused_when_called():
    d = distiller()
    d.student.eval()
    with pytest.raises(RuntimeError, match="the student is in eval mode, the distiller trains"):
        d(images())
    d = distiller(Branching())
    with pytest.raises(RuntimeError, match=r"were called \[2, 6\] times in this pass, \[1, 3\] in the first"):
        d(images())
