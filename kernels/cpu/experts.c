/* Rows through routed experts, and the ordered sum of what they gave.
 *
 * Legend: R rows, S row slots of the input, H hidden, I intermediate, P expert slots, T tokens, K experts per token.
 */
#include <stdlib.h>

#include "mlp.h"

typedef struct {
    int64_t hidden, inter;
    float *x, *gate_up, *inner, *out; /* [ROWS_TOGETHER, H], [.., 2 I], [.., I], [.., H] */
} scratch_t;

/* Rows of one expert, at most ROWS_TOGETHER of them: gathered, computed, and put where they belong. */
static void few_rows(const float *x, int64_t x_step, const int64_t *row, const int64_t *chosen, int64_t count,
                     const float *expert, const scratch_t *s, float *out)
{
    const size_t row_bytes = (size_t)s->hidden * sizeof(float);
    const float *down = expert + 2 * s->hidden * s->inter;
    for (int64_t i = 0; i < count; i++) memcpy(s->x + i * s->hidden, x + row[chosen[i]] * x_step, row_bytes);
    gemm(s->x, s->hidden, count, plain_weight(expert, s->hidden, 2 * s->inter), s->gate_up, 2 * s->inter);
    swiglu(s->gate_up, count, s->inter, s->inner);
    gemm(s->inner, s->inter, count, plain_weight(down, s->inter, s->hidden), s->out, s->hidden);
    for (int64_t i = 0; i < count; i++) memcpy(out + chosen[i] * s->hidden, s->out + i * s->hidden, row_bytes);
}

/* Lists the rows of each expert, in their order: those of expert e are order[first[e]] .. order[first[e + 1] - 1].
 * What is out of range is not listed but answered: the number of such rows. */
static int64_t sort_by_expert(const int64_t *row, const int64_t *expert, int64_t num_rows, int64_t num_slots,
                              const float *const *expert_at, int64_t num_experts, int64_t *first, int64_t *order)
{
    int64_t num_wrong = 0;
    memset(first, 0, (size_t)(num_experts + 2) * sizeof *first);
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t e = expert[r];
        if (e < 0 || e >= num_experts || !expert_at[e] || row[r] < 0 || row[r] >= num_slots) num_wrong++;
        else first[e + 2]++;
    }
    if (num_wrong) return num_wrong;
    for (int64_t e = 0; e < num_experts; e++) first[e + 2] += first[e + 1];
    for (int64_t r = 0; r < num_rows; r++) order[first[expert[r] + 1]++] = r;
    return 0;
}

/* out[r] = down(silu(gate x) * up x) with x = x[row[r]] and the weights of expert[r], packed at expert_at[expert[r]] as
 * gate_up [H, 2 I], then down [I, H]. Returns how many rows name an expert or a row slot that is not there; when there
 * is one, nothing is computed. -1: no memory. */
EXPORT int64_t regrow_expert_rows(const float *x, int64_t x_step, int64_t num_slots, const int64_t *row,
                                  const int64_t *expert, int64_t num_rows, const float *const *expert_at,
                                  int64_t num_experts, int64_t hidden, int64_t inter, float *out)
{
    const int64_t most = least(num_rows, ROWS_TOGETHER), num_floats = most * (2 * hidden + 3 * inter);
    int64_t *const numbers = malloc((size_t)(num_experts + 2 + num_rows) * sizeof *numbers);
    float *const floats = malloc((size_t)num_floats * sizeof *floats);
    int64_t status = -1;
    if (numbers && floats) {
        int64_t *const first = numbers, *const order = numbers + num_experts + 2;
        float *const gate_up = floats + most * hidden, *const inner = gate_up + most * 2 * inter;
        const scratch_t scratch = {hidden, inter, floats, gate_up, inner, inner + most * inter};
        status = sort_by_expert(row, expert, num_rows, num_slots, expert_at, num_experts, first, order);
        for (int64_t e = 0; status == 0 && e < num_experts; e++)
            for (int64_t at = first[e]; at < first[e + 1]; at += ROWS_TOGETHER) {
                const int64_t count = least(first[e + 1] - at, ROWS_TOGETHER);
                few_rows(x, x_step, row, order + at, count, expert_at[e], &scratch, out);
            }
    }
    free(floats);
    free(numbers);
    return status;
}

/* out[t] = ((0 + w[t, 0] rows[t, 0]) + w[t, 1] rows[t, 1]) + ...: each product is rounded before it is added, as in the
 * other implementations of combine. */
EXPORT void regrow_combine_ordered(const float *rows, const float *weight, int64_t num_tokens, int64_t top_k,
                                   int64_t hidden, float *out)
{
    for (int64_t t = 0; t < num_tokens; t++, out += hidden) {
        for (int64_t h = 0; h < hidden; h++) out[h] = 0.0f;
        for (int64_t k = 0; k < top_k; k++, rows += hidden, weight++)
            for (int64_t h = 0; h < hidden; h++) out[h] += rows[h] * *weight;
    }
}
