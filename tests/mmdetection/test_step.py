"""One training step of each detector against the formulas: losses, gradients, masks, and how often what is called."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from detectors import FRS, NAMES, batch, by_formula, distiller, gradients, recorded, student_of, teacher_of
from mmengine.logging import MessageHub

from frs_kernels import PRESETS, localization_distillation, richness_mask
from frs_kernels.distill import masks
from frs_kernels.integrations.mmdet_pair import dense_head

CLASS_CONVS = {"retinanet": "retina_cls", "gfl": "gfl_cls", "fcos": "conv_cls"}

each_detector = pytest.mark.parametrize("name", NAMES)


def weights_of(name: str) -> tuple[float, float]:
    return PRESETS[name]["feat_weight"], PRESETS[name]["cls_weight"]


@each_detector
def test_losses_and_gradients_are_the_formulas(rng, teacher_file, name):
    model = distiller(name, teacher_file(name))
    losses, s, t = recorded(model, *batch(rng))
    truth = by_formula(model, s, t, weights_of(name), torch.float64)
    eager = by_formula(model, s, t, weights_of(name), torch.float32)
    for key, right in zip(FRS, truth, strict=False):
        assert right > 0
        assert abs(losses[key] - right) <= 1e-6 * right
    masses = [losses[f"frs_mass_{level}"] for level in range(5)]
    torch.testing.assert_close(torch.stack(masses).double(), torch.stack(truth[2]), rtol=1e-6, atol=0)

    # fp64 at the loss, fp32 through the network, for all three: what differs is the loss's own rounding.
    kept = {"retain_graph": True}
    right = gradients(truth[0] + truth[1], model, **kept)
    ours = gradients(sum(losses[key] for key in FRS), model, **kept)
    theirs = gradients(eager[0] + eager[1], model)
    assert (right != 0).float().mean() > 0.2
    assert (ours - right).norm() <= 2 * (theirs - right).norm() + 4 * torch.finfo(torch.float32).eps * right.norm()


@each_detector
def test_the_student_keeps_its_own_losses(rng, teacher_file, name):
    model = distiller(name, teacher_file(name))
    inputs, samples = batch(rng)
    state = torch.get_rng_state()
    losses = model.loss(inputs, samples)
    torch.set_rng_state(state)  # Faster R-CNN samples proposals
    own = model.student.loss(inputs, samples)
    assert set(losses) == set(own) | set(FRS) | {f"frs_mass_{level}" for level in range(5)}
    total = {key: sum(v) if isinstance(v, list) else v for key, v in losses.items()}
    for key, value in own.items():
        assert torch.equal(total[key], sum(value) if isinstance(value, list) else value), key


@each_detector
def test_a_few_steps_lower_the_losses(rng, teacher_file, name):
    model = distiller(name, teacher_file(name))
    inputs, samples = batch(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    for _ in range(12):
        losses = model.loss(inputs, samples)
        loss, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append([losses[key].item() for key in FRS])
    assert seen[-1][0] < 0.9 * seen[0][0]
    assert sum(seen[-1]) < sum(seen[0])


@each_detector
def test_heads_and_necks_run_once_a_step(rng, teacher_file, name):
    model = distiller(name, teacher_file(name))
    calls = []
    for part in (model.teacher.backbone, model.teacher.neck, model.student.backbone, model.student.neck):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    dense_head(model.student).register_forward_hook(lambda module, *_: calls.append(module))
    classify = getattr(dense_head(model.teacher), "rpn_cls" if name == "faster_rcnn" else CLASS_CONVS[name])
    classify.register_forward_hook(lambda module, *_: calls.append(module))
    model.loss(*batch(rng))
    assert len(calls) == 5 + len(model.levels)
    assert len({id(module) for module in calls}) == 6


@each_detector
def test_no_hook_stays_on_the_head(rng, teacher_file, name):
    model = distiller(name, teacher_file(name))
    model.loss(*batch(rng))
    assert not dense_head(model.student)._forward_hooks


def test_a_head_that_was_not_called_is_an_error(rng, teacher_file, monkeypatch):
    model = distiller("gfl", teacher_file("gfl"))
    monkeypatch.setattr(model.student, "loss", lambda *_: {})
    with pytest.raises(RuntimeError, match="GFLHead 0 times"):
        model.loss(*batch(rng))


@pytest.mark.parametrize(("terms", "keys"), [("features", FRS[:1]), ("head", FRS[1:])])
@each_detector
def test_each_term_alone_is_what_it_is_with_the_other(rng, teacher_file, name, terms, keys):
    file = teacher_file(name)
    inputs, samples = batch(rng)
    whole = distiller(name, file)
    model = distiller(name, file, terms=terms)
    model.load_state_dict(whole.state_dict(), strict=terms == "features")
    both, alone = (who.loss(inputs, samples) for who in (whole, model))
    assert [key for key in FRS if key in alone] == list(keys)
    torch.testing.assert_close(alone[keys[0]], both[keys[0]], rtol=1e-6, atol=0)
    assert (model.adapter is None) == (terms == "head")


def boxes_by_cell(samples, z, stride):
    """Cell by cell, whether any pixel of the cell is inside a box."""
    mask = torch.zeros(z.shape[0], *z.shape[-2:])
    for n, sample in enumerate(samples):
        for x0, y0, x1, y1 in sample.gt_instances.bboxes.tolist():
            for h in range(z.shape[2]):
                for w in range(z.shape[3]):
                    across = min(x1, (w + 1) * stride) > max(x0, w * stride)
                    down = min(y1, (h + 1) * stride) > max(y0, h * stride)
                    if across and down:
                        mask[n, h, w] = 1
    return mask


@pytest.mark.parametrize("mask", ["ones", "boxes", "threshold"])
@each_detector
def test_every_mask_is_what_it_says(rng, teacher_file, name, mask):
    model = distiller(name, teacher_file(name), mask=mask, threshold=0.0105 if mask == "threshold" else None)
    inputs, samples = batch(rng)
    losses, s, t = recorded(model, inputs, samples)
    strides = (4, 8, 16, 32, 64) if name == "faster_rcnn" else (8, 16, 32, 64, 128)
    richness = [z.double().sigmoid().amax(1) for z in t.logits]
    masks = {
        "ones": [torch.ones_like(r) for r in richness],
        "boxes": [boxes_by_cell(samples, z, stride) for z, stride in zip(t.logits, strides, strict=True)],
        "threshold": [r * (r.float() > (model.threshold or 0)) for r in richness],
    }[mask]
    feat, cls, _ = by_formula(model, s, t, weights_of(name), torch.float64, masks)
    for key, right in zip(FRS, (feat, cls), strict=True):
        assert abs(losses[key] - right) <= 2e-6 * right


def test_a_threshold_that_leaves_nothing_gives_zero(rng, teacher_file):
    model = distiller("gfl", teacher_file("gfl"), mask="threshold", threshold=0.99)
    losses = model.loss(*batch(rng))
    assert [losses[key].item() for key in FRS] == [0, 0]
    assert not gradients(losses["loss_frs_feat"] + losses["loss_frs_cls"], model).any()


def test_a_box_smaller_than_a_cell_is_seen_on_every_level():
    box = torch.tensor([[33.0, 17.0, 35.0, 20.0]])
    for stride in (8, 16, 32, 64, 128):
        like = torch.empty(1, 1, max(1, 96 // stride), 128 // stride)
        assert masks.boxes([box], [like], [stride])[0].sum() == 1
    assert masks.boxes([box[:0]], [like], [128])[0].sum() == 0


def test_centerness_multiplies_the_richness_of_fcos(rng, teacher_file):
    model = distiller("fcos", teacher_file("fcos"), centerness=True)
    losses, s, t = recorded(model, *batch(rng))
    masks = [
        z.double().sigmoid().amax(1) * c.double().sigmoid()[:, 0]
        for z, c in zip(t.logits, t.outputs[2], strict=True)
    ]  # fmt: skip
    feat, cls, masses = by_formula(model, s, t, weights_of("fcos"), torch.float64, masks)
    assert abs(losses["loss_frs_feat"] - feat) <= 2e-6 * feat
    assert abs(losses["loss_frs_cls"] - cls) <= 2e-6 * cls
    assert masses[0] < 0.9 * sum(z.sigmoid().amax(1).sum() for z in t.logits[:1])


def test_levels_that_are_left_out_add_nothing(rng, teacher_file):
    file = teacher_file("gfl")
    model = distiller("gfl", file, levels=[2, 0])
    losses, s, t = recorded(model, *batch(rng))
    assert [z.shape[-1] for z in s.logits] == [4, 16]
    assert len(model.adapter.convs) == 2
    feat, cls, _ = by_formula(model, s, t, weights_of("gfl"), torch.float64)
    assert abs(losses["loss_frs_feat"] - feat) <= 1e-6 * feat
    assert abs(losses["loss_frs_cls"] - cls) <= 1e-6 * cls
    assert {key for key in losses if key.startswith("frs_mass")} == {"frs_mass_0", "frs_mass_2"}


@pytest.mark.parametrize("options", [{}, {"mask": "boxes"}, {"preset": "pkd"}, {"terms": "features", "levels": [2, 0]}])
def test_distributions_of_boxes_under_the_mask_of_the_others(rng, teacher_file, options):
    how = {"weight": 0.25, "temperature": 3.0}
    model = distiller("gfl", teacher_file("gfl"), **{"box_options": how, **options})
    inputs, samples = batch(rng)
    losses, s, t = recorded(model, inputs, samples)
    mask = masks.boxes([v.gt_instances.bboxes for v in samples], t.logits, model.strides)
    right = localization_distillation(s.boxes, t.boxes, mask if "mask" in options else richness_mask(t.logits), **how)
    assert [b.shape[1] for b in s.boxes] == [4 * (model.bbox_head.reg_max + 1)] * len(model.levels)
    assert right > 0
    torch.testing.assert_close(losses["loss_frs_box"], right)
    reached = model.bbox_head.gfl_reg.weight
    (got,) = torch.autograd.grad(losses["loss_frs_box"], reached, retain_graph=True)
    (want,) = torch.autograd.grad(right, reached)
    torch.testing.assert_close(got, want)
    assert model.parse_losses(losses)[0] > losses["loss_frs_box"]
    without = distiller("gfl", teacher_file("gfl"), **options).loss(inputs, samples)
    assert set(losses) == {*without, "loss_frs_box"}
    assert all(torch.equal(losses[key], without[key]) for key in FRS if key in without)


def test_boxes_of_a_smaller_teachers_image_have_the_students_sizes(rng, teacher_file):
    model = distiller("gfl", teacher_file("gfl"), box_options={}, fast_teacher={"image_scale": 0.5})
    losses, s, t = recorded(model, *batch(rng))
    assert [b.shape for b in s.boxes] == [b.shape for b in t.boxes]
    assert losses["loss_frs_box"].isfinite()


def test_a_gradient_share_is_held(rng, teacher_file):
    """The pull at the head's outputs, as a part of that of the detector's own losses."""
    model = distiller("gfl", teacher_file("gfl"), terms="head", box_options={}, gradient_share=[0.2, 0.3, 0.4])
    inputs, samples = batch(rng)
    for _ in range(2):
        losses = model.loss(inputs, samples)
        loss, _ = model.parse_losses(losses)
        loss.backward()
    assert losses["frs_weight_cls"] != 0.05
    losses = model.loss(inputs, samples)
    assert set(model.shares) == {"cls", "box"}
    for name, target in (("cls", 0.3), ("box", 0.4)):
        share = model.shares[name]
        assert [losses[f"frs_share_{name}_{level}"] for level in range(5)] == (share.term / share.own).tolist()
        assert abs(share.term.norm() / share.own.norm() - target) <= 1e-3


def test_options_of_the_loss_reach_it(rng, teacher_file):
    file = teacher_file("gfl")
    inputs, samples = batch(rng)
    plain = distiller("gfl", file).loss(inputs, samples)
    half = distiller("gfl", file, loss={"feat_weight": 0.05, "level_weights": [1.0] * 5}).loss(inputs, samples)
    kl = distiller("gfl", file, loss={"cls_loss": "kl"}).loss(inputs, samples)
    torch.testing.assert_close(half["loss_frs_feat"], plain["loss_frs_feat"] / 2)
    assert half["loss_frs_cls"] == plain["loss_frs_cls"]
    assert kl["loss_frs_cls"] < plain["loss_frs_cls"]


def test_equal_channels_need_no_adapter(rng, teacher_file):
    wide = {"neck__out_channels": 64, "bbox_head__in_channels": 64, "bbox_head__feat_channels": 64}
    model = distiller("gfl", teacher_file("gfl"), student=student_of("gfl", **wide), adapter_kernel=None)
    assert model.adapter is None
    losses, s, t = recorded(model, *batch(rng))
    feat, _, _ = by_formula(model, s, t, weights_of("gfl"), torch.float64)
    assert abs(losses["loss_frs_feat"] - feat) <= 1e-6 * feat


def test_one_dict_serves_two_models(teacher_file):
    """Building a model changes its config; the caller's stays as it was."""
    student, teacher = student_of("gfl"), teacher_of("gfl")
    before = str(student), str(teacher)
    for _ in range(2):
        distiller("gfl", teacher_file("gfl"), student=student, teacher=teacher)
    assert (str(student), str(teacher)) == before


