/// y = a + b
extern "C" __global__ void add(half_t* y, const half_t* a, const half_t* b, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = to_half(to_float(a[i]) + to_float(b[i]));
}

/// y[t, n] += bias[n]; one block a token.
extern "C" __global__ void add_bias(half_t* y, const half_t* bias, int width) {
    for (int n = threadIdx.x; n < width; n += blockDim.x) {
        size_t i = (size_t)blockIdx.x * width + n;
        y[i] = to_half(to_float(y[i]) + to_float(bias[n]));
    }
}
