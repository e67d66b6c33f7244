/* The two ends of a forward pass, and what keeps its reads and writes inside its arrays. */
#include "model.h"

#include <stdlib.h>

#include "nonlinear.h"

static int is_within(int64_t value, int64_t size) { return value >= 0 && value < size; }

/* 0, or what is out of range: 1 a token id, 2 a position, 3 a request, 4 a block that a request reads, 5 a row that
 * wants logits. */
EXPORT int64_t regrow_check_batch(const batch_t *b)
{
    for (int64_t t = 0; t < b->num_tokens; t++) {
        const int64_t position = b->position[t], request = b->request[t];
        if (!is_within(b->token[t], b->vocab_size)) return 1;
        if (!is_within(position, b->num_positions)) return 2;
        if (!is_within(request, b->num_requests)) return 3;
        if (position / b->block_size >= b->table_width) return 4;
        const int64_t *const blocks = b->table + request * b->table_width;
        for (int64_t i = 0; i <= position / b->block_size; i++)
            if (!is_within(blocks[i], b->num_blocks)) return 4;
    }
    for (int64_t s = 0; s < b->num_logits; s++)
        if (!is_within(b->logit_index[s], b->num_tokens)) return 5;
    return 0;
}

/* x[t] = the embedding of token t. */
EXPORT void regrow_embed(const batch_t *b, const float *embedding, int64_t hidden, float *x)
{
    for (int64_t t = 0; t < b->num_tokens; t++)
        memcpy(x + t * hidden, embedding + b->token[t] * hidden, (size_t)hidden * sizeof(float));
}

typedef struct head {
    const float *norm;
    double eps;
    packed_t weight;
} head_t;

/* logits [S, V] of the rows of x [T, H] that want them. -1: no memory. */
EXPORT int64_t regrow_head(const head_t *h, const batch_t *b, const float *x, float *logits)
{
    const int64_t hidden = h->weight.inner, most = least(b->num_logits, ROWS_TOGETHER);
    float *const normed = malloc((size_t)(most * hidden) * sizeof *normed + 1);
    if (!normed) return -1;
    for (int64_t first = 0; first < b->num_logits; first += most) {
        const int64_t count = least(b->num_logits - first, most);
        for (int64_t s = 0; s < count; s++) {
            const float *row = x + b->logit_index[first + s] * hidden;
            rms_norm(row, h->norm, (float)h->eps, hidden, normed + s * hidden);
        }
        gemm(normed, hidden, count, panels(h->weight), logits + first * h->weight.outer, h->weight.outer);
    }
    free(normed);
    return 0;
}
