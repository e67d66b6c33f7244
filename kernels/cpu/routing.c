/* Which experts a token goes to and with what weight, and the experts that all tokens share.
 *
 * Legend: T tokens, H hidden, E routed experts, K experts per token, G groups.
 */
#include <stdlib.h>

#include "mlp.h"
#include "nonlinear.h"

typedef struct moe {
    const float *norm, *bias; /* bias [E] takes part in the choice, not in the weight; or none */
    double eps, scaling;      /* scaling: times every weight, rounded to fp32 */
    packed_t gate;
    mlp_t shared; /* outer 0: there are none */
    int64_t top_k, is_sigmoid, is_normalised;
    int64_t num_groups, num_kept_groups, num_scored; /* a group is as good as the sum of its num_scored best */
} moe_t;

/* e^(x - largest) / sum: sixteen chains added as sum16 does. */
static void softmax(float *x, int64_t size)
{
    float top = x[0];
    for (int64_t i = 1; i < size; i++) top = x[i] > top ? x[i] : top;
    vec16 total = all16(0.0f);
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = least(size - i, LANES);
        store_part16(x + i, exp16(load_part16(x + i, count) - top), count);
        total += load_part16(x + i, count);
    }
    const float sum = sum16(total);
    for (int64_t i = 0; i < size; i++) x[i] = x[i] / sum;
}

static void sigmoid(float *x, int64_t size)
{
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = least(size - i, LANES);
        store_part16(x + i, sigmoid16(load_part16(x + i, count)), count);
    }
}

/* The indices of the `count` largest, largest first; of equal ones the lowest index first. They become -infinity. What
 * is not larger than -infinity (NaN as well) comes last, from the lowest index on, so that indices always exist. */
static void take_largest(float *x, int64_t size, int64_t count, int64_t *index)
{
    for (int64_t k = 0; k < count; k++) {
        float top = -INFINITY;
        int64_t at = -1;
        for (int64_t i = 0; i < size; i++)
            if (x[i] > top) {
                top = x[i];
                at = i;
            }
        for (int64_t i = 0; at < 0; i++) {
            int is_taken = 0;
            for (int64_t before = 0; before < k; before++) is_taken |= index[before] == i;
            if (!is_taken) at = i;
        }
        x[at] = -INFINITY;
        index[k] = at;
    }
}

/* Experts outside the best groups become -infinity. `spare` holds E floats, `index` E numbers. */
static void drop_weak_groups(const moe_t *m, float *choice, float *spare, int64_t *index)
{
    const int64_t groups = m->num_groups, size = m->gate.outer / groups;
    float *const score = spare + size;
    for (int64_t g = 0; g < groups; g++) {
        memcpy(spare, choice + g * size, (size_t)size * sizeof(float));
        take_largest(spare, size, m->num_scored, index);
        score[g] = 0.0f;
        for (int64_t i = 0; i < m->num_scored; i++) score[g] += choice[g * size + index[i]];
    }
    take_largest(score, groups, m->num_kept_groups, index);
    for (int64_t g = 0; g < groups; g++) {
        int is_kept = 0;
        for (int64_t i = 0; i < m->num_kept_groups; i++) is_kept |= index[i] == g;
        for (int64_t e = g * size; !is_kept && e < (g + 1) * size; e++) choice[e] = -INFINITY;
    }
}

/* One token's experts [K] and weights [K] from its scores [E]. `spare` holds 3 E floats. */
static void choose(const moe_t *m, const float *score, float *spare, int64_t *index, int64_t *expert, float *weight)
{
    const int64_t num_experts = m->gate.outer;
    float total = 0.0f;
    for (int64_t e = 0; e < num_experts; e++) spare[e] = m->bias ? score[e] + m->bias[e] : score[e];
    if (m->num_groups > 1) drop_weak_groups(m, spare, spare + num_experts, index);
    take_largest(spare, num_experts, m->top_k, expert);
    for (int64_t k = 0; k < m->top_k; k++) {
        weight[k] = score[expert[k]];
        total += weight[k];
    }
    for (int64_t k = 0; k < m->top_k; k++) {
        if (m->is_normalised) weight[k] = weight[k] / (total + 1e-20f);
        weight[k] *= (float)m->scaling;
    }
}

/* A mixture layer's second half up to the exchange, for x [T, H]: normed [T, H] is what the experts get, expert and
 * weight [T, K] where it goes, best first, and shared [T, H] what the shared experts make of it (not written if there
 * are none). -1: no memory. */
EXPORT int64_t regrow_route(const moe_t *m, const float *x, int64_t num_tokens, float *normed, int64_t *expert,
                            float *weight, float *shared)
{
    const int64_t hidden = m->gate.inner, num_experts = m->gate.outer, most = least(num_tokens, ROWS_TOGETHER);
    const int64_t num_floats = (most + 3) * num_experts + mlp_scratch(&m->shared, most);
    float *const score = malloc((size_t)num_floats * sizeof *score);
    int64_t *const index = malloc((size_t)num_experts * sizeof *index);
    float *const spare = score + most * num_experts;
    for (int64_t t = 0; t < num_tokens; t++)
        rms_norm(x + t * hidden, m->norm, (float)m->eps, hidden, normed + t * hidden);
    for (int64_t first = 0; score && index && first < num_tokens; first += most) {
        const int64_t count = least(num_tokens - first, most);
        const float *const x_here = normed + first * hidden;
        gemm(x_here, hidden, count, panels(m->gate), score, num_experts);
        for (int64_t t = 0; t < count; t++) {
            float *const of_token = score + t * num_experts;
            const int64_t at = (first + t) * m->top_k;
            if (m->is_sigmoid) sigmoid(of_token, num_experts);
            else softmax(of_token, num_experts);
            choose(m, of_token, spare, index, expert + at, weight + at);
        }
        if (m->shared.gate_up.outer) mlp(&m->shared, x_here, count, spare + 3 * num_experts, shared + first * hidden);
    }
    const int64_t status = score && index ? 0 : -1;
    free(index);
    free(score);
    return status;
}

/* A mixture layer's second half after the exchange: x += shared + routed, or x += routed where `shared` is null. */
EXPORT void regrow_add_experts(float *x, const float *shared, const float *routed, int64_t size)
{
    for (int64_t i = 0; i < size; i++) x[i] += shared ? shared[i] + routed[i] : routed[i];
}
