/* Matrix products in row-and-column tiles that stay in registers. */
#ifndef REGROW_GEMM_H
#define REGROW_GEMM_H

#include "vec16.h"

/* A weight [inner, outer], input-major, cut into panels of PANEL columns. Element (k, n) lies at
 * at[n / PANEL * panel_step + k * row_step + n % PANEL]: PANEL and outer for a plain matrix; for a packed one, whose
 * panels lie one behind the other so that a product reads memory in order, PANEL * inner and PANEL. */
enum { PANEL = 32 };
typedef struct {
    const float *at;
    int64_t inner, outer, row_step, panel_step;
} weight_t;

INLINE weight_t plain_weight(const float *at, int64_t inner, int64_t outer)
{
    return (weight_t){at, inner, outer, outer, PANEL};
}

INLINE weight_t packed_weight(const float *at, int64_t inner, int64_t outer)
{
    return (weight_t){at, inner, outer, PANEL, PANEL * inner};
}

/* out[r, n] = (((0 + x[r, 0] w[0, n]) + x[r, 1] w[1, n]) + ...), each step one fused multiply-add: a chain in the order
 * of k for every element, so its bits depend on the row and the column alone. Steps are those between rows. */
void gemm(const float *x, int64_t x_step, int64_t num_rows, weight_t weight, float *out, int64_t out_step);

#endif
