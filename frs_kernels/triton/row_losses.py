"""The losses along rows of the Triton kernels: sums of a part of a row, the numbers of a row, the gradient.

    pkd   a row: a channel over N, H, W.       gradient = a (s - s0) - b (t - t0) + c
          sums of d = s - pivot, e = t - pivot', d^2, e^2 and d e, the pivots being numbers of the part
    cwd   a row: a channel of an image.        gradient = a exp((s - s0) / tau) - b exp((t - t0) / tau)
          sums of exp((s - pivot) / tau), exp((t - pivot') / tau), and of the latter times
          (t - pivot') - (s - pivot), the pivots being the part's maxima

A thread's sums are fp32, about the pivots of its part. The rest is fp64, once a part and channel: pkd's value is what
is left of sums that nearly cancel. It is about the pivots of the row's first part (pkd), or the row's maxima (cwd).
frs_kernels/row_losses.py has the formulas of the numbers.

Where student and teacher agree pkd's three sums of squares are the same bits, or its value would not be 0. So what a
compiler could fuse in one way or another is spelt out.
"""

import triton
import triton.language as tl

from frs_kernels.triton.pointwise import COMPILED

# Numbers of a part and channel: two pivots, then the sums. cwd has three of those.
STORED = tl.constexpr(7)
# Parts and channels that 128 threads add up at once: with twice as many pkd's registers are spilled.
AT_ONCE = tl.constexpr(256)


@triton.jit
def weight_below(distance, rate):
    """exp(-distance / tau) with rate = log2(e) / tau, 0 below the normal numbers: two instructions."""
    if COMPILED and distance.dtype == tl.float32:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [distance * -rate], tl.float32, True, 1)
    else:
        return tl.exp2(distance * -rate)


@triton.jit
def add_step(sums, x, z, mask, pivot_x, pivot_z, rate, LOSS: tl.constexpr):
    """The sums, with those of a step. What does not exist, read as 0 (pkd) or -inf (cwd), adds nothing."""
    tl.static_assert(LOSS == "pkd" or LOSS == "cwd", "a loss without its maths")
    if LOSS == "pkd":
        d, e = tl.where(mask, x - pivot_x, 0.0), tl.where(mask, z - pivot_z, 0.0)
        return sums[0] + d, sums[1] + e, tl.fma(d, d, sums[2]), tl.fma(e, e, sums[3]), tl.fma(d, e, sums[4])
    else:
        d, e = pivot_x - x, pivot_z - z
        p, q = weight_below(d, rate), weight_below(e, rate)
        return sums[0] + p, sums[1] + q, tl.fma(q, tl.where(mask, d - e, 0.0), sums[2])


@triton.jit
def load_stored(slots, k, mask, other, STRIDE: tl.constexpr):
    # .cg: past L1, which may hold a line from before the others' stores
    return tl.load(slots + k * STRIDE, mask=mask, other=other, cache_modifier=".cg")


@triton.jit
def moved(product, d, e, count, by_s, by_t):
    """A sum of d e about other pivots, `by_s` and `by_t` below these."""
    return tl.fma(by_t, tl.fma(count, by_s, d), tl.fma(by_s, e, product))


@triton.jit
def pkd_sums(slots, apart, each, count, BLOCK_C: tl.constexpr, STRIDE: tl.constexpr):
    """Pivots and sums of `count` numbers, parts of `each` that lie `apart`; the last part may have fewer."""
    PARTS: tl.constexpr = AT_ONCE // BLOCK_C
    parts = tl.cdiv(count, each)
    slots += tl.arange(0, BLOCK_C)[None, :]
    pivot_s, pivot_t = load_stored(slots, 0, None, None, STRIDE), load_stored(slots, 1, None, None, STRIDE)
    zero = tl.zeros((PARTS, BLOCK_C), tl.float64)
    d_sum, e_sum, dd_sum, ee_sum, de_sum = zero, zero, zero, zero, zero
    for i in range(0, parts, PARTS):
        part = (i + tl.arange(0, PARTS))[:, None]
        here, at = part < parts, slots + part.to(tl.int64) * apart
        size = tl.where(here, tl.minimum(count - part.to(tl.int64) * each, each), 0).to(tl.float64)
        by_s = tl.where(here, load_stored(at, 0, here, 0.0, STRIDE) - pivot_s, 0.0)
        by_t = tl.where(here, load_stored(at, 1, here, 0.0, STRIDE) - pivot_t, 0.0)
        d, e = load_stored(at, 2, here, 0.0, STRIDE), load_stored(at, 3, here, 0.0, STRIDE)
        dd_sum += moved(load_stored(at, 4, here, 0.0, STRIDE), d, d, size, by_s, by_s)
        ee_sum += moved(load_stored(at, 5, here, 0.0, STRIDE), e, e, size, by_t, by_t)
        de_sum += moved(load_stored(at, 6, here, 0.0, STRIDE), d, e, size, by_s, by_t)
        d_sum += tl.fma(size, by_s, d)
        e_sum += tl.fma(size, by_t, e)
    sums = (tl.sum(d_sum, 0), tl.sum(e_sum, 0), tl.sum(dd_sum, 0), tl.sum(ee_sum, 0), tl.sum(de_sum, 0))
    return tl.sum(pivot_s, 0), tl.sum(pivot_t, 0), sums


