"""The operators as torch.library sees them, and what they do to memory: nothing outside, nothing unwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    BAND,
    OPERATORS,
    assert_right,
    compiled_backends,
    each_backend,
    guarded_outputs,
    run,
    same_bits,
    ulp,
    unharmed,
)
from columns import Entry, Term, columns
from torch import Tensor
from truth import LAYOUTS, SMALL, Pyramid, lay_out, pyramid, truth

from frs_kernels import fsr_loss
from frs_kernels.ops import VERBS

TINY = ((1, 2, 3), (1, 1, 1))


def detached(levels: list[Tensor]) -> list[Tensor]:
    return [v.detach() for v in levels]


def both_terms(p: Pyramid) -> tuple[list[Tensor], list[Tensor]]:
    """Student and teacher of a term of logits and one of features."""
    return detached([*p.x, *p.s]), [*p.z, *p.t]


def table(want_loss: bool, want_grad: tuple[bool, bool]) -> list[Any]:
    """The columns for them."""
    factor = None if want_loss else torch.tensor(3.0)
    terms = [Term("bce", 0.5, factor, 2.0, want_grad=want_grad[0]), Term("smooth_l1", beta=0.3, want_grad=want_grad[1])]
    nothing = torch.zeros(())
    entries = [Entry(nothing, nothing, level, term, 0.5, 0.1) for term in range(2) for level in range(len(TINY))]
    return columns(entries, terms, want_loss)


WANTED = [(True, (True, True)), (True, (False, False)), (False, (True, True)), (True, (False, True))]


@pytest.mark.parametrize("namespace", OPERATORS)
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, (torch.float32, torch.float64)], ids=str)
class TestOpcheck:
    def test_score(self, rng, namespace, layout, dtype):
        p = pyramid(rng, sizes=TINY, dtype=dtype, layout=layout)
        torch.library.opcheck(getattr(torch.ops, namespace).score.default, (p.z,))

    @pytest.mark.parametrize(("want_loss", "want_grad"), WANTED)
    def test_imitate(self, rng, namespace, layout, dtype, want_loss, want_grad):
        p = pyramid(rng, sizes=TINY, dtype=dtype, layout=layout)
        args = (*both_terms(p), *VERBS["torch"].score(p.z), *table(want_loss, want_grad))
        torch.library.opcheck(getattr(torch.ops, namespace).imitate.default, args)

    @pytest.mark.parametrize(("want_loss", "want_grad"), WANTED)
    def test_distill(self, rng, namespace, layout, dtype, want_loss, want_grad):
        p = pyramid(rng, sizes=TINY, dtype=dtype, layout=layout)
        args = (*both_terms(p), p.z, *table(want_loss, want_grad))
        torch.library.opcheck(getattr(torch.ops, namespace).distill.default, args)

    def test_scale(self, rng, namespace, layout, dtype):
        p = pyramid(rng, sizes=TINY, dtype=dtype, layout=layout)
        torch.library.opcheck(getattr(torch.ops, namespace).scale_.default, (detached(p.s), torch.tensor(3.0)))


@each_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_run_gives_the_same_bits(rng, backend, device, layout):
    p = pyramid(rng, layout=layout, device=device)
    first = run(p, backend)
    for _ in range(3):
        again = run(p, backend)
        assert all(same_bits(a, b) for a, b in zip(first.grads, again.grads, strict=True))
        assert all(same_bits(getattr(first, n), getattr(again, n)) for n in ("loss", "feat", "cls", "mass"))
        assert all(same_bits(a, b) for a, b in zip(first.mask, again.mask, strict=True))


@each_backend
@pytest.mark.parametrize("grad_mode", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_inputs_are_never_written(rng, backend, device, grad_mode, layout):
    p = pyramid(rng, sizes=TINY, layout=layout, device=device)
    weight = torch.tensor(0.5, device=device)
    mask = [torch.rand(s[:, 0].shape, generator=rng).to(device) for s in p.s]
    with unharmed(*p.student, *p.t, *p.z, *mask, weight):
        for given in (None, mask):
            loss = fsr_loss(*p.inputs, feat_weight=weight, mask=given, grad_mode=grad_mode, backend=backend)
            (3 * loss).backward()


@each_backend
@pytest.mark.parametrize("grad_mode", ["forward", "backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_that_is_handed_out_has_been_written(rng, poison, backend, device, grad_mode, layout):
    p = pyramid(rng, sizes=TINY, layout=layout, device=device)
    assert_right(p, backend, grad_mode=grad_mode)


@each_backend
def test_empty_levels_among_others_are_written_too(rng, poison, backend, device):
    assert_right(pyramid(rng, sizes=((1, 0, 4), (1, 2, 2), (1, 3, 0)), device=device), backend)
    assert_right(pyramid(rng, sizes=((0, 2, 2), (0, 1, 1)), device=device), backend)


# channels 5 and 17 leave part of every tile over, 1x1 nearly all of it
@compiled_backends
@pytest.mark.parametrize("channels", [1, 5, 17])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "misaligned"])
def test_nothing_outside_is_read_or_written(rng, backend, device, channels, layout):
    """Inputs lie in NaN and outputs in sentinels; one read or write outside shows."""
    p = pyramid(rng, sizes=((1, 3, 5), (1, 1, 1)), channels=channels, classes=channels, device=device)
    p = p.map(lambda v: lay_out(surrounded(v), layout) if layout != "channels_last" else surrounded(lay_out(v, layout)))
    with guarded_outputs() as guards:
        assert_right(p, backend, grad_mode="forward")
        assert_right(p, backend, grad_mode="backward")
    guards.assert_unharmed()
    assert guards.buffers


def surrounded(v: Tensor) -> Tensor:
    """The same values and strides at an odd offset of a buffer of NaN."""
    buffer = v.new_full((v.numel() + 2 * BAND + 1,), float("nan"))
    return buffer.as_strided(v.shape, v.stride(), BAND + 1).copy_(v)


@compiled_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_scale_writes_inside_only(rng, backend, device, layout):
    grads = [lay_out(torch.randn(2, 5, 7, 3, generator=rng).to(device), layout) for _ in range(2)]
    inside = [surrounded(g) for g in grads]
    VERBS[backend].scale_(inside, torch.tensor(-3.0, device=device))
    for before, after in zip(grads, inside, strict=True):
        assert torch.equal(after, -3 * before)
        buffer = after.as_strided((after.numel() + 2 * BAND + 1,), (1,), 0)
        assert buffer.isnan().sum() == 2 * BAND + 1


SCALABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda v: v,
    "transposed": lambda v: v.transpose(1, 3),
    "with gaps": lambda v: torch.stack([v, v], -1)[..., 1],
    "empty": lambda v: v[:0],
}


@each_backend
@pytest.mark.parametrize("kind", SCALABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_scale_multiplies_any_gradient_in_place(rng, backend, device, kind, dtype):
    # 65,536: what a thread of the CPU takes at a time; 4,099: over two blocks of a GPU and a tail of 3
    grads = [SCALABLE[kind](torch.randn(1, 65_536 + 4_099, 1, 1, generator=rng).to(device, dtype)) for _ in range(2)]
    expected = [(g.double() * 0.3).to(dtype) for g in grads]
    VERBS[backend].scale_(grads, torch.tensor(0.3, dtype=torch.float64, device=device))
    for grad, right in zip(grads, expected, strict=True):
        # fp32 arithmetic, or fp64 for fp64: one rounding of the factor, one of the product; fp16's may be subnormal
        assert ((grad.double() - right.double()).abs() <= 2 * ulp(right.double(), dtype)).all()


@compiled_backends
def test_scale_by_one_writes_nothing(backend, device):
    """Not even the same number: a multiplication would quieten a signalling NaN."""
    signalling = torch.full((4096,), 0x7F800001, dtype=torch.int32, device=device).view(torch.float32)
    before = signalling.clone()
    VERBS[backend].scale_([signalling.view(1, 1, 64, 64)], torch.ones((), device=device))
    assert same_bits(signalling, before)
    VERBS[backend].scale_([signalling.view(1, 1, 64, 64)], torch.tensor(2.0, device=device))
    assert not same_bits(signalling, before)


@compiled_backends
def test_pyramids_of_any_size_in_any_order(rng, backend, device):
    big = ((2, 40, 30), (2, 9, 9))
    for sizes in (big, TINY, SMALL, TINY, big):
        p = pyramid(rng, sizes=sizes, channels=2, classes=2, device=device)
        with torch.no_grad():
            loss = fsr_loss(*p.inputs, backend=backend)
        assert abs(loss.double().cpu() - truth(p.map(torch.Tensor.cpu)).loss) <= 1e-6 * loss


def test_every_program_of_a_launch_counts_once(rng, monkeypatch):
    from frs_kernels.triton import imitate, score, slots

    device = "cuda" if torch.cuda.is_available() else "cpu"
    counters: list[tuple[Tensor, Tensor]] = []
    workspace = slots.workspace

    def keep(*args: Any) -> tuple[Tensor, Tensor]:
        made = workspace(*args)
        assert made[1].item() == 0
        counters.append(made)
        return made

    for module in (score, imitate):
        monkeypatch.setattr(module, "workspace", keep)
    fsr_loss(*pyramid(rng, device=device).inputs, backend="triton").backward()
    assert len(counters) == 2  # score and imitate
    assert all(counter.item() == slots.numel() for slots, counter in counters)


def test_more_slots_than_one_block_of_the_sum(rng):
    """A level of more than 512 programs: their partial sums take a second step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    z = [torch.randn(514, 1, 1, 1, generator=rng).to(device), torch.randn(2, 1, 1, 1, generator=rng).to(device)]
    scores, mass = VERBS["triton"].score(z)
    expected = [torch.sigmoid(v.double()).sum() for v in z]
    assert torch.allclose(mass.double(), torch.stack(expected), rtol=1e-6, atol=0)
    assert scores.numel() == 516


