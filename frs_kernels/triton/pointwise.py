"""The pointwise losses of the Triton kernels: value and slope of a student's x against a teacher's z.

    mse         (x - z)^2                                           2 (x - z)
    l1          |x - z|                                             sign(x - z)
    smooth_l1   d^2 / (2 beta) where |d| < beta, else |d| - beta/2  d / beta, or sign(d)        d = x - z
    bce         log1p(e) + |x| miss                                 sign(x) (miss - tail) = sigmoid(x) - sigmoid(z)
    kl          bce(x, z) - bce(z, z)                               as bce
    qfl         |d|^beta bce(x, z)                                  |d|^beta d + beta |d|^(beta-1) sign(d) p (1 - p) bce
    qfl_detached  as qfl                                            |d|^beta d          d = p - q, the slope of bce

with e = exp(-|x|), tail = e / (1 + e) = sigmoid(-|x|), and miss = sigmoid(-z) where x >= 0, sigmoid(z) where x < 0.
Mirrored so that the student is on the positive side, nothing cancels where a logit saturates (docs/math.md), and the
slope is exactly 0 where x and z agree. p = sigmoid(x), q = sigmoid(z); beta = 0 is bce, under that name.
"""

import triton
import triton.language as tl

# The losses that are 0 where x and z are: what does not exist is read as 0 and adds nothing. The others are masked.
ZERO_AT_ZERO = ("mse", "l1", "smooth_l1", "kl", "qfl", "qfl_detached")
# The interpreter knows no machine code.
COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


@triton.jit
def magnitude(x):
    """|x|, opaque: where x was widened from bf16 the compiler would take it before, in three instructions, not none."""
    if COMPILED and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return tl.abs(x)


@triton.jit
def exp_of_minus(a):
    """exp(-a) for a >= 0, 0 below the normal numbers: the guard against that takes four instructions."""
    if COMPILED and a.dtype == tl.float32:
        power = a * -1.4426950408889634
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], tl.float32, True, 1)
    else:
        return tl.exp(-a)


@triton.jit
def reciprocal(a):
    """1 / a within an ulp, for a in [1, 2]: the guards of a division, seven instructions, are for other numbers."""
    if COMPILED and a.dtype == tl.float32:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], tl.float32, True, 1)
    else:
        return 1.0 / a


@triton.jit
def rounded_product(a, b):
    """a b, rounded. Fused with its difference from a product that is rounded, it would leave no 0 where both agree."""
    if COMPILED and a.dtype == tl.float32:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, True, 1)
    elif COMPILED:
        return tl.inline_asm_elementwise("mul.rn.f64 $0, $1, $2;", "=d,d,d", [a, b], tl.float64, True, 1)
    else:
        return a * b


@triton.jit
def log1p_of(e):
    """log1p(e) for e in [0, 1], to the last digits also where log(1 + e) would lose them all: logits below -9, most of
    a detector's.

    fp32: e P(e), fitted with P(0) = 1 to 2^-27.5 relative; the whole stays within 1.7 ulp. tl.log is within 2^-22
    absolute only, and the interpreter has no log1p. fp64: log(u) with u = 1 + e, plus what rounding u lost.
    """
    if e.dtype == tl.float64:
        u = 1.0 + e
        return tl.log(u) + (e - (u - 1.0)) / u
    else:
        p = -3.318471608e-03 * e + 2.020457966e-02
        p = p * e - 5.766443201e-02
        p = p * e + 1.0680554e-01
        p = p * e - 1.535539522e-01
        p = p * e + 1.969540009e-01
        p = p * e - 2.495858732e-01
        p = p * e + 3.333051131e-01
        p = p * e - 4.999993276e-01
        return e + e * (e * p)


@triton.jit
def log_of(a):
    """log(a) for a >= 1 within an ulp or two: tl.log is not as good. a = 2^k m with m in [1, 2)."""
    if a.dtype == tl.float64:
        return tl.log(a)
    else:
        bits = a.to(tl.int32, bitcast=True)
        m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        return ((bits >> 23) - 127).to(tl.float32) * 0.6931471805599453 + log1p_of(m - 1.0)


