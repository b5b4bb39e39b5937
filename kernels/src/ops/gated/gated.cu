/// y[t, i] = activation(gate_i) * up_i. Gates and what they gate lie in runs of `run` after each other: n of them, or 8 as a
/// gated product leaves them. One block a token, a thread eight at a time where the run allows. They may be stored in
/// panels.
extern "C" __global__ void gated(
    real_t* y,         // [tokens, n]
    const real_t* x,   // [tokens, 2 n]
    int n, int run, int lane_shift, int panel_tokens, Gate activation) {
    const real_t* row = x + (size_t)blockIdx.x * 2 * n;
    real_t* out = y + (size_t)blockIdx.x * n;
    int wide = run % 8 == 0 ? n : 0;
    start_next_early();
    await_previous();
    for (int i = 8 * threadIdx.x; i < wide; i += 8 * blockDim.x) {
        const real_t* from = row + i / run * 2 * run + i % run;
        float gate[8], up[8];
        load8(gate, from);
        load8(up, from + run);
#pragma unroll
        for (int j = 0; j < 8; j++) gate[j] = activation.of(gate[j]) * up[j];
#if !F32
        if (panel_tokens) {
#pragma unroll
            for (int j = 0; j < 8; j += 2)
                *(u32*)(y + panel_place(blockIdx.x, panel_column(i + j, lane_shift), panel_tokens)) =
                    pack2(gate[j], gate[j + 1]);
            continue;
        }
#endif
        store8(out + i, gate);
    }
    for (int i = wide + threadIdx.x; i < n; i += blockDim.x) {
        const real_t* from = row + i / run * 2 * run + i % run;
        out[i] = to_real(activation.of(to_float(from[0])) * to_float(from[run]));
    }
}
