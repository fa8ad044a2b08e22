"""Random calls of the public functions: what a call is, how one is drawn, and what it must give.

A `Case` is a call in plain words, so that the one that hypothesis has shrunk can be pasted into a test. Another
function is one line of FUNCTIONS: its options and its check.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from cases import FLOATS, assert_right, relative
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase
from row_truth import Loss, cwd, cwd_swing, pkd, pkd_swing
from row_truth import assert_right as assert_rows
from torch import Tensor
from truth import LAYOUTS, QFL, Answer, Levels, Pyramid, lay_out

from frs_kernels import (
    FSRLoss,
    FSRTerms,
    cwd_loss,
    fsr_loss,
    localization_distillation,
    masked_imitation_loss,
    pkd_loss,
    quality_focal_distillation,
    richness_mask,
)
from frs_kernels.levels import accumulate_dtype

FEATURES = ("mse", "l1", "smooth_l1")
LOGITS = ("bce", "kl", "softmax_kl", *QFL)
FAR = 80.0  # the largest logit: beyond 87 a probability is no normal number of fp32's

# Where the numbers lie: a name of LAYOUTS; an axis along which a teacher is expanded; or the axes from the outermost to
# the innermost, the step along the last and how many numbers come before the first.
Layout = str | int | tuple[tuple[int, ...], int, int]


@dataclass(frozen=True, repr=False)
class Case:
    """Of what has a value for each level, the levels take the values in turn."""

    function: str
    seed: int = 0
    sizes: tuple[tuple[int, int, int], ...] = ((1, 1, 1),)  # (N, H, W)
    channels: tuple[int, ...] = (1,)
    classes: tuple[int, ...] = (1,)
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    teacher_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    layouts: tuple[Layout, ...] = ("contiguous",)
    teacher_layouts: tuple[Layout, ...] = ("contiguous",)
    spread: float = 3.0  # of the logits, around shift
    shift: float = -1.0
    agree: bool = False  # the teacher says what the student does
    parts: str = "both"  # or "features" or "logits": what `fsr_loss` is given of the student
    mask: str = "none"
    terms: bool = False
    upstream: tuple[float, float, float] = (1.0, 0.0, 0.0)  # gradients of the loss and, with terms, of feat and cls
    tensor_weights: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What differs from the defaults."""
        plain = Case(self.function)
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        return f"Case({', '.join(f'{k}={v!r}' for k, v in said.items() if k == 'function' or v != getattr(plain, k))})"

    def pyramid(self, device: str) -> Pyramid:
        rng = torch.Generator().manual_seed(self.seed)
        made = Pyramid([], [], [], [])
        for level, (n, h, w) in enumerate(self.sizes):

            def turn(values: Sequence[Any], level: int = level) -> Any:
                return values[level % len(values)]

            for student, teacher, count, spread, shift in (
                (made.s, made.t, turn(self.channels), 1.0, 0.1),
                (made.x, made.z, turn(self.classes), self.spread, self.shift),
            ):
                a, b = (torch.randn(2, n, count, h, w, generator=rng) * spread + shift).clamp_(-FAR, FAR).to(device)
                student.append(place(a.to(turn(self.dtypes)), turn(self.layouts)).requires_grad_())
                teacher.append(
                    place((a if self.agree else b).to(turn(self.teacher_dtypes)), turn(self.teacher_layouts))
                )
        return made

    def made_mask(self, p: Pyramid, backend: str) -> Any:
        """In one of the forms that a caller may have it in."""
        if self.mask == "none":
            return None
        if self.mask == "richness":
            return richness_mask(p.z, backend=backend)
        wide = torch.float64 if self.mask == "double" else torch.float32
        mask = [z.to(wide).square().mean(1) % 1 for z in p.z]
        if self.mask == "bool":
            return [m < 0.4 for m in mask]
        return [m.unsqueeze(1) for m in mask] if self.mask == "four axes" else mask


def place(v: Tensor, layout: Layout) -> Tensor:
    if isinstance(layout, str):
        return lay_out(v, layout)
    if isinstance(layout, int):
        return v.narrow(layout, 0, min(1, v.shape[layout])).expand(v.shape)
    axes, step, before = layout
    shape = [v.shape[axis] for axis in axes]
    memory = v.new_full((before + v.numel() * step,), float("nan"))
    there = memory[before:].view(*shape[:-1], shape[-1] * step)[..., ::step]
    return there.permute([axes.index(axis) for axis in range(4)]).copy_(v)


def check(case: Case, backend: str, device: str = "cpu") -> None:
    """The call of this case is right on this backend."""
    FUNCTIONS[case.function].check(case, case.pyramid(device), backend)


