"""`Distiller`: a student that is trained with its own losses and `fsr_loss`, in any training loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from frs_kernels import checks
from frs_kernels.distill import masks
from frs_kernels.distill.pairing import (
    Distilling,
    check_level_weights,
    check_weights,
    choose_levels,
    has_head_term,
    make_adapter,
    make_localization,
    make_shares,
    options_of,
    ramp,
    resized,
)
from frs_kernels.distill.recipe import Recipe, both
from frs_kernels.distill.tap import COMPILED, Source, Tap
from frs_kernels.modules import FSRLoss
from frs_kernels.row_losses import ROW_LOSSES

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from frs_kernels.options import Keywords

SCHEDULES = ("constant", "cosine")
MASKS = ("richness", "ones")
Mask = str | Callable[[list[Tensor]], list[Tensor]]


class Distiller(Distilling, nn.Module):
    """A student and its frozen teacher. Calling it is calling the student: the same arguments, the same return.

        distiller = Distiller(student, teacher, feats="neck", logits="head.cls", preset="gfl")
        optimizer = SGD(distiller.parameters(), ...)            # the student's and the adapter's
        losses = distiller(images, targets)                     # with loss_frs_feat and loss_frs_cls, if it is a dict
        loss = sum(losses.values())                             # else:  loss = own_loss + distiller.loss()

    In training mode each call runs the teacher on the images that the student saw, as far as needed, and adds

        loss_frs_feat = ramp * feat_weight * feat,    loss_frs_cls = ramp * cls_weight * cls        (`fsr_loss`)
        loss_frs_box = ramp * `localization_distillation`, with boxes=

    to what the student returns, if that is a dict of scalars; else `loss()` hands out their sum. In eval mode it is
    the student alone. The teacher is outside the module tree: in no checkpoint, optimiser or DDP bucket. `train()`
    leaves it in eval mode, and `.to()` and the like move it along. `distiller.student` is the plain model,
    `distiller.terms` are the last call's (`FSRTerms`). DDP and fully_shard wrap the distiller, not the student;
    torch.compile takes the student or its parts, not the distiller.

    Args:
        student, teacher: detectors. The teacher is frozen and put into eval mode.
        feats, logits, images: where both emit the levels' features, the class logits and the images; feats or logits
            may be left out. Without `images` the teacher is given the first argument of the call.
        boxes: where both emit the distributions of a box's sides, (N, sides * bins, H, W) a level, as GFL's head does:
            `localization_distillation` under the same mask is added, as loss_frs_box.
        box_options: its options, dict(weight=0.25, temperature=10.0, ...).
        of_teacher: those that differ in the teacher, dict(feats=..., logits=..., boxes=...).
        recipe: instead of these "torchvision", "ultralytics" or "transformers", or a `Recipe`, or a pair of them,
            the student's and the teacher's.
        preset: a name in `frs_kernels.PRESETS`; None for normalizer="total_mass", which was the better one wherever it
            was tried (docs/math.md), and weights of your own or gradient_share. With a cls_weight of 0 the head is left
            out.
        mask: "richness", "ones", or a function of the teacher's logits (a list of (N, K, H, W)) that gives (N, H, W)
            a level; `frs_kernels.distill.masks` has some.
        levels: indices of the levels that are distilled, of both; all by default.
        gradient_share: hold each term where its gradient, at the features, class logits or boxes, is this part of that
            of all other losses (`frs_kernels.distill.GradientShare`), one number or (features', logits') or, with
            boxes, (features', logits', boxes'): for detectors whose weights nobody has tuned. Each begins at its
            weight. `distiller.shares` has them.
        adapter_kernel: kernel size of the adapter's convolution a level; None for no adapter, where channels agree.
        fast_teacher: keep a copy of the teacher with its batch norms folded, on the same memory where nothing changes;
            a dict has options of `frs_kernels.distill.fast_teacher`, dict(dtype="auto") for 16 bits where that is
            faster, and two of the distiller's own: stream=True runs the teacher on a CUDA stream beside the student;
            image_scale=0.5 gives it smaller images and resizes what it emits, which is another method than the paper's.
            Load the teacher's weights before; for one that changes later, False keeps the teacher itself.
        warmup: calls in training mode over which both losses rise linearly from 0.
        schedule: "constant", or "cosine": then both fall to 0 over `steps` calls.
        example: the arguments of one call, for the first pass that measures levels and channels, in eval mode and
            without gradient; by default one black image of 512x512. Adapters are made from it.
        options: keywords of `fsr_loss` beside the preset's and over them.

    Raises (when made):
        ValueError: no such module; a module that emits nothing or no levels; levels, sizes or channels that do not fit;
            a student without anything to train, or that is its own teacher; an unknown value of an option.
        TypeError: an option of a wrong type, an unknown one, or one that the distiller sets itself.
    Where the heads have other classes or anchors, a warning says so and features alone are distilled.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        feats: Source | None = None,
        logits: Source | None = None,
        images: Source | None = None,
        boxes: Source | None = None,
        box_options: dict[str, Any] | None = None,
        of_teacher: dict[str, Source] | None = None,
        recipe: str | Recipe | tuple[Recipe, Recipe] | None = None,
        preset: str | None = None,
        mask: Mask = "richness",
        levels: Sequence[int] | None = None,
        gradient_share: float | tuple[float, ...] | None = None,
        adapter_kernel: int | None = 3,
        warmup: int = 500,
        fast_teacher: bool | dict[str, Any] = True,
        schedule: str = "constant",
        steps: int | None = None,
        example: Sequence[Any] | None = None,
        **options: Unpack[Keywords],
    ) -> None:
        super().__init__()
        if student is teacher:
            raise ValueError("student and teacher are the same module; it would learn from itself")
        if set(student.parameters()) & set(teacher.parameters()):
            raise ValueError("student and teacher share parameters, which would be frozen; give the teacher a copy")
        if isinstance(student, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(
                "the student is wrapped for data parallel training already, and the adapter would be left out; wrap "
                "the distiller: DistributedDataParallel(Distiller(student, ...))"
            )
        if _is_sharded(student):
            raise ValueError("the student is sharded already; make the distiller first, then fully_shard(distiller)")
        if not any(p.requires_grad for p in student.parameters()):
            raise ValueError(
                "no parameter of the student requires a gradient: are student and teacher swapped, or was it loaded "
                "for inference? Then call student.requires_grad_(True)"
            )
        checks.check_number("warmup", warmup, positive=False)
        checks.check_option("schedule", schedule, SCHEDULES)
        if (schedule == "cosine") != (steps is not None):
            raise ValueError(f"schedule={schedule!r} with steps={steps}: steps= goes with schedule='cosine' alone")
        if steps is not None:
            checks.check_number("steps", steps, positive=True)
        if not callable(mask):
            checks.check_option("mask", mask, MASKS)
        if "return_terms" in options:
            raise TypeError("return_terms is the distiller's own; the last call's terms are in distiller.terms")
        chosen = options_of(preset, options)
        self.criterion = FSRLoss(**chosen)
        sources = {"feats": feats, "logits": logits, "images": images, "boxes": boxes}
        self.recipes = both(recipe, sources, of_teacher, student, teacher)
        self.localization = None
        if self.recipes[0].boxes is not None:
            self.localization = make_localization(box_options)
        elif box_options is not None:
            raise ValueError("box_options without boxes: name the module that emits the boxes' distributions")
        self.mask = mask
        if not self._needs_logits():  # and the teacher need not run so far
            self.recipes = self.recipes[0]._replace(logits=None), self.recipes[1]._replace(logits=None)
        norms = [found.normalisation for found in self.recipes]
        if norms[0] != norms[1]:
            raise ValueError(
                f"student and teacher see the same images, but normalise otherwise: student {norms[0]}, teacher "
                f"{norms[1]}; take a teacher that was trained with the student's"
            )
        self.student = student
        self.teacher = teacher
        self.warmup = warmup
        self.steps = steps
        self.iteration = 0
        self._losses: dict[str, Tensor] | None = None
        seen = self._prepared(self._measure(example, levels, adapter_kernel))
        self.quicken(lambda model: self._run_teacher(model, seen), self._tap(self.teacher, 1).names, fast_teacher)
        self.shares = make_shares(gradient_share, self.criterion, self.localization, self.has_feats, self.has_logits)
        self.shares.to(next(student.parameters()).device)
        check_weights(chosen, self.shares, self.has_feats)

    def _measure(
        self, example: Sequence[Any] | None, levels: Sequence[int] | None, adapter_kernel: int | None
    ) -> Tensor:
        """The first pass: whether student and teacher fit, how far the teacher must run, the adapter; the images."""
        like = next(self.student.parameters())
        black = torch.zeros(1, 3, 512, 512, device=like.device, dtype=like.dtype)
        arguments = self.recipes[0].example(black) if example is None else example
        if isinstance(arguments, Tensor):
            arguments = (arguments,)
        modes = {module: module.training for module in self.student.modules()}
        s, t = self._tap(self.student, 0), self._tap(self.teacher, 1)
        try:
            with torch.no_grad(), s:
                self.student.eval()(*arguments)
        except Exception as error:
            raise ValueError(
                f"the student cannot be run on the example: {error}; give example=, the arguments of one call"
            ) from error
        finally:
            for module, training in modes.items():
                module.training = training
        images = self._images(s, arguments)
        try:
            with torch.no_grad(), t:
                self.recipes[1].run(self.teacher, self._prepared(images))
        except Exception as error:
            raise ValueError(
                f"the teacher cannot be run on the images {tuple(images.shape)}, {images.dtype}: {error}; a recipe's "
                "run= says how"
            ) from error
        self._counts = s.counts, t.counts
        self.has_feats = self.recipes[0].feats is not None
        self.has_logits = self.recipes[0].logits is not None and has_head_term(self.criterion)
        if self._needs_logits() and self.recipes[1].logits is None:
            raise ValueError("the richness is made of the teacher's class logits: name logits, or take mask='ones'")
        sizes = "feats" if self.has_feats else "logits" if self.recipes[0].logits is not None else "boxes"
        of_student, of_teacher = (getattr(tap, sizes) for tap in (s, t))
        self.levels = choose_levels(levels, of_student, of_teacher, images.shape[-1])
        self.adapter = None
        if self.has_feats:
            self.adapter = make_adapter(self._pick(of_student), self._pick(of_teacher), adapter_kernel)
        if self.has_logits:
            choose_levels(levels, s.logits, t.logits, images.shape[-1])
            ins, outs = ([z.shape[1] for z in self._pick(tap.logits)] for tap in (s, t))
            if ins != outs:
                message = f"student has {ins} class logits a level, teacher {outs}: other classes or anchors"
                if not self.has_feats:
                    raise ValueError(f"{message}, and no features to distil; name feats")
                warnings.warn(f"{message}; features alone are distilled", stacklevel=3)
                self.has_logits = False
        if self.localization:
            choose_levels(levels, s.boxes, t.boxes, images.shape[-1])
            ins, outs = ([b.shape[1] for b in self._pick(tap.boxes)] for tap in (s, t))
            if ins != outs:
                raise ValueError(f"student has {ins} channels of boxes a level, teacher {outs}: other bins or anchors")
            checks.check_sides(self.localization.options["sides"], "boxes", self._pick(s.boxes))
        if not self.has_feats and not self.has_logits and not self.localization:
            raise ValueError("nothing to distil: cls_weight is 0 and feats are not named")
        check_level_weights(self.criterion, self.localization, len(self.levels))
        return images

    def _needs_logits(self) -> bool:
        """For the head's term, or for a mask."""
        head = self.recipes[0].logits is not None and has_head_term(self.criterion)
        masked = self.localization is not None or self.criterion.options.feat_loss not in ROW_LOSSES
        return head or (self.mask != "ones" and masked)

    def _run_teacher(self, model: nn.Module, images: Tensor) -> Tap:
        """As far as needed."""
        with self._tap(model, 1, stop_at=self._counts[1]) as tap:
            self.recipes[1].run(model, images)
        return tap

    def _pick(self, levels: list[Tensor]) -> list[Tensor]:
        return [levels[i] for i in self.levels]

    def _tap(self, model: nn.Module, which: int, **options: Any) -> Tap:
        recipe = self.recipes[which]
        images = recipe.images if which == 0 else None
        return Tap(model, feats=recipe.feats, logits=recipe.logits, boxes=recipe.boxes, images=images, **options)

    def _images(self, tap: Tap, arguments: Sequence[Any]) -> Tensor:
        if self.recipes[0].images is not None:
            return tap.images
        if not arguments or not isinstance(arguments[0], Tensor):
            raise ValueError("the first argument is no tensor of images; name the module that is given them: images=")
        return arguments[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the student returns; in training mode with the losses, or these kept for `loss()`.

        Raises:
            RuntimeError: the student is in eval mode while the distiller trains, or its modules were called another
                number of times than in the first pass.
        """
        if self._losses is not None:
            self._warn("the losses of the last call were never taken: add distiller.loss() to the student's own")
            self._losses = None
        if not self.training:
            return self.student(*args, **kwargs)
        if self.adapter is not None and _is_sharded(self.student) and not _is_sharded(self):
            raise RuntimeError("the student is sharded, the adapter is not: fully_shard(distiller) does both")
        if not self.student.training:
            raise RuntimeError("the student is in eval mode, the distiller trains: call distiller.train()")
        version = args[0]._version if args and isinstance(args[0], Tensor) and not args[0].is_inference() else None
        self.images_are_there()
        through = self.through(self.criterion.process_group)
        with self._tap(self.student, 0, through=through, when_images=self.images_are_there) as tap:
            returned = self.student(*args, **kwargs)
        if tap.counts != self._counts[0]:
            raise RuntimeError(
                f"the student's modules were called {tap.counts} times in this pass, {self._counts[0]} in the first: "
                "its forward pass runs them once; or they were compiled and ran before without hooks, which they then "
                f"do not see ({COMPILED})"
            )
        if self.recipes[0].images is None and version is not None and args[0]._version != version:
            raise RuntimeError("the student changed its images in place; name the module that is given them: images=")
        losses = self._distil(tap, self._images(tap, args))
        self.iteration += torch.is_grad_enabled()
        if isinstance(returned, dict) and returned and all(map(_is_scalar, returned.values())):
            if taken := losses.keys() & returned.keys():
                raise RuntimeError(f"the student returns {sorted(taken)} itself: is it a distiller's student already?")
            returned = copy.copy(returned)
            returned.update(losses)
        else:
            self._losses = losses
        return returned

    def loss(self) -> Tensor:
        """The sum of the last call's losses, where the student returned no dict of losses; once a call.

        Raises:
            RuntimeError: there is none: they are in the dict, were handed out, or there was no call in training mode.
        """
        if self._losses is None:
            raise RuntimeError(
                "no loss is kept: it is in the dict that the call returned, has been handed out already, or there was "
                "no call in training mode"
            )
        losses, self._losses = self._losses, None
        return sum(losses.values(), start=torch.zeros((), device=next(iter(losses.values())).device))

    def ramp(self) -> float:
        """The factor of both losses at this iteration."""
        return ramp(self.iteration, self.warmup, self.steps)

    @torch.no_grad()
    def observe(self, images: Tensor) -> Tap:
        """What the teacher emits for images as its backbone takes them: `.feats`, `.logits`, `.boxes`."""
        self.teacher.eval()
        return self._run_teacher(self.teacher, self._prepared(images))

    def _emitted(self, images: Tensor) -> tuple[list[Tensor] | None, ...]:
        """The teacher's features, logits and boxes at the levels that are distilled, those that are needed."""
        t, recipe = self.observe(images), self.recipes[1]
        needed = self.has_feats, recipe.logits is not None, self.localization is not None
        names = ("feats", "logits", "boxes")
        return tuple(self._pick(getattr(t, name)) if need else None for name, need in zip(names, needed, strict=True))

    def _distil(self, s: Tap, images: Tensor) -> dict[str, Tensor]:
        feats = self._pick(s.feats) if self.has_feats else None
        logits = self._pick(s.logits) if self.has_logits else None
        boxes = self._pick(s.boxes) if self.localization else None
        found = self.beside.run(self._emitted, images)
        self.beside.join(found)
        self.check_first(*(levels or [] for levels in found))
        if self.image_scale != 1:
            like = feats or logits or boxes or []
            found = tuple(levels and resized(levels, like) for levels in found)
        of_teacher, z, of_boxes = found
        learns = {
            name: any(x.requires_grad for x in levels)
            for name, levels in (("features", feats), ("class logits", logits), ("boxes", boxes))
            if levels is not None
        }
        for name in learns:
            if torch.is_grad_enabled() and not learns[name] and any(learns.values()):  # where none does, fsr_loss warns
                self._warn(
                    f"the student's {name} carry no gradient, so that it learns nothing from them: they are frozen, "
                    "under no_grad, or inside checkpoint(use_reentrant=True)"
                )
        mask: Any = None
        if self.mask == "ones":
            mask = masks.ones(of_teacher or z or of_boxes or [])
        elif not isinstance(self.mask, str) and z is not None:  # without logits no term has a mask
            mask = self.mask(z)
            if mask is None:
                raise TypeError("mask= returned None; it gives a list of (N, H, W), one a level")
        ramp, group = self.ramp(), self.criterion.process_group
        losses = {}
        if self.has_feats or self.has_logits:
            losses = self.imitate(feats, of_teacher, logits, z, mask=mask, ramp=ramp, process_group=group)
        if boxes is not None and of_boxes is not None:
            losses |= self.localize(boxes, of_boxes, z, mask=mask, ramp=ramp, process_group=group)
        return losses

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no loss to hand out and is not compiled: tensors of a graph and compiled code cannot be copied."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_losses": None}

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.iteration)  # a tensor, as averages over state dicts expect

    def set_extra_state(self, state: Tensor) -> None:
        self.iteration = int(state)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _is_sharded(module: nn.Module) -> bool:
    """By FSDP2, which gives a module another class; importing that takes a third of a second."""
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)
