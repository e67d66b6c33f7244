/* A whole forward pass with the exchange of its layers, without Python in between: each wait is where another process
 * gets this core, and what a rank touches when it comes back is cold.
 *
 * A pass goes as far as it can. It ends at a wait that is not over after its first part, or that ended for another reason
 * than its words; `stage` says which. A caller that has seen the words meanwhile calls again, and the pass goes on behind
 * that wait; nothing else is ever published (PROTOCOL 2.3).
 *
 * Legend: T tokens, H hidden, E logical experts, K experts per token, C columns of the replica table, N entries that came.
 */
#include "exchange.h"
#include "model.h"

enum {
    BEGINS = 0, WAITS_FOR_HEADERS = 1, WAITS_FOR_TOKENS = 2, WAITS_FOR_ROWS = 3, DONE = 4,
    BAD_ROUTING = 5, BAD_ROWS = 6, NO_MEMORY = 7
};

/* Laid out as in structures.py. Of `dense` and `moe` one is there. */
typedef struct {
    const struct attention *attention;
    float *cache;
    const struct dense *dense;
    const struct moe *moe;
} layer_t;

typedef struct {
    const layer_t *layers;
    int64_t num_layers;
    const float *embedding;
    const struct head *head;
    int64_t num_experts, has_shared;
} model_t;

/* Where the experts of one mixture layer are: rank and local index of the copy that serves (expert, column), and the
 * packed weights of those that are here. `num_asked` and `num_served` grow. */
typedef struct {
    const int64_t *rank_EC, *local_EC;
    const float *const *expert_at;
    int64_t num_slots;
    int64_t *num_asked_E, *num_served;
} experts_t;

/* Laid out as in forward.py. */
typedef struct {
    exchange_t *exchange;
    wait_t *wait;
    header_t *header; /* own tokens go as far as they can alone before it is waited for */
    float *x_TH, *normed_TH, *shared_TH, *routed_TH, *weight_TK, *rows_NH;
    int64_t *expert_TK, *rank_TK, *local_TK;
    const model_t *model;
    const batch_t *batch;
    const experts_t *experts; /* of the mixture layers */
    int64_t num_columns, inter;
    uint8_t *misses_T; /* set for tokens with an expert without live copy */
    float *logits_SV;
    int64_t *num_operations; /* completed: grows */
    int64_t step;            /* of the last operation begun */
    int64_t num_sent;        /* grows; whatever differs between tokens spreads them over copies */
    int64_t most_wait_ns, own_ns; /* the latter without waits: grows */
    int64_t layer, moe_layer, stage;
} pass_t;

static void choose_copies(pass_t *p, const experts_t *experts)
{
    const int64_t num_tokens = p->batch->num_tokens, top_k = p->exchange->top_k;
    for (int64_t t = 0; t < num_tokens; t++)
        for (int64_t i = t * top_k; i < (t + 1) * top_k; i++) {
            const int64_t at = p->expert_TK[i] * p->num_columns + (p->num_sent + t) % p->num_columns;
            p->rank_TK[i] = experts->rank_EC[at];
            p->local_TK[i] = experts->local_EC[at];
            if (p->rank_TK[i] < 0) p->misses_T[t] = 1;
        }
    p->num_sent += num_tokens;
}

/* A word of this rank to every member: what it stands for was stored before. */
static void publish(const pass_t *p, int64_t word_at, int64_t word_step)
{
    const exchange_t *const e = p->exchange;
    for (int64_t g = 0; g < e->num_members; g++) {
        int64_t *word = (int64_t *)(heap_of(e, e->member_G[g]) + word_at + e->rank * word_step);
        __atomic_store_n(word, p->step, __ATOMIC_RELEASE);
    }
    regrow_ring(e);
}

/* Whether the words of the last operation are all here. */
static int words_come(pass_t *p, int64_t word_at, int64_t word_step)
{
    wait_t *const w = p->wait;
    w->word = heap_of(p->exchange, p->exchange->rank) + word_at;
    w->word_step = word_step;
    w->step = p->step;
    w->begun_ns = 0;
    w->most_ns = p->most_wait_ns;
    const int64_t begun = now_ns();
    regrow_wait(p->exchange, w);
    count_wait(p->exchange, w);
    p->own_ns -= now_ns() - begun;
    return w->end == COMPLETE;
}

static int headers_come(pass_t *p)
{
    if (!p->header->is_due) return 1;
    p->wait->most_ns = p->most_wait_ns;
    const int64_t begun = now_ns();
    regrow_await_headers(p->exchange, p->wait, p->header);
    p->own_ns -= now_ns() - begun;
    return !p->header->is_due;
}

