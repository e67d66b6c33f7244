#include "mlp.h"

#include <stdlib.h>

#include "nonlinear.h"

void swiglu(const float *gate_up, int64_t num_rows, int64_t size, float *inner)
{
    for (int64_t row = 0; row < num_rows; row++, gate_up += 2 * size, inner += size) {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES)
            store16(inner + i, silu16(load16(gate_up + i)) * load16(gate_up + size + i));
        if (i < size) {
            const int64_t left = size - i;
            const vec16 gate = load_part16(gate_up + i, left), up = load_part16(gate_up + size + i, left);
            store_part16(inner + i, silu16(gate) * up, left);
        }
    }
}

void mlp(const mlp_t *m, const float *x, int64_t num_rows, float *scratch, float *out)
{
    float *const inner = scratch + num_rows * m->gate_up.outer;
    gemm(x, m->gate_up.inner, num_rows, panels(m->gate_up), scratch, m->gate_up.outer);
    swiglu(scratch, num_rows, m->down.inner, inner);
    gemm(inner, m->down.inner, num_rows, panels(m->down), out, m->down.outer);
}

typedef struct dense {
    const float *norm;
    double eps;
    mlp_t mlp;
} dense_t;

/* A dense layer's second half: x += mlp(norm(x)), x [T, H] in place. -1: no memory. */
EXPORT int64_t regrow_dense(const dense_t *d, int64_t num_tokens, float *x)
{
    const int64_t hidden = d->mlp.gate_up.inner, most = least(num_tokens, ROWS_TOGETHER);
    float *const memory = malloc((size_t)(most * 2 * hidden + mlp_scratch(&d->mlp, most)) * sizeof *memory);
    float *const normed = memory, *const out = memory + most * hidden, *const scratch = out + most * hidden;
    if (!memory) return -1;
    for (int64_t first = 0; first < num_tokens; first += most, x += most * hidden) {
        const int64_t count = least(num_tokens - first, most);
        for (int64_t t = 0; t < count; t++)
            rms_norm(x + t * hidden, d->norm, (float)d->eps, hidden, normed + t * hidden);
        mlp(&d->mlp, normed, count, scratch, out);
        for (int64_t i = 0; i < count * hidden; i++) x[i] += out[i];
    }
    free(memory);
    return 0;
}
