/* Choosing tokens: one fixed sequence of fp64 operations for each row. */
#include <stdlib.h>

#include "vec16.h"

/* One row. Temperature 0: the largest. `least`: lower values are left out; top_k 0: all. Laid out as in choose.py. */
typedef struct {
    double temperature, top_p, least, number;
    int64_t top_k;
} draw_t;

/* e^x for x <= 0: 2^k e^r with |r| <= ln(2) / 2, e^r by its series. */
INLINE double exp_of(double x)
{
    const double magic = 0x1.8p52;
    const double shifted = __builtin_fma(x, 0x1.71547652b82fep+0, magic), k = shifted - magic;
    const double r = __builtin_fma(k, -0x1.abc9e3b39803fp-56, __builtin_fma(k, -0x1.62e42fefa39efp-1, x));
    static const double factor[] = {
        1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120,
        1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0,
    };
    double sum = 1.0 / 6227020800.0;
#pragma GCC unroll 13
    for (int i = 0; i < 13; i++) sum = __builtin_fma(sum, r, factor[i]);
    uint64_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return x < -708.0 ? 0.0 : sum * power;
}

/* ln(x) for x >= 1: x = 2^k m with m in [sqrt(1/2), sqrt(2)], ln(m) = 2 artanh((m - 1) / (m + 1)) by its series. */
static double log_of(double x)
{
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int64_t k = (int64_t)(bits >> 52) - 1023;
    bits = (bits & 0xFFFFFFFFFFFFFull) | 1023ull << 52;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > 0x1.6a09e667f3bcdp+0) {
        m *= 0.5;
        k++;
    }
    const double s = (m - 1.0) / (m + 1.0), square = s * s;
    double sum = 1.0 / 25;
    for (int i = 23; i >= 3; i -= 2) sum = __builtin_fma(sum, square, 1.0 / i);
    const double log_m = 2.0 * __builtin_fma(sum * square, s, s);
    return __builtin_fma((double)k, 0x1.62e42fefa39efp-1, __builtin_fma((double)k, 0x1.abc9e3b39803fp-56, log_m));
}

/* Whether token a comes before token b: by falling value, equal ones by id. */
static int comes_before(const double *value, int64_t a, int64_t b)
{
    return value[a] > value[b] || (value[a] == value[b] && a < b);
}

/* Puts what stands at `at` of the heap where it belongs, below those that come before it. */
static void sink(const double *value, int64_t *heap, int64_t count, int64_t at)
{
    const int64_t token = heap[at];
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && comes_before(value, heap[child + 1], heap[child])) child++;
        if (comes_before(value, token, heap[child])) break;
        heap[at] = heap[child];
    }
    heap[at] = token;
}

typedef struct {
    double *value, *weight, *cumulative;
    int64_t *heap, *order;
    int64_t num_left, num_ordered; /* of both */
} ranking_t;

/* The sum of the weights of the first `place` + 1 tokens of the order, which is made only as far as somebody asks:
 * usually a few tokens have almost all of the weight. */
static double sum_up_to(ranking_t *r, int64_t place)
{
    while (r->num_ordered <= place) {
        const int64_t token = r->heap[0], at = r->num_ordered++;
        r->order[at] = token;
        r->cumulative[at] = (at ? r->cumulative[at - 1] : 0.0) + r->weight[token];
        r->heap[0] = r->heap[--r->num_left];
        sink(r->value, r->heap, r->num_left, 0);
    }
    return r->cumulative[place];
}

/* The token at a random place of the order by falling value. */
static int64_t draw(const draw_t *d, const double *shifted, int64_t size, ranking_t *r)
{
    double total = 0.0;
    r->num_left = r->num_ordered = 0;
    for (int64_t i = 0; i < size; i++) r->value[i] = shifted[i] / d->temperature;
    for (int64_t i = 0; i < size; i++) r->weight[i] = exp_of(r->value[i]);
    for (int64_t i = 0; i < size; i++)
        if (r->value[i] >= d->least) {
            r->heap[r->num_left++] = i;
            total += r->weight[i];
        }
    int64_t kept = r->num_left;
    for (int64_t at = kept / 2 - 1; at >= 0; at--) sink(r->value, r->heap, kept, at);
    if (0 < d->top_k && d->top_k < kept) {
        kept = d->top_k;
        total = sum_up_to(r, kept - 1);
    }
    if (d->top_p < 1.0) {
        int64_t last = 0;
        while (last < kept - 1 && sum_up_to(r, last) < d->top_p * total) last++;
        kept = last + 1;
        total = sum_up_to(r, last);
    }
    int64_t place = 0;
    while (place < kept - 1 && sum_up_to(r, place) <= d->number * total) place++;
    sum_up_to(r, place);
    return r->order[place];
}

/* The sum of e^value in eight chains, which are added as sum16 adds its own. */
static double sum_of_weights(const double *value, int64_t size)
{
    enum { CHAINS = 8 };
    double part[CHAINS] = {0};
    int64_t i = 0;
    for (; i + CHAINS <= size; i += CHAINS) {
        double weight[CHAINS];
        for (int chain = 0; chain < CHAINS; chain++) weight[chain] = exp_of(value[i + chain]);
        for (int chain = 0; chain < CHAINS; chain++) part[chain] += weight[chain];
    }
    for (; i < size; i++) part[i % CHAINS] += exp_of(value[i]);
    for (int width = CHAINS / 2; width > 0; width /= 2)
        for (int chain = 0; chain < width; chain++) part[chain] += part[chain + width];
    return part[0];
}

/* The largest, the first of equal ones; -1 when it is infinite, or one is no number. */
static int64_t largest(const float *logits, int64_t size)
{
    int64_t at = 0;
    int has_nan = logits[0] != logits[0];
    for (int64_t i = 1; i < size; i++) {
        has_nan |= logits[i] != logits[i];
        if (logits[i] > logits[at]) at = i;
    }
    return has_nan || logits[at] - logits[at] != 0.0f ? -1 : at;
}

/* token[r] of logits [R, V], as draws[r] says, and its log-probability at temperature 1 with nothing left out. 0; or -1: no
 * memory, or 1 + the first row without a finite largest value. */
EXPORT int64_t regrow_choose(const draw_t *draws, const float *logits, int64_t num_rows, int64_t size, int64_t *token,
                             double *logprob)
{
    double *const numbers = malloc(4 * (size_t)size * sizeof *numbers), *const shifted = numbers + 3 * size;
    int64_t *const tokens = malloc(2 * (size_t)size * sizeof *tokens);
    ranking_t ranking = {numbers, numbers + size, numbers + 2 * size, tokens, tokens + size, 0, 0};
    int64_t status = numbers && tokens ? 0 : -1;
    for (int64_t r = 0; status == 0 && r < num_rows; r++, logits += size) {
        const int64_t top = largest(logits, size);
        if (top < 0) {
            status = 1 + r;
            break;
        }
        for (int64_t i = 0; i < size; i++) shifted[i] = (double)logits[i] - (double)logits[top];
        token[r] = draws[r].temperature > 0.0 ? draw(draws + r, shifted, size, &ranking) : top;
        logprob[r] = shifted[token[r]] - log_of(sum_of_weights(shifted, size));
    }
    free(tokens);
    free(numbers);
    return status;
}