def test_warmup_follows_the_runners_iteration(rng, teacher_file):
    model = distiller("gfl", teacher_file("gfl"), warmup=8)
    inputs, samples = batch(rng)
    assert model.ramp() == 1  # no runner
    hub = MessageHub.get_instance("a runner")
    seen = {}
    for iteration in (0, 2, 8, 100):
        hub.update_info("iter", iteration)
        seen[iteration] = model.loss(inputs, samples)
    for key in FRS:
        assert seen[0][key] == 0
        torch.testing.assert_close(seen[2][key], seen[8][key] / 4)
        assert torch.equal(seen[8][key], seen[100][key])


@each_detector
def test_the_teacher_is_kept_out(rng, teacher_file, name):
    model = distiller(name, teacher_file(name))
    frozen = {id(v) for v in (*model.teacher.parameters(), *model.teacher.buffers())}
    assert not frozen & {id(v) for v in (*model.parameters(), *model.buffers())}
    assert model.teacher not in list(model.modules())
    assert {key.split(".")[0] for key in model.state_dict()} == {"student", "adapter"}
    model.train()
    assert model.student.training
    assert not any(module.training for module in model.teacher.modules())
    before = [v.clone() for v in model.teacher.state_dict().values()]
    loss, _ = model.parse_losses(model.loss(*batch(rng)))
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.teacher.state_dict().values(), strict=True))