@triton.jit
def weight_of(most, of_row, tau):
    """exp((most - of_row) / tau), also of two infinities that are equal."""
    return tl.where(most == of_row, 1.0, tl.exp((most - of_row) / tau))


@triton.jit
def cwd_sums(slots, apart, parts, tau, BLOCK_C: tl.constexpr, STRIDE: tl.constexpr):
    """Maxima and sums of rows whose parts lie `apart`."""
    PARTS: tl.constexpr = AT_ONCE // BLOCK_C
    NOTHING: tl.constexpr = float("-inf")
    slots += tl.arange(0, BLOCK_C)[None, :]
    zero = tl.zeros((PARTS, BLOCK_C), tl.float64)
    most_s, most_t = zero + NOTHING, zero + NOTHING
    for i in range(0, parts, PARTS):
        part = (i + tl.arange(0, PARTS))[:, None]
        here, at = part < parts, slots + part.to(tl.int64) * apart
        most_s = tl.maximum(most_s, load_stored(at, 0, here, NOTHING, STRIDE))
        most_t = tl.maximum(most_t, load_stored(at, 1, here, NOTHING, STRIDE))
    row_s, row_t = tl.max(most_s, 0), tl.max(most_t, 0)
    z_s, z_t, differences = zero, zero, zero
    for i in range(0, parts, PARTS):
        part = (i + tl.arange(0, PARTS))[:, None]
        here, at = part < parts, slots + part.to(tl.int64) * apart
        part_s, part_t = load_stored(at, 0, here, NOTHING, STRIDE), load_stored(at, 1, here, NOTHING, STRIDE)
        of_s, of_t = weight_of(part_s, row_s[None, :], tau), weight_of(part_t, row_t[None, :], tau)
        total = load_stored(at, 3, here, 0.0, STRIDE)
        more = tl.where(here, total * ((part_t - row_t[None, :]) - (part_s - row_s[None, :])), 0.0)
        z_s += load_stored(at, 2, here, 0.0, STRIDE) * of_s
        z_t += total * of_t
        differences += (load_stored(at, 4, here, 0.0, STRIDE) + more) * of_t
    return row_s, row_t, (tl.sum(z_s, 0), tl.sum(z_t, 0), tl.sum(differences, 0))


@triton.jit
def within(v, most):
    return tl.where(v > most, most, tl.where(v < -most, -most, v))


@triton.jit
def inverse_of(deviation, eps):
    return tl.where(deviation + eps == 0, 0.0, 1.0 / (deviation + eps))


@triton.jit
def pkd_numbers(pivot_s, pivot_t, sums, count, share, eps, DTYPE: tl.constexpr):
    """The numbers of rows of `count` numbers each, s0 and t0 as they are stored, and their values times `share`."""
    d_sum, e_sum, dd_sum, ee_sum, de_sum = sums
    d, e = d_sum / count, e_sum / count
    square_s, square_t = tl.fma(-d, d_sum, dd_sum), tl.fma(-e, e_sum, ee_sum)
    square_s, square_t = tl.where(square_s < 0, 0.0, square_s), tl.where(square_t < 0, 0.0, square_t)
    most = tl.where(square_s == square_t, square_s, tl.sqrt(square_s) * tl.sqrt(square_t))
    product = within(tl.fma(-d, e_sum, de_sum), most)
    others = tl.maximum(count - 1, 1.0)
    sigma, rho = tl.sqrt(square_s / others), tl.sqrt(square_t / others)
    p, q = inverse_of(sigma, eps), inverse_of(rho, eps)
    pull = tl.where(sigma == 0, 0.0, p * q * product / (others * sigma))
    a, b = share * p * (eps * p * p + pull), share * p * q
    s0, t0 = (pivot_s + d).to(DTYPE), (pivot_t + e).to(DTYPE)
    c = b * (pivot_t - t0.to(tl.float64) + e) - a * (pivot_s - s0.to(tl.float64) + d)
    # p^2 S + q^2 T - 2 p q X without the terms that cancel where p and q are far apart. Quotients, as products could
    # be fused with their difference.
    apart = tl.where(sigma == 0, 0.0, sigma / (sigma + eps)) - tl.where(rho == 0, 0.0, rho / (rho + eps))
    value = (others * apart * apart + 2.0 * p * q * (most - product)) * (share / 2)
    if count < 2:
        a, b, c, s0, t0 = tl.zeros_like(a), tl.zeros_like(b), tl.zeros_like(c), tl.zeros_like(s0), tl.zeros_like(t0)
        value = d_sum * 0.0  # NaN of a NaN
    return (s0, t0, a, b, c), value


@triton.jit
def cwd_numbers(most_s, most_t, sums, share, tau):
    """As `pkd_numbers`, of rows' maxima and the sums about them."""
    z_s, z_t, differences = sums
    value = differences / z_t / tau + (tl.log(z_s) - tl.log(z_t))
    return (most_s, most_t, share * tau / z_s, share * tau / z_t, tl.zeros_like(z_s)), value * (share * tau * tau)


@triton.jit
def slope_of(x, z, numbers, rate, LOSS: tl.constexpr):
    """The gradient; a, b and c have been multiplied by weight and factor."""
    tl.static_assert(LOSS == "pkd" or LOSS == "cwd", "a loss without its maths")
    s0, t0, a, b, c = numbers
    if LOSS == "pkd":
        return a * (x - s0) - (b * (z - t0) - c)
    else:
        return a * weight_below(s0 - x, rate) - b * weight_below(t0 - z, rate)
