"""A new pointwise loss is one entry a language; one that is named and has no maths does not compile."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from building import CHECKOUT, CXX, needs_compiler, needs_sources
from cases import relative
from torch import Tensor
from truth import pyramid

from frs_kernels import backends, masked_imitation_loss
from frs_kernels.losses import LOSSES, Pointwise


def quartic(x: Tensor, z: Tensor, _: float, want_value: bool = True) -> tuple[Tensor | None, Tensor]:
    d = x - z
    return d**4 if want_value else None, 4 * d**3


def test_an_entry_of_losses_is_all_that_the_torch_backend_needs(rng, monkeypatch):
    monkeypatch.setitem(LOSSES, "quartic", Pointwise(quartic, takes_logits=False))
    p = pyramid(rng, dtype=torch.float64)
    mask = [torch.rand(s[:, 0].shape, generator=rng, dtype=torch.float64) for s in p.s]
    for grad_mode in ("forward", "backward"):
        loss = masked_imitation_loss(p.s, p.t, mask, loss="quartic", backend="torch", grad_mode=grad_mode)
        expected = sum((m[:, None] * (s - t) ** 4).sum() / m.sum() for s, t, m in zip(p.s, p.t, mask, strict=True))
        assert isinstance(expected, Tensor)
        assert relative(loss.detach(), expected.detach()) <= 1e-14
        for a, b in zip(torch.autograd.grad(loss, p.s), torch.autograd.grad(expected, p.s), strict=True):
            assert relative(a, b) <= 1e-14


def test_a_backend_that_has_no_maths_for_it_refuses_it(rng, monkeypatch):
    if backends.why_not("cpu", "cpu"):
        pytest.skip("no cpu backend")
    monkeypatch.setitem(LOSSES, "quartic", Pointwise(quartic, takes_logits=False))
    p = pyramid(rng)
    mask = [s[:, 0].detach().abs() for s in p.s]
    with pytest.raises(RuntimeError, match="loss 'quartic' is unknown; the valid ones are 'mse', 'l1'"):
        masked_imitation_loss(p.s, p.t, mask, loss="quartic", backend="cpu")


@pytest.mark.skipif(backends.why_not("triton", "cpu") is not None, reason="the interpreter is off")
def test_triton_has_no_other_loss_in_its_place(rng, monkeypatch):
    monkeypatch.setitem(LOSSES, "quartic", Pointwise(quartic, takes_logits=False))
    p = pyramid(rng)
    mask = [s[:, 0].detach().abs() for s in p.s]
    with pytest.raises(Exception, match=r"quartic|a loss without its maths"):
        masked_imitation_loss(p.s, p.t, mask, loss="quartic", backend="triton")


USE = """
#include "pointwise.h"
#include <cstdio>
#include <string>
using namespace frs;
int main() {
  for (int i = 0; i < static_cast<int>(Loss::COUNT); ++i)
    EveryPointwise::with(static_cast<Loss>(i), [](auto loss) {
      using Known = Traits<decltype(loss)::value>;
      const auto [value, slope] = Known::at(3.0, 1.0, 1.0);
      if (std::string(Known::name) == "quartic") std::printf("%g %g", value, slope);
    });
}
"""
TRAITS = """
template <>
struct Traits<Loss::quartic> {
  static constexpr const char* name = "quartic";
  static constexpr bool takes_logits = false;
  template <class V, class S>
  static FRS_INLINE Pointwise<V> at(V x, V z, S) {
    const V d = x - z, square = d * d;
    return {square * square, 4 * square * d};
  }
};

template <Loss L>
using LossConstant"""


def compile_with(folder: Path, named: bool, traits: bool) -> subprocess.CompletedProcess[str]:
    text = (CHECKOUT / "csrc/pointwise.h").read_text()
    if named:
        text, count = re.subn(r"(enum class Loss[^}]*?)POINTWISE,", r"\1quartic, POINTWISE,", text)
        assert count == 1
    if traits:
        text, count = re.subn(r"\ntemplate <Loss L>\nusing LossConstant", lambda _: TRAITS, text)
        assert count == 1
    (folder / "pointwise.h").write_text(text)
    (folder / "use.cpp").write_text(USE)
    command = [str(CXX), "-std=c++20", "-O0", "use.cpp", "-o", "use"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@needs_sources
@needs_compiler
def test_a_loss_without_traits_does_not_compile(tmp_path):
    assert compile_with(tmp_path, named=False, traits=False).returncode == 0
    done = compile_with(tmp_path, named=True, traits=False)
    assert done.returncode != 0
    assert "Traits" in done.stderr


@needs_sources
@needs_compiler
def test_traits_are_all_that_it_needs(tmp_path):
    done = compile_with(tmp_path, named=True, traits=True)
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["./use"], cwd=tmp_path, capture_output=True, text=True).stdout == "16 32"
