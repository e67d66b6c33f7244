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

/* Rows worked on together: bounds scratch memory, and keeps what is between two products in the cache. */
enum { ROWS_TOGETHER = 64 };

#endif
