/* The SwiGLU of rows: of an expert, of the shared experts, of a dense layer. */
#ifndef REGROW_MLP_H
#define REGROW_MLP_H

#include "gemm.h"

/* Rows worked on together: bounds scratch memory, and keeps what is between two products in the cache. */
enum { ROWS_TOGETHER = 64 };

/* inner[r, i] = silu(gate[r, i]) * up[r, i], of rows [gate | up]. */
void swiglu(const float *gate_up, int64_t num_rows, int64_t size, float *inner);

#endif
