#include "least.h"

#include <math.h>
#include <stdlib.h>

/* Local search of the planner, layer by layer: services/planner/local_search.py, which says what it does and why, in
 * the same order of floating-point operations, so that both give the same placements.
 *
 * Legend: R ranks, S slots of the largest, P = R x S slots, E experts (index E: EMPTY), H hosts (0: one), Q slots and
 * K experts considered for a replace, M light ranks considered for a swap.
 */

enum { MAX_LIGHT = 6 };

struct dims {
    int64_t L, R, S, E, H, Q, K, M, max_steps;
};

struct layer {
    const struct dims *d;
    const int64_t *host_R;
    const uint8_t *exists_P;
    double price;
    int64_t *held_P, cost;
    double *load_E, *counts_E, *more_E, *relief_E, *harm_E, *share_E, *rise_E; /* E + 1 */
    double *slot_share_P, *harm_P, *left_P, *rest_P, *least_P, *count_P, *lost_P;
    double *load_R, *cost_R;
    int64_t *num_hosts_E, *on_host_HE;
    uint8_t *is_held_RE;
    int64_t *slot_Q, *expert_K, *light_M;
    double *value_Q, *more_K, *change_K; /* value_Q has room for the longest of the three lists */
};

struct move {
    double change;
    int64_t from, to; /* slots; of a replace: slot and expert */
};

INLINE double power8(double value)
{
    value *= value;
    value *= value;
    return value * value;
}

INLINE double most(double a, double b) { return a > b ? a : b; }

static void least_of_both(int64_t size, const double *restrict values, double *restrict least)
{
    for (int64_t i = 0; i < size; i++)
        least[i] = values[i] < least[i] ? values[i] : least[i];
}

/* The `wanted` smallest of `count` values, smallest first, of equal ones the first. */
static void smallest(const double *values, int64_t count, int64_t wanted, double *value_Q, int64_t *index_Q)
{
    /* None of them is above the largest of the least of `wanted` groups: most values need no second look. */
    double bound = -INFINITY;
    int64_t found = 0;
    memcpy(value_Q, values, (size_t)wanted * sizeof *values);
    for (int64_t i = wanted; i + wanted <= count; i += wanted)
        least_of_both(wanted, values + i, value_Q);
    for (int64_t i = 0; i < wanted; i++)
        bound = most(bound, value_Q[i]);
    for (int64_t i = 0; i < count; i++) {
        double value = values[i];
        if (value > bound || (found == wanted && !(value < value_Q[found - 1])))
            continue;
        int64_t place = found < wanted ? found++ : found - 1;
        for (; place > 0 && value < value_Q[place - 1]; place--) {
            value_Q[place] = value_Q[place - 1];
            index_Q[place] = index_Q[place - 1];
        }
        value_Q[place] = value;
        index_Q[place] = i;
    }
}

/* Of each copy; had the expert a copy more; and what is added to each if it has one less. */
static void shares(
    int64_t size, const double *restrict load, const double *restrict counts, double *restrict share,
    double *restrict more, double *restrict rise)
{
    for (int64_t e = 0; e < size; e++) {
        share[e] = load[e] / most(counts[e], 1.0);
        more[e] = load[e] / (counts[e] + 1.0);
        rise[e] = load[e] / most(counts[e] - 1.0, 1.0) - share[e];
    }
}

/* What the cost of one rank becomes with each of the experts in place of what a slot held, and what follows elsewhere. */
static void changes(
    int64_t size, double left, double least_left, const double *restrict more, const double *restrict hope,
    double *restrict change)
{
    for (int64_t k = 0; k < size; k++)
        change[k] = power8(left + more[k]) + least_left + hope[k];
}

/* What it costs that the copy in a slot goes; infinite for the only one. */
static void losses(
    int64_t size, double price, const double *restrict count, const double *restrict rest, const double *restrict left,
    const double *restrict lost, double *restrict least)
{
    for (int64_t p = 0; p < size; p++) {
        double cost = rest[p] + power8(left[p]) + price * lost[p];
        least[p] = count[p] > 1.5 ? cost : INFINITY;
    }
}

/* Of the cost of two ranks, when the heavy one gives `given` and takes one of the others. */
static void swaps(
    int64_t size, double given, double heavy, double light, double both, const double *restrict taken,
    double *restrict change)
{
    for (int64_t n = 0; n < size; n++) {
        double moved = given - taken[n];
        change[n] = power8(heavy - moved) + power8(moved + light) - both;
    }
}

