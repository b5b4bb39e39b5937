/// y = a - b, rounded to the compute type: what two streams differ by is small, and then exact.
extern "C" __global__ void stream_difference(real_t* y, const real_t* a, const real_t* b, size_t count) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = to_real(to_float(a[i]) - to_float(b[i]));
}
