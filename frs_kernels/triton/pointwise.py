"""The pointwise maths of the Triton kernels: loss and slope of one student value against one teacher value.

    mse   value = (x - z)^2                             slope = 2 (x - z)
    bce   value = log1p(e) + |x| miss                   slope = sign(x) (miss - tail)  = sigmoid(x) - sigmoid(z)
    kl    value = bce(x, z) - bce(z, z)                 slope as bce

with e = exp(-|x|), tail = e / (1 + e) = sigmoid(-|x|), and miss = sigmoid(-z) where x >= 0, sigmoid(z) where x < 0.
Mirrored so that the student is on the positive side, nothing cancels where a logit saturates (docs/math.md).
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tail_and_log1p(e):
    """e / (1 + e) and log1p(e) for e in [0, 1], one reciprocal for both.

    fp32: with t = e / (2 + e), log1p(e) = 2 atanh(t) = e - t (e - t^2 P(t^2)). P is fitted on t^2 in [0, 1/9] to
    2^-27.7 relative; the whole stays within 1.6 ulp, also where log(1 + e) would lose all digits (logits below -9,
    most of a detector's). tl.log is within 2^-22 absolute only, and the interpreter has no log1p.
    fp64: log(u) with u = 1 + e, plus what rounding u lost.
    """
    if e.dtype == tl.float64:
        u = 1.0 + e
        tail = e / u
        log1p = tl.log(u) + (e - (u - 1.0)) / u
    else:
        r = 1.0 / ((1.0 + e) * (2.0 + e))
        tail = e * (2.0 + e) * r
        t = e * (1.0 + e) * r
        q = t * t
        p = ((2.801204871e-01 * q + 2.800179067e-01) * q + 4.002152834e-01) * q + 6.666641626e-01
        log1p = e - t * (e - q * p)
    return tail, log1p


@triton.jit
def bernoulli(x, z, KL: tl.constexpr):
    """bce or kl of the logits x against z, and sigmoid(x) - sigmoid(z)."""
    tail, log1p = tail_and_log1p(tl.exp(-tl.abs(x)))
    tail_z, log1p_z = tail_and_log1p(tl.exp(-tl.abs(z)))
    miss = tl.where((x >= 0) == (z >= 0), tail_z, 1.0 - tail_z)
    value = log1p + tl.abs(x) * miss
    if KL:
        value -= log1p_z + tl.abs(z) * tail_z
    slope = miss - tail
    return value, tl.where(x >= 0, slope, -slope)


@triton.jit
def pointwise(x, z, inverse_temperature, temperature, LOSS: tl.constexpr):
    """Value and slope; `temperature` scales the logits only (mse ignores it)."""
    if LOSS == "mse":
        d = x - z
        return d * d, 2.0 * d
    else:
        value, slope = bernoulli(x * inverse_temperature, z * inverse_temperature, LOSS == "kl")
        return value * (temperature * temperature), slope * temperature