REFUSED: dict[str, tuple[Callable[..., tuple[Any, ...]], str]] = {
    "shapes": (lambda p, scores, mass: (p.x, p.z[:1], scores, mass), "same shape"),
    "channels": (lambda p, scores, mass: (p.x, [v[:, 1:] for v in p.z], scores, mass), "same shape"),
    "scores": (lambda p, scores, mass: (p.x, p.z, scores[1:], mass), "scores must hold one number a position"),
    "norm": (lambda p, scores, mass: (p.x, p.z, scores, mass[1:]), "norm one a level"),
    "empty": (lambda p, scores, mass: ([], [], scores, mass), "one a level|at least one entry"),
    "3-dim": (lambda p, scores, mass: ([v[0] for v in p.x], p.z, scores, mass), r"\(N, C, H, W\)"),
}


@pytest.mark.parametrize("namespace", OPERATORS)
@pytest.mark.parametrize("change", REFUSED)
def test_an_operator_called_alone_refuses_what_would_read_outside(rng, namespace, change):
    p: Pyramid = pyramid(rng, sizes=TINY)
    make, message = REFUSED[change]
    args = make(p.map(torch.clone), *VERBS["torch"].score(p.z))
    entries = [Entry(p.x[level], p.z[level], level) for level in range(len(TINY))]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops, namespace).imitate(*args, *columns(entries, [Term("bce")]))


