"""`Tap`: levels out of every kind of module, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from toy_detectors import Detector, images

from frs_kernels.distill import Input, Mean, Output, Tap
from frs_kernels.distill.tap import split_packed


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def expected(model: Detector, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    feats = model.neck(x)
    feats = list(feats.values()) if isinstance(feats, dict) else list(feats)
    return feats, [model.head.cls(f) for f in feats]


def assert_equal(found: list[Tensor], right: list[Tensor]) -> None:
    assert [v.shape for v in found] == [v.shape for v in right]
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("neck", ["list", "tuple", "dict"])
@pytest.mark.parametrize(
    ("head", "anchors", "logits"),
    [("list", 3, "head.cls"), ("list", 1, "head"), ("columns", 3, "head"), ("rows", 1, "head"), ("rows", 3, "head")],
)
def test_levels_in_every_form(neck, head, anchors, logits):
    model, x = Detector(anchors=anchors, neck=neck, head=head), images()
    with Tap(model, feats="neck", logits=logits, images="neck") as tap:
        model(x)
    feats, right = expected(model, x)
    assert_equal(tap.feats, feats)
    assert_equal(tap.logits, right)
    assert tap.images is x
    assert not hooks(model)


def test_packed_levels_are_views():
    for packed in (torch.randn(2, 5, 18), torch.randn(2, 36, 5)):
        for z in split_packed(packed, [(4, 3), (2, 2), (1, 2)]):
            assert z.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()


def test_several_modules_inputs_and_picks():
    model, x = Detector(), images()
    with Tap(
        model,
        feats=[f"neck.convs.{i}" for i in range(3)],
        logits=Output("head", lambda levels: levels[::-1]),
        images=Input("neck"),
    ) as tap:
        model(x)
    feats, logits = expected(model, x)
    assert_equal(tap.feats, feats)
    with pytest.raises(ValueError, match=r"logits\[0\] .* and feats\[0\] .* differ in N, H or W"):
        _ = tap.logits
    with Tap(model, feats=Input("head"), logits=Output("", lambda out: out if isinstance(out, list) else [])) as tap:
        model.eval()(x)
    assert_equal(tap.feats, feats)
    assert_equal(tap.logits, logits)


def test_branches_are_averaged():
    model, x = Detector(), images()
    with Tap(model, logits=Mean("head.cls", Output("head", lambda levels: [3 * z for z in levels]))) as tap:
        model(x)
    assert_equal(tap.logits, [torch.stack([z, 3 * z]).mean(0) for z in expected(model, x)[1]])
    with Tap(model, logits=Mean("head.cls", "neck.convs.0")) as tap:
        model(x)
    with pytest.raises(ValueError, match="the branches that are averaged emitted 3, 1 levels"):
        _ = tap.logits


def test_a_tap_is_used_again_and_forgets():
    model = Detector()
    tap = Tap(model, feats="neck")
    for seed in range(2):
        with tap:
            model(images(seed))
        assert_equal(tap.feats, expected(model, images(seed))[0])


def test_no_hook_is_left_after_an_exception():
    model = Detector()
    with pytest.raises(RuntimeError), Tap(model, feats="neck", logits="head"):
        model(torch.zeros(1, 5, 8, 8))
    assert not hooks(model)


def test_the_pass_ends_once_all_has_been_seen():
    model, x = Detector(), images()
    with Tap(model, feats="neck", logits="head.cls") as whole:
        model(x)
    assert whole.counts == [1, 3]
    ran = []
    handle = model.head.register_forward_hook(lambda *_: ran.append(1))
    with Tap(model, feats="neck", logits="head.cls", stop_at=whole.counts) as tap:
        model(x)
        ran.append(2)
    handle.remove()
    assert not ran
    assert not hooks(model)
    assert_equal(tap.logits, expected(model, x)[1])
    with pytest.raises(KeyError), Tap(model, feats="neck", stop_at=[2]):
        raise KeyError  # another's exception comes through


def test_copies_and_pickles_with_its_model():
    model = Detector()
    with Tap(model, feats="neck", logits="head") as tap:
        model(images())
        copies = copy.deepcopy((model, tap)), pickle.loads(pickle.dumps((model, tap)))
    for other, other_tap in copies:
        assert hooks(other) == 2
        with other_tap:
            other(images())
        assert_equal(other_tap.feats, tap.feats)


def test_compiled_parts_make_no_graph_break():
    model, x = Detector(returns="logits"), images()
    feats, logits = expected(model, x)
    backend = CompileCounter()
    model.neck, model.head = (torch.compile(part, backend=backend, fullgraph=True) for part in (model.neck, model.head))
    for _ in range(2):
        with Tap(model, feats="neck", logits="head") as tap:
            model(x)
        assert_equal(tap.feats, feats)
        assert_equal(tap.logits, logits)
    assert backend.frame_count == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to collect"),
        ({"feats": "nek"}, "feats: Detector has no module 'nek'; it has 'neck', 'head'"),
        ({"logits": "bbox_head.cls"}, "logits: Detector has no module 'bbox_head.cls'; it has 'head.cls'"),
    ],
)
def test_refused_when_made(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tap(Detector(), **arguments)


def test_a_source_of_another_type_is_refused():
    with pytest.raises(TypeError, match="a source is a name, Output, Input, Mean or a list of those, got int"):
        Tap(Detector(), feats=3)


@pytest.mark.parametrize(
    ("arguments", "read", "message"),
    [
        ({"feats": "head.box"}, "feats", "feats: 'head.box' emitted nothing; it did not run"),
        ({"feats": Output("neck", lambda levels: levels[0].shape)}, "feats", "feats: the output of 'neck' is a Size"),
        ({"feats": Output("neck", len)}, "feats", r"is a int, no tensor .* Output\('neck', pick=...\)"),
        ({"feats": "neck"}, "logits", "logits: not collected; name the module"),
        ({"feats": Output("neck", lambda levels: levels[0][0])}, "feats", r"shape \(6, 8, 8\); levels are"),
        ({"images": "head"}, "images", "images: 3 tensors were collected, one batch of images is needed"),
        ({"feats": "neck", "logits": "neck.convs.0"}, "logits", "logits: 1 levels were collected, features have 3"),
    ],
)  # fmt: skip
def test_refused_when_read(arguments, read, message):
    model = Detector()
    with Tap(model, **arguments) as tap:
        model(images())
    with pytest.raises(ValueError, match=message):
        getattr(tap, read)


def test_a_head_that_runs_twice_is_refused():
    model = Detector()
    with Tap(model, feats="neck", logits="head.cls") as tap:
        model.head(model.neck(images()))
        for x in tap.feats:
            model.head.cls(x)
    with pytest.raises(ValueError, match="6 levels were collected, features have 3; did the head run more than once"):
        _ = tap.logits


@pytest.mark.parametrize(("shape", "message"), [((2, 5, 17), "no axis has"), ((2, 18, 18), "both axes have")])
def test_packed_logits_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        split_packed(torch.zeros(shape), [(4, 3), (2, 2), (1, 2)])
