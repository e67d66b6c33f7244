/* One rank's end of a group as C sees it, and its waits. */
#ifndef REGROW_EXCHANGE_H
#define REGROW_EXCHANGE_H

#include "vec16.h"

enum { DROPPED = -1, MASKED = -2 };
enum { ROUTING_FINE = 0, UNKNOWN_RANK = 1, UNKNOWN_EXPERT = 2 };
enum { PENDING = 0, COMPLETE = 1, FUTURE_WORD = 2, HOST_POISON = 3, PEER_POISON = 4 };

/* One rank's end of a group. Offsets are bytes from the start of a heap, all heaps are laid out alike; addresses of what
 * is not mapped are 0. Laid out as in exchange.py. */
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

/* kernels/word_wait.py, without what needs the host: the caller looks after deadlines and `stop` between two parts.
 * Laid out as in exchange.py. */
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

/* The headers of a round: word 0 of a row is the step word, each other one holds 32 bits of it and 32 of data, the digest
 * first. Laid out as in exchange.py. */
typedef struct {
    int64_t bank;       /* bytes from the start of a heap to the row of slot 0 */
    int64_t num_data;
    int64_t step;
    const int64_t *own_D;
    int64_t *data_GD;   /* of the members, in order; also what was not fine */
    int64_t is_due;     /* those of the others are not known to be there */
} header_t;

static inline char *heap_of(const exchange_t *e, int64_t rank) { return (char *)(intptr_t)e->heap_W[rank]; }

static inline int64_t load_word(const char *word) { return __atomic_load_n((const int64_t *)word, __ATOMIC_ACQUIRE); }

/* Nanoseconds of CLOCK_MONOTONIC. */
int64_t now_ns(void);

/* exchange.c */
void regrow_route_tokens(exchange_t *e, int64_t num_tokens, const int64_t *rank_TK, const int64_t *local_TK,
                         const float *weight_TK);
void regrow_send_tokens(exchange_t *e, int64_t num_tokens, const float *x, int64_t x_step);
void regrow_read_tokens(exchange_t *e);
void regrow_return_rows(const exchange_t *e, const float *rows_NH);
void regrow_add_up(const exchange_t *e, int64_t num_tokens, float *out_TH);

/* waiting.c, headers.c */
void regrow_ring(const exchange_t *e);
void regrow_send_header(const exchange_t *e, const header_t *h);
void regrow_await_headers(const exchange_t *e, wait_t *w, header_t *h);
void regrow_wait(const exchange_t *e, wait_t *w);
void count_wait(const exchange_t *e, const wait_t *w);

#endif
