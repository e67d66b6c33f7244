/* Headers, as kernels/header_exchange.py exchanges them. */
#include "exchange.h"

enum { EPOCH_SHIFT = 40 };

/* kernels/step_words.py */
static uint64_t tag_of(int64_t step) { return (uint64_t)((step >> EPOCH_SHIFT & 0xFFF) << 20 | (step & 0xFFFFF)); }

static int64_t *row_of(const exchange_t *e, const header_t *h, int64_t heap, int64_t source)
{
    return (int64_t *)(heap_of(e, heap) + h->bank) + source * (1 + h->num_data);
}

/* To all members, who are told. */
EXPORT void regrow_send_header(const exchange_t *e, const header_t *h)
{
    const uint64_t tag = tag_of(h->step) << 32;
    for (int64_t g = 0; g < e->num_members; g++) {
        int64_t *row = row_of(e, h, e->member_G[g], e->rank);
        for (int64_t d = 0; d < h->num_data; d++)
            __atomic_store_n(row + 1 + d, (int64_t)(tag | (uint64_t)h->own_D[d]), __ATOMIC_RELAXED);
        __atomic_store_n(row, h->step, __ATOMIC_RELEASE);
    }
    regrow_ring(e);
}

/* Takes the headers from the heap; whether all are whole and none speaks of another view. */
static int read_headers(const exchange_t *e, const header_t *h)
{
    const uint64_t tag = tag_of(h->step);
    int is_fine = 1;
    for (int64_t g = 0; g < e->num_members; g++) {
        const int64_t *row = row_of(e, h, e->rank, e->member_G[g]);
        int64_t *data_D = h->data_GD + g * h->num_data;
        for (int64_t d = 0; d < h->num_data; d++) {
            const uint64_t word = (uint64_t)__atomic_load_n(row + 1 + d, __ATOMIC_RELAXED);
            is_fine &= word >> 32 == tag;
            data_D[d] = (int64_t)(word & 0xFFFFFFFF);
        }
        is_fine &= data_D[0] == h->data_GD[0];
    }
    return is_fine;
}

/* Waits for one part; `is_due` remains when the words are not all here or not fine, for the caller to look into. */
EXPORT void regrow_await_headers(const exchange_t *e, wait_t *w, header_t *h)
{
    w->word = heap_of(e, e->rank) + h->bank;
    w->word_step = (1 + h->num_data) * (int64_t)sizeof(int64_t);
    w->step = h->step;
    w->begun_ns = 0;
    regrow_wait(e, w);
    count_wait(e, w);
    if (w->end == COMPLETE && read_headers(e, h)) h->is_due = 0;
}
