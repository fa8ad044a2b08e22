"""`GradientShare`: what it measures against two backward passes apart, and that it holds what it is told to."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_detectors import Detector, distiller, images

from frs_kernels.distill import Distiller, GradientShare, Mean


def norms(gradients: Any) -> Tensor:
    return torch.stack([g.norm() for g in gradients])


def losses_at(x: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Two losses that pull in directions of their own."""
    own = sum(v.sin().sum() for v in x)
    term = sum((k + 1) * v.square().sum() for k, v in enumerate(x))
    assert isinstance(own, Tensor)
    assert isinstance(term, Tensor)
    return own, term


def leaves(rng: torch.Generator) -> list[Tensor]:
    return [torch.randn(2, 3, n, n, generator=rng).requires_grad_() for n in (4, 2)]


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_the_norms_and_the_weight_are_those_of_two_passes(rng, scale):
    x = leaves(rng)
    share = GradientShare(0.3, weight=0.5)
    own, term = (norms(torch.autograd.grad(loss, x)) for loss in losses_at(x))
    (scale * (losses_at(x)[0] + 0.25 * share.weight * losses_at(share.watch(x))[1])).backward()
    share.update(ramp=0.25)
    assert torch.allclose(share.own, scale * own)
    assert torch.allclose(share.term, scale * 0.25 * 0.5 * term)
    assert torch.allclose(share.weight, 0.3 * own.norm() / term.norm())


def test_values_and_gradients_stay(rng):
    x = leaves(rng)
    own, term = losses_at(x)
    right = torch.autograd.grad(own + term, x)
    share = GradientShare()
    watched = share.watch(x)
    assert all(torch.equal(a, b) for a, b in zip(watched, x, strict=True))
    (losses_at(x)[0] + losses_at(watched)[1]).backward()
    assert all(torch.equal(v.grad, g) for v, g in zip(x, right, strict=True))
    share.update()
    assert share.weight == 1, "without a target the weight stays"


def test_the_mean_is_plain_at_first_then_exponential(rng):
    share = GradientShare(1.0, momentum=0.75)
    ratios = [2.0, 8.0, 1.0, 4.0, 0.5, 16.0]
    logs, expected = torch.tensor(ratios).log(), torch.zeros(())
    for i, ratio in enumerate(ratios):
        x = torch.ones(3, requires_grad=True)
        (ratio * x.sum() + share.weight * share.watch([x])[0].sum()).backward()
        share.update()
        keep = min(i / (i + 1), 0.75)
        expected = keep * expected + (1 - keep) * logs[i]
        assert torch.allclose(share.weight.log(), expected, atol=1e-6)


def test_fp64_and_16_bits(rng):
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.randn(4, generator=rng).to(dtype).requires_grad_()
        share = GradientShare(0.3)
        (x.sum() + share.weight.to(dtype) * share.watch([x])[0].sum()).backward()
        share.update()
        assert torch.allclose(share.weight, torch.tensor(0.3), rtol=1e-2)


@pytest.mark.parametrize("spoil", ["no term", "no rest", "overflow", "nan"])
def test_a_pass_that_says_nothing_changes_nothing(spoil):
    share = GradientShare(0.3, weight=0.5)
    x = torch.ones(3, requires_grad=True)
    own, term = x.sum(), share.watch([x])[0].sum()
    loss = {
        "no term": own,
        "no rest": term,
        "overflow": float("inf") * own + term,
        "nan": float("nan") * (own + term),
    }[spoil]
    loss.backward()
    share.update()
    assert share.weight == 0.5
    assert share.updates == 0


def test_passes_of_one_step_add_up(rng):
    """Gradient accumulation, and losses that are differentiated one after another."""
    share, parts = GradientShare(0.3), []
    for _ in range(2):
        x = leaves(rng)
        parts.append([norms(torch.autograd.grad(loss, x)) for loss in losses_at(x)])
        own, term = losses_at(x)[0], losses_at(share.watch(x))[1]
        own.backward(retain_graph=True)
        term.backward()
    share.update()
    own, term = (torch.cat(each).norm() for each in zip(*parts, strict=True))
    assert torch.allclose(share.weight, 0.3 * own / term)


def test_nothing_is_watched_without_a_gradient(rng):
    share = GradientShare(0.3)
    x = torch.randn(3, generator=rng)
    assert share.watch([x])[0] is x
    with torch.no_grad():
        y = x.clone().requires_grad_()
        assert share.watch([y])[0] is y
    share.update()
    assert share.own is None