def test_the_teacher_follows_to_another_dtype_and_device(teacher_file):
    model = distiller("gfl", teacher_file("gfl"))
    assert {p.dtype for p in model.to(torch.float64).teacher.parameters()} == {torch.float64}
    assert {p.device.type for p in model.to("meta").teacher.parameters()} == {"meta"}


@each_detector
def test_prediction_is_the_students(rng, teacher_file, name):
    model = distiller(name, teacher_file(name)).eval()
    inputs, samples = batch(rng)
    for sample in samples:
        sample.set_metainfo({"scale_factor": (1.0, 1.0), "ori_shape": (96, 128)})
    with torch.no_grad():
        theirs = model.student(inputs, samples, mode="predict")[0].pred_instances.clone()
        ours = model(inputs, samples, mode="predict")[0].pred_instances
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.bboxes, theirs.bboxes)


@each_detector
def test_autocast_in_bf16(rng, teacher_file, name):
    model = distiller(name, teacher_file(name))
    inputs, samples = batch(rng)
    full = model.loss(inputs, samples)
    if name == "faster_rcnn":  # mmcv's nms on the CPU takes no bf16: the proposals are left out, the RPN is not
        model.student.loss = lambda images, _: (dense_head(model.student)(model.student.extract_feat(images)), {})[1]
    with torch.autocast("cpu", torch.bfloat16):
        losses, s, t = recorded(model, inputs, samples)
        truth = by_formula(model, s, t, weights_of(name), torch.float64)
    assert s.logits[0].dtype == torch.bfloat16
    assert losses["loss_frs_cls"].dtype == torch.float32
    assert abs(losses["loss_frs_cls"] - truth[1]) <= 1e-5 * truth[1]
    assert abs(losses["loss_frs_feat"] - full["loss_frs_feat"]) <= 0.1 * full["loss_frs_feat"]
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@each_detector
def test_a_copy_is_whole(rng, teacher_file, name):
    """As mmengine's EMAHook makes one: with a teacher of its own that is no submodule, and the same losses."""
    model = distiller(name, teacher_file(name))
    inputs, samples = batch(rng)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.teacher is not model.teacher
        assert not any(module.training for module in other.teacher.modules())
        state = torch.get_rng_state()
        losses = model.loss(inputs, samples)
        torch.set_rng_state(state)
        again = other.loss(inputs, samples)
        assert all(torch.equal(losses[key], again[key]) for key in FRS)


