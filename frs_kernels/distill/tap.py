"""`Tap`: what named modules of a model emit in one forward pass, as lists of (N, C, H, W), one tensor per level."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Output:
    """What a module returns, over all its calls. `pick` makes tensors of it where it is neither one, nor a list or dict
    of them: it takes one call's return. An empty name is the model itself."""

    name: str
    pick: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Input:
    """What a module is given: its positional arguments, or what `pick` makes of them; a tuple of them."""

    name: str
    pick: Callable[[Any], Any] | None = None


@dataclass(frozen=True, init=False)
class Mean:
    """The mean, level by level, of what several sources emit: the branches of a head."""

    sources: tuple[Source, ...]

    def __init__(self, *sources: Source) -> None:
        object.__setattr__(self, "sources", sources)


COMPILED = "torch.compiler.reset(), or compile after the first pass"

Source = str | Output | Input | Mean | Sequence[Any]
Through = Callable[[list[Tensor]], list[Tensor]]


class Tap:
    """Collects, while it is open, what a model's modules emit.

        with Tap(model, feats="neck", logits="head.cls", images="backbone") as tap:
            model(images)
        tap.feats, tap.logits, tap.images

    A source is the name of a module (its output), `Output(name, pick)`, `Input(name, pick)`, a list of those (a module
    a level), or `Mean(...)` of several. A module may be called once a level, or once and return a list, a tuple or a
    dict of levels. Levels packed as (N, K, P) or (N, P, K), P the positions of all levels, times the anchors of a
    position in the second form, are split by the sizes of the features, as views.

    No hook is left behind, also after an exception.

    Args:
        model: the detector.
        feats, logits: sources of the levels' features and class logits. At least one.
        boxes: source of what a head predicts of boxes, (N, sides * bins, H, W) a level, or packed as logits may be.
        images: source of the images as the backbone sees them; a name means that module's input.
        stop_at: `counts` of an earlier pass: as soon as every module has been called so often, the pass ends, by an
            exception that goes no further than this context.
        when_images: called as soon as the images have been seen.
        through: by "feats", "logits" or "boxes", a function of a list of tensors that gives another, which what was
            emitted goes through before it is averaged or split.

    Raises (where they are read; for a name when made):
        ValueError: there is no such module; nothing was emitted, or it is no list of levels; logits do not fit the
            features: another number of levels (a module that ran twice emits twice as many), other sizes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        feats: Source | None = None,
        logits: Source | None = None,
        images: Source | None = None,
        boxes: Source | None = None,
        stop_at: Sequence[int] | None = None,
        through: Mapping[str, Through] | None = None,
        when_images: Callable[[], None] | None = None,
    ) -> None:
        if feats is None and logits is None and images is None and boxes is None:
            raise ValueError("nothing to collect: name the modules that emit feats, logits, boxes or images")
        self._sources = {
            "feats": feats, "logits": logits, "boxes": boxes,
            "images": Input(images) if isinstance(images, str) else images,
        }  # fmt: skip
        self._recorders: dict[Output | Input, _Recorder] = {}
        for name, source in self._sources.items():
            for leaf in _leaves(source):
                self._recorders.setdefault(leaf, _Recorder(_module(model, name, leaf.name), leaf))
                if name == "images":
                    self._recorders[leaf].then = when_images
        self._stop_at = stop_at
        self._through = through or {}
        self._found: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Tap:
        self._detach()  # a copy of an open tap
        self._found.clear()
        stop = None if self._stop_at is None else (list(self._recorders.values()), self._stop_at)
        for recorder in self._recorders.values():
            recorder.calls.clear()
            recorder.versions.clear()
            recorder.stop = stop
            self._handles.append(recorder.attach())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._detach()
        return isinstance(error, _Enough) and error.args[0] in self._recorders.values()

    def __getstate__(self) -> dict[str, Any]:
        """A copy has seen nothing: tensors of a graph can be neither copied nor pickled."""
        return {**self.__dict__, "_found": {}}

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        for recorder in self._recorders.values():
            recorder.stop = None  # a cycle of references, which would keep what was seen until it is collected

    @property
    def names(self) -> list[str]:
        """Of the modules that are tapped."""
        return [leaf.name for leaf in self._recorders]

    @property
    def counts(self) -> list[int]:
        """How often each module was called, for `stop_at`."""
        return [len(recorder.calls) for recorder in self._recorders.values()]

    @property
    def feats(self) -> list[Tensor]:
        """(N, C, H, W), one a level."""
        return [_as_level("feats", x) for x in self._collected("feats")]

    @property
    def logits(self) -> list[Tensor]:
        """(N, K, H, W), one a level; where features are collected, of their N, H and W."""
        return self._of_head("logits")

    @property
    def boxes(self) -> list[Tensor]:
        """(N, C, H, W), likewise."""
        return self._of_head("boxes")

    def _of_head(self, name: str) -> list[Tensor]:
        found = self._collected(name)
        if self._sources["feats"] is None:
            return [_as_level(name, z) for z in found]
        feats = self.feats
        if len(found) == 1 and found[0].dim() == 3:
            return split_packed(found[0], [(x.shape[2], x.shape[3]) for x in feats], name)
        return _like_features(name, [_as_level(name, z) for z in found], feats)

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W), as the model has resized and normalised them."""
        found = self._collected("images")
        if len(found) != 1:
            raise ValueError(f"images: {len(found)} tensors were collected, one batch of images is needed")
        return found[0]

    def _collected(self, name: str) -> list[Tensor]:
        source = self._sources[name]
        if source is None:
            raise ValueError(f"{name}: not collected; name the module that emits them")
        if name in self._found:
            return self._found[name]
        found = self._tensors(name, source)
        if not found:
            names = ", ".join(repr(leaf.name) for leaf in _leaves(source))
            raise ValueError(
                f"{name}: {names} emitted nothing; it did not run in the forward pass, was given keywords alone, or "
                f"was compiled and ran before without hooks ({COMPILED})"
            )
        self._found[name] = found
        return found

    def _tensors(self, name: str, source: Source) -> list[Tensor]:
        if isinstance(source, str):
            source = Output(source)
        if isinstance(source, Mean):
            branches = [self._tensors(name, branch) for branch in source.sources]
            if len({len(branch) for branch in branches}) > 1:
                counts = ", ".join(str(len(branch)) for branch in branches)
                raise ValueError(f"{name}: the branches that are averaged emitted {counts} levels")
            return [torch.stack(levels).mean(0) for levels in zip(*branches, strict=True)]
        if isinstance(source, (Output, Input)):
            recorder = self._recorders[source]
            found = [x for call in recorder.calls for x in _flatten(name, recorder.source, call)]
            if recorder.versions != recorder.versions_now():
                raise ValueError(
                    f"{name}: what {source.name!r} emitted was changed in place afterwards; tap what changes it"
                )
            return self._through[name](found) if name in self._through else found
        return [x for each in source for x in self._tensors(name, each)]


