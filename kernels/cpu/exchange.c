/* The inner loops of the exchange (kernels/compiled_group.py): what kernels/reference.py does, bit by bit.
 *
 * Memory order. Words are stored after the payload (the store of a caller that comes after one of these functions, on a
 * machine with ordered stores) and loaded with acquire before it. Whatever is read from rows that others have written is
 * checked against the bounds of this heap: a process that is out of its mind must not make this one write elsewhere.
 */
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "vec16.h"

enum { DROPPED = -1, MASKED = -2 };
enum { ROUTING_FINE = 0, UNKNOWN_RANK = 1, UNKNOWN_EXPERT = 2 };
enum { PENDING = 0, COMPLETE = 1, FUTURE_WORD = 2, HOST_POISON = 3, PEER_POISON = 4 };
/* Of one sleep: a ring that never comes costs no more. */
enum { SLEEP_NS = 1000000 };

/* One rank's end of a group. Offsets are bytes from the start of a heap, all heaps are laid out alike; addresses of what
 * is not mapped are 0. Laid out as in compiled_group.py. */
typedef struct {
    int64_t max_ranks, max_tokens, top_k, hidden_size, row_words, row_header_words, rank, num_local_experts;
    int64_t dispatch_rows, dispatch_word, combine_rows, combine_word, bell, sleeper, poison;
    const int64_t *heap_W;    /* addresses of the heaps as mapped here */
    const int64_t *member_G;  /* sorted slots */
    int64_t num_members;
    const uint8_t *routable_W, *masked_W; /* masked: no members */
    int32_t *outbox;          /* the headers of the rows that go out: [M][row_words] */
    int64_t *load_WL;         /* rows sent to each expert; NULL: not counted */
    int64_t *num_rows_W;      /* that have come from each slot */
    int64_t *row_N, *source_N, *token_N, *k_N, *local_N; /* what came: [W * M * K] */
    float *weight_N;
    int64_t num_entries;      /* of these */
    int64_t fault;            /* of the last routing */
} exchange_t;

static inline char *heap_of(const exchange_t *e, int64_t rank) { return (char *)(intptr_t)e->heap_W[rank]; }

/* Beside the word of a dispatch: how many rows it stands for. */
static inline int64_t *num_rows_of(const exchange_t *e, int64_t heap, int64_t source)
{
    return (int64_t *)(heap_of(e, heap) + e->dispatch_word) + 2 * source + 1;
}

static inline int64_t load_word(const char *word) { return __atomic_load_n((const int64_t *)word, __ATOMIC_ACQUIRE); }

/* The headers of the rows, after a check of the routing; `fault` says what is wrong with it. */
EXPORT void regrow_route_tokens(exchange_t *e, int64_t num_tokens, const int64_t *rank_TK, const int64_t *local_TK,
                                const float *weight_TK)
{
    const int64_t top_k = e->top_k, num_local = e->num_local_experts ? e->num_local_experts : 65536;
    e->fault = ROUTING_FINE;
    for (int64_t i = 0; i < num_tokens * top_k; i++) {
        const int64_t rank = rank_TK[i];
        if (rank == DROPPED) continue;
        if (rank < 0 || rank >= e->max_ranks || !e->routable_W[rank]) e->fault = UNKNOWN_RANK;
        else if (local_TK[i] < 0 || local_TK[i] >= num_local) e->fault = e->fault ? e->fault : UNKNOWN_EXPERT;
    }
    if (e->fault) return;
    for (int64_t token = 0; token < num_tokens; token++) {
        int32_t *code_K = e->outbox + token * e->row_words + 1;
        for (int64_t k = 0; k < top_k; k++) {
            const int64_t rank = rank_TK[token * top_k + k], local = local_TK[token * top_k + k];
            if (rank < 0) code_K[k] = DROPPED;
            else code_K[k] = e->masked_W[rank] ? MASKED : (int32_t)(rank << 16 | local);
        }
        memcpy(code_K + top_k, weight_TK + token * top_k, (size_t)top_k * sizeof(float));
    }
}

/* Each routed token once to every member among its ranks, with the number of rows for each: all but the words. */
EXPORT void regrow_send_tokens(exchange_t *e, int64_t num_tokens, const float *x, int64_t x_step)
{
    const size_t header_bytes = (size_t)e->row_header_words * 4, x_bytes = (size_t)e->hidden_size * 4;
    const size_t row_bytes = (size_t)e->row_words * 4;
    for (int64_t g = 0; g < e->num_members; g++) {
        const int64_t member = e->member_G[g];
        char *row = heap_of(e, member) + e->dispatch_rows + e->rank * e->max_tokens * (int64_t)row_bytes;
        int64_t num_rows = 0;
        for (int64_t token = 0; token < num_tokens; token++) {
            const int32_t *header = e->outbox + token * e->row_words;
            int is_wanted = 0;
            for (int64_t k = 0; k < e->top_k; k++) is_wanted |= header[1 + k] >> 16 == member;
            if (!is_wanted) continue;
            memcpy(row, header, header_bytes);
            memcpy(row + header_bytes, x + token * x_step, x_bytes);
            memset(row + header_bytes + x_bytes, 0, row_bytes - header_bytes - x_bytes);
            row += row_bytes;
            num_rows++;
        }
        *num_rows_of(e, member, e->rank) = num_rows;
    }
    if (!e->load_WL) return;
    for (int64_t token = 0; token < num_tokens; token++)
        for (int64_t k = 0; k < e->top_k; k++) {
            const int32_t code = e->outbox[token * e->row_words + 1 + k];
            if (code >= 0) e->load_WL[(code >> 16) * e->num_local_experts + (code & 0xFFFF)]++;
        }
}

