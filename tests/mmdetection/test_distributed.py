"""Two processes on gloo: the gradients of the joined batch, and no unused parameter."""

from __future__ import annotations

import pytest
import torch
from detectors import FRS, NAMES, batch
from processes import averaged_gradients, model_of, whole_steps
from workers import launch

from frs_kernels.integrations.mmdet import TERMS

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
each_detector = pytest.mark.parametrize("name", NAMES)


def distance(grads, right) -> float:
    """Relative, over all parameters at once."""
    assert grads.keys() == right.keys()
    apart = sum((grads[key] - right[key]).double().square().sum() for key in right)
    return float((apart / sum(g.double().square().sum() for g in right.values())).sqrt())


@each_detector
def test_averaged_gradients_are_those_of_the_joined_batch(rng, tmp_path, teacher_file, name):
    file = teacher_file(name)
    inputs, samples = batch(rng, images=4)
    inputs[:2] *= 3  # so that the halves' masses differ
    model = model_of(name, file)
    losses = model.loss(inputs, samples)
    sum(losses[key] for key in FRS).backward()
    joined = {key: p.grad for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    ranks = launch(averaged_gradients, tmp_path, name, file, inputs, samples)
    far = {}
    for average_mass in (True, False):
        first, second = ({key: rank[average_mass][key] for key in joined} for rank in ranks)
        assert all(torch.equal(first[key], second[key]) for key in joined)
        far[average_mass] = distance(first, joined)
    # Convolutions sum over the images of a batch in another order: a few hundred roundings of fp32.
    assert far[True] <= 256 * torch.finfo(torch.float32).eps
    assert far[False] > 10 * far[True]


@each_detector
def test_no_parameter_is_unused(rng, tmp_path, teacher_file, name):
    first, second = launch(whole_steps, tmp_path, name, teacher_file(name), *batch(rng, images=4))
    assert set(first) == set(TERMS)
    for terms in TERMS:
        assert all(torch.equal(a, b) for a, b in zip(first[terms], second[terms], strict=True))