class _Enough(BaseException):  # no Exception: a model may catch those around its head
    """Ends a pass in which all has been seen."""


class _Recorder:
    """The hook of one module, and what it has seen. A class, so that a model with its hooks can be pickled."""

    def __init__(self, module: nn.Module, source: Output | Input) -> None:
        self.module = module
        self.source = source
        self.calls: list[Any] = []
        self.versions: list[int] = []
        self.stop: tuple[list[_Recorder], Sequence[int]] | None = None
        self.then: Callable[[], None] | None = None

    def attach(self) -> Any:
        if isinstance(self.source, Input):
            return self.module.register_forward_pre_hook(self.see_input)
        return self.module.register_forward_hook(self.see_output)

    def see_input(self, module: nn.Module, arguments: Any) -> None:
        self._see(arguments if self.source.pick else tuple(map(_copied, arguments)))

    def see_output(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._see(_copied(output))

    def versions_now(self) -> list[int]:
        return _versions(self.calls)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "calls": [], "versions": [], "then": None}

    def _see(self, emitted: Any) -> None:
        if self.source.pick is not None:
            emitted = _copied(self.source.pick(emitted))
        self.calls.append(emitted)
        self.versions += _versions(emitted)
        if self.then is not None:
            self.then()
        if self.stop is not None and all(len(r.calls) >= n for r, n in zip(*self.stop, strict=True)):
            raise _Enough(self)


def _copied(emitted: Any) -> Any:
    """A list or dict may be filled with other tensors later: Ultralytics' head does that with the one it is given."""
    return copy.copy(emitted) if type(emitted) in (list, dict) else emitted