def check_fsr_loss(case: Case, p: Pyramid, backend: str) -> None:
    mask = case.made_mask(p, backend)
    p = {"both": p, "features": p.without("x"), "logits": p.without("s", "t")}[case.parts]
    options = with_tensors(case, p.z[0].device)
    kept = {"backend": backend, "return_terms": case.terms, **options}
    called = FSRLoss(**kept) if case.function == "FSRLoss" else lambda *v, mask: fsr_loss(*v, mask=mask, **kept)
    assert_answer(case, p, backend, lambda p: called(*p.inputs, mask=mask), mask=held(mask), **options)


def check_imitation(case: Case, p: Pyramid, backend: str) -> None:
    """A term of `fsr_loss` alone, under a mask."""
    mask = case.made_mask(p, backend)
    options = with_tensors(case, p.z[0].device)
    kept = {"backend": backend, "return_terms": case.terms, **options}
    weight, loss = options.pop("weight", 1.0), options.pop("loss", "mse")
    ones = [z.new_ones((z.shape[0], *z.shape[2:]), dtype=accumulate_dtype(*p.x, *p.z)) for z in p.z]
    scores = held(mask) or ones
    called = FUNCTIONS[case.function].call
    if case.function == "quality_focal_distillation":
        loss = QFL[options.pop("detach", False)]
    elif case.function == "localization_distillation":
        loss, group = "softmax_kl", p.z[0].shape[1] // options.pop("sides", 4)
        options = {"temperature": 10.0, "normalizer": "mass_channels", "group_size": group} | options
    part = "feat" if loss in FEATURES else "cls"
    student, teacher = (p.s, p.t) if part == "feat" else (p.x, p.z)
    p = p.without("x", "z") if part == "feat" else p.without("s", "t")
    options |= {f"{part}_loss": loss, f"{part}_weight": weight, "mask": scores}
    assert_answer(case, p, backend, lambda _: called(student, teacher, mask, **kept), part, **options)


def check_richness_mask(case: Case, p: Pyramid, backend: str) -> None:
    found = richness_mask(p.z, backend=backend)
    eps = torch.finfo(accumulate_dtype(*p.z)).eps
    for z, scores, mass in zip(p.z, found.scores, found.mass, strict=True):
        right = z.double().sigmoid().amax(1)
        assert scores.shape == right.shape
        assert relative(scores, right) <= 4 * eps
        assert relative(mass, right.sum()) <= (1e-13 if eps < 1e-10 else 1e-6)


def check_rows(case: Case, p: Pyramid, backend: str) -> None:
    """pkd of the features or cwd of the logits, against its published form."""
    name, options = case.function.removesuffix("_loss"), dict(case.options)
    student, teacher = (p.s, p.t) if name == "pkd" else (p.x, p.z)
    kept = [i for i, s in enumerate(student) if s.numel() > (s.shape[1] if name == "pkd" else 0)]
    if not kept:  # nothing to compare, whose published form is NaN
        assert FUNCTIONS[case.function].call(student, teacher, backend=backend, **options).item() == 0
        return
    published, ours, swing = (partial(f, **options) for f in ROWS[name])
    student, teacher = ([levels[i] for i in kept] for levels in (student, teacher))
    unit = options.get("temperature", 1.0) ** 2
    assert_rows(Loss(name, published, ours, swing, unit), student, teacher, backend, roundings=32)


ROWS = {"pkd": (pkd, pkd_loss, pkd_swing), "cwd": (cwd, cwd_loss, cwd_swing)}


class Function(NamedTuple):
    call: Callable[..., Any]
    options: Callable[[st.DrawFn, int], dict[str, Any]]  # for so many levels
    check: Callable[[Case, Pyramid, str], None]
    masks: tuple[str, ...] = ("none",)


def with_tensors(case: Case, device: torch.device) -> dict[str, Any]:
    """The options, the weights among them as tensors if the case says so."""
    return {
        name: torch.tensor(v, device=device) if case.tensor_weights and name.endswith("weight") else v
        for name, v in case.options.items()
    }


def held(mask: Any) -> Levels | None:
    """What such a mask holds, as floating-point (N, H, W)."""
    if mask is None:
        return None
    levels = [m.squeeze(1) if m.dim() == 4 else m for m in getattr(mask, "scores", mask)]
    return [m.float() if m.dtype == torch.bool else m for m in levels]


