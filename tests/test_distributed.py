"""Two processes: with the mass averaged over them, averaged gradients are those of the joint batch."""

from __future__ import annotations

import pytest
import torch
from cases import each_backend, relative, run
from torch.distributed.fsdp import fully_shard
from toy_detectors import Detector, images
from truth import pyramid
from workers import (
    Model,
    assert_of_one_process,
    averaged_gradients,
    ddp_gradients,
    descend,
    distilled,
    distiller_gradients,
    launch,
    make_distiller,
    masked_losses,
    sharded,
    shared_weight,
)

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
    distiller = make_distiller(x)
    distilled(distiller, distiller(x)).backward()
    right = [p.grad for p in distiller.parameters() if p.requires_grad]
    for first, second, grad in zip(*results, right, strict=True):
        assert torch.equal(first, second)
        assert relative(first, grad) <= 1e-5


@pytest.mark.parametrize("parts", [[], ["student.neck", "student.head"]], ids=["whole", "nested"])
@pytest.mark.parametrize("returns", ["losses", "logits"])
def test_fully_sharded(tmp_path, returns, parts):
    """FSDP2 on two processes is one process with all images, for some steps; the teacher stays whole in each."""
    x = images(n=4)
    results = launch(sharded, tmp_path, list(x.chunk(2)), returns, parts)
    distiller = make_distiller(x, returns)
    losses, grads = descend(distiller, x)
    assert_of_one_process(results, distiller, losses, grads)


def test_a_gradient_share_over_ranks(tmp_path):
    """One weight for all, from the norms of all: sqrt(2^2 + 3^2) / sqrt(2), then 2 / w, averaged as logarithms."""
    found = launch(shared_weight, tmp_path)
    first = 0.3 * (13 / 2) ** 0.5
    assert found[0] == found[1] == pytest.approx((first * 0.3 * 2) ** 0.5, rel=1e-5)


def test_what_is_sharded_in_part_is_refused():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        x = images(n=2)
        distiller = make_distiller(x)
        fully_shard(distiller.student)
        with pytest.raises(RuntimeError, match=r"the student is sharded, the adapter is not: fully_shard\(distiller\)"):
            distiller(x)
        with pytest.raises(ValueError, match="make the distiller first"):
            Distiller(distiller.student, Detector(), feats="neck", logits="head.cls", example=(x,))
    finally:
        torch.distributed.destroy_process_group()
