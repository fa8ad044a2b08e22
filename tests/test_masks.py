"""Masks by hand, and against loops."""

from __future__ import annotations

import pytest
import torch

from frs_kernels.distill import masks


def levels(rng, channels: int = 4, n: int = 2) -> list[torch.Tensor]:
    return [torch.randn(n, channels, h, w, generator=rng) for h, w in ((4, 6), (2, 3), (1, 1))]


def test_richness_and_threshold(rng):
    z = levels(rng)
    scores = masks.richness(z)
    for s, v in zip(scores, z, strict=True):
        assert torch.allclose(s, v.sigmoid().amax(1), atol=1e-6)
    for kept, s in zip(masks.threshold(scores, 0.7), scores, strict=True):
        assert torch.equal(kept, torch.where(s > 0.7, s, 0))


def test_top_k_is_of_an_image_over_all_levels(rng):
    scores = [torch.rand(2, *x.shape[2:], generator=rng) for x in levels(rng)]
    for k in (1, 5, 30, 31, 99):
        kept = torch.cat([s.flatten(1) for s in masks.top_k(scores, k)], 1)
        flat = torch.cat([s.flatten(1) for s in scores], 1)
        for row, before in zip(kept, flat, strict=True):
            right = before.sort(descending=True).values[:k]
            assert torch.equal(row[row > 0].sort(descending=True).values, right)
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        masks.top_k(scores, 0)


def test_centerness(rng):
    scores = [torch.rand(2, *x.shape[2:], generator=rng) for x in levels(rng)]
    logits = levels(rng, 3)
    for found, s, c in zip(masks.centerness(scores, logits), scores, logits, strict=True):
        assert torch.equal(found, s * c.sigmoid().max(1).values)


def test_boxes_by_loop(rng):
    like, strides = levels(rng), (8, 16, 32)
    corners = torch.rand(2, 3, 2, 2, generator=rng) * torch.tensor([48.0, 32.0])
    boxes = [c.sort(1).values.flatten(1) for c in corners]
    boxes[1] = boxes[1][:0]
    for mask, x, stride in zip(masks.boxes(boxes, like, strides), like, strides, strict=True):
        for n in range(2):
            for i in range(x.shape[2]):
                for j in range(x.shape[3]):
                    meets = any(
                        x0 < (j + 1) * stride and x1 > j * stride and y0 < (i + 1) * stride and y1 > i * stride
                        for x0, y0, x1, y1 in boxes[n].tolist()
                    )
                    assert mask[n, i, j] == meets
    with pytest.raises(ValueError, match="boxes are of 1 images, the levels of 2"):
        masks.boxes(boxes[:1], like, strides)
    assert all((m == 1).all() and m.shape == x[:, 0].shape for m, x in zip(masks.ones(like), like, strict=True))


def test_objects_and_background_apart(rng):
    objects = [(torch.rand(2, *x.shape[2:], generator=rng) * 4).clamp(0, 1) for x in levels(rng)]
    objects += [torch.zeros(2, 3, 3), torch.ones(2, 3, 3)]
    for found, m in zip(masks.decoupled(objects, 4.0, 0.5), objects, strict=True):
        inside, outside = m.sum().item(), (1 - m).sum().item()
        for mine, v in zip(found.flatten().tolist(), m.flatten().tolist(), strict=True):
            right = (4.0 * v / inside if inside else 0.0) + (0.5 * (1 - v) / outside if outside else 0.0)
            assert mine == pytest.approx(right, rel=1e-5, abs=1e-9)
