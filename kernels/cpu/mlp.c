#include "mlp.h"
#include "nonlinear.h"

void swiglu(const float *gate_up, int64_t num_rows, int64_t size, float *inner)
{
    for (int64_t row = 0; row < num_rows; row++, gate_up += 2 * size, inner += size) {
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES)
            store16(inner + i, silu16(load16(gate_up + i)) * load16(gate_up + size + i));
        if (i < size) {
            const int64_t left = size - i;
            const vec16 gate = load_part16(gate_up + i, left), up = load_part16(gate_up + size + i, left);
            store_part16(inner + i, silu16(gate) * up, left);
        }
    }
}
