"""Ranks that are not alike: without images, without objects, with images of another size; and ranks that fail."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from cases import each_backend, relative
from toy_detectors import by_hand, images
from truth import Pyramid, pyramid, truth
from workers import assert_of_one_process, descend, launch, make_distiller, own_gradients, refused, replicated, sharded

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo")
CHOICES = ({}, {"normalizer": "total_mass"}, {"normalizer": "total_mass", "cls_loss": "kl", "feat_weight": 0.3})
NO_OBJECTS = 1000.0  # logits so far below 0 that every score is 0, in fp64 too


def unlike(rng: torch.Generator) -> list[Pyramid]:
    """Of four ranks: some images, none, images without objects, images of another size."""
    sizes = (((3, 4, 6), (3, 2, 3)), ((0, 4, 6), (0, 2, 3)), ((1, 4, 6), (1, 2, 3)), ((2, 5, 3), (2, 3, 1)))
    some, none, empty, other = (pyramid(rng, sizes=each) for each in sizes)
    background = Pyramid(empty.s, empty.t, empty.x, [z - NO_OBJECTS for z in empty.z or []])
    return [some, none, background, other]


def joint(ranks: list[Pyramid], options: dict[str, object]) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """The loss of all ranks' images under joint masses, in fp64, and its gradients a rank.

    All that shares a denominator is one pyramid, a level a tensor.
    """
    options = dict(options)
    levels = len(ranks[0].s or [])
    of_all = options.pop("normalizer", "mass") == "total_mass"
    groups = [range(levels)] if of_all else [[level] for level in range(levels)]
    loss = torch.zeros((), dtype=torch.float64)
    grads: list[list[torch.Tensor]] = [[torch.empty(0)] * (2 * levels) for _ in ranks]
    for group in groups:
        places = [(rank, level) for rank in range(len(ranks)) for level in group]
        one = Pyramid(*([ranks[rank].inputs[i][level] for rank, level in places] for i in range(4)))
        answer = truth(one.to(torch.float64), normalizer="total_mass", **options)
        loss += answer.loss
        for (rank, level), feat, cls in zip(places, answer.grads, answer.grads[len(places) :], strict=False):
            grads[rank][level], grads[rank][levels + level] = feat, cls
    return loss, grads


@each_backend
def test_the_mean_over_ranks_is_the_joint_batch(rng, tmp_path, backend, device):
    if device != "cpu":
        pytest.skip("gloo on the CPU: the reduction is the same call on a GPU")
    ranks = unlike(rng)
    results = launch(own_gradients, tmp_path, [p.map(torch.clone) for p in ranks], backend, list(CHOICES), ranks=4)
    for options, *found in zip(CHOICES, *results, strict=True):
        loss, grads = joint(ranks, options)
        assert abs(sum(mine for mine, _ in found) / 4 - loss) <= 1e-6 * loss
        for (_, mine), right in zip(found, grads, strict=True):
            for got, whole in zip(mine, right, strict=True):
                assert got.shape == whole.shape
                assert relative(got / 4, whole) <= 16 * torch.finfo(got.dtype).eps


def joint_loss(distiller, batches):
    """Of all ranks' images under the joint mass, on one process, by `fsr_loss` without a denominator."""
    terms = [by_hand(distiller, x, normalizer="none") for x in batches]
    return sum(t.loss for t in terms) / sum(t.mass.sum() for t in terms)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("wrapped", ["DDP", "FSDP2"])
def test_steps_of_unlike_ranks_are_those_of_one_process(tmp_path, wrapped, ranks):
    """Two images and none; among four also one of another size, and a black one."""
    batches = [images(1), images(2, n=0), images(3, n=1, side=96), torch.zeros(1, 3, 64, 64)][:ranks]
    if wrapped == "DDP":
        results = launch(replicated, tmp_path, batches, ranks=ranks)
    else:
        results = launch(sharded, tmp_path, batches, "losses", ["student.neck", "student.head"], ranks=ranks)
    distiller = make_distiller(batches[0])
    losses, grads = descend(distiller, batches, joint_loss)
    assert_of_one_process(results, distiller, losses, grads)


@pytest.mark.parametrize("lives_on", [False, True], ids=["ends", "lives on"])
def test_a_rank_that_fails_leaves_no_other_waiting(rng, tmp_path, lives_on):
    """It is told what is wrong. The others, which wait for its mass: at once where it ends, else at the time limit."""
    limit = timedelta(seconds=2) if lives_on else timedelta(minutes=10)
    until = tmp_path / "told" if lives_on else None
    (waited, seconds), (wrong, _) = launch(refused, tmp_path, pyramid(rng).map(torch.clone), limit, until)
    assert "student_feats[0]" in wrong
    assert "FeatureAdapter" in wrong
    if lives_on:
        assert "Timed out" in waited
        assert seconds >= limit.total_seconds()
    else:
        assert "peer" in waited
        assert seconds < 60
