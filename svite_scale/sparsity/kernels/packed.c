// Packed weights to dense ones and back, for elements of 2 and 4 bytes.
//
// A mask has one bit per position: bit i of byte j is position 8j + i; bits past the last position mean nothing. Elements are
// moved as bit patterns, so that a NaN keeps its payload. Each function first counts the mask's active positions and, where
// they aren't num_active, returns their number without touching anything else; otherwise it does its work and returns
// num_active. Nothing outside the buffers is ever read or written: elements are moved in groups of eight while eight values are
// left, since then there are eight positions too; what remains goes one by one.
//
// The library is compiled for the base architecture; instructions above it are asked for function by function, and
// has_avx2() says at run time whether those may be called.

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE int is_active(const uint8_t *mask, int64_t position) { return mask[position >> 3] >> (position & 7) & 1; }

INLINE int64_t count(const uint8_t *mask, int64_t numel) {
    int64_t active = 0, whole_bytes = numel >> 3, byte = 0;
    for (; byte + 8 <= whole_bytes; byte += 8) {
        uint64_t word;
        memcpy(&word, mask + byte, sizeof word);
        active += __builtin_popcountll(word);
    }
    for (int64_t position = byte << 3; position < numel; position++) active += is_active(mask, position);
    return active;
}

// Defines expand_NAME and compress_NAME. EXPAND_EIGHT(values, bits, dense) writes the eight positions of one byte of mask and
// may read eight values; COMPRESS_EIGHT(dense, bits, values) reads eight positions and may write eight values.
#define DEFINE_KERNELS(NAME, ELEMENT, TARGET, EXPAND_EIGHT, COMPRESS_EIGHT)                                            \
    TARGET int64_t expand_##NAME(const ELEMENT *values, int64_t num_active, const uint8_t *mask, ELEMENT *dense,       \
                                 int64_t numel) {                                                                      \
        int64_t found = count(mask, numel), used = 0, byte = 0;                                                        \
        if (found != num_active) return found;                                                                         \
        for (; used + 8 <= num_active; byte++) {                                                                       \
            EXPAND_EIGHT(values + used, mask[byte], dense + 8 * byte);                                                 \
            used += __builtin_popcount(mask[byte]);                                                                    \
        }                                                                                                              \
        for (int64_t position = 8 * byte; position < numel; position++)                                                \
            dense[position] = is_active(mask, position) ? values[used++] : 0;                                          \
        return found;                                                                                                  \
    }                                                                                                                  \
    TARGET int64_t compress_##NAME(const ELEMENT *dense, int64_t numel, const uint8_t *mask, ELEMENT *values,          \
                                   int64_t num_active) {                                                               \
        int64_t found = count(mask, numel), used = 0, byte = 0;                                                        \
        if (found != num_active) return found;                                                                         \
        for (; used + 8 <= num_active; byte++) {                                                                       \
            COMPRESS_EIGHT(dense + 8 * byte, mask[byte], values + used);                                               \
            used += __builtin_popcount(mask[byte]);                                                                    \
        }                                                                                                              \
        for (int64_t position = 8 * byte; used < num_active; position++)                                               \
            if (is_active(mask, position)) values[used++] = dense[position];                                           \
        return found;                                                                                                  \
    }

// Without branches: what a masked weight's bits are can't be predicted.
#define DEFINE_PORTABLE_KERNELS(NAME, ELEMENT)                                                                         \
    INLINE void expand_eight_##NAME(const ELEMENT *values, unsigned bits, ELEMENT *dense) {                            \
        for (int i = 0; i < 8; i++, bits >>= 1) {                                                                      \
            dense[i] = *values & (ELEMENT) - (bits & 1);                                                               \
            values += bits & 1;                                                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void compress_eight_##NAME(const ELEMENT *dense, unsigned bits, ELEMENT *values) {                          \
        for (int i = 0; i < 8; i++, bits >>= 1) {                                                                      \
            *values = dense[i];                                                                                        \
            values += bits & 1;                                                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    DEFINE_KERNELS(NAME, ELEMENT, , expand_eight_##NAME, compress_eight_##NAME)

DEFINE_PORTABLE_KERNELS(2_portable, uint16_t)
DEFINE_PORTABLE_KERNELS(4_portable, uint32_t)

#if defined(__x86_64__)

#define AVX2 __attribute__((target("avx2,popcnt")))

// By byte of mask. For each of eight positions, the value that belongs there, or 0x80 where none does; for each of eight
// values, the position that it comes from, or 0x80 past the last one. In elements, and in the bytes of elements of 2.
static uint8_t value_of[256][8], position_of[256][8], value_bytes_of[256][16], position_bytes_of[256][16];

static void to_bytes(const uint8_t elements[8], uint8_t bytes[16]) {
    for (int i = 0; i < 16; i++) bytes[i] = elements[i / 2] & 0x80 ? 0x80 : (uint8_t)(2 * elements[i / 2] + i % 2);
}

__attribute__((constructor)) static void fill_tables(void) {
    for (int bits = 0; bits < 256; bits++) {
        memset(position_of[bits], 0x80, 8);
        for (int position = 0, used = 0; position < 8; position++) {
            int active = bits >> position & 1;
            value_of[bits][position] = active ? (uint8_t)used : 0x80;
            if (active) position_of[bits][used++] = (uint8_t)position;
        }
        to_bytes(value_of[bits], value_bytes_of[bits]);
        to_bytes(position_of[bits], position_bytes_of[bits]);
    }
}

INLINE AVX2 __m256i eight_lanes(const uint8_t lanes[8]) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)lanes));
}

INLINE AVX2 void expand_eight_4_avx2(const uint32_t *values, unsigned bits, uint32_t *dense) {
    __m256i lanes = eight_lanes(value_of[bits]);
    __m256i spread = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)values), lanes);
    // The sign of a lane's number says that the lane is inactive.
    _mm256_storeu_si256((__m256i *)dense, _mm256_andnot_si256(_mm256_srai_epi32(lanes, 31), spread));
}

INLINE AVX2 void compress_eight_4_avx2(const uint32_t *dense, unsigned bits, uint32_t *values) {
    __m256i loaded = _mm256_loadu_si256((const __m256i *)dense);
    _mm256_storeu_si256((__m256i *)values, _mm256_permutevar8x32_epi32(loaded, eight_lanes(position_of[bits])));
}

INLINE AVX2 void shuffle(const uint16_t *from, const uint8_t bytes[16], uint16_t *to) {
    __m128i loaded = _mm_loadu_si128((const __m128i *)from);
    _mm_storeu_si128((__m128i *)to, _mm_shuffle_epi8(loaded, _mm_loadu_si128((const __m128i *)bytes)));
}

INLINE AVX2 void expand_eight_2_avx2(const uint16_t *values, unsigned bits, uint16_t *dense) {
    shuffle(values, value_bytes_of[bits], dense);
}

INLINE AVX2 void compress_eight_2_avx2(const uint16_t *dense, unsigned bits, uint16_t *values) {
    shuffle(dense, position_bytes_of[bits], values);
}

DEFINE_KERNELS(2_avx2, uint16_t, AVX2, expand_eight_2_avx2, compress_eight_2_avx2)
DEFINE_KERNELS(4_avx2, uint32_t, AVX2, expand_eight_4_avx2, compress_eight_4_avx2)

int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"); }

#else

int has_avx2(void) { return 0; }

#endif
