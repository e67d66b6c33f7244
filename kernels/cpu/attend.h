/* Softmax attention of one token over rows of a cache. */
#ifndef REGROW_ATTEND_H
#define REGROW_ATTEND_H

#include "vec16.h"

/* Key head g of a cache row: its keys at key_at + g * key_size, its values at value_at + g * value_size. It serves the
 * num_heads / num_key_heads query heads that follow each other. */
typedef struct {
    int64_t num_heads, num_key_heads, key_size, value_size, value_at;
} heads_t;

/* Floats of scratch that `attend` needs for so many keys. */
int64_t attend_scratch(int64_t num_keys);

/* out[N, value_size] of query[N, key_size] over the first num_keys rows, at least one. Scores are sixteen chains over
 * the key, added as sum16 does; weights are e^(score - largest), not below e^-64; each output element is one chain over
 * the rows in their order, divided by the weights' sum: sixteen chains (row j in chain j % 16), added as sum16 does. */
void attend(const heads_t *heads, const float *query, const float *const *rows, int64_t num_keys, float *scratch,
            float *out);

#endif