def tensors_in(nested: Any) -> list[Tensor]:
    """Those at hand, in lists, tuples and dicts of them."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, Mapping):
        nested = list(nested.values())
    return [t for each in nested for t in tensors_in(each)] if isinstance(nested, (list, tuple)) else []


def _versions(emitted: Any) -> list[int]:
    """Of tensors that have a version counter; those of inference mode have none."""
    return [t._version for t in tensors_in(emitted) if not t.is_inference()]


def _leaves(source: Source | None) -> list[Output | Input]:
    if source is None:
        return []
    if isinstance(source, str):
        return [Output(source)]
    if isinstance(source, (Output, Input)):
        return [source]
    if isinstance(source, Mean):
        return [leaf for each in source.sources for leaf in _leaves(each)]
    if not isinstance(source, Sequence):
        raise TypeError(f"a source is a name, Output, Input, Mean or a list of those, got {type(source).__name__}")
    return [leaf for each in source for leaf in _leaves(each)]


def _module(model: nn.Module, argument: str, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        last = name.rpartition(".")[2]
        near = [known for known, _ in model.named_modules() if known.rpartition(".")[2] == last][:5]
        known = near or [child for child, _ in model.named_children()]
        raise ValueError(
            f"{argument}: {type(model).__name__} has no module {name!r}; it has {', '.join(map(repr, known))}"
        ) from None


def _flatten(name: str, source: Output | Input, emitted: Any) -> list[Tensor]:
    """The tensors of one call, in order."""
    if isinstance(emitted, Tensor):
        return [emitted]
    if isinstance(emitted, Mapping):
        emitted = list(emitted.values())
    if isinstance(emitted, (list, tuple)) and all(isinstance(x, Tensor) for x in emitted):
        return list(emitted)
    if isinstance(source, Input) and isinstance(emitted, tuple) and len(emitted) == 1:
        return _flatten(name, Input(source.name), emitted[0])
    kind = type(source).__name__
    raise ValueError(
        f"{name}: the {kind.lower()} of {source.name!r} is a {type(emitted).__name__}, no tensor and no list or dict "
        f"of tensors; say what to take of it: {kind}({source.name!r}, pick=...)"
    )


def _as_level(name: str, x: Tensor) -> Tensor:
    if x.dim() != 4:
        raise ValueError(
            f"{name}: collected a tensor of shape {tuple(x.shape)}; levels are (N, C, H, W), or one packed (N, K, P) "
            "or (N, P, K) of a head's outputs beside collected features"
        )
    return x


def _like_features(name: str, levels: list[Tensor], feats: list[Tensor]) -> list[Tensor]:
    if len(levels) != len(feats):
        many = len(levels) > len(feats)
        hint = "; did the head run more than once in the pass?" if many and len(levels) % len(feats) == 0 else ""
        raise ValueError(f"{name}: {len(levels)} levels were collected, features have {len(feats)}{hint}")
    for level, (z, x) in enumerate(zip(levels, feats, strict=True)):
        if (z.shape[0], *z.shape[2:]) != (x.shape[0], *x.shape[2:]):
            raise ValueError(
                f"{name}[{level}] {tuple(z.shape)} and feats[{level}] {tuple(x.shape)} differ in N, H or W; the "
                "features are to be those that the head is given"
            )
    return levels


def split_packed(packed: Tensor, sizes: Sequence[tuple[int, int]], name: str = "logits") -> list[Tensor]:
    """Views (N, K, H, W) of levels packed as (N, K, P), or (N, P, K) with P = A * sum(H * W); then (N, A * K, H, W).

    Args:
        packed: levels one after another, positions row-major, anchors of a position side by side.
        sizes: each level's (H, W).
        name: of what is packed, for an error.

    Raises:
        ValueError: neither axis has as many elements as the levels have positions, or both do.
    """
    positions = sum(h * w for h, w in sizes)
    n, first, second = packed.shape
    in_columns = second == positions
    in_rows = positions > 0 and first % positions == 0 and first > 0
    if in_columns == in_rows:
        which = "both axes have" if in_columns else "no axis has"
        raise ValueError(
            f"{name} {tuple(packed.shape)}: {which} the {positions} positions of the levels {list(sizes)}; give the "
            "levels apart, or the features that the head is given"
        )
    # split, not slices: the gradient of each of those would be a tensor of the whole size.
    if in_columns:
        parts = packed.split([h * w for h, w in sizes], 2)
        return [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
    anchors = first // positions
    parts = packed.split([h * w * anchors for h, w in sizes], 1)
    return [
        part.reshape(n, h, w, anchors * second).permute(0, 3, 1, 2) for part, (h, w) in zip(parts, sizes, strict=True)
    ]
