#include "vec16.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A copy made by a thread of its own, with the CRC-32 (zlib's) of what has arrived, at a bounded rate.
 *
 * The thread knows nothing of Python, so it takes the interpreter from nobody, and it is nicer than its process by
 * NICER, so where processors are scarce the rounds go first. What it writes is complete once `done` says so.
 */

enum { SLICE = 64 << 10, NICER = 10 };
static const int64_t SECOND = 1000000000, NAP = 1000000, LAG = 100000000; /* nanoseconds */

struct copy {
    unsigned char *to;
    const unsigned char *from;
    int64_t size, bytes_per_s;
    uint32_t crc; /* of the copy; read after `done` */
    _Atomic int64_t done;
    _Atomic int32_t stop;
    pthread_t thread;
};

static uint32_t crc_table[8][256];
static pthread_once_t crc_once = PTHREAD_ONCE_INIT;

static void make_crc_table(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (0xEDB88320u & -(crc & 1));
        crc_table[0][byte] = crc;
    }
    for (int place = 1; place < 8; place++)
        for (int byte = 0; byte < 256; byte++) {
            uint32_t crc = crc_table[place - 1][byte];
            crc_table[place][byte] = crc >> 8 ^ crc_table[0][crc & 255];
        }
}

/* Eight bytes a step: each table holds what a byte does to the sum that many bytes later. */
static uint32_t crc32_of(const unsigned char *bytes, int64_t size, uint32_t crc)
{
    crc = ~crc;
    for (; size && (uintptr_t)bytes % 8; size--)
        crc = crc >> 8 ^ crc_table[0][(crc ^ *bytes++) & 255];
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; size >= 8; size -= 8, bytes += 8) {
        uint64_t word;
        memcpy(&word, bytes, sizeof word);
        word ^= crc;
        crc = 0;
        for (int place = 0; place < 8; place++)
            crc ^= crc_table[7 - place][word >> 8 * place & 255];
    }
#endif
    for (; size; size--)
        crc = crc >> 8 ^ crc_table[0][(crc ^ *bytes++) & 255];
    return ~crc;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static void *run(void *argument)
{
    struct copy *copy = argument;
    int64_t done = 0, begun = now_ns();
    uint32_t crc = 0;
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), getpriority(PRIO_PROCESS, 0) + NICER);
    while (done < copy->size) {
        int64_t part = least(SLICE, copy->size - done);
        memcpy(copy->to + done, copy->from + done, (size_t)part);
        crc = crc32_of(copy->to + done, part, crc);
        done += part;
        if (done == copy->size)
            copy->crc = crc;
        atomic_store_explicit(&copy->done, done, memory_order_release);
        int64_t due = begun + (int64_t)((double)done / (double)copy->bytes_per_s * (double)SECOND), late;
        while ((late = now_ns() - due) < 0 && !atomic_load(&copy->stop)) {
            struct timespec nap = {0, least(NAP, -late)};
            nanosleep(&nap, NULL);
        }
        if (late > LAG)
            begun += late; /* what was missed is not made good by going faster */
        if (atomic_load(&copy->stop))
            break;
    }
    return NULL;
}

/* *handle: NULL if the system gives no thread. `to` and `from` stay valid until regrow_copy_end. */
EXPORT void regrow_copy_begin(void *to, const void *from, int64_t size, int64_t bytes_per_s, struct copy **handle)
{
    struct copy *copy = calloc(1, sizeof *copy);
    sigset_t all, before;
    *handle = NULL;
    if (!copy)
        return;
    pthread_once(&crc_once, make_crc_table);
    copy->to = to, copy->from = from, copy->size = size, copy->bytes_per_s = bytes_per_s;
    sigfillset(&all); /* signals are for threads that know what to do with them */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&copy->thread, NULL, run, copy);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed)
        free(copy);
    else
        *handle = copy;
}

/* state[0]: bytes that have arrived; state[1]: their checksum, once that is all of them. */
EXPORT void regrow_copy_look(const struct copy *copy, int64_t *state)
{
    state[0] = atomic_load_explicit(&copy->done, memory_order_acquire);
    state[1] = state[0] == copy->size ? copy->crc : 0;
}

/* Afterwards nothing is written any more: a slice at most, which takes well under a millisecond. */
EXPORT void regrow_copy_end(struct copy *copy)
{
    atomic_store(&copy->stop, 1);
    pthread_join(copy->thread, NULL);
    free(copy);
}
