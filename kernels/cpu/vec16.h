/* Sixteen floats at a time, the same bits on every processor.
 *
 * A library is compiled for each instruction set (build.py): with AVX-512 a vec16 is one register, and otherwise the
 * compiler's business, who keeps it in memory: what is worth it has a vecn there. All operations are IEEE ones on each lane (fused multiply-add rounds once, in
 * hardware or in libm), and sums across lanes have one order, so the width of the machine never shows.
 * Products and sums are fused only where fma16 or fmaf says so: everything is compiled with -ffp-contract=off.
 */
#ifndef REGROW_VEC16_H
#define REGROW_VEC16_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum { LANES = 16 };
typedef float vec16 __attribute__((vector_size(64)));
typedef int32_t int16x32 __attribute__((vector_size(64)));
typedef float loose16 __attribute__((vector_size(64), aligned(4), may_alias));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE vec16 load16(const float *from) { return *(const loose16 *)from; }
INLINE void store16(float *to, vec16 x) { *(loose16 *)to = x; }
INLINE vec16 all16(float x) { return (vec16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* The first `count` lanes from memory, the others zero; nothing beyond them is touched. */
INLINE vec16 load_part16(const float *from, int64_t count)
{
#if defined(__AVX512F__)
    return (vec16)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1u), from);
#else
    vec16 x = all16(0.0f);
    memcpy(&x, from, (size_t)count * sizeof(float));
    return x;
#endif
}

INLINE void store_part16(float *to, vec16 x, int64_t count)
{
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(to, (__mmask16)((1u << count) - 1u), (__m512)x);
#else
    memcpy(to, &x, (size_t)count * sizeof(float));
#endif
}

/* a where the mask has all bits set, b where it has none. */
INLINE vec16 choose16(int16x32 mask, vec16 a, vec16 b) { return (vec16)((mask & (int16x32)a) | (~mask & (int16x32)b)); }

/* a * b + c, rounded once. */
INLINE vec16 fma16(vec16 a, vec16 b, vec16 c)
{
#if defined(__AVX512F__)
    return (vec16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    union { vec16 whole; __m256 half[2]; } x = {a}, y = {b}, z = {c};
    z.half[0] = _mm256_fmadd_ps(x.half[0], y.half[0], z.half[0]);
    z.half[1] = _mm256_fmadd_ps(x.half[1], y.half[1], z.half[1]);
    return z.whole;
#else
    for (int lane = 0; lane < LANES; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#endif
}

/* A vector of as many floats as a register holds, where elements are independent and lanes have no meaning. */
#if defined(__AVX512F__)
enum { NATIVE = 16 };
typedef vec16 vecn;
INLINE vecn loadn(const float *from) { return load16(from); }
INLINE void storen(float *to, vecn x) { store16(to, x); }
INLINE vecn alln(float x) { return all16(x); }
INLINE vecn load_partn(const float *from, int64_t count) { return load_part16(from, count); }
INLINE void store_partn(float *to, vecn x, int64_t count) { store_part16(to, x, count); }
INLINE vecn fman(vecn a, vecn b, vecn c) { return fma16(a, b, c); }
#else
enum { NATIVE = 8 };
typedef float vecn __attribute__((vector_size(32)));
typedef int32_t intn __attribute__((vector_size(32)));
typedef float loosen __attribute__((vector_size(32), aligned(4), may_alias));
INLINE vecn loadn(const float *from) { return *(const loosen *)from; }
INLINE void storen(float *to, vecn x) { *(loosen *)to = x; }
INLINE vecn alln(float x) { return (vecn){x, x, x, x, x, x, x, x}; }
INLINE vecn load_partn(const float *from, int64_t count)
{
#if defined(__AVX2__)
    const intn lane = {0, 1, 2, 3, 4, 5, 6, 7};
    return (vecn)_mm256_maskload_ps(from, (__m256i)(lane < (int32_t)count));
#else
    vecn x = alln(0.0f);
    memcpy(&x, from, (size_t)count * sizeof(float));
    return x;
#endif
}
INLINE void store_partn(float *to, vecn x, int64_t count) { memcpy(to, &x, (size_t)count * sizeof(float)); }
INLINE vecn fman(vecn a, vecn b, vecn c)
{
#if defined(__FMA__)
    return (vecn)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int lane = 0; lane < NATIVE; lane++) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return c;
#endif
}
#endif

/* The sum of all lanes: lane l and l + 8 first, then l + 4, l + 2, l + 1. */
INLINE float sum16(vec16 x)
{
    float part[LANES];
    memcpy(part, &x, sizeof part);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; lane++) part[lane] += part[lane + width];
    return part[0];
}

#endif
