/// loss[t] = ln sum_i exp(logits[t, i]) - logits[t, targets[t]]; one block a token.
extern "C" __global__ void token_loss(
    float* loss,          // [tokens]
    const float* logits,  // [tokens, vocab]
    const u32* targets,   // [tokens]
    int vocab) {
    const float* row = logits + (size_t)blockIdx.x * vocab;
    float largest = -INFINITY_F, sum = 0.f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) largest = fmaxf(largest, row[i]);
    largest = block_max(largest);
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf(row[i] - largest);
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[blockIdx.x] = largest - row[targets[blockIdx.x]] + logf(sum);
}

/// First index of a row's largest value; the same for every thread.
__device__ __forceinline__ int first_of(const float* row, float largest, int vocab) {
    float index = INFINITY_F;  // exact for every vocabulary below 2^24
    for (int i = threadIdx.x; i < vocab; i += blockDim.x)
        if (row[i] == largest) index = fminf(index, (float)i);
    return (int)-block_max(-index);
}

/// kl[t] = sum_i p_i (ln p_i - ln q_i); same[t] = 1 where both have the same first choice.
extern "C" __global__ void divergence(
    float* kl,               // [tokens]
    u32* same,               // [tokens]
    const float* reference,  // [tokens, vocab]
    const float* logits,     // [tokens, vocab]
    int vocab) {
    const float* p = reference + (size_t)blockIdx.x * vocab;
    const float* q = logits + (size_t)blockIdx.x * vocab;
    float largest_p = -INFINITY_F, largest_q = -INFINITY_F;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        largest_p = fmaxf(largest_p, p[i]);
        largest_q = fmaxf(largest_q, q[i]);
    }
    largest_p = block_max(largest_p);
    largest_q = block_max(largest_q);
    float sum_p = 0.f, sum_q = 0.f, spread = 0.f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float a = p[i] - largest_p, b = q[i] - largest_q, weight = expf(a);
        sum_p += weight;
        sum_q += expf(b);
        spread += weight * (a - b);
    }
    sum_p = block_sum(sum_p);
    sum_q = block_sum(sum_q);
    spread = block_sum(spread);
    int first_p = first_of(p, largest_p, vocab), first_q = first_of(q, largest_q, vocab);
    if (threadIdx.x == 0) {
        kl[blockIdx.x] = spread / sum_p - logf(sum_p) + logf(sum_q);
        same[blockIdx.x] = first_p == first_q;
    }
}
