"""Two processes: with the mass averaged over them, averaged gradients are those of the joint batch."""

from __future__ import annotations

import pytest
import torch
from cases import each_backend, relative, run
from truth import pyramid
from workers import Model, averaged_gradients, ddp_gradients, launch

from frs_kernels import fsr_loss

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


def test_ddp_gives_the_gradients_of_one_process_with_all_images(rng, tmp_path):
    images, t, z = (torch.randn(4, c, 3, 4, generator=rng) for c in (3, 5, 7))
    results = launch(ddp_gradients, tmp_path, images, [t], [z], "torch")
    model = Model()
    feats, logits = model(images)
    fsr_loss(feats, [t], logits, [z], feat_weight=0.5, cls_weight=0.1, backend="torch").backward()
    for first, second, v in zip(*results, model.parameters(), strict=True):
        assert torch.equal(first, second)
        assert relative(first, v.grad) <= 64 * torch.finfo(v.dtype).eps