def test_it_is_saved_copied_and_stays_fp32():
    share = GradientShare(0.3, weight=0.007)
    other = GradientShare(0.3)
    other.load_state_dict(share.state_dict())
    assert other.weight == share.weight
    small = GradientShare(0.3, weight=1e-9).half().to_empty(device="cpu")
    assert small.weight.dtype == torch.float32
    assert small.weight == GradientShare(0.3, weight=1e-9).weight
    assert small.updates == 0
    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(share.watch([x])[0].sum(), x, create_graph=True)
    assert copy.deepcopy(share).weight == share.weight
    assert pickle.loads(pickle.dumps(share)).weight == share.weight


@pytest.mark.parametrize("arguments", [(0.0,), (-1.0,), (float("nan"),), (0.3, 0.0)])
def test_what_is_no_share(arguments):
    with pytest.raises(ValueError, match="must be positive and finite"):
        GradientShare(*arguments)


class Summed(Detector):
    """A detector whose own loss reaches features and logits alike."""

    def forward(self, x: Tensor, targets: Any = None) -> Any:
        self.levels = self.neck(x)
        logits = self.head(self.levels)
        levels = [logits] if isinstance(logits, Tensor) else logits
        return {"loss_cls": torch.stack([z.square().sum() for z in levels]).sum()} if self.training else logits


class Branches(Summed):
    """With a second class branch beside the first."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__(channels)
        self.other = nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor, targets: Any = None) -> Any:
        returned = super().forward(x)
        more = [self.other(level) for level in self.levels]
        if not self.training:
            return returned
        return {"loss_cls": returned["loss_cls"] + torch.stack([z.square().sum() for z in more]).sum()}


KINDS: dict[str, dict[str, Any]] = {
    "a call a level": {"feats": "neck", "logits": "head.cls"},
    "packed rows": {"feats": "neck", "logits": "head", "of": {"head": "rows"}},
    "packed columns": {"feats": "neck", "logits": "head", "of": {"head": "columns"}},
    "branches": {"feats": "neck", "logits": Mean("head.cls", "other")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_distiller_holds_both_terms(kind):
    options = dict(KINDS[kind])
    of = options.pop("of", {})
    torch.manual_seed(7)
    models = (Branches(), Branches(9)) if kind == "branches" else (Summed(**of), Detector(channels=9, **of))
    d = distiller(*models, gradient_share=(0.2, 0.5), **options)
    for _ in range(60):  # the features' rest has the logits' term in it, whose weight moves
        sum(d(images()).values()).backward()
    d(images())
    for name, target in (("feat", 0.2), ("cls", 0.5)):
        share = d.shares[name]
        assert torch.allclose(share.term.norm() / share.own.norm(), torch.tensor(target), rtol=0.01)
        assert share.updates == 60
        logged = d.logged()
        assert logged[f"frs_weight_{name}"] == share.weight
        assert torch.equal(share.levels, share.term / share.own)
        if len(share.levels) == 3:
            assert [logged[f"frs_share_{name}_{level}"] for level in range(3)] == share.levels.tolist()
    assert {"shares.feat.weight", "shares.cls.weight"} <= set(d.state_dict())


def test_a_share_begins_at_the_weights_and_keeps_the_losses_in_their_terms():
    d = distiller(Summed(), preset="gfl", gradient_share=0.1)
    losses = d(images())
    assert torch.allclose(losses["loss_frs_feat"], 0.1 * d.terms.feat)
    assert torch.allclose(losses["loss_frs_cls"], 0.05 * d.terms.cls)
    sum(losses.values()).backward()
    losses = d(images())
    assert torch.allclose(losses["loss_frs_feat"], d.shares["feat"].weight * d.terms.feat)
    assert set(distiller(Summed(), gradient_share=0.1, cls_weight=0).shares) == {"feat"}


def test_a_share_during_the_warmup_is_the_ramps():
    d = distiller(Summed(), gradient_share=0.2, warmup=8, cls_weight=0)
    for i in range(6):
        sum(d(images()).values()).backward()
        if i > 1:
            share = d.shares["feat"]
            share.update(d.last_ramp)
            assert torch.allclose(share.term.norm() / share.own.norm(), torch.tensor(0.2 * i / 8), rtol=1e-3)


def test_nothing_waits_for_the_device(monkeypatch):
    d = distiller(Summed(), gradient_share=0.2)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the host waited")

    sum(d(images()).values()).backward()
    for name in ("item", "__bool__", "__float__", "tolist"):
        monkeypatch.setattr(Tensor, name, refuse)
    losses = d(images())
    torch.stack(list(losses.values())).sum().backward()


def test_two_students_of_one_model_do_not_meet():
    d = distiller(Summed(), gradient_share=0.2)
    other = copy.deepcopy(d)
    sum(d(images()).values()).backward()
    d(images())
    assert isinstance(other, Distiller)
    assert isinstance(other.shares, nn.ModuleDict)
    assert other.shares["feat"].updates == 0