# what is refused of the table's columns, by name: the place in the schema and a value
COLUMNS = ("level", "term", "scale", "eps", "loss", "weight", "factor", "temperature", "beta", "want_grad")
WRONG: dict[str, tuple[str, Any]] = {
    "a level that is not there": ("level", [0, 5]),
    "a negative level": ("level", [-1, 0]),
    "a level without an entry": ("level", [0, 0]),
    "a term that is not there": ("term", [0, 1]),
    "a negative term": ("term", [0, -1]),
    **{f"a {name} too few": (name, [0.0]) for name in ("scale", "eps")},
    **{f"a {name} too few": (name, [0]) for name in ("level", "term")},
    **{f"a {name} too many": (name, [1.0, 1.0]) for name in ("weight", "temperature", "beta")},
    "a factor too many": ("factor", [None, None]),
    "a wish too few": ("want_grad", []),
    "a term without entries": ("loss", ["bce", "mse"]),
    "no loss": ("loss", []),
    "an unknown loss": ("loss", ["hinge"]),
    **{f"temperature {v}": ("temperature", [v]) for v in (0.0, -1.0, float("inf"), float("nan"))},
    **{f"beta {v}": ("beta", [v]) for v in (-1.0, float("inf"), float("nan"))},
    "a factor of a vector": ("factor", [torch.ones(1)]),
    "a factor of an integer": ("factor", [torch.tensor(1)]),
}


@pytest.mark.parametrize("namespace", OPERATORS)
@pytest.mark.parametrize("verb", ["imitate", "distill"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_table_that_does_not_fit_is_refused(rng, namespace, verb, wrong):
    p = pyramid(rng, sizes=TINY)
    x = detached(p.x)
    entries = [Entry(x[level], p.z[level], level) for level in range(len(TINY))]
    masks = list(VERBS["torch"].score(p.z)) if verb == "imitate" else [p.z]
    table = columns(entries, [Term("bce")])
    operator = getattr(getattr(torch.ops, namespace), verb)
    operator(x, p.z, *masks, *table)
    name, value = WRONG[wrong]
    table[COLUMNS.index(name)] = value
    if wrong == "a term without entries":
        for other in ("weight", "factor", "temperature", "beta", "want_grad"):
            table[COLUMNS.index(other)] *= 2
    with unharmed(*x, *p.z), pytest.raises(RuntimeError, match=f"({verb}|imitate): "):
        operator(x, p.z, *masks, *table)
