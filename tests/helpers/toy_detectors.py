"""Small detectors that emit their levels in every way that `Tap` knows, and distillers of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frs_kernels import FSRTerms, fsr_loss
from frs_kernels.distill import Distiller

STRIDES = (8, 16, 32)


class Neck(nn.Module):
    def __init__(self, channels: int, returns: str) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, channels, 3, padding=1) for _ in STRIDES)
        self.returns = returns

    def forward(self, images: Tensor) -> Any:
        levels = [conv(F.avg_pool2d(images, s)) for conv, s in zip(self.convs, STRIDES, strict=True)]
        if self.returns == "dict":
            return {str(i): x for i, x in enumerate(levels)}
        return tuple(levels) if self.returns == "tuple" else levels


class Head(nn.Module):
    """Class logits of `anchors` a position, by one convolution that all levels share."""

    def __init__(self, channels: int, classes: int, anchors: int, returns: str) -> None:
        super().__init__()
        self.cls = nn.Conv2d(channels, anchors * classes, 1)
        self.box = nn.Conv2d(channels, 4, 1)
        self.classes = classes
        self.returns = returns

    def forward(self, feats: list[Tensor]) -> Any:
        logits = [self.cls(x) for x in feats]
        if self.returns == "columns":  # (N, K, P)
            return torch.cat([z.flatten(2) for z in logits], 2)
        if self.returns == "rows":  # (N, A P, K)
            n = logits[0].shape[0]
            rows = [z.permute(0, 2, 3, 1).reshape(n, -1, self.classes) for z in logits]
            return torch.cat(rows, 1)
        return logits


class Detector(nn.Module):
    """Returns a dict of losses in training mode, else its logits."""

    def __init__(
        self, channels: int = 6, classes: int = 4, anchors: int = 1, neck: str = "list", head: str = "list",
        returns: str = "losses",
    ) -> None:  # fmt: skip
        super().__init__()
        self.neck = Neck(channels, neck)
        self.head = Head(channels, classes, anchors, head)
        self.returns = returns

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        feats = self.neck(images)
        logits = self.head(list(feats.values()) if isinstance(feats, dict) else feats)
        if not self.training or self.returns == "logits":
            return logits
        own = sum(z.square().mean() for z in ([logits] if isinstance(logits, Tensor) else logits))
        return {"loss_cls": own} if self.returns == "losses" else own


def images(seed: int = 0, n: int = 2, side: int = 64) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


class Loop(nn.Module):
    """A model as the pages' training loops have it: features, logits and, given targets, its own loss."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = Detector(channels, classes=4, returns="logits")
        self.inner.head.box.requires_grad_(False)  # which has no loss here, and DDP would wait for its gradient
        self.extra = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(5 - len(STRIDES)))

    def forward(self, x: Tensor, targets: Tensor | None = None) -> tuple[list[Tensor] | Tensor, ...]:
        feats = self.inner.neck(x)
        for conv in self.extra:
            feats.append(conv(feats[-1]))
        logits = self.inner.head(feats)
        return (feats, logits) if targets is None else (feats, logits, sum(z.square().mean() for z in logits))


class Normed(Detector):
    """With batch norms in the neck, and a second tower that is not distilled."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__(channels)
        self.neck.convs = nn.ModuleList(nn.Sequential(conv, nn.BatchNorm2d(channels)) for conv in self.neck.convs)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)


EXAMPLE = (torch.zeros(1, 3, 64, 64),)


def pair(**student: Any) -> tuple[Detector, Detector]:
    torch.manual_seed(7)
    return Detector(**student), Detector(channels=9)


def distiller(student: nn.Module | None = None, teacher: nn.Module | None = None, **options: Any) -> Distiller:
    s, t = pair()
    arguments = {"feats": "neck", "logits": "head.cls", "warmup": 0, "example": EXAMPLE, **options}
    if "preset" not in options:
        arguments = {"normalizer": "mass", "feat_weight": 1.0, **arguments}
    return Distiller(student or s, teacher or t, **arguments)


def by_hand(d: Distiller, x: torch.Tensor, **options: Any) -> FSRTerms:
    s, t = d.student, d.teacher
    feats = s.neck(x)
    with torch.no_grad():
        t_feats = t.neck(x)
        z = [t.head.cls(v) for v in t_feats]
    terms = fsr_loss(
        d.adapter(feats) if d.adapter else feats, t_feats, [s.head.cls(v) for v in feats], z,
        return_terms=True, **options,
    )  # fmt: skip
    assert isinstance(terms, FSRTerms)
    return terms
