#ifndef REGROW_LEAST_H
#define REGROW_LEAST_H

#include "vec16.h"

/* Where the least of `size` > 0 values is; of equal ones the first. Four searches at once, so none waits for itself. */
INLINE int64_t first_least(const double *values, int64_t size)
{
    double low[4];
    int64_t at[4], i = 4;
    if (size < 4) {
        int64_t best = 0;
        for (i = 1; i < size; i++)
            best = values[i] < values[best] ? i : best;
        return best;
    }
    for (int lane = 0; lane < 4; lane++)
        low[lane] = values[lane], at[lane] = lane;
    for (; i + 4 <= size; i += 4)
        for (int lane = 0; lane < 4; lane++) {
            int is_less = values[i + lane] < low[lane];
            low[lane] = is_less ? values[i + lane] : low[lane];
            at[lane] = is_less ? i + lane : at[lane];
        }
    for (int lane = 0; i < size; i++, lane++) {
        int is_less = values[i] < low[lane];
        low[lane] = is_less ? values[i] : low[lane];
        at[lane] = is_less ? i : at[lane];
    }
    for (int lane = 1; lane < 4; lane++)
        if (low[lane] < low[0] || (low[lane] == low[0] && at[lane] < at[0]))
            low[0] = low[lane], at[0] = at[lane];
    return at[0];
}

#endif
