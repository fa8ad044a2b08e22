"""Distilling any detector: what it emits (`Tap`), where to imitate (`masks`), student and teacher as one (`Distiller`).

Plain PyTorch: no framework is imported.
"""

from frs_kernels.distill import masks
from frs_kernels.distill.distiller import Distiller
from frs_kernels.distill.recipe import Recipe
from frs_kernels.distill.share import GradientShare
from frs_kernels.distill.tap import Input, Mean, Output, Tap
from frs_kernels.distill.teacher import fast_teacher

__all__ = ["Distiller", "GradientShare", "Input", "Mean", "Output", "Recipe", "Tap", "fast_teacher", "masks"]