def assert_answer(
    case: Case, p: Pyramid, backend: str, call: Callable[[Pyramid], Any], part: str = "", **options: Any
) -> None:
    """What `call` returns and its gradients are those of `fsr_loss` with these options."""

    def answer(p: Pyramid, _: str, **__: Any) -> Answer:
        found = call(p)
        if isinstance(found, Tensor):
            parts = {"loss": found}
        elif isinstance(found, FSRTerms):
            parts = found._asdict()
        else:
            names = {"value": part, "per_level": f"{part}_per_level"}
            parts = {names.get(name, name): v for name, v in found._asdict().items()}
        pulled = {n: u for n, u in zip(("loss", "feat", "cls"), case.upstream, strict=True)
                  if n in parts and parts[n].requires_grad}  # fmt: skip
        outputs = [parts[name] for name in pulled]
        factors = [v.new_tensor(u) for v, u in zip(outputs, pulled.values(), strict=True)]
        grads = torch.autograd.grad(outputs, p.student, factors)
        plain = {name: v.detach() if isinstance(v, Tensor) else v for name, v in parts.items()}
        return Answer(**{**dict.fromkeys(f.name for f in fields(Answer)), **plain, "grads": list(grads)})

    pull = None
    if case.upstream != (1.0, 0.0, 0.0):
        of_loss, *of_parts = case.upstream
        weights = {name: float(options.get(name, 1.0)) for name in ("feat_weight", "cls_weight")}
        pull = {n: of_loss * w + (u if case.terms else 0.0)
                for (n, w), u in zip(weights.items(), of_parts, strict=True)}  # fmt: skip
    assert_right(p, backend, call=answer, pull=pull, **options)


# how a case is drawn


def common(draw: st.DrawFn, levels: int) -> dict[str, Any]:
    each = st.lists(st.sampled_from([1.0, 0.0, 0.5, 3.0]), min_size=levels, max_size=levels)
    return {
        "temperature": draw(st.sampled_from([1.0, 0.5, 3.0])),
        "normalizer": draw(st.sampled_from(["mass", "mass_channels", "total_mass", "none"])),
        "eps": draw(st.sampled_from([0.0, 1e-9, 2.0])),
        "level_weights": draw(st.none() | each),
        "grad_mode": draw(st.sampled_from(["auto", "forward", "backward"])),
    }


def said(call: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not the defaults, those of `fsr_loss` where `call` names none."""
    known = {name: p.default for f in (fsr_loss, call) for name, p in inspect.signature(f).parameters.items()}
    return {name: v for name, v in options.items() if v != known[name]}


def betas(*losses: str) -> st.SearchStrategy[float]:
    """Where qfl's exponent is less than 1 its slope grows without bound, and one of 100 leaves no digit of a power."""
    if "qfl" in losses:
        return st.sampled_from([1.0, 0.0, 1.5, 2.0, 3.0])
    return st.sampled_from([1.0, 0.0, 0.25, 1.5, 2.0] if "qfl_detached" in losses else [1.0, 0.0, 1e-6, 0.25, 100.0])


def of_fsr_loss(draw: st.DrawFn, levels: int) -> dict[str, Any]:
    feat, cls = draw(st.sampled_from(FEATURES)), draw(st.sampled_from(LOGITS))
    weights = {
        "feat_weight": draw(st.sampled_from([1.0, 0.0, 0.005])),
        "cls_weight": draw(st.sampled_from([1.0, 0.0, 0.05, 2.0])),
    }
    return {"feat_loss": feat, "cls_loss": cls, "beta": draw(betas(feat, cls)), **weights, **common(draw, levels)}


def of_imitation(draw: st.DrawFn, levels: int) -> dict[str, Any]:
    loss, weight = draw(st.sampled_from([*FEATURES, *LOGITS])), draw(st.sampled_from([1.0, 0.0, 0.05]))
    return {"loss": loss, "beta": draw(betas(loss)), "weight": weight, **common(draw, levels)}


def of_focal(draw: st.DrawFn, levels: int) -> dict[str, Any]:
    weight = draw(st.sampled_from([1.0, 0.0, 0.05]))
    return {"detach": draw(st.booleans()), "beta": draw(betas("qfl")), "weight": weight, **common(draw, levels)}


def of_localization(draw: st.DrawFn, levels: int) -> dict[str, Any]:
    sides, weight = draw(st.sampled_from([4, 1, 2, 3])), draw(st.sampled_from([1.0, 0.0, 0.05]))
    return {**common(draw, levels), "sides": sides, "weight": weight, "temperature": draw(st.sampled_from([10.0, 1.0]))}


def of_cwd(draw: st.DrawFn, levels: int) -> dict[str, Any]:
    return {"temperature": draw(st.sampled_from([1.0, 0.5, 4.0]))}


GIVEN = ("float", "double", "bool", "four axes", "richness")
FUNCTIONS = {
    "fsr_loss": Function(fsr_loss, of_fsr_loss, check_fsr_loss, ("none", *GIVEN)),
    "FSRLoss": Function(FSRLoss, of_fsr_loss, check_fsr_loss, ("none", *GIVEN)),
    "masked_imitation_loss": Function(masked_imitation_loss, of_imitation, check_imitation, GIVEN),
    "quality_focal_distillation": Function(quality_focal_distillation, of_focal, check_imitation, ("none", *GIVEN)),
    "localization_distillation": Function(
        localization_distillation, of_localization, check_imitation, ("none", *GIVEN)
    ),
    "pkd_loss": Function(pkd_loss, lambda draw, levels: {}, check_rows),
    "cwd_loss": Function(cwd_loss, of_cwd, check_rows),
    "richness_mask": Function(richness_mask, lambda draw, levels: {}, check_richness_mask),
}

NUMBERS = 60_000  # of a case's at most: the truth takes long
sides = st.one_of(st.integers(1, 12), st.sampled_from([0, 16, 31, 32, 33, 40]))
# More than 16 levels, or 8 with two terms, are more than one launch takes.
level_counts = st.sampled_from([*sorted([*range(1, 6)] * 5), *range(6, 21), 24, 33])
widths = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 32, 33, 64, 65, 80, 130, 260, 300])