static void weigh(struct layer *y)
{
    const struct dims *d = y->d;
    shares(d->E + 1, y->load_E, y->counts_E, y->share_E, y->more_E, y->rise_E);
    memset(y->harm_E, 0, (size_t)(d->E + 1) * sizeof *y->harm_E);
    memset(y->relief_E, 0, (size_t)(d->E + 1) * sizeof *y->relief_E);
    for (int64_t r = 0, p = 0; r < d->R; r++) {
        int64_t begin = p;
        double load = y->slot_share_P[p] = y->share_E[y->held_P[p]];
        for (p++; p < begin + d->S; p++)
            load += y->slot_share_P[p] = y->share_E[y->held_P[p]];
        double cost = power8(load);
        y->load_R[r] = load;
        y->cost_R[r] = cost;
        for (int64_t q = begin; q < p; q++) {
            int64_t e = y->held_P[q];
            y->harm_P[q] = power8(load + y->rise_E[e]) - cost;
            y->least_P[q] = power8(load - (y->share_E[e] - y->more_E[e])) - cost; /* relief, until it is summed */
            y->left_P[q] = load - y->slot_share_P[q];
            y->rest_P[q] = cost;
        }
    }
    for (int64_t p = 0; p < d->R * d->S; p++) {
        y->harm_E[y->held_P[p]] += y->harm_P[p];
        y->relief_E[y->held_P[p]] += y->least_P[p];
    }
    for (int64_t p = 0; p < d->R * d->S; p++)
        y->rest_P[p] = y->harm_E[y->held_P[p]] - y->harm_P[p] - y->rest_P[p];
    for (int64_t e = 0; d->H && e <= d->E; e++) {
        y->num_hosts_E[e] = 0;
        for (int64_t h = 0; h < d->H; h++)
            y->num_hosts_E[e] += y->on_host_HE[h * (d->E + 1) + e] > 0;
    }
}

/* Experts with one copy, and once more those on one host where there are several. */
static double deficit(const struct layer *y)
{
    int64_t single = 0;
    for (int64_t e = 0; e <= y->d->E; e++)
        single += (y->counts_E[e] == 1.0) + (y->d->H && y->num_hosts_E[e] == 1);
    return (double)single;
}

static struct move best_replace(struct layer *y)
{
    const struct dims *d = y->d;
    const int64_t width = d->E + 1;
    struct move best = {INFINITY, 0, 0};
    for (int64_t p = 0; p < d->R * d->S; p++) {
        int64_t e = y->held_P[p]; /* an empty slot has nothing to lose */
        y->count_P[p] = y->exists_P[p] ? (e == d->E ? 3.0 : y->counts_E[e]) : 0.0;
        y->lost_P[p] = y->count_P[p] == 2.0 ? 1.0 : 0.0;
    }
    for (int64_t r = 0; d->H && r < d->R; r++)
        for (int64_t p = r * d->S; p < (r + 1) * d->S; p++) {
            int64_t e = y->held_P[p];
            if (y->num_hosts_E[e] == 2 && y->on_host_HE[y->host_R[r] * width + e] == 1)
                y->lost_P[p] += 1.0;
        }
    losses(d->R * d->S, y->price, y->count_P, y->rest_P, y->left_P, y->lost_P, y->least_P);
    smallest(y->least_P, d->R * d->S, d->Q, y->value_Q, y->slot_Q);
    double *hope_E = y->relief_E;
    for (int64_t e = 0; e < d->E; e++)
        hope_E[e] = y->counts_E[e] == 0.0 ? INFINITY : hope_E[e] - y->price * (y->counts_E[e] == 1.0 ? 1.0 : 0.0);
    smallest(hope_E, d->E, d->K, y->value_Q, y->expert_K);
    for (int64_t k = 0; k < d->K; k++)
        y->more_K[k] = y->more_E[y->expert_K[k]];
    for (int64_t q = 0; q < d->Q; q++) {
        int64_t p = y->slot_Q[q], rank = p / d->S;
        double left = y->left_P[p], least_left = y->least_P[p] - power8(left);
        changes(d->K, left, least_left, y->more_K, y->value_Q, y->change_K);
        for (int64_t k = 0; d->H && k < d->K; k++) {
            int64_t e = y->expert_K[k]; /* what a copy on another host is worth beyond a second copy */
            if (y->num_hosts_E[e] == 1 && y->on_host_HE[y->host_R[rank] * width + e] == 0)
                y->change_K[k] -= y->price;
        }
        int is_better = y->change_K[first_least(y->change_K, d->K)] < best.change;
        for (int64_t k = 0; is_better && k < d->K; k++)
            if (y->change_K[k] < best.change && !y->is_held_RE[rank * width + y->expert_K[k]])
                best = (struct move){y->change_K[k], p, y->expert_K[k]};
    }
    return best;
}

