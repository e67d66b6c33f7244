/* Ringing and waiting for words, as kernels/doorbell.py and kernels/word_wait.py do. */
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "exchange.h"

/* Of one sleep: a ring that never comes costs no more. */
enum { SLEEP_NS = 1000000 };

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

int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* After a part of a wait that ended without all words: the time since it began counts, whoever goes on waiting. */
void count_wait(const exchange_t *e, const wait_t *w)
{
    const int64_t waited = now_ns() - w->begun_ns;
    for (int64_t g = 0; w->end != COMPLETE && g < e->num_members; g++)
        if (w->is_missing_W[e->member_G[g]]) w->waited_ns_W[e->member_G[g]] += waited;
}

EXPORT void regrow_wait(const exchange_t *e, wait_t *w)
{
    char *own = heap_of(e, e->rank);
    int is_first_look = w->begun_ns == 0;
    if (is_first_look) memset(w->is_missing_W, 0, (size_t)e->max_ranks);
    if (!e->num_members) {
        w->end = COMPLETE;
        return;
    }
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
            if (!is_first_look && !w->is_missing_W[source]) continue;
            const int64_t word = load_word(w->word + source * w->word_step);
            if (word == w->step) {
                w->is_missing_W[source] = 0;
                if (!is_first_look) w->waited_ns_W[source] += now - w->begun_ns;
            } else {
                w->is_missing_W[source] = 1;
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