/* The entries for this rank among the rows that have come, in order of (source, row, k). */
EXPORT void regrow_read_tokens(exchange_t *e)
{
    const int64_t max_tokens = e->max_tokens, top_k = e->top_k;
    int64_t n = 0;
    memset(e->num_rows_W, 0, (size_t)e->max_ranks * sizeof(int64_t));
    for (int64_t g = 0; g < e->num_members; g++) {
        const int64_t source = e->member_G[g], num_rows = least(*num_rows_of(e, e->rank, source), max_tokens);
        e->num_rows_W[source] = num_rows;
        for (int64_t row = 0; row < num_rows; row++) {
            const int64_t slot = source * max_tokens + row;
            const int32_t *header = (const int32_t *)(heap_of(e, e->rank) + e->dispatch_rows) + slot * e->row_words;
            for (int64_t k = 0; k < top_k; k++) {
                const int32_t code = header[1 + k];
                if (code >> 16 != e->rank) continue;
                e->row_N[n] = slot, e->source_N[n] = source, e->token_N[n] = header[0], e->k_N[n] = k;
                e->local_N[n] = code & 0xFFFF;
                memcpy(e->weight_N + n, header + 1 + top_k + k, sizeof(float));
                n++;
            }
        }
    }
    e->num_entries = n;
}

/* The experts' rows of all entries to the tokens' owners: all but the words. */
EXPORT void regrow_return_rows(const exchange_t *e, const float *rows_NH)
{
    const int64_t places = e->max_tokens * e->top_k;
    const size_t row_bytes = (size_t)e->hidden_size * sizeof(float);
    for (int64_t n = 0; n < e->num_entries; n++) {
        const int64_t place = e->token_N[n] * e->top_k + e->k_N[n];
        char *heap = heap_of(e, e->source_N[n]);
        if (e->masked_W[e->source_N[n]] || place < 0 || place >= places) continue;
        memcpy(heap + e->combine_rows + (e->rank * places + place) * (int64_t)row_bytes,
               rows_NH + n * e->hidden_size, row_bytes);
    }
}

/* out[t] = ((0 + w[t, 0] row[t, 0]) + w[t, 1] row[t, 1]) + ..., without the entries that were dropped or masked. */
EXPORT void regrow_add_up(const exchange_t *e, int64_t num_tokens, float *out_TH)
{
    const int64_t top_k = e->top_k, hidden = e->hidden_size, places = e->max_tokens * top_k;
    const float *rows = (const float *)(heap_of(e, e->rank) + e->combine_rows);
    for (int64_t token = 0; token < num_tokens; token++) {
        const int32_t *code_K = e->outbox + token * e->row_words + 1;
        float *out = out_TH + token * hidden;
        for (int64_t h = 0; h < hidden; h++) out[h] = 0.0f;
        for (int64_t k = 0; k < top_k; k++) {
            if (code_K[k] < 0) continue;
            float weight;
            memcpy(&weight, code_K + top_k + k, sizeof weight);
            const float *row = rows + ((code_K[k] >> 16) * places + token * top_k + k) * hidden;
            for (int64_t h = 0; h < hidden; h++) {
                const float product = weight * row[h];
                out[h] += product;
            }
        }
    }
}

