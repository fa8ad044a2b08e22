"""Fused kernels for distilling object detectors with the Feature-Richness Score (Du et al., NeurIPS 2021)."""

from frs_kernels import backends
from frs_kernels.diagnosis import Diagnosis, check
from frs_kernels.distill import Distiller, Tap, masks
from frs_kernels.functional import FSRTerms, Richness, fsr_loss, masked_imitation_loss, richness_mask
from frs_kernels.modules import FeatureAdapter, FSRLoss
from frs_kernels.presets import PRESETS
from frs_kernels.version import __version__

__all__ = [
    "PRESETS",
    "Diagnosis",
    "Distiller",
    "FSRLoss",
    "FSRTerms",
    "FeatureAdapter",
    "Richness",
    "Tap",
    "__version__",
    "backends",
    "check",
    "fsr_loss",
    "masked_imitation_loss",
    "masks",
    "richness_mask",
]