/* How many more experts are on one host only when a copy of this one goes from one host to another. */
static int64_t moved_deficit(const struct layer *y, int64_t expert, int64_t source, int64_t target)
{
    const int64_t width = y->d->E + 1, hosts = y->num_hosts_E[expert];
    int64_t is_last = y->on_host_HE[source * width + expert] == 1;
    int64_t is_first = y->on_host_HE[target * width + expert] == 0;
    return (hosts - is_last + is_first < 2) - (hosts < 2);
}

static struct move best_swap(struct layer *y)
{
    const struct dims *d = y->d;
    const int64_t width = d->E + 1;
    struct move best = {INFINITY, 0, 0};
    int64_t heavy = 0, num_light = d->M;
    for (int64_t r = 1; r < d->R; r++)
        if (y->load_R[r] > y->load_R[heavy])
            heavy = r;
    smallest(y->load_R, d->R, d->M, y->value_Q, y->light_M);
    if (d->H) { /* and the lightest on the host of the heaviest: there a swap costs no coverage */
        for (int64_t r = 0; r < d->R; r++)
            y->left_P[r] = y->load_R[r] + (double)(d->R * (y->host_R[r] != y->host_R[heavy]));
        smallest(y->left_P, d->R, d->M, y->value_Q, y->light_M + d->M);
        num_light *= 2;
    }
    int64_t to_MS[MAX_LIGHT * d->S], num_M[MAX_LIGHT];
    double share_MS[MAX_LIGHT * d->S], change_S[d->S];
    for (int64_t m = 0; m < num_light; m++) {
        int64_t light = y->light_M[m], found = 0;
        for (int64_t to = light * d->S; light != heavy && to < (light + 1) * d->S; to++)
            if (y->exists_P[to] && !y->is_held_RE[heavy * width + y->held_P[to]]) {
                to_MS[m * d->S + found] = to;
                share_MS[m * d->S + found++] = y->slot_share_P[to];
            }
        num_M[m] = found;
    }
    for (int64_t s = 0; s < d->S; s++)
        for (int64_t m = 0; m < num_light; m++) {
            int64_t light = y->light_M[m], from = heavy * d->S + s, given = y->held_P[from], *to_S = to_MS + m * d->S;
            if (!num_M[m] || !y->exists_P[from] || y->is_held_RE[light * width + given])
                continue;
            double both = y->cost_R[light] + y->cost_R[heavy];
            swaps(num_M[m], y->slot_share_P[from], y->load_R[heavy], y->load_R[light], both, share_MS + m * d->S, change_S);
            if (d->H && y->price != 0.0 && y->host_R[light] != y->host_R[heavy]) {
                int64_t given_change = moved_deficit(y, given, y->host_R[heavy], y->host_R[light]);
                for (int64_t n = 0; n < num_M[m]; n++) {
                    int64_t taken = y->held_P[to_S[n]];
                    int64_t taken_change = moved_deficit(y, taken, y->host_R[light], y->host_R[heavy]);
                    change_S[n] += y->price * (double)(given_change + taken_change);
                }
            }
            for (int64_t n = 0; n < num_M[m]; n++)
                if (change_S[n] < best.change)
                    best = (struct move){change_S[n], from, to_S[n]};
        }
    return best;
}

static void put(struct layer *y, int64_t slot, int64_t new)
{
    const struct dims *d = y->d;
    int64_t old = y->held_P[slot], rank = slot / d->S, width = d->E + 1;
    y->held_P[slot] = new;
    if (old != d->E) {
        y->counts_E[old] -= 1.0;
        y->is_held_RE[rank * width + old] = 0;
    }
    if (new != d->E) {
        y->counts_E[new] += 1.0;
        y->is_held_RE[rank * width + new] = 1;
    }
    if (d->H && old != d->E)
        y->on_host_HE[y->host_R[rank] * width + old] -= 1;
    if (d->H && new != d->E)
        y->on_host_HE[y->host_R[rank] * width + new] += 1;
}

/* Whether there was a good move. changed_4: its slots and what they hold now; slot -1: none. */
static int improve(struct layer *y, int64_t most_cost, int64_t *changed_4)
{
    struct move replace = best_replace(y), swap = best_swap(y);
    int64_t swap_cost = 2 - (y->held_P[swap.to] == y->d->E);
    int use_swap = y->cost + swap_cost <= most_cost && swap.change / (double)swap_cost < replace.change;
    double gain = use_swap ? swap.change : replace.change;
    int64_t cost = use_swap ? swap_cost : 1;
    if (!(gain < -1e-9) || y->cost + cost > most_cost)
        return 0;
    changed_4[0] = use_swap ? swap.from : replace.from;
    changed_4[1] = use_swap ? y->held_P[swap.to] : replace.to;
    changed_4[2] = use_swap ? swap.to : -1;
    changed_4[3] = use_swap ? y->held_P[swap.from] : -1;
    put(y, changed_4[0], changed_4[1]);
    if (use_swap)
        put(y, changed_4[2], changed_4[3]);
    y->cost += cost;
    return 1;
}

