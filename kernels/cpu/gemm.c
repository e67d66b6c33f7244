#include "gemm.h"

/* The most rows and vectors of a tile: what the registers of the instruction set hold as sums. */
#if defined(__AVX512F__)
enum { TILE_ROWS = 8, TILE_VECTORS = 2 };
#else
enum { TILE_ROWS = 6, TILE_VECTORS = 2 };
#endif

INLINE void tile(const float *x, int64_t x_step, const int num_rows, const float *w, int64_t w_step, int64_t inner,
                 const int64_t width, const int is_whole, float *out, int64_t out_step)
{
    vecn sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
    for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) sum[row][v] = alln(0.0f);
    for (int64_t k = 0; k < inner; k++) {
        vecn w_k[TILE_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) {
            const int64_t left = width - v * NATIVE;
            if (is_whole) w_k[v] = loadn(w + k * w_step + v * NATIVE);
            else w_k[v] = left > 0 ? load_partn(w + k * w_step + v * NATIVE, least(left, NATIVE)) : alln(0.0f);
        }
#pragma GCC unroll 8
        for (int row = 0; row < num_rows; row++) {
            const vecn x_k = alln(x[row * x_step + k]);
#pragma GCC unroll 2
            for (int v = 0; v < TILE_VECTORS; v++) sum[row][v] = fman(x_k, w_k[v], sum[row][v]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 2
        for (int v = 0; v < TILE_VECTORS; v++) {
            const int64_t left = width - v * NATIVE;
            if (is_whole) storen(out + row * out_step + v * NATIVE, sum[row][v]);
            else if (left > 0) store_partn(out + row * out_step + v * NATIVE, sum[row][v], least(left, NATIVE));
        }
}

/* A tile of each number of rows, whole and cut off at the last column: the compiler keeps its sums in registers. */
#define TILES_OF(ROWS)                                                                                                 \
    static void tile_##ROWS(const float *x, int64_t x_step, const float *w, int64_t w_step, int64_t inner,             \
                            int64_t width, float *out, int64_t out_step)                                               \
    {                                                                                                                  \
        if (width == TILE_VECTORS * NATIVE) tile(x, x_step, ROWS, w, w_step, inner, width, 1, out, out_step);           \
        else tile(x, x_step, ROWS, w, w_step, inner, width, 0, out, out_step);                                         \
    }
TILES_OF(1)
TILES_OF(2)
TILES_OF(3)
TILES_OF(4)
TILES_OF(5)
TILES_OF(6)
#if defined(__AVX512F__)
TILES_OF(7)
TILES_OF(8)
#endif

typedef void (*tile_t)(const float *, int64_t, const float *, int64_t, int64_t, int64_t, float *, int64_t);
static const tile_t TILES[TILE_ROWS + 1] = {
    0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6,
#if defined(__AVX512F__)
    tile_7, tile_8,
#endif
};

void gemm(const float *x, int64_t x_step, int64_t num_rows, weight_t weight, float *out, int64_t out_step)
{
    const int64_t tile_width = TILE_VECTORS * NATIVE;
    for (int64_t column = 0; column < weight.outer; column += tile_width) {
        const float *w = weight.at + column / PANEL * weight.panel_step + column % PANEL;
        const int64_t width = least(weight.outer - column, tile_width);
        for (int64_t row = 0; row < num_rows; row += TILE_ROWS)
            TILES[least(num_rows - row, TILE_ROWS)](x + row * x_step, x_step, w, weight.row_step, weight.inner, width,
                                                    out + row * out_step + column, out_step);
    }
}

EXPORT void regrow_linear(const float *x, int64_t x_step, int64_t num_rows, const float *packed, int64_t inner,
                          int64_t outer, float *out)
{
    gemm(x, x_step, num_rows, packed_weight(packed, inner, outer), out, outer);
}