def turns(one: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """The same at every level, or two or three in turn."""
    return st.one_of(st.tuples(one), st.tuples(one, one), st.tuples(one, one, one))


placed = st.tuples(st.permutations(range(4)).map(tuple), st.integers(1, 3), st.integers(0, 9))
layouts = st.one_of(st.sampled_from(LAYOUTS), placed)
teacher_layouts = st.one_of(layouts, st.sampled_from([0, 1, 2, 3]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    function = draw(st.sampled_from([*FUNCTIONS, "fsr_loss"]))
    channels, classes = draw(turns(widths)), draw(turns(widths))
    sizes: list[tuple[int, int, int]] = []
    left = NUMBERS // max(*channels, *classes)
    for _ in range(draw(level_counts)):
        n, h, w = draw(st.sampled_from([1, 2, 3, 0])), draw(sides), draw(sides)
        if n * h * w <= left:
            sizes.append((n, h, w))
            left -= n * h * w
    sizes = sizes or [(1, 1, 1)]
    factors = st.sampled_from([0.0, 0.25, 1.0, 3.0, 16.0])
    sign = draw(st.sampled_from([1.0, -1.0]))  # one for all, so that nothing cancels
    case = Case(
        function,
        draw(st.integers(0, 2**31)),
        tuple(sizes),
        channels,
        classes,
        draw(turns(st.sampled_from(FLOATS))),
        draw(turns(st.sampled_from(FLOATS))),
        draw(turns(layouts)),
        draw(turns(teacher_layouts)),
        spread=draw(st.sampled_from([3.0, 0.1, 20.0])),
        shift=draw(st.sampled_from([-1.0, -20.0, 5.0])),
        agree=draw(st.sampled_from([False, False, False, True])),
        parts=draw(st.sampled_from(["both", "both", "features", "logits"])),
        mask=draw(st.sampled_from(FUNCTIONS[function].masks)),
        terms=draw(st.booleans()),
        upstream=draw(
            st.just((1.0, 0.0, 0.0)) | st.tuples(factors, factors, factors).map(lambda v: tuple(sign * u for u in v))
        ),
        tensor_weights=draw(st.booleans()),
        options=said(FUNCTIONS[function].call, FUNCTIONS[function].options(draw, len(sizes))),
    )
    if function == "localization_distillation":  # the sides' bins, as many at every level
        own = case.options.get("sides", 4)
        case = replace(case, classes=(own * -(-classes[0] // own),))
    if torch.float16 in case.dtypes and case.options.get("grad_mode") == "forward":
        # what underflows in the forward pass stays 0, as documented: no upstream gradient brings it back
        case = replace(case, upstream=(1.0, 0.0, 0.0))
    return case


def look(backend: str, device: str, count: int, keep: str | None = None) -> None:
    """Check `count` random cases. What fails is shrunk, printed as a test and, where `keep` is a folder, kept there."""

    @settings(
        max_examples=count, database=DirectoryBasedExampleDatabase(keep) if keep else None, deadline=None,
        report_multiple_bugs=False, suppress_health_check=list(HealthCheck),
        phases=(Phase.reuse, Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(case=cases())
    def each(case: Case) -> None:
        try:
            check(case, backend, device)
        except Exception as error:
            error.add_note(f"def test_found():\n    check({case}, {backend!r}, {device!r})")
            raise

    each()
