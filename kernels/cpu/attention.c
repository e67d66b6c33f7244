/* One layer's attention, from the residual stream back into it. Both kinds are one computation with other sizes:
 *
 *   latent    one key head for all; a cache row is [latent | rotated key], the latent is the value; the latent is normed
 *   grouped   several key heads; a cache row is [rotated keys | values]; queries and keys are normed head by head
 *
 * Legend: T tokens, H hidden, N heads, G key heads, C floats of a cache row.
 */
#include <stdlib.h>

#include "attend.h"
#include "model.h"
#include "nonlinear.h"

typedef struct attention {
    int64_t hidden, row_size, num_pairs; /* the last 2 * num_pairs floats of a query or key rotate */
    heads_t heads;
    packed_t query_a, query, key_value, output;
    const float *norm, *query_a_norm, *query_norm, *key_norm; /* of queries: of their rank, of each head; or none */
    int64_t key_norm_size;                                    /* the first floats of a key head that are normed */
    double eps, inner_eps;
} attention_t;

typedef struct {
    float *normed, *query_a, *query, *key_value, *attended, *out, *scores;
    const float **rows;
} scratch_t;

static void *carve(char **at, int64_t count, size_t size)
{
    void *part = *at;
    *at += ((size_t)count * size + 63) / 64 * 64;
    return part;
}

/* Lays the parts out from `base` on; how many bytes they take. */
static size_t lay_out(const attention_t *a, int64_t num_rows, int64_t num_keys, char *base, scratch_t *s)
{
    char *at = base;
    s->normed = carve(&at, num_rows * a->hidden, sizeof(float));
    s->query_a = carve(&at, num_rows * a->query_a.outer, sizeof(float));
    s->query = carve(&at, num_rows * a->query.outer, sizeof(float));
    s->key_value = carve(&at, num_rows * a->row_size, sizeof(float));
    s->attended = carve(&at, num_rows * a->output.inner, sizeof(float));
    s->out = carve(&at, num_rows * a->hidden, sizeof(float));
    s->scores = carve(&at, attend_scratch(num_keys), sizeof(float));
    s->rows = carve(&at, num_keys, sizeof *s->rows);
    return (size_t)(at - base);
}

INLINE float *cache_row(const batch_t *b, float *cache, int64_t row_size, int64_t request, int64_t position)
{
    const int64_t block = b->table[request * b->table_width + position / b->block_size];
    return cache + (block * b->block_size + position % b->block_size) * row_size;
}

static void norm_rows(const attention_t *a, const float *x, int64_t num_rows, float *normed)
{
    for (int64_t row = 0; row < num_rows; row++)
        rms_norm(x + row * a->hidden, a->norm, (float)a->eps, a->hidden, normed + row * a->hidden);
}

static const float *turn_of(const attention_t *a, const batch_t *b, int64_t token)
{
    return b->turn + b->position[token] * 2 * a->num_pairs;
}

/* The cache rows of some tokens, from their normed inputs. */
static void write_cache(const attention_t *a, const batch_t *b, int64_t first, int64_t count, const scratch_t *s,
                        float *cache)
{
    const int64_t rotary_at = a->heads.key_size - 2 * a->num_pairs;
    gemm(s->normed, a->hidden, count, panels(a->key_value), s->key_value, a->row_size);
    for (int64_t t = 0; t < count; t++) {
        float *row = cache_row(b, cache, a->row_size, b->request[first + t], b->position[first + t]);
        memcpy(row, s->key_value + t * a->row_size, (size_t)a->row_size * sizeof(float));
        for (int64_t g = 0; g < a->heads.num_key_heads; g++) {
            float *key = row + g * a->heads.key_size;
            rms_norm(key, a->key_norm, (float)a->inner_eps, a->key_norm_size, key);
            rotate(key + rotary_at, turn_of(a, b, first + t), a->num_pairs);
        }
    }
}

/* The queries of some tokens, from their normed inputs. */
static void make_queries(const attention_t *a, const batch_t *b, int64_t first, int64_t count, const scratch_t *s)
{
    const int64_t size = a->heads.key_size, rotary_at = size - 2 * a->num_pairs;
    const float *input = s->normed;
    if (a->query_a.outer) {
        gemm(s->normed, a->hidden, count, panels(a->query_a), s->query_a, a->query_a.outer);
        for (int64_t t = 0; t < count; t++) {
            float *row = s->query_a + t * a->query_a.outer;
            rms_norm(row, a->query_a_norm, (float)a->inner_eps, a->query_a.outer, row);
        }
        input = s->query_a;
    }
    gemm(input, a->query.inner, count, panels(a->query), s->query, a->query.outer);
    for (int64_t t = 0; t < count; t++)
        for (int64_t n = 0; n < a->heads.num_heads; n++) {
            float *query = s->query + t * a->query.outer + n * size;
            if (a->query_norm) rms_norm(query, a->query_norm, (float)a->inner_eps, size, query);
            rotate(query + rotary_at, turn_of(a, b, first + t), a->num_pairs);
        }
}

static void attend_all(const attention_t *a, const batch_t *b, int64_t first, int64_t count, const scratch_t *s,
                       float *cache)
{
    int64_t known_request = -1, num_known = 0;
    for (int64_t t = 0; t < count; t++) {
        const int64_t request = b->request[first + t], num_keys = b->position[first + t] + 1;
        if (request != known_request) num_known = 0;
        for (; num_known < num_keys; num_known++)
            s->rows[num_known] = cache_row(b, cache, a->row_size, request, num_known);
        known_request = request;
        attend(&a->heads, s->query + t * a->query.outer, s->rows, num_keys, s->scores, s->attended + t * a->output.inner);
    }
}

static int64_t most_keys(const batch_t *b)
{
    int64_t most = 1;
    for (int64_t t = 0; t < b->num_tokens; t++) most = b->position[t] + 1 > most ? b->position[t] + 1 : most;
    return most;
}

/* x += attention(norm(x)) for all tokens, x [T, H] in place; writes their cache rows first. The batch was checked.
 * -1: no memory. */
EXPORT int64_t regrow_attention(const attention_t *a, const batch_t *b, float *cache, float *x)
{
    const int64_t most = least(b->num_tokens, ROWS_TOGETHER), num_keys = most_keys(b);
    scratch_t s;
    char *const memory = malloc(lay_out(a, most, num_keys, 0, &s) + 64);
    if (!memory) return -1;
    lay_out(a, most, num_keys, memory + (64 - (uintptr_t)memory % 64), &s);
    for (int64_t first = 0; first < b->num_tokens; first += most) {
        const int64_t count = least(b->num_tokens - first, most);
        norm_rows(a, x + first * a->hidden, count, s.normed);
        write_cache(a, b, first, count, &s, cache);
    }
    for (int64_t first = 0; first < b->num_tokens; first += most) {
        const int64_t count = least(b->num_tokens - first, most);
        float *x_here = x + first * a->hidden;
        if (b->num_tokens > most) norm_rows(a, x_here, count, s.normed);
        make_queries(a, b, first, count, &s);
        attend_all(a, b, first, count, &s, cache);
        gemm(s.attended, a->output.inner, count, panels(a->output), s.out, a->hidden);
        for (int64_t i = 0; i < count * a->hidden; i++) x_here[i] += s.out[i];
    }
    free(memory);
    return 0;
}
