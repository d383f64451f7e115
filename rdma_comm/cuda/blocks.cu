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

/* Copies num_blocks blocks of block_bytes (a multiple of 16) from source + offsets[2 * i] to target + offsets[2 * i + 1]. Either side may be
 * another GPU's memory. A block is cut into pieces of 8 KiB; UNROLL pieces are under way in each CTA at once. */
extern "C" __global__ void __launch_bounds__(THREADS) copy_blocks(const char *source, char *target, const u64 *offsets, u32 num_blocks, u32 block_bytes)
{
    const u32 pieces = (block_bytes + PIECE - 1) / PIECE;
    const u64 total = (u64)num_blocks * pieces;
    for (u64 first = (u64)blockIdx.x * UNROLL; first < total; first += (u64)gridDim.x * UNROLL) {
        uint4 values[UNROLL];
        char *to[UNROLL];
#pragma unroll
        for (u32 i = 0; i < UNROLL; i++) {
            const u64 number = first + i;
            const u32 block = (u32)(number / pieces), within = (u32)(number % pieces) * PIECE + threadIdx.x * 16;
            to[i] = 0;
            if (number < total && within < block_bytes) {
                const ulonglong2 place = ((const ulonglong2 *)offsets)[block];
                values[i] = load(source + place.x + within);
                to[i] = target + place.y + within;
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

/* Adds to digests[i] the sum over block i's 8-byte words w, at position p in the whole block (num_layers pieces of block_bytes, layer_bytes
 * apart, from pool + offsets[i] on), of mix(w ^ (nonce + p) * C). A sum does not depend on the order in which words are added, but every word
 * on its position and the nonce. */
extern "C" __global__ void __launch_bounds__(THREADS) digest_blocks(const char *pool, const u64 *offsets, u32 num_blocks, u32 block_bytes, u32 num_layers, u64 layer_bytes, u64 nonce, u64 *digests)
{
    __shared__ u64 sums[THREADS / 32];
    const u64 total = (u64)num_blocks * num_layers;
    for (u64 item = blockIdx.x; item < total; item += gridDim.x) {
        const u32 block = (u32)(item % num_blocks);
        const u64 layer = item / num_blocks;
        const char *from = pool + offsets[block] + layer * layer_bytes;
        const u64 first_word = layer * (block_bytes / 8) + nonce;
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