def test_a_plain_students_checkpoint_is_the_students(teacher_file):
    model, other = (distiller("gfl", teacher_file("gfl")) for _ in range(2))
    state = {key: torch.randn_like(v) if v.is_floating_point() else v for key, v in other.student.state_dict().items()}
    adapter = {key: value.clone() for key, value in model.adapter.state_dict().items()}
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    assert not unexpected
    assert all(key.startswith("adapter.") for key in missing)
    assert all(torch.equal(value, state[key]) for key, value in model.student.state_dict().items())
    assert all(torch.equal(value, adapter[key]) for key, value in model.adapter.state_dict().items())


def test_what_hooks_ask_of_a_detector_is_the_students(teacher_file):
    model = distiller("gfl", teacher_file("gfl"))
    assert model.bbox_head is model.student.bbox_head
    assert model.with_neck
    assert not hasattr(model, "rpn_head")
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = model.nothing_such


def test_strides_beyond_128(rng, teacher_file):
    deep = {"neck__num_outs": 6, "bbox_head__anchor_generator__strides": [8, 16, 32, 64, 128, 256]}
    student, teacher = student_of("gfl", **deep), teacher_of("gfl", **deep)
    model = distiller("gfl", teacher_file("gfl", **deep), student=student, teacher=teacher, mask="boxes")
    assert model.strides == [8, 16, 32, 64, 128, 256]