static void begin(struct layer *y, const double *load_E)
{
    const struct dims *d = y->d;
    int64_t width = d->E + 1;
    memset(y->counts_E, 0, (size_t)width * sizeof *y->counts_E);
    memset(y->is_held_RE, 0, (size_t)(d->R * width));
    memset(y->on_host_HE, 0, (size_t)(d->H * width) * sizeof *y->on_host_HE);
    for (int64_t p = 0; p < d->R * d->S; p++) {
        int64_t e = y->held_P[p], rank = p / d->S;
        if (e == d->E)
            continue;
        y->counts_E[e] += 1.0;
        if (d->H && !y->is_held_RE[rank * width + e])
            y->on_host_HE[y->host_R[rank] * width + e] += 1;
        y->is_held_RE[rank * width + e] = 1;
    }
    /* EMPTY counts as an expert without load that has a copy to spare, and lacks no host. */
    y->counts_E[d->E] = 2.0;
    for (int64_t h = 0; h < d->H; h++)
        y->on_host_HE[h * width + d->E] = 2;
    for (int64_t e = 0; e <= d->E; e++)
        y->load_E[e] = e == d->E || y->counts_E[e] == 0.0 ? 0.0 : load_E[e];
    y->cost = 0;
}

static double largest(const double *values, int64_t count)
{
    double found = values[0];
    for (int64_t i = 1; i < count; i++)
        found = most(found, values[i]);
    return found;
}

/* held_LP is changed. Outputs have max_steps + 1 entries a layer (changed_LN4: max_steps), of which the first
 * num_moves_L + 1 are written. *failed: 1 if there is no memory. */
EXPORT void regrow_placement_search(
    const int64_t *dims_9, const double *load_LE, int64_t *held_LP, const int64_t *host_R, const uint8_t *exists_P,
    const double *price, const int64_t *most_L, int64_t *num_moves_L, int64_t *cost_LN, double *largest_LN,
    double *deficit_LN, int64_t *changed_LN4, int64_t *failed)
{
    struct dims d;
    memcpy(&d, dims_9, sizeof d);
    const int64_t E = d.E + 1, P = d.R * d.S, longest = d.Q + d.K + 2 * d.M;
    /* In words of eight bytes; the flags last. */
    const int64_t words = 7 * E + 7 * P + 2 * d.R + E + d.H * E + 2 * longest + 2 * d.K;
    double *memory = malloc((size_t)words * 8 + (size_t)(d.R * E));
    *failed = memory == NULL;
    if (*failed)
        return;
    struct layer y = {.d = &d, .host_R = host_R, .exists_P = exists_P, .price = *price};
    double *next = memory, **rows_E[] = {&y.load_E, &y.counts_E, &y.more_E, &y.relief_E, &y.harm_E, &y.share_E, &y.rise_E};
    double **rows_P[] = {&y.slot_share_P, &y.harm_P, &y.left_P, &y.rest_P, &y.least_P, &y.count_P, &y.lost_P};
    for (int i = 0; i < 7; i++, next += E)
        *rows_E[i] = next;
    for (int i = 0; i < 7; i++, next += P)
        *rows_P[i] = next;
    y.load_R = next, next += d.R;
    y.cost_R = next, next += d.R;
    y.value_Q = next, next += longest;
    y.more_K = next, next += d.K;
    y.change_K = next, next += d.K;
    y.num_hosts_E = (int64_t *)next, next += E;
    y.on_host_HE = (int64_t *)next, next += d.H * E;
    y.slot_Q = (int64_t *)next, y.expert_K = y.slot_Q + d.Q, y.light_M = y.expert_K + d.K, next += longest;
    y.is_held_RE = (uint8_t *)next;
    for (int64_t layer = 0; layer < d.L; layer++) {
        int64_t moves = 0, first = layer * (d.max_steps + 1);
        y.held_P = held_LP + layer * P;
        begin(&y, load_LE + layer * d.E);
        for (;; moves++) {
            weigh(&y);
            cost_LN[first + moves] = y.cost;
            largest_LN[first + moves] = largest(y.load_R, d.R);
            deficit_LN[first + moves] = deficit(&y);
            if (moves == d.max_steps ||
                !improve(&y, most_L[layer], changed_LN4 + 4 * (layer * d.max_steps + moves)))
                break;
        }
        num_moves_L[layer] = moves;
    }
    free(memory);
}
