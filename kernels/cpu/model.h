/* What the layers of a model have in common: rows of a batch, and weights that were packed at load.
 *
 * Python fills these structures through ctypes (structures.py): members of 8 bytes each, in this order. */
#ifndef REGROW_MODEL_H
#define REGROW_MODEL_H

#include "gemm.h"

/* A packed weight (gemm.h); outer 0: there is none. */
typedef struct {
    const float *at;
    int64_t inner, outer;
} packed_t;

INLINE weight_t panels(packed_t weight) { return packed_weight(weight.at, weight.inner, weight.outer); }

/* One forward pass: tokens, their places in their requests, the requests' rows of the block table [R, W]. */
typedef struct {
    int64_t num_tokens, num_requests, table_width, num_logits;
    const int64_t *token, *position, *request, *table, *logit_index;
    int64_t vocab_size, num_positions, num_blocks, block_size;
    const float *turn; /* cosine and sine of every position's pairs: [num_positions, pairs, 2] */
} batch_t;

/* What one pass is made of; -1: no memory. The structures are those of the files that define them. */
struct attention;
struct dense;
struct moe;
struct head;
void regrow_embed(const batch_t *b, const float *embedding, int64_t hidden, float *x);
int64_t regrow_attention(const struct attention *a, const batch_t *b, float *cache, float *x);
int64_t regrow_dense(const struct dense *d, int64_t num_tokens, float *x);
int64_t regrow_route(const struct moe *m, const float *x, int64_t num_tokens, float *normed, int64_t *expert,
                     float *weight, float *shared);
int64_t regrow_expert_rows(const float *x, int64_t x_step, int64_t num_slots, const int64_t *row, const int64_t *expert,
                           int64_t num_rows, const float *const *expert_at, int64_t num_experts, int64_t hidden,
                           int64_t inter, float *out);
void regrow_add_experts(float *x, const float *shared, const float *routed, int64_t size);
int64_t regrow_head(const struct head *h, const batch_t *b, const float *x, float *logits);

/* Rows worked on together: bounds scratch memory, and keeps what is between two products in the cache. */
enum { ROWS_TOGETHER = 64 };

#endif
