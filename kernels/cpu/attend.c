#include "attend.h"
#include "nonlinear.h"

/* Heads and keys of a tile of scores: their sums fill one vector. */
enum { HEADS = 4, KEYS = 4 };
/* Vectors of a value worked on together: what registers hold beside those of HEADS heads. */
#if defined(__AVX512F__)
enum { VALUES = 4 };
#else
enum { VALUES = 2 };
#endif
static const float LEAST_EXPONENT = -64.0f; /* beyond it nothing shows, and denormal numbers are slow */

static int64_t padded(int64_t num_keys) { return (num_keys + LANES - 1) / LANES * LANES; }

int64_t attend_scratch(int64_t num_keys) { return HEADS * padded(num_keys); }

#if defined(__AVX512F__)
#if defined(__clang__)
#define SHUFFLE(p, q, ...) __builtin_shufflevector(p, q, __VA_ARGS__)
#else
#define SHUFFLE(p, q, ...) __builtin_shuffle(p, q, (int16x32){__VA_ARGS__})
#endif
/* Lanes without the bit of `width`: p[l] + p[l + width]; lanes with it: q[l] + q[l - width]. */
INLINE vec16 fold8(vec16 p, vec16 q)
{
    return SHUFFLE(p, q, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) +
           SHUFFLE(p, q, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
}
INLINE vec16 fold4(vec16 p, vec16 q)
{
    return SHUFFLE(p, q, 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) +
           SHUFFLE(p, q, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
}
INLINE vec16 fold2(vec16 p, vec16 q)
{
    return SHUFFLE(p, q, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +
           SHUFFLE(p, q, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
}
INLINE vec16 fold1(vec16 p, vec16 q)
{
    return SHUFFLE(p, q, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +
           SHUFFLE(p, q, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
}

/* sum16 of sixteen vectors at once. */
INLINE vec16 sums_of(const vec16 x[LANES])
{
    vec16 by8[8], by4[4];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) by8[i] = fold8(x[i], x[i + 8]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) by4[i] = fold4(by8[i], by8[i + 4]);
    return fold1(fold2(by4[0], by4[2]), fold2(by4[1], by4[3]));
}
/* Lane h * KEYS + k: head h's query times key k. */
static void score_tile(const float *const query[HEADS], const float *const key[KEYS], int64_t size, float *score)
{
    vec16 sum[HEADS * KEYS];
#pragma GCC unroll 16
    for (int i = 0; i < HEADS * KEYS; i++) sum[i] = all16(0.0f);
    for (int64_t c = 0; c < size; c += LANES) {
        const int is_whole = c + LANES <= size;
        vec16 key_c[KEYS];
#pragma GCC unroll 4
        for (int k = 0; k < KEYS; k++) key_c[k] = is_whole ? load16(key[k] + c) : load_part16(key[k] + c, size - c);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            const vec16 query_c = is_whole ? load16(query[h] + c) : load_part16(query[h] + c, size - c);
#pragma GCC unroll 4
            for (int k = 0; k < KEYS; k++) sum[h * KEYS + k] = fma16(query_c, key_c[k], sum[h * KEYS + k]);
        }
    }
    store16(score, sums_of(sum));
}
#else
/* Lane h * KEYS + k: head h's query times key k. The sixteen chains of a score lie in two vectors. */
static void score_tile(const float *const query[HEADS], const float *const key[KEYS], int64_t size, float *score)
{
    for (int h = 0; h < HEADS; h++) {
        vecn low[KEYS], high[KEYS];
#pragma GCC unroll 4
        for (int k = 0; k < KEYS; k++) low[k] = high[k] = alln(0.0f);
        for (int64_t c = 0; c < size; c += LANES) {
            const int64_t left = size - c;
            const int64_t first = least(left, NATIVE), second = left > NATIVE ? least(left - NATIVE, NATIVE) : 0;
            const int is_whole = left >= LANES;
            const float *const from = query[h] + c;
            const vecn query_low = is_whole ? loadn(from) : load_partn(from, first);
            const vecn query_high = is_whole ? loadn(from + NATIVE) : load_partn(from + NATIVE, second);
#pragma GCC unroll 4
            for (int k = 0; k < KEYS; k++) {
                const float *const of_key = key[k] + c;
                const vecn key_low = is_whole ? loadn(of_key) : load_partn(of_key, first);
                const vecn key_high = is_whole ? loadn(of_key + NATIVE) : load_partn(of_key + NATIVE, second);
                low[k] = fman(query_low, key_low, low[k]);
                high[k] = fman(query_high, key_high, high[k]);
            }
        }
#pragma GCC unroll 4
        for (int k = 0; k < KEYS; k++) {
            const vecn by8 = low[k] + high[k];
            float part[NATIVE];
            memcpy(part, &by8, sizeof part);
            for (int width = NATIVE / 2; width > 0; width /= 2)
                for (int lane = 0; lane < width; lane++) part[lane] += part[lane + width];
            score[h * KEYS + k] = part[0];
        }
    }
}
#endif

/* From scores to e^(score - largest), in place; their sum. */
static float soften(float *score, int64_t num_keys)
{
    const int16x32 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec16 tops = all16(-INFINITY), total = all16(0.0f);
    for (int64_t j = num_keys; j < padded(num_keys); j++) score[j] = -INFINITY;
    for (int64_t j = 0; j < num_keys; j += LANES) {
        const vec16 x = load16(score + j);
        tops = choose16(x > tops, x, tops);
    }
    float top = tops[0];
    for (int l = 1; l < LANES; l++) top = tops[l] > top ? tops[l] : top;
    for (int64_t j = 0; j < num_keys; j += LANES) {
        vec16 weight = exp16(clamp16(load16(score + j) - top, LEAST_EXPONENT, 0.0f));
        weight = choose16(lane < (int32_t)least(num_keys - j, LANES), weight, all16(0.0f));
        store16(score + j, weight);
        total += weight;
    }
    return sum16(total);
}

/* out[h] = sum over the rows of weight[h] times `count` values, at most those of VALUES vectors, divided by total[h]. */
INLINE void value_tile(const float *const *rows, int64_t value_at, int64_t num_keys, const float *weight,
                       int64_t weight_step, const float *total, int64_t num_heads, const int num_vectors,
                       const int64_t count, const int is_whole, float *out, int64_t out_step)
{
    vecn sum[HEADS][VALUES];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int v = 0; v < num_vectors; v++) sum[h][v] = alln(0.0f);
    for (int64_t j = 0; j < num_keys; j++) {
        const float *value = rows[j] + value_at;
        vecn value_j[VALUES];
#pragma GCC unroll 4
        for (int v = 0; v < num_vectors; v++)
            value_j[v] = is_whole || v + 1 < num_vectors ? loadn(value + v * NATIVE)
                                                         : load_partn(value + v * NATIVE, count - v * NATIVE);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; h++) {
            const vecn weight_j = alln(weight[h * weight_step + j]);
#pragma GCC unroll 4
            for (int v = 0; v < num_vectors; v++) sum[h][v] = fman(weight_j, value_j[v], sum[h][v]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; h++)
#pragma GCC unroll 4
        for (int v = 0; v < num_vectors; v++)
            if (h < num_heads)
                store_partn(out + h * out_step + v * NATIVE, sum[h][v] / total[h],
                             is_whole ? NATIVE : least(count - v * NATIVE, NATIVE));
}

static void values(const float *const *rows, int64_t value_at, int64_t num_keys, const float *weight, int64_t weight_step,
                   const float *total, int64_t num_heads, int64_t size, float *out)
{
#define TILE(VECTORS, IS_WHOLE)                                                                                        \
    value_tile(rows, value_at + at, num_keys, weight, weight_step, total, num_heads, VECTORS, size - at, IS_WHOLE,     \
               out + at, size)
    for (int64_t at = 0; at < size; at += VALUES * NATIVE) {
        const int64_t left = size - at;
        if (left >= VALUES * NATIVE) TILE(VALUES, 1);
#if defined(__AVX512F__)
        else if (left > 3 * NATIVE) TILE(4, 0);
        else if (left > 2 * NATIVE) TILE(3, 0);
#endif
        else if (left > NATIVE) TILE(2, 0);
        else TILE(1, 0);
    }
#undef TILE
}

void attend(const heads_t *heads, const float *query, const float *const *rows, int64_t num_keys, float *scratch,
            float *out)
{
    const int64_t per_key_head = heads->num_heads / heads->num_key_heads, step = padded(num_keys);
    for (int64_t g = 0; g < heads->num_key_heads; g++)
        for (int64_t first = 0; first < per_key_head; first += HEADS) {
            const int64_t count = least(per_key_head - first, HEADS), head = g * per_key_head + first;
            const float *queries[HEADS];
            /* What is left of a tile repeats its last head or key; nobody reads that. */
            for (int64_t h = 0; h < HEADS; h++) queries[h] = query + (head + least(h, count - 1)) * heads->key_size;
            for (int64_t j = 0; j < num_keys; j += KEYS) {
                const float *keys[KEYS];
                for (int64_t k = 0; k < KEYS; k++) keys[k] = rows[least(j + k, num_keys - 1)] + g * heads->key_size;
                float tile[HEADS * KEYS];
                score_tile(queries, keys, heads->key_size, tile);
                for (int64_t h = 0; h < HEADS; h++)
                    memcpy(scratch + h * step + j, tile + h * KEYS, KEYS * sizeof(float));
            }
            float total[HEADS];
            for (int64_t h = 0; h < HEADS; h++) total[h] = soften(scratch + h * step, num_keys);
            values(rows, heads->value_at + g * heads->value_size, num_keys, scratch, step, total, count,
                   heads->value_size, out + head * heads->value_size);
        }
}
