/* The SwiGLU MLP of rows: of an expert, of the shared experts, of a dense layer. */
#ifndef REGROW_MLP_H
#define REGROW_MLP_H

#include "model.h"

typedef struct {
    packed_t gate_up, down; /* [H, 2 I] gate and up side by side, and [I, H] */
} mlp_t;

/* inner[r, i] = silu(gate[r, i]) * up[r, i], of rows [gate | up]. */
void swiglu(const float *gate_up, int64_t num_rows, int64_t size, float *inner);

/* Floats of scratch that `mlp` needs for so many rows. */
INLINE int64_t mlp_scratch(const mlp_t *m, int64_t num_rows) { return num_rows * (m->gate_up.outer + m->down.inner); }

/* out[r] = down(silu(gate x[r]) * up x[r]). */
void mlp(const mlp_t *m, const float *x, int64_t num_rows, float *scratch, float *out);

#endif
