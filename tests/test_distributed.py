"""Two processes: with the mass averaged over them, averaged gradients are those of the joint batch."""

from __future__ import annotations

import pytest
import torch
from cases import each_backend, relative, run
from toy_detectors import Detector, images
from truth import pyramid
from workers import Model, averaged_gradients, ddp_gradients, distiller_gradients, launch, masked_losses

from frs_kernels import Distiller, fsr_loss, masked_imitation_loss

BATCH = ((4, 2, 3), (4, 1, 1))
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")


OPTIONS = (
    {},
    {"normalizer": "mass_channels", "eps": 0.5, "feat_weight": 0.3},
    {"normalizer": "total_mass"},
    {"feat_loss": "smooth_l1", "beta": 0.5, "cls_loss": "kl"},
)


@each_backend
def test_averaged_gradients_are_those_of_the_joint_batch(rng, tmp_path, backend, device):
    if device != "cpu":
        pytest.skip("gloo on the CPU: the reduction is the same call on a GPU")
    p = pyramid(rng, sizes=BATCH)
    ranks = launch(averaged_gradients, tmp_path, p.map(torch.clone), backend, list(OPTIONS))
    for options, *results in zip(OPTIONS, *ranks, strict=True):
        # The denominator is the mean of the ranks' masses, half of the joint mass; so is its eps of the joint one.
        joint = run(p, backend, **options | {"eps": 2 * options.get("eps", 0.0)})
        assert results[0]["local"] != results[1]["local"]
        for result in results:
            assert abs(result["loss"] - joint.loss) <= 1e-6 * joint.loss
        for number, whole in enumerate(joint.grads):
            parts = torch.cat([result["grads"][number] for result in results])
            assert relative(parts, whole) <= 8 * torch.finfo(whole.dtype).eps


def test_a_given_masks_mass_is_averaged_too(rng, tmp_path):
    p = pyramid(rng, sizes=BATCH)
    mask = [torch.rand(s[:, 0].shape, generator=rng) for s in p.s]
    ranks = launch(masked_losses, tmp_path, p.map(torch.clone), mask)
    joint = masked_imitation_loss(p.s, p.t, mask, backend="torch")
    assert abs(sum(ranks) / 2 - joint) <= 1e-6 * joint


def test_ddp_gives_the_gradients_of_one_process_with_all_images(rng, tmp_path):
    images, t, z = (torch.randn(4, c, 3, 4, generator=rng) for c in (3, 5, 7))
    results = launch(ddp_gradients, tmp_path, images, [t], [z], "torch")
    model = Model()
    feats, logits = model(images)
    fsr_loss(feats, [t], logits, [z], feat_weight=0.5, cls_weight=0.1, backend="torch").backward()
    for first, second, v in zip(*results, model.parameters(), strict=True):
        assert torch.equal(first, second)
        assert relative(first, v.grad) <= 64 * torch.finfo(v.dtype).eps


@pytest.mark.parametrize("returns", ["losses", "logits"])
def test_ddp_around_a_distiller(tmp_path, returns):
    """Averaged, the gradients of student and adapter are those of one process with all images."""
    x = images(n=4)
    results = launch(distiller_gradients, tmp_path, x, returns)
    torch.manual_seed(0)
    distiller = Distiller(
        Detector(), Detector(channels=9), feats="neck", logits="head.cls", warmup=0, normalizer="total_mass",
        example=(x[:1],),
    )  # fmt: skip
    distiller.student.head.box.requires_grad_(False)
    losses = distiller(x)
    (losses["loss_frs_feat"] + losses["loss_frs_cls"]).backward()
    right = [p.grad for p in distiller.parameters() if p.requires_grad]
    for first, second, grad in zip(*results, right, strict=True):
        assert torch.equal(first, second)
        assert relative(first, grad) <= 1e-5