static void send_tokens(pass_t *p)
{
    exchange_t *const e = p->exchange;
    p->step++;
    regrow_send_tokens(e, p->batch->num_tokens, p->normed_TH, e->hidden_size);
    publish(p, e->dispatch_word, 2 * sizeof(int64_t));
    p->stage = WAITS_FOR_TOKENS;
}

/* The experts' rows of what came, back to their owners. */
static void return_rows(pass_t *p, const experts_t *experts)
{
    exchange_t *const e = p->exchange;
    const float *const x = (const float *)(heap_of(e, e->rank) + e->dispatch_rows) + e->row_header_words;
    regrow_read_tokens(e);
    const int64_t wrong = regrow_expert_rows(x, e->row_words, e->max_ranks * e->max_tokens, e->row_N, e->local_N,
                                             e->num_entries, experts->expert_at, experts->num_slots, e->hidden_size,
                                             p->inter, p->rows_NH);
    if (wrong) {
        p->stage = wrong < 0 ? NO_MEMORY : BAD_ROWS;
        return;
    }
    regrow_return_rows(e, p->rows_NH);
    p->step++;
    publish(p, e->combine_word, sizeof(int64_t));
    p->stage = WAITS_FOR_ROWS;
}

/* What came back, added to x. */
static void finish_layer(pass_t *p, const experts_t *experts)
{
    const exchange_t *const e = p->exchange;
    const int64_t num_tokens = p->batch->num_tokens;
    regrow_add_up(e, num_tokens, p->routed_TH);
    regrow_add_experts(p->x_TH, p->model->has_shared ? p->shared_TH : 0, p->routed_TH, num_tokens * e->hidden_size);
    for (int64_t i = 0; i < num_tokens * e->top_k; i++) experts->num_asked_E[p->expert_TK[i]]++;
    *experts->num_served += e->num_entries;
    p->layer++;
    p->moe_layer++;
    p->stage = BEGINS;
}

/* Up to the next words that go out, through layers that need none; or to the end. */
static void begin_layers(pass_t *p)
{
    const model_t *const m = p->model;
    const batch_t *const b = p->batch;
    for (; p->layer < m->num_layers; p->layer++) {
        const layer_t *const layer = m->layers + p->layer;
        if (b->num_tokens && regrow_attention(layer->attention, b, layer->cache, p->x_TH)) break;
        if (layer->moe) {
            if (regrow_route(layer->moe, p->x_TH, b->num_tokens, p->normed_TH, p->expert_TK, p->weight_TK, p->shared_TH))
                break;
            choose_copies(p, p->experts + p->moe_layer);
            regrow_route_tokens(p->exchange, b->num_tokens, p->rank_TK, p->local_TK, p->weight_TK);
            p->stage = p->exchange->fault ? BAD_ROUTING : WAITS_FOR_HEADERS;
            return;
        }
        if (b->num_tokens && regrow_dense(layer->dense, b->num_tokens, p->x_TH)) break;
    }
    const int is_done = p->layer == m->num_layers && !regrow_head(m->head, b, p->x_TH, p->logits_SV);
    p->stage = is_done ? DONE : NO_MEMORY;
}

static void go_on(pass_t *p)
{
    exchange_t *const e = p->exchange;
    for (;;) {
        const experts_t *const experts = p->experts + p->moe_layer;
        if (p->stage == BEGINS) {
            begin_layers(p);
            if (p->stage != WAITS_FOR_HEADERS || !headers_come(p)) return;
        }
        if (p->stage == WAITS_FOR_HEADERS) {
            send_tokens(p);
            if (!words_come(p, e->dispatch_word, 2 * sizeof(int64_t))) return;
        }
        if (p->stage == WAITS_FOR_TOKENS) {
            __atomic_fetch_add(p->num_operations, 1, __ATOMIC_RELAXED);
            return_rows(p, experts);
            if (p->stage != WAITS_FOR_ROWS || !words_come(p, e->combine_word, sizeof(int64_t))) return;
        }
        __atomic_fetch_add(p->num_operations, 1, __ATOMIC_RELAXED);
        finish_layer(p, experts);
    }
}

/* From `stage` BEGINS, or behind the wait at which the last call ended. */
EXPORT void regrow_forward(pass_t *p)
{
    p->own_ns -= now_ns();
    if (p->stage == BEGINS) {
        p->layer = p->moe_layer = 0;
        regrow_embed(p->batch, p->model->embedding, p->exchange->hidden_size, p->x_TH);
    }
    go_on(p);
    p->own_ns += now_ns();
}