/* kernels/doorbell.py */
EXPORT void regrow_ring(const exchange_t *e)
{
    for (int64_t g = 0; g < e->num_members; g++)
        if (e->member_G[g] != e->rank) {
            int64_t *bell = (int64_t *)(heap_of(e, e->member_G[g]) + e->bell) + e->rank;
            __atomic_store_n(bell, __atomic_load_n(bell, __ATOMIC_RELAXED) + 1, __ATOMIC_RELEASE);
        }
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* what was stored is seen by all before the sleepers are read */
    for (int64_t g = 0; g < e->num_members; g++)
        if (e->member_G[g] != e->rank) {
            char *heap = heap_of(e, e->member_G[g]);
            if (load_word(heap + e->sleeper) == e->rank + 1)
                syscall(SYS_futex, heap + e->bell + 8 * e->rank, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        }
}

/* kernels/word_wait.py, without what needs the host: the caller looks after deadlines and `stop` between two parts.
 * Laid out as in compiled_wait.py. */
typedef struct {
    const char *word;        /* of slot 0 */
    int64_t word_step;       /* bytes from one slot's word to the next */
    int64_t step, floor;
    int64_t most_ns;         /* of this part of the wait; 0: one look */
    int64_t begun_ns;        /* when the wait began; 0: now, and all members are missing */
    uint8_t *is_missing_W;   /* also for the next part */
    int64_t *waited_ns_W;    /* grows */
    int64_t end;
} wait_t;

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

EXPORT void regrow_wait(const exchange_t *e, wait_t *w)
{
    char *own = heap_of(e, e->rank);
    int is_first_look = w->begun_ns == 0;
    if (is_first_look)
        for (int64_t g = 0; g < e->num_members; g++) w->is_missing_W[e->member_G[g]] = 1;
    int64_t now = now_ns();
    const int64_t part_begun = now;
    if (is_first_look) w->begun_ns = now;
    int64_t last = e->member_G[e->num_members - 1];
    for (;;) {
        /* Before the words: what is rung for after this look ends the sleep behind it. */
        const int64_t rung_for = last, ring = load_word(own + e->bell + 8 * rung_for);
        int has_future = 0, has_poison = 0;
        last = -1;
        for (int64_t g = 0; g < e->num_members; g++) {
            const int64_t source = e->member_G[g];
            if (!w->is_missing_W[source]) continue;
            const int64_t word = load_word(w->word + source * w->word_step);
            if (word == w->step) {
                w->is_missing_W[source] = 0;
                if (!is_first_look) w->waited_ns_W[source] += now - w->begun_ns;
            } else {
                last = source;
                has_future |= word > w->step;
            }
        }
        is_first_look = 0;
        if (last < 0) {
            w->end = COMPLETE;
            return;
        }
        for (int64_t g = 0; g < e->num_members; g++)
            has_poison |= load_word(own + e->poison + 8 * e->member_G[g]) >= w->floor;
        if (has_future) w->end = FUTURE_WORD;
        else if (load_word(own + e->poison + 8 * e->rank) >= w->floor) w->end = HOST_POISON;
        else if (has_poison) w->end = PEER_POISON;
        else w->end = PENDING;
        const int64_t left_ns = w->most_ns - (now - part_begun);
        if (w->end != PENDING || left_ns <= 0) return;
        if (rung_for == last) {
            const struct timespec most = {0, left_ns < SLEEP_NS ? left_ns : SLEEP_NS};
            __atomic_store_n((int64_t *)(own + e->sleeper), last + 1, __ATOMIC_SEQ_CST);
            syscall(SYS_futex, own + e->bell + 8 * last, FUTEX_WAIT, (uint32_t)ring, &most, NULL, 0);
            __atomic_store_n((int64_t *)(own + e->sleeper), 0, __ATOMIC_RELEASE);
        }
        now = now_ns();
    }
}

/* One layer from the words of its dispatch to the sums of its combine, without Python in between: each wait is where
 * another process gets this core, and what a rank touches when it comes back is cold. Any wait that is not over after
 * its first part is left to the caller, `stage` says which; so are rows that name no expert. */
enum { WAITS_FOR_TOKENS = 0, WAITS_FOR_ROWS = 1, LAYER_DONE = 2 };

/* Laid out as in exchange.py. */
typedef struct {
    const float *const *expert_at;
    int64_t num_experts, inter;
    float *rows_NH, *out_TH;
    int64_t num_tokens;
    int64_t own_ns; /* between and after the waits */
    int64_t stage;
} layer_t;

int64_t regrow_expert_rows(const float *x, int64_t x_step, int64_t num_slots, const int64_t *row, const int64_t *expert,
                           int64_t num_rows, const float *const *expert_at, int64_t num_experts, int64_t hidden,
                           int64_t inter, float *out);

EXPORT void regrow_finish_layer(exchange_t *e, wait_t *w, layer_t *layer)
{
    char *own = heap_of(e, e->rank);
    const float *x = (const float *)(own + e->dispatch_rows) + e->row_header_words;
    layer->stage = WAITS_FOR_TOKENS;
    layer->own_ns = 0;
    regrow_ring(e);
    regrow_wait(e, w);
    if (w->end != COMPLETE) return;
    int64_t begun = now_ns();
    regrow_read_tokens(e);
    if (regrow_expert_rows(x, e->row_words, e->max_ranks * e->max_tokens, e->row_N, e->local_N, e->num_entries,
                           layer->expert_at, layer->num_experts, e->hidden_size, layer->inter, layer->rows_NH))
        return;
    regrow_return_rows(e, layer->rows_NH);
    for (int64_t g = 0; g < e->num_members; g++) {
        int64_t *word = (int64_t *)(heap_of(e, e->member_G[g]) + e->combine_word) + e->rank;
        __atomic_store_n(word, w->step + 1, __ATOMIC_RELEASE);
    }
    layer->stage = WAITS_FOR_ROWS;
    regrow_ring(e);
    layer->own_ns = now_ns() - begun;
    w->word = own + e->combine_word;
    w->word_step = sizeof(int64_t);
    w->step++;
    w->begun_ns = 0;
    regrow_wait(e, w);
    if (w->end != COMPLETE) return;
    begun = now_ns();
    regrow_add_up(e, layer->num_tokens, layer->out_TH);
    layer->own_ns += now_ns() - begun;
    layer->stage = LAYER_DONE;
}
