"""One call of `imitate` over a table of entries: any loss, weight, temperature, level and dtype beside any other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from cases import OPERATORS, each_backend, same_bits
from columns import Entry, Results, Term, arguments, assert_right, columns, imitate
from torch import Tensor
from truth import lay_out

from frs_kernels.levels import level_slices
from frs_kernels.losses import group_size
from frs_kernels.ops import VERBS

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LOSSES = ("mse", "l1", "smooth_l1", "bce", "kl", "qfl", "qfl_detached", "softmax_kl")
PLACES = ((2, 3, 5), (2, 1, 1), (1, 4, 4))  # (N, H, W) of a level


class Maker:
    """Entries of random numbers, and the scores of their levels."""

    def __init__(self, rng: torch.Generator, device: str, places: Any = PLACES, score_dtype: torch.dtype = f32) -> None:
        self.rng, self.device, self.places = rng, device, places
        count = sum(n * h * w for n, h, w in places)
        self.scores = torch.rand(count, generator=rng).to(device, score_dtype)
        self.norm = (1 + 3 * torch.rand(len(places), generator=rng)).to(device, score_dtype)

    def entry(
        self,
        level: int,
        term: int = 0,
        channels: int = 5,
        dtypes: tuple[torch.dtype, torch.dtype] = (f32, f32),
        layouts: tuple[str, str] = ("contiguous", "contiguous"),
        **options: float,
    ) -> Entry:
        n, h, w = self.places[level]
        x, z = (
            lay_out((2 * torch.randn(n, channels, h, w, generator=self.rng)).to(self.device, dtype), layout)
            for dtype, layout in zip(dtypes, layouts, strict=True)
        )
        return Entry(x, z, level, term, **options)

    def call(self, entries: list[Entry], terms: list[Term], want_loss: bool = True) -> tuple[Any, ...]:
        return entries, terms, self.scores, self.norm, want_loss

    def check(self, backend: str, entries: list[Entry], terms: list[Term], want_loss: bool = True) -> Results:
        call = self.call(entries, terms, want_loss)
        got = imitate(backend, *call)
        assert_right(got, *call)
        return got


def number(value: float, device: str, dtype: torch.dtype = f32) -> Tensor:
    return torch.tensor(value, device=device, dtype=dtype)


def different_terms(device: str) -> list[Term]:
    return [
        Term("bce", 0.5, number(2.0, device), temperature=2.0),
        Term("mse", -1.5, want_grad=False),
        Term("smooth_l1", 0.25, number(-3.0, device, bf16), beta=0.5),
        Term("kl", 2.0, temperature=0.5),
        Term("l1", 3.0, number(0.5, device, f64), want_grad=False),
        Term("smooth_l1", 1.0, beta=4.0, temperature=7.0),
        Term("qfl", 1.5, temperature=2.0, beta=1.25),
        Term("qfl_detached", 0.5, number(2.0, device), beta=2.0),
        Term("softmax_kl", 0.5, number(2.0, device), temperature=3.0, beta=0.0),
    ]


@each_backend
@pytest.mark.parametrize("want_loss", [True, False])
def test_losses_weights_factors_and_wishes_differ_from_term_to_term(rng, backend, device, want_loss):
    make, terms = Maker(rng, device), different_terms(device)
    entries = [make.entry(level, t, channels=3 + t) for t in range(len(terms)) for level in range(len(PLACES))]
    together = make.check(backend, entries, terms, want_loss)
    kept = iter(together.grads)
    for e, entry in enumerate(entries):
        mine = [Entry(entry.x, entry.z, 0, 0)]
        places = torch.tensor([0, *(n * h * w for n, h, w in PLACES)]).cumsum(0).tolist()
        scores = make.scores[places[entry.level] : places[entry.level + 1]]
        alone = imitate(backend, mine, [terms[entry.term]], scores, make.norm[entry.level : entry.level + 1])
        if want_loss:
            assert abs(together.values[len(terms) + e] - alone.values[1]) <= 1e-6 * alone.values[1].abs() + 1e-9
        eps = torch.finfo(f32).eps
        for grad in alone.grads:  # softmax_kl's is a difference, which one kernel rounds once and another twice
            least = eps * grad.abs().max() if terms[entry.term].loss == "softmax_kl" else 0
            assert torch.allclose(next(kept), grad, rtol=4 * eps, atol=float(least))
    assert next(kept, None) is None


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_values_are_the_terms_then_the_entries(rng, backend, device, loss, layout):
    make = Maker(rng, device)
    entries = [make.entry(level, t, 4, layouts=(layout, layout)) for level in (2, 0, 1) for t in (1, 0)]
    terms = [Term(loss, 0.5, beta=2.0), Term("mse", 2.0)]
    got = make.check(backend, entries, terms)
    of_terms, of_entries = got.values[:2], got.values[2:]
    for t in range(2):
        parts = [v for v, e in zip(of_entries, entries, strict=True) if e.term == t]
        assert torch.allclose(torch.stack(parts).sum(), of_terms[t], rtol=1e-6, atol=1e-9)
    assert torch.allclose(0.5 * of_terms[0] + 2 * of_terms[1], got.total, rtol=1e-6, atol=0)


@each_backend
def test_scale_and_eps_belong_to_an_entry(rng, backend, device):
    """level_weights, mass_channels and eps reach a backend so."""
    make = Maker(rng, device)
    make.norm[1] = 0
    numbers = [(1.0, 0.0), (0.25, 0.0), (3.0, 0.5), (0.0, 0.0), (1 / 3, 1e-9), (2.0, 1e6)]
    entries = [
        make.entry(level, t, 4, scale=scale, eps=eps)
        for t, level in ((0, 0), (0, 1), (1, 2), (1, 1), (0, 2))
        for scale, eps in numbers
    ]
    terms = [Term("mse"), Term("bce", 2.0)]
    got = make.check(backend, entries, terms)
    for e, entry in enumerate(entries):
        if entry.scale == 0 or (entry.level == 1 and entry.eps == 0):
            assert got.values[2 + e] == 0
            assert not got.grads[e].any()


@each_backend
def test_a_sum_of_norm_and_eps_that_is_zero_gives_nothing(rng, backend, device):
    make = Maker(rng, device)
    make.norm[0] = -0.5
    got = make.check(backend, [make.entry(0, eps=0.5), make.entry(1), make.entry(2)], [Term()])
    assert got.values[1] == 0
    assert not got.grads[0].any()


@each_backend
@pytest.mark.parametrize("count", [17, 40])
def test_more_entries_than_a_launch_takes(rng, backend, device, count):
    make = Maker(rng, device)
    source = random.Random(rng.initial_seed())
    pairs = [(0, 0), (1, 1), (2, 2), *((source.randrange(3), source.randrange(3)) for _ in range(count - 3))]
    terms = [Term("mse", 0.5), Term("bce", 0.25), Term("l1", 3.0)]
    make.check(backend, [make.entry(level, term, source.randrange(1, 9)) for level, term in pairs], terms)


@each_backend
def test_more_terms_than_a_launch_takes(rng, backend, device):
    make = Maker(rng, device)
    terms = [Term(LOSSES[t % 8], 1.0 + t, want_grad=t % 3 > 0) for t in range(11)]
    make.check(backend, [make.entry(t % 3, t, 1 + t % 4) for t in range(11)], terms)


@each_backend
def test_levels_come_in_any_order_and_many_times(rng, backend, device):
    places = tuple((1 + i % 2, 1 + i, 7 - i) for i in range(6))
    make = Maker(rng, device, places)
    order = [5, 0, 3, 3, 1, 4, 2, 0, 5]
    make.check(backend, [make.entry(level, i % 2) for i, level in enumerate(order)], [Term(), Term("kl")])


@each_backend
def test_entries_of_one_level_may_differ_in_channels_and_strides(rng, backend, device):
    make = Maker(rng, device)
    layouts = ("contiguous", "channels_last", "transposed", "sliced", "misaligned")
    entries = [
        make.entry(level, t, 1 + 8 * i, layouts=(layouts[i], layouts[(i + level) % 5]))
        for i in range(5)
        for level in range(3)
        for t in range(2)
    ]
    make.check(backend, entries, [Term("smooth_l1", beta=0.75), Term("bce")])


@each_backend
@pytest.mark.parametrize("want_loss", [True, False])
def test_dtypes_may_differ_from_entry_to_entry(rng, backend, device, want_loss):
    """Features in fp32 beside logits in bf16 are what autocast makes."""
    make = Maker(rng, device)
    pairs = [((bf16, bf16), 0), ((f32, f32), 1), ((f32, bf16), 1), ((f16, f32), 0), ((f16, f16), 1)]
    entries = [make.entry(level, term, 6, dtypes) for dtypes, term in pairs for level in range(3)]
    make.check(backend, entries, [Term("bce", 0.3), Term("mse", 0.1)], want_loss)


@each_backend
@pytest.mark.parametrize("dtypes", [(f64, f64), (f32, f64), (bf16, f64)], ids=str)
def test_one_entry_in_fp64_has_all_computed_in_it(rng, backend, device, dtypes):
    make = Maker(rng, device, score_dtype=f64)
    entries = [make.entry(level, 0, 4, dtypes if level == 1 else (f32, bf16)) for level in range(3)]
    got = make.check(backend, entries, [Term("smooth_l1", beta=0.5)])
    assert got.total.dtype == f64


@each_backend
def test_empty_levels_lie_among_the_others(rng, backend, device):
    make = Maker(rng, device, ((2, 0, 4), (1, 2, 3), (0, 5, 5), (2, 2, 2)))
    entries = [make.entry(level, t) for t in range(2) for level in (3, 2, 0, 1)]
    got = make.check(backend, entries, [Term(), Term("bce")])
    assert not got.values[2:].view(2, 4)[:, 1:3].any()


@each_backend
def test_every_run_gives_the_same_bits(rng, backend, device):
    make, terms = Maker(rng, device), different_terms(device)
    call = make.call([make.entry(i % 3, i % len(terms), 1 + i % 7) for i in range(27)], terms)
    first, second = (imitate(backend, *call) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip([*first[:2], *first[2]], [*second[:2], *second[2]], strict=True))


@each_backend
@pytest.mark.parametrize("dtype", [f32, bf16, f64], ids=str)
def test_distill_is_score_then_imitate(rng, backend, device, dtype):
    make, terms = Maker(rng, device), different_terms(device)
    logits = [make.entry(level, 0, 7, (dtype, dtype)).z for level in range(3)]
    entries = [make.entry(level, t, 4, (dtype, dtype)) for t in range(len(terms)) for level in (2, 0, 1)]
    entries += [Entry(z.flip(1), z, level, 0) for level, z in enumerate(logits)]
    table = columns(entries, terms)
    student, teacher = [e.x for e in entries], [e.z for e in entries]
    scores, mass, *found = VERBS[backend].distill(student, teacher, logits, *table)
    expected = VERBS[backend].score(logits)
    assert same_bits(scores, expected[0])
    assert same_bits(mass, expected[1])
    total, values, grads = VERBS[backend].imitate(student, teacher, *expected, *table)
    for a, b in zip([*found[:2], *found[2]], [total, values, *grads], strict=True):
        assert same_bits(a, b)
    assert_right(Results(*found), entries, terms, scores, mass)


@pytest.mark.parametrize("namespace", OPERATORS)
@pytest.mark.parametrize(
    ("places", "levels", "message"),
    [((0, 0, 0), (0, 2, 0), "gap|positions"), ((0, 0, 1), (0, 1, 0), "N, H or W|positions")],
    ids=["a gap", "another size"],
)
def test_levels_that_do_not_add_up_are_refused(rng, namespace, places, levels, message):
    make = Maker(rng, "cpu", ((1, 2, 3), (1, 1, 6)))
    entries = [Entry(make.entry(p).x, make.entry(p).z, level) for p, level in zip(places, levels, strict=True)]
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops, namespace).imitate(*arguments(entries, [Term()], make.scores, make.norm))


@each_backend
@pytest.mark.parametrize("verb", ["imitate", "distill"])
def test_empty_columns_are_the_usual_ones(rng, backend, device, verb):
    """Every term's levels in turn, a scale of 1, an eps of 0; without logits, the first term's teachers are scored."""
    maker = Maker(rng, device)
    levels = range(len(PLACES))
    entries = [maker.entry(level, term) for term in range(2) for level in levels]
    terms = [Term("bce", 0.5), Term("mse", 2.0)]
    full = arguments(entries, terms, maker.scores, maker.norm)
    if verb == "distill":
        full[2:4] = [[e.z for e in entries[: len(PLACES)]]]
    first = len(full) - len(columns(entries, terms))
    short = [*full[:first], (), (), (), (), *full[first + 4 :]]
    if verb == "distill":
        short[2] = []
    right, got = (flat(getattr(VERBS[backend], verb)(*call)) for call in (full, short))
    assert all(map(same_bits, got, right))
    for column in range(first, first + 4):
        other = list(short)
        other[column] = full[column]
        if column >= first + 2:
            assert all(map(same_bits, flat(getattr(VERBS[backend], verb)(*other)), right))


def flat(results: Any) -> list[Tensor]:
    return [t for each in results for t in (each if isinstance(each, (list, tuple)) else [each])]


@each_backend
def test_empty_columns_that_do_not_fit(rng, backend, device):
    maker = Maker(rng, device)
    entries = [maker.entry(level) for level in range(3)]
    call = arguments(entries, [Term("mse"), Term("l1")], maker.scores, maker.norm)
    call[4:6] = [], []
    with pytest.raises(RuntimeError, match="without level and term, 3 entries must be the same levels for 2 terms"):
        VERBS[backend].imitate(*call)
    z = [e.z for e in entries]
    with pytest.raises(RuntimeError, match="logits is empty"):
        VERBS[backend].distill(z, z, [], *columns(entries, [Term("mse")]))


@pytest.mark.parametrize(
    ("level", "total", "words"),
    [
        ([0, 0], 6, "the entries of level 0 have 6 and 4 positions"),
        ([0, 2], 10, "level 1 has no entry"),
        ([0, 1], 11, "the levels have 10 positions, scores hold 11"),
    ],
)
def test_the_definition_knows_where_scores_lie(level, total, words):
    entries = [torch.zeros(1, 5, 2, 3), torch.zeros(2, 5, 1, 2)]
    assert level_slices(entries, [0, 1], 10) == [slice(0, 6), slice(6, 10)]
    with pytest.raises(RuntimeError, match=words):
        level_slices(entries, level, total)


@pytest.mark.parametrize(("beta", "channels"), [(-1.0, 6), (0.5, 6), (4.0, 6), (0.0, 0), (7.0, 6)])
def test_the_size_of_a_group(beta, channels):
    assert (group_size(0.0, 6), group_size(3.0, 6), group_size(6.0, 6)) == (6, 3, 6)
    with pytest.raises(RuntimeError, match=f"divides {channels}, or 0 for all"):
        group_size(beta, channels)