@triton.jit
def bernoulli(x, z, KL: tl.constexpr):
    """bce or kl of the logits x against z, and sigmoid(x) - sigmoid(z)."""
    a, a_z = magnitude(x), magnitude(z)
    e, e_z = exp_of_minus(a), exp_of_minus(a_z)
    head, head_z = reciprocal(1.0 + e), reciprocal(1.0 + e_z)
    tail, tail_z = rounded_product(e, head), rounded_product(e_z, head_z)
    miss = tl.where((x >= 0) == (z >= 0), tail_z, head_z)
    value = log1p_of(e) + a * miss
    if KL:
        value -= log1p_of(e_z) + a_z * tail_z
    slope = miss - tail
    return value, tl.where(x >= 0, slope, -slope)


@triton.jit
def sign_of(d):
    """-1, 0 or 1; NaN stays NaN."""
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))


@triton.jit
def power_of(a, s):
    """a^s for a in [0, 1] and s > -1, that of the smallest normal number where a is less: 0 times it is 0.

    a = 2^k m with m around 1, and 2^n 2^f with n whole and f = s k - n + s log2(m): an error of the logarithm is one of
    m's, not of one as large as that of a, which would cost a digit or two.
    """
    if a.dtype == tl.float64:
        bits = tl.where(a < 2.2250738585072014e-308, 2.2250738585072014e-308, a).to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
        k, m = exponent.to(tl.float64), (bits - (exponent << 52)).to(tl.float64, bitcast=True)
    else:
        bits = tl.where(a < 1.1754943508222875e-38, 1.1754943508222875e-38, a).to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) >> 23
        k, m = exponent.to(tl.float32), (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    log2_m = tl.log2(m)
    n = tl.floor(s * (k + log2_m) + 0.5)
    return tl.exp2(tl.fma(log2_m, s, tl.fma(k, s, -n))) * tl.exp2(n)


@triton.jit
def quality_focal(x, z, beta, DETACHED: tl.constexpr):
    """bce times |d|^beta. One power serves both parts of the slope, which have the same sign: nothing cancels."""
    bce, d = bernoulli(x, z, False)
    a = tl.abs(d)
    if beta == 1:
        power = tl.full(a.shape, 1.0, a.dtype)
    elif beta == 2:
        power = a
    else:
        power = power_of(a, beta - 1)
    weight = a * power
    slope = weight * d
    if not DETACHED:
        e = exp_of_minus(magnitude(x))
        head = reciprocal(1.0 + e)
        slope += sign_of(d) * ((beta * power) * (e * head * head) * bce)
    return weight * bce, slope


@triton.jit
def pointwise(x, z, beta, inverse_beta, LOSS: tl.constexpr):
    """Value and slope; smooth_l1 and qfl read beta, and smooth_l1 its inverse, which is 0 where beta is."""
    IS_QFL: tl.constexpr = LOSS == "qfl" or LOSS == "qfl_detached"
    tl.static_assert(
        LOSS == "mse" or LOSS == "l1" or LOSS == "smooth_l1" or LOSS == "bce" or LOSS == "kl" or IS_QFL,
        "a loss without its maths",
    )
    if LOSS == "mse":
        d = x - z
        return d * d, 2.0 * d
    elif LOSS == "l1":
        d = x - z
        return tl.abs(d), sign_of(d)
    elif LOSS == "smooth_l1":
        d = x - z
        slope = tl.where(tl.abs(d) < beta, d * inverse_beta, sign_of(d))
        return slope * (d - slope * (0.5 * beta)), slope
    elif IS_QFL:
        return quality_focal(x, z, beta, LOSS == "qfl_detached")
    else:
        tl.static_assert(LOSS == "bce" or LOSS == "kl", "a loss without its maths")
        return bernoulli(x, z, LOSS == "kl")


@triton.jit
def sigmoid(x):
    """For the scores: one a position, so it keeps the numbers that `exp_of_minus` flushes to 0."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)
