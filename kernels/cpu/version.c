#include "vec16.h"

/* Says which sources a library was built from, and which instruction sets this processor has (build.py, library.py). */

EXPORT const char *regrow_sources(void) { return REGROW_SOURCES; }

EXPORT int32_t regrow_has_level(const char *level)
{
#if defined(__x86_64__)
    if (strcmp(level, "v4") == 0)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && regrow_has_level("v3");
    if (strcmp(level, "v3") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
               __builtin_cpu_supports("bmi2");
#endif
    return strcmp(level, "base") == 0;
}
