// What all kernels share. NVRTC sees no headers: conversions, matrix instructions and asynchronous copies are
// written as inline PTX. One of F16, BF16 and F32 is 1: the type in which this program computes.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
/// An f16 as its bits, whatever the compute type.
typedef unsigned short f16_t;
/// An activation or a dense weight: a float of 16 bits as its bits, or a plain one.
#if F32
typedef float real_t;
#else
typedef unsigned short real_t;
#endif

#define FULL_WARP 0xffffffffu
#define INFINITY_F __int_as_float(0x7f800000)

__device__ __forceinline__ float to_float(real_t x) {
#if F32
    return x;
#elif BF16
    return __uint_as_float((u32)x << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

__device__ __forceinline__ real_t to_real(float x) {
#if F32
    return x;
#else
    real_t y;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
#endif
}

/// f16 bits to f32, whatever the compute type: scales of artifacts are always f16.
__device__ __forceinline__ float f16_to_float(f16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

__device__ __forceinline__ float f16_round(float x) {
    f16_t y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return f16_to_float(y);
}

/// 1 / x for `quotient`: without branches, and such that `a / x` stays finite.
__device__ __forceinline__ float inverse_of(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    y = fmaxf(fminf(y, 1e30f), -1e30f);
    return fmaf(fmaf(-x, y, 1.f), y, y);
}

/// a / b by the inverse of b: rounded twice, then corrected by what it leaves of a (Markstein 1990).
__device__ __forceinline__ float quotient(float a, float b, float inverse) {
    float q = __fmul_rn(a, inverse);
    return fmaf(fmaf(-q, b, a), inverse, q);
}

#if F32
/// Eight neighbouring values, sixteen bytes an access.
__device__ __forceinline__ void load8(float (&x)[8], const real_t* source) {
    float4 low = ((const float4*)source)[0], high = ((const float4*)source)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

__device__ __forceinline__ void store8(real_t* target, const float (&x)[8]) {
    ((float4*)target)[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)target)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
#else
__device__ __forceinline__ u32 pack2(float low, float high) {
    return (u32)to_real(low) | (u32)to_real(high) << 16;
}

/// Eight neighbouring values in one 16-byte access.
__device__ __forceinline__ void load8(float (&x)[8], const real_t* source) {
    uint4 bits = *(const uint4*)source;
    u32 words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = to_float((real_t)(words[i / 2] >> (i % 2 * 16)));
}

__device__ __forceinline__ void store8(real_t* target, const float (&x)[8]) {
    *(uint4*)target = make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}
#endif

/// 2^x within two units in the last place; what is below the smallest normal number becomes zero.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// The warp's number, in a way that tells the compiler that all lanes have the same: what it reads from shared memory is
/// then found without detours.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(FULL_WARP, threadIdx.x / 32, 0); }

__device__ __forceinline__ float warp_sum(float x) {
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

__device__ __forceinline__ float warp_min(float x) {
    for (int offset = 16; offset > 0; offset >>= 1) x = fminf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

/// The same value for every thread of a block of at most 1024 threads. All of them must take part.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.f);
}

__device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_max(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : -INFINITY_F);
}

#if !F32
/// d += a b on the tensor cores: a 16 x 16 (row), b 16 x 8 (column), d 16 x 8 in f32.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return (u32)__cvta_generic_to_shared(pointer);
}

/// Four 8 x 8 matrices; lane l gives the address of a row of matrix l / 8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

/// 16 bytes from global to shared memory; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(u32 target, const void* source, bool valid) {
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes));
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }

template <int PENDING>
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING)); }

#if HOPPER
__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Waits for the end of the phase with this parity.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}

/// What this thread wrote to shared memory becomes visible to the tensor cores' and the copy engine's own path to it.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Announces bytes that copies will bring, and arrives.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// `bytes` from global to shared memory, all at once; the barrier is told when they are there.
__device__ __forceinline__ void copy_bulk(u32 target, const void* source, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(target), "l"(source), "r"(bytes), "r"(barrier) : "memory");
}
/// The blocks of a cluster wait for each other.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

/// The same, but not for what they have stored to arrive: so that no block ends while others read its memory. What was
/// read must have been used, or stored, before.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

/// What another block of the cluster keeps at the place of `mine`.
__device__ __forceinline__ float read_of_block(const float* mine, int block) {
    float x;
    asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(x) : "r"(shared_address(mine)), "r"(block) : "memory");
    return x;
}

__device__ __forceinline__ u32 read_of_block(const u32* mine, int block) {
    return __float_as_uint(read_of_block((const float*)mine, block));
}
__device__ __forceinline__ u64 read_of_block(const u64* mine, int block) {
    u64 x;
    asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.u64 %0, [there];\n}"
                 : "=l"(x) : "r"(shared_address(mine)), "r"(block) : "memory");
    return x;
}

/// The same of two or four neighbours.
__device__ __forceinline__ void read_of_block(float (&x)[2], const float* mine, int block) {
    asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %2, %3;\n"
                 "ld.shared::cluster.v2.f32 {%0,%1}, [there];\n}"
                 : "=f"(x[0]), "=f"(x[1]) : "r"(shared_address(mine)), "r"(block) : "memory");
}
__device__ __forceinline__ void read_of_block(float (&x)[4], const float* mine, int block) {
    asm volatile("{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n}"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(shared_address(mine)), "r"(block) : "memory");
}
#endif

#if HOPPER && !F32
// Matrix instructions of a warp group, which run beside it: 64 rows times 16 features times up to 256 columns.
#if BF16
#define PAIR "bf16.bf16"
#else
#define PAIR "f16.f16"
#endif

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

/// Shared memory of 128-byte rows, pieces permuted: `leading` bytes between panels, 1024 between groups of rows.
__device__ __forceinline__ u64 matrix(u32 address, u32 leading) {
    return (u64)(address >> 4 & 0x3FFF) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

#define D8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(d, i) D8(d, i), D8(d, i + 8), D8(d, i + 16), D8(d, i + 24)
#define R128 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}"
#define R64 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define R32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}"
#endif

/// Brings `bytes`, a multiple of 16, into the GPU's own cache.
__device__ __forceinline__ void prefetch_bulk(const void* source, u32 bytes) {
#if HOPPER
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes));
#endif
}

/// Brings the line of an address into the GPU's own cache.
__device__ __forceinline__ void prefetch(const void* source) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(source));
}

/// Lets the next kernel of the stream start beside this one, where it was launched to do so: it may fetch what no
/// kernel before it writes.
__device__ __forceinline__ void start_next_early() {
#if HOPPER
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Waits until the kernels before this one have ended. What they write must not be read, and nothing at all be
/// written, before.
__device__ __forceinline__ void await_previous() {
#if HOPPER
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Where a column of a token is in panels: of 64 columns each, a row of 128 bytes for each of `tokens`, its 16-byte
/// pieces permuted by the row's last three bits, as the tensor cores of Hopper read it without conflicts.
__device__ __forceinline__ size_t panel_place(int token, int column, int tokens) {
    return ((size_t)(column / 64) * tokens + token) * 64 + (column / 8 ^ token) % 8 * 8 + column % 8;
}

/// The column in panels of what is at `place` of a row, for codes of which a lane has 2^lane_shift neighbours.
__device__ __forceinline__ int panel_column(int place, int lane_shift) {
    int inside = place & ((4 << lane_shift) - 1), lane = inside >> lane_shift, i = inside & ((1 << lane_shift) - 1);
    return place - inside + i / 4 * 16 + i % 4 / 2 * 8 + 2 * lane + i % 2;
}
