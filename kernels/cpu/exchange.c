/* The inner loops of the exchange (kernels/compiled_group.py): what kernels/reference.py does, bit by bit.
 *
 * Memory order. Words are stored after the payload (the store of a caller that comes after one of these functions, on a
 * machine with ordered stores) and loaded with acquire before it. Whatever is read from rows that others have written is
 * checked against the bounds of this heap: a process that is out of its mind must not make this one write elsewhere.
 */
#include "exchange.h"

/* Beside the word of a dispatch: how many rows it stands for. */
static inline int64_t *num_rows_of(const exchange_t *e, int64_t heap, int64_t source)
{
    return (int64_t *)(heap_of(e, heap) + e->dispatch_word) + 2 * source + 1;
}

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
        const int64_t source = e->member_G[g], said = load_word((const char *)num_rows_of(e, e->rank, source));
        const int64_t num_rows = said < 0 ? 0 : least(said, max_tokens);
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
