/* Kernels over scattered blocks. blocks.ptx is made from this file by compile.py; a test on a GPU holds one against the other. */

typedef unsigned long long u64;
typedef unsigned int u32;

enum { THREADS = 512, UNROLL = 4, PIECE = THREADS * 16 };

__device__ static uint4 load(const char *from)
{
    uint4 v; /* read once: it shall not push out of the first-level cache what a computing kernel has there */
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
}

/* Where a block begins in each of two memories, from where its plane begins. */
struct place {
    u64 source, target;
};

/* Where a plane (a layer, say) begins in each of two memories; the position of its first 8-byte word in a whole block. */
struct plane {
    u64 source, target, first_word, unused;
};

/* Copies num_blocks blocks of block_bytes (a multiple of 16) in each of num_planes planes. Either side may be another GPU's memory. A block is
 * cut into pieces of 8 KiB; UNROLL pieces are under way in each CTA at once. There are fewer than 2^31 pieces. */
extern "C" __global__ void __launch_bounds__(THREADS)
    copy_blocks(const char *source, char *target, const place *places, u32 num_blocks, const plane *planes, u32 num_planes, u32 block_bytes)
{
    const u32 pieces = (block_bytes + PIECE - 1) / PIECE;
    const u32 total = num_planes * num_blocks * pieces;
    for (u32 first = blockIdx.x * UNROLL; first < total; first += gridDim.x * UNROLL) {
        uint4 values[UNROLL];
        char *to[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++) {
            const u32 number = first + i, item = number / pieces, within = number % pieces * PIECE + threadIdx.x * 16;
            to[i] = 0;
            if (number < total && within < block_bytes) {
                const place block = places[item % num_blocks];
                const plane layer = planes[item / num_blocks];
                values[i] = load(source + layer.source + block.source + within);
                to[i] = target + layer.target + block.target + within;
            }
        }
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++) {
            if (to[i])
                __stcs((uint4 *)to[i], values[i]);
        }
    }
}

__device__ static u64 mix(u64 x)
{
    x ^= x >> 32;
    x *= 0x9fb21c651e98df25ull;
    x ^= x >> 29;
    x *= 0x9e3779b97f4a7c15ull;
    return x ^ x >> 32;
}

/* Adds to digests[i] the sum over the 8-byte words w of block i in these planes of the target memory, at position p in the whole block, of
 * mix(w ^ (nonce + p) * C). A sum does not depend on the order in which words are added, but every word on its position and the nonce. */
extern "C" __global__ void __launch_bounds__(THREADS)
    digest_blocks(const char *pool, const place *places, u32 num_blocks, const plane *planes, u32 num_planes, u32 block_bytes, u64 nonce, u64 *digests)
{
    __shared__ u64 sums[THREADS / 32];
    const u32 total = num_blocks * num_planes;
    for (u32 item = blockIdx.x; item < total; item += gridDim.x) {
        const u32 block = item % num_blocks;
        const plane layer = planes[item / num_blocks];
        const char *from = pool + layer.target + places[block].target;
        const u64 first_word = layer.first_word + nonce;
        u64 sum = 0;
#pragma unroll 4
        for (u32 at = threadIdx.x * 16; at < block_bytes; at += PIECE) {
            const uint4 v = load(from + at);
            const u64 position = first_word + at / 8;
            sum += mix(((u64)v.y << 32 | v.x) ^ position * 0x9e3779b97f4a7c15ull);
            sum += mix(((u64)v.w << 32 | v.z) ^ (position + 1) * 0x9e3779b97f4a7c15ull);
        }
#pragma unroll
        for (u32 distance = 16; distance; distance /= 2)
            sum += __shfl_down_sync(0xffffffffu, sum, distance);
        __syncthreads();
        if (threadIdx.x % 32 == 0)
            sums[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (u32 i = 1; i < THREADS / 32; i++)
                sum += sums[i];
            atomicAdd(digests + block, sum);
        }
    }
}
