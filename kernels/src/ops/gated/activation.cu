/// An activation of a gate a: a / (1 + exp(-a (linear + cubic a^2))), which SiLU and the tanh form of GELU are; with two
/// zeros a / 2 erfc(-a / sqrt(2)), the exact form.
struct Gate {
    float linear, cubic;

    __device__ __forceinline__ float exponent(float a) const { return -a * (linear + cubic * a * a); }

    __device__ __forceinline__ float of(float a) const {
        if (linear == 0.f) return 0.5f * a * erfcf(-0.707106781f * a);
        return a / (1.f + expf(exponent(a)));
    }

    /// The same for results of 16 bits, and not for the exact form.
    __device__ __forceinline__ float quick(float a) const { return __fdividef(a, 1.f + __expf(exponent(a))); }
};
