"""What the native operators refuse when they are called alone, and that they have written nothing then."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import FLOATS, ids
from columns import Entry, Term, arguments, columns
from torch import Tensor
from truth import pyramid

from frs_kernels import backends
from frs_kernels.ops import VERBS

HERE = backends.why_not("cpu", "cpu")
needs_cpu = pytest.mark.skipif(HERE is not None, reason=f"cpu backend: {HERE}")
THREE = [torch.zeros(1, 7, 2, 3)] * 3


def junk(source: random.Random) -> Tensor:
    """A tensor that fits nowhere: another shape, dtype, layout or device."""
    make: list[Callable[[], Tensor]] = [
        lambda: torch.zeros(()),
        lambda: torch.zeros(source.randrange(1, 40)),
        lambda: torch.zeros([source.randrange(4) for _ in range(source.choice((2, 3, 5)))]),
        lambda: torch.zeros(1, 0, 2, 2),
        lambda: torch.zeros(1, source.randrange(1, 9), source.randrange(9, 12), 2),
        lambda: torch.zeros(1, 2, 3, 4, dtype=source.choice((torch.int32, torch.bool, torch.complex64, torch.int8))),
        lambda: torch.zeros(1, 2, 3, 4).to_sparse(),
        lambda: torch.zeros(1, 2, 3, 4, device="meta"),
        lambda: torch.zeros(7).as_strided((3, 2), (2, 1)),
        lambda: torch.tensor(math.nan, dtype=torch.float16),
    ]
    return source.choice(make)()


JUNK_NUMBERS = (None, math.nan, math.inf, -math.inf, -1.0, -3, 7, "1", True, torch.zeros(2))
ANYTHING = (None, [], [None], "l1", 5, [5], [5.0], [[]], ["l1"], [True])


def spoil(source: random.Random, arguments: list[Any]) -> list[Any]:
    """The same call with one thing wrong, or two."""
    spoiled = [list(v) if isinstance(v, list) else v for v in arguments]
    for _ in range(source.choice((1, 1, 2))):
        place = source.randrange(len(spoiled))
        value = spoiled[place]
        if isinstance(value, list) and value and source.random() < 0.8:
            change, at = source.randrange(4), source.randrange(len(value))
            wrong = junk(source) if isinstance(value[at], Tensor) and change < 3 else source.choice(JUNK_NUMBERS)
            if change == 0:
                value.pop(at)
            elif change == 1:
                value.insert(at, wrong)
            else:
                value[at] = wrong
        elif isinstance(value, Tensor) and source.random() < 0.8:
            spoiled[place] = junk(source)
        else:
            spoiled[place] = source.choice((*ANYTHING, junk(source), [junk(source)]))
    return spoiled


def calls(rng: torch.Generator) -> dict[str, list[Any]]:
    p = pyramid(rng, sizes=((1, 3, 5), (1, 2, 2)))
    x, z = ([v.detach() for v in levels] for levels in (p.x, p.z))
    scores, mass = VERBS["torch"].score(z)
    entries = [Entry(x[level], z[level], level, term, 0.5, 0.1) for term in range(2) for level in range(2)]
    terms = [Term("bce", 0.5, torch.tensor(2.0), 2.0), Term("smooth_l1", beta=0.3)]
    return {
        "score": [z],
        "imitate": arguments(entries, terms, scores, mass),
        "distill": [x + x, z + z, z, *columns(entries, terms)],
        "scale_": [x, torch.tensor(3.0)],
        "moments": [x, z, "pkd", [1.0, 0.5], 1.0, torch.tensor(2.0), 1.0, 1e-6],
        "moments_backward": [x, z, torch.zeros(14, 5), "pkd", 1.0, torch.tensor(2.0), 1.0],
    }


@needs_cpu
@pytest.mark.parametrize("verb", ["score", "imitate", "distill", "scale_", "moments", "moments_backward"])
def test_malformed_calls_of_an_operator_are_refused_and_write_nothing(rng, verb):
    """300 refused calls; one that happens to be well-formed does not count."""
    source = random.Random(int(torch.randint(1 << 30, (), generator=rng)))
    operator = getattr(torch.ops.frs_kernels, verb)
    messages: list[str] = []
    for _ in range(5000):
        args = spoil(source, calls(rng)[verb])
        tensors = [t for v in args for t in (v if isinstance(v, list) else [v])]
        plain = [t for t in tensors if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"]
        before = [t.clone() for t in plain]
        try:
            operator(*args)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            messages.append(str(error))
        else:
            continue
        for t, copy in zip(plain, before, strict=True):
            assert t.shape == copy.shape
            assert torch.equal(t.nan_to_num(), copy.nan_to_num()), messages[-1]
        if len(messages) == 300:
            break
    assert len(messages) == 300
    assert all(len(message) > 20 for message in messages)
    assert VERBS["cpu"].score(calls(rng)["score"][0])[0].isfinite().all()


@needs_cpu
@pytest.mark.parametrize(
    ("verb", "argument", "value", "words"),
    [
        ("score", "logits", [torch.zeros(1, 2, 3, 4), torch.zeros(2, 3)], ("score: logits[1] (2, 3)", "(N, C, H, W)")),
        ("score", "logits", [torch.zeros(1, 2, 3, 4).int()], ("score: logits[0] (1, 2, 3, 4)", "bfloat16")),
        ("imitate", "teacher", [torch.zeros(1, 7, 3, 5), *THREE], ("student[1] (1, 7, 2, 2)", "(1, 7, 2, 3)")),
        ("imitate", "scores", torch.zeros(19).half(), ("scores must be float32 or float64",)),
        ("imitate", "scores", torch.zeros(38)[::2], ("scores (19)", "contiguous")),
        ("imitate", "scores", None, ("scores is None",)),
        ("imitate", "norm", torch.zeros(2).double(), ("scores and norm must have one dtype",)),
        ("imitate", "norm", torch.zeros(2, device="meta"), ("cpu and meta", "one device")),
        ("imitate", "student", [torch.zeros(1, 7, 3, 5)] * 4, ("student[1] (1, 7, 3, 5), teacher (1, 7, 2, 2)",)),
        ("distill", "logits", [torch.zeros(1, 7, 3, 5)], ("student[1] (1, 7, 2, 2): there is no level 1",)),
        ("distill", "logits", THREE, ("student[0] (1, 7, 3, 5) differs in N, H or W from level 0, (1, 7, 2, 3)",)),
        ("imitate", "level", [0, 1, 0], ("level, term, scale and eps must have an element an entry", "has: 4")),
        (
            "imitate",
            "level",
            [0, 1, 1, 1],
            ("student[2] (1, 7, 3, 5) differs", "from level 1, (1, 7, 2, 2)"),
        ),
        ("imitate", "level", [0, -1, 0, 1], ("student[1] (1, 7, 2, 2): there is no level -1",)),
        ("imitate", "level", [0, 2, 0, 2], ("level 1 has no entry", "from 0 without a gap")),
        ("imitate", "term", [0, 2, 1, 1], ("student[1] (1, 7, 2, 2): there is no term 2",)),
        ("imitate", "term", [1, 1, 1, 1], ("term 0 has no entry",)),
        ("imitate", "eps", [0.0] * 5, ("level, term, scale and eps must have an element an entry",)),
        (
            "imitate",
            "loss",
            ["bce", "hinge"],
            ("'hinge' is unknown", "'mse', 'l1', 'smooth_l1', 'bce', 'kl', 'qfl',"),
        ),
        ("imitate", "loss", [], ("loss is empty",)),
        ("imitate", "weight", [1.0], ("must have an element a term, as loss has: 2",)),
        ("imitate", "factor", [torch.zeros(1), None], ("factor must be 0-dim", "(1)")),
        ("imitate", "factor", [None, torch.tensor(2)], ("factor must be float32",)),
        ("distill", "temperature", [0.0, 1.0], ("temperature must be positive and finite, got 0",)),
        ("distill", "beta", [1.0, -0.5], ("beta must be zero or more and finite, got -0.5",)),
        ("distill", "want_grad", [True], ("must have an element a term",)),
        ("scale_", "factor", torch.tensor(3), ("factor must be float32",)),
        ("scale_", "factor", None, ("factor is None",)),
        *(
            (verb, argument, value, words)
            for verb in ("moments", "moments_backward")
            for argument, value, words in (
                ("student", [], ("student is empty",)),
                ("teacher", [torch.zeros(1, 7, 3, 5)], ("student has 2 levels, teacher 1; they must have the same",)),
                ("teacher", THREE[:2], ("student[0] (1, 7, 3, 5), teacher (1, 7, 2, 3); they must have the same",)),
                ("student", [torch.zeros(7, 3, 5)], ("student[0] (7, 3, 5)", "(N, C, H, W)")),
                ("teacher", [torch.zeros(1, 7, 3, 5).int()], ("teacher[0] (1, 7, 3, 5)", "bfloat16")),
                ("teacher", [torch.zeros(1, 7, 3, 5, device="meta"), THREE[0][..., :2]], ("cpu and meta",)),
                ("loss", "mse", ("loss 'mse' is unknown; the valid ones are 'pkd', 'cwd'",)),
                ("temperature", 0.0, ("temperature must be positive and finite, got 0",)),
                ("temperature", math.inf, ("temperature must be positive and finite, got inf",)),
                ("factor", torch.ones(1), ("factor must be 0-dim", "(1)")),
                ("factor", torch.tensor(1), ("factor must be float32",)),
            )
        ),
        ("moments", "scale", [1.0], ("scale must have an element a level, as student has: 2",)),
        ("moments", "eps", -1.0, ("eps must be zero or more and finite, got -1",)),
        ("moments", "eps", math.nan, ("eps must be zero or more and finite, got nan",)),
        *(
            ("moments_backward", "rows", rows, ("must be what moments returned for these tensors: (14, 5)",))
            for rows in (
                torch.zeros(13, 5),
                torch.zeros(14, 4),
                torch.zeros(70),
                torch.zeros(5, 14).t(),
                torch.zeros(14, 5).double(),
            )
        ),
        ("moments_backward", "rows", torch.zeros(14, 5, device="meta"), ("cpu and meta", "one device")),
        ("moments_backward", "rows", None, ("rows is None",)),
    ],
)
def test_a_refusal_says_what_is_wrong(rng, verb, argument, value, words):
    args = calls(rng)[verb]
    schema = getattr(torch.ops.frs_kernels, verb).default._schema
    args[[a.name for a in schema.arguments].index(argument)] = value
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.frs_kernels, verb)(*args)
    for word in words:
        assert word in str(error.value)


@needs_cpu
@pytest.mark.parametrize("verb", ["score", "imitate", "distill", "moments", "moments_backward"])
def test_levels_that_are_not_4d_are_refused_on_the_meta_device_too(rng, verb):
    """One meta tensor brings a call to the fake implementation, before any backend has looked at it."""
    args = [torch.zeros(v.shape, device="meta") if isinstance(v, Tensor) else v for v in calls(rng)[verb]]
    args = [[torch.zeros(14, device="meta") for _ in v] if _are_levels(v) else v for v in args]
    with pytest.raises(RuntimeError, match=r"a level is \(14,\); it must be \(N, C, H, W\)"):
        getattr(torch.ops.frs_kernels, verb)(*args)


def _are_levels(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(t, Tensor) and t.dim() == 4 for t in value)


@needs_cpu
@pytest.mark.parametrize("verb", ["imitate", "distill"])
def test_a_call_that_wants_nothing_is_refused(rng, verb):
    args = calls(rng)[verb]
    args[-3:-1] = [False, False], False
    with pytest.raises(RuntimeError, match="nothing is wanted: set want_loss, want_grad or both"):
        getattr(torch.ops.frs_kernels, verb)(*args)


@pytest.mark.parametrize("dtype", FLOATS, ids=ids)
@needs_cpu
def test_a_gradient_with_an_overlap_is_not_a_run(dtype):
    """Four numbers in two places of memory, with a gap of two: as many places as numbers."""
    overlapping = torch.ones(8, dtype=dtype).as_strided((1, 1, 2, 2), (4, 4, 0, 3))
    other = torch.ones(1, 1, 2, 2, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"grads\[1\] \(1, 1, 2, 2\) overlaps itself"):
        VERBS["cpu"].scale_([other, overlapping], torch.tensor(2.0))
    assert (overlapping == 1).all()
    assert (other == 1).all()
