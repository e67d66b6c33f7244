/* exp and what is made of it, the norm of a row, and rotation: fixed operations on each lane. */
#ifndef REGROW_NONLINEAR_H
#define REGROW_NONLINEAR_H

#include "vec16.h"

INLINE vec16 clamp16(vec16 x, float low, float high)
{
    /* NaN compares false and stays what it is. */
    x = choose16(x < low, all16(low), x);
    return choose16(x > high, all16(high), x);
}

/* e^x to about one unit in the last place, for x in -87..88 and limited to that: x = n ln 2 + r with |r| <= ln 2 / 2,
 * e^r by a polynomial of degree 6, times 2^n. The coefficients are those of Taylor's series with the last two moved so
 * that the largest error on the interval is least (as in Cephes' expf). */
INLINE vec16 exp16(vec16 x)
{
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    x = clamp16(x, -87.0f, 88.0f);
    const vec16 shifted = fma16(x, all16(1.44269504088896341f), all16(to_integer));
    const vec16 n = shifted - to_integer;
    vec16 r = fma16(n, all16(-0.693359375f), x);
    r = fma16(n, all16(2.12194440e-4f), r);
    vec16 p = all16(1.9875691500e-4f);
    p = fma16(p, r, all16(1.3981999507e-3f));
    p = fma16(p, r, all16(8.3334519073e-3f));
    p = fma16(p, r, all16(4.1665795894e-2f));
    p = fma16(p, r, all16(1.6666665459e-1f));
    p = fma16(p, r, all16(5.0000001201e-1f));
    p = fma16(p, r * r, r) + 1.0f;
    const int16x32 exponent = ((int16x32)shifted - 0x4b400000 + 127) << 23;
    return p * (vec16)exponent;
}

INLINE vec16 sigmoid16(vec16 x) { return 1.0f / (1.0f + exp16(-x)); }

INLINE vec16 silu16(vec16 x) { return x / (1.0f + exp16(-x)); }

/* out = x / sqrt(mean(x^2) + eps) * weight, the squares added in sixteen chains and these as sum16 does. */
INLINE void rms_norm(const float *x, const float *weight, float eps, int64_t size, float *out)
{
    vec16 squares = all16(0.0f);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares = fma16(load16(x + i), load16(x + i), squares);
    if (i < size) {
        const vec16 rest = load_part16(x + i, size - i);
        squares = fma16(rest, rest, squares);
    }
    const float scale = 1.0f / sqrtf(sum16(squares) / (float)size + eps);
    for (i = 0; i + LANES <= size; i += LANES) store16(out + i, load16(x + i) * scale * load16(weight + i));
    if (i < size)
        store_part16(out + i, load_part16(x + i, size - i) * scale * load_part16(weight + i, size - i), size - i);
}

/* Pairs (a, b) of neighbours times the complex numbers cos + i sin, in place. */
INLINE void rotate(float *pairs, const float *turn, int64_t num_pairs)
{
    for (int64_t i = 0; i < num_pairs; i++) {
        const float a = pairs[2 * i], b = pairs[2 * i + 1], cosine = turn[2 * i], sine = turn[2 * i + 1];
        pairs[2 * i] = __builtin_fmaf(a, cosine, -(b * sine));
        pairs[2 * i + 1] = __builtin_fmaf(a, sine, b * cosine);
    }
}

#endif
