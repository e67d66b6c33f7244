#include "least.h"

#include <math.h>

/* A placement from nothing: numbers of copies and their places, as services/planner/replica_counts.py and packing.py
 * say, in the same order of floating-point operations.
 *
 * Legend: L layers, E experts, N copies, R ranks, S slots of the largest.
 */

/* The smaller, the more urgent. */
static double key_of(double share, int64_t copies, int64_t max_copies, double limit, int coverage_first)
{
    const double urgent = 2.0 * (double)max_copies; /* more than any share */
    if (copies >= max_copies)
        return 1.0;
    if (!coverage_first && share > limit)
        return -(share + 2.0 * urgent);
    return -(share + urgent * (copies == 1 ? 1.0 : 0.0));
}

/* counts_LE: what each expert has already; num_more further copies go to whom they help most, one by one. */
EXPORT void regrow_replica_counts(
    const int64_t *dims_5, const double *load_LE, const double *share_limit, int64_t *counts_LE)
{
    const int64_t L = dims_5[0], E = dims_5[1], num_more = dims_5[2], max_copies = dims_5[3];
    const int coverage_first = dims_5[4] != 0;
    double key_E[E];
    for (int64_t layer = 0; layer < L; layer++) {
        const double *load_E = load_LE + layer * E;
        int64_t *counts_E = counts_LE + layer * E;
        for (int64_t e = 0; e < E; e++)
            key_E[e] = key_of(load_E[e] / (double)counts_E[e], counts_E[e], max_copies, *share_limit, coverage_first);
        for (int64_t n = 0; n < num_more; n++) {
            int64_t best = first_least(key_E, E);
            double share = load_E[best] / (double)++counts_E[best];
            key_E[best] = key_of(share, counts_E[best], max_copies, *share_limit, coverage_first);
        }
    }
}

/* Copies of a layer, largest share first, each onto the lightest rank with room. */
EXPORT void regrow_pack(
    const int64_t *dims_5, const int64_t *expert_LN, const double *share_LN, const int64_t *num_local_R,
    const int64_t *host_R, int64_t *placement_LRS)
{
    const int64_t L = dims_5[0], N = dims_5[1], R = dims_5[2], S = dims_5[3], has_hosts = dims_5[4];
    const double same_host = 1e6, same_rank = 1e9;
    double load_R[R], key_R[R];
    int64_t placed_R[R];
    for (int64_t layer = 0; layer < L; layer++) {
        int64_t previous = -1;
        for (int64_t r = 0; r < R; r++) {
            load_R[r] = key_R[r] = num_local_R[r] ? 0.0 : INFINITY;
            placed_R[r] = 0;
        }
        for (int64_t n = 0; n < N; n++) {
            int64_t expert = expert_LN[layer * N + n];
            int is_first = expert != previous;
            if (is_first)
                memcpy(key_R, load_R, sizeof load_R);
            previous = expert;
            int64_t best = first_least(key_R, R);
            int fits = key_R[best] < same_rank;
            if (fits) {
                placement_LRS[(layer * R + best) * S + placed_R[best]++] = expert;
                load_R[best] = placed_R[best] == num_local_R[best] ? INFINITY : load_R[best] + share_LN[layer * N + n];
                key_R[best] = load_R[best] + same_rank;
            }
            /* Only the second copy has to be on another host. */
            for (int64_t r = 0; has_hosts && r < R; r++) {
                double taken = key_R[r] >= same_rank ? same_rank : 0.0;
                key_R[r] = load_R[r] + taken + (is_first && host_R[r] == host_R[best] ? same_host : 0.0);
            }
        }
    }
}
