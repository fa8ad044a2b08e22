"""Fused kernels for distilling object detectors with the Feature-Richness Score (Du et al., NeurIPS 2021)."""

from frs_kernels import backends
from frs_kernels.diagnosis import Diagnosis, check
from frs_kernels.distill import Distiller, Tap, masks
from frs_kernels.functional import fsr_loss, masked_imitation_loss, richness_mask
from frs_kernels.heads import localization_distillation, quality_focal_distillation
from frs_kernels.modules import (
    CWDLoss,
    FeatureAdapter,
    FSRLoss,
    LocalizationDistillation,
    PKDLoss,
    QualityFocalDistillation,
)
from frs_kernels.presets import PRESETS
from frs_kernels.results import FSRTerms, ImitationTerms, Richness, RowTerms
from frs_kernels.rows import cwd_loss, pkd_loss
from frs_kernels.version import __version__

frs_loss = fsr_loss
"""Another spelling: FRS is the paper's name of the score."""

__all__ = [
    "PRESETS",
    "CWDLoss",
    "Diagnosis",
    "Distiller",
    "FSRLoss",
    "FSRTerms",
    "FeatureAdapter",
    "ImitationTerms",
    "LocalizationDistillation",
    "PKDLoss",
    "QualityFocalDistillation",
    "Richness",
    "RowTerms",
    "Tap",
    "__version__",
    "backends",
    "check",
    "cwd_loss",
    "frs_loss",
    "fsr_loss",
    "localization_distillation",
    "masked_imitation_loss",
    "masks",
    "pkd_loss",
    "quality_focal_distillation",
    "richness_mask",
]
