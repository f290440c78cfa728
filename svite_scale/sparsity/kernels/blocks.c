// Products with a weight that is stored as its active blocks, in fp32.
//
// The weight has R = G * V rows and C = J * U columns, in G rows of J blocks. values[i][u][v] is row v, column u of the i-th
// active block, along a row of blocks first, so the active columns of a row of blocks are one matrix of vectors of V values.
// A mask has one bit per block: bit i of byte j is block 8j + i; bits past the last block mean nothing. V is a multiple of 16;
// U is any.
//
// Each function first counts the active blocks. It returns their number without touching anything else where it isn't
// num_active, and -1 where memory is short; otherwise it does its work and returns num_active. Nothing outside the buffers is
// ever read or written, and the results don't depend on the number of threads.
//
// A product is made of tiles, whose sums stay in registers: at each step some scalars are multiplied with the same vectors.
// Inputs are transposed before, a few tokens at a time, so that what a step needs lies side by side, in the cache.
//
// The file is compiled once for each set of instructions; what it may use follows from the compiler's flags.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

// All sums of a tile are in registers, at most two vectors for each of SCALARS scalars that lie side by side. Where each scalar
// has an address of its own, two vectors for each of ADDRESSES or three for each of FEWER.
#if defined(__AVX512F__)
#define LANES 16
#define SCALARS 14
#define ADDRESSES 8
#define FEWER 8
#elif defined(__AVX2__)
#define LANES 8
#define SCALARS 6
#define ADDRESSES 6
#define FEWER 4
#else
#define LANES 4
#define SCALARS 4
#define ADDRESSES 4
#define FEWER 4
#endif

#define PAIR (2 * LANES)
#define TRIPLE (3 * LANES)
#define TOKENS (2 * SCALARS) // that the product is computed for at a time
#define ROW PAIR             // the memory of one feature of them
#define CHUNK 128            // tokens that are added to the gradient at a time
#define LINE 16              // floats that come into the cache together

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll") // a tile's loops, so that its sums are registers
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

INLINE vector load(const float *from) { return *(const vector *)from; }
INLINE void store(float *to, vector value) { *(vector *)to = value; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Transposition ----------------------------------------------------------------------------------------------------------

// The lanes of two rows, the second of which is `distance` below: of the upper one, every other group of `distance` lanes is
// exchanged with the group before it in the lower one.
INLINE void exchange(vector *upper, vector *lower, int distance) {
    vector a = *upper, b = *lower;
#if defined(__clang__)
    UNROLL for (int lane = 0; lane < LANES; lane++) {
        (*upper)[lane] = lane & distance ? b[lane - distance] : a[lane];
        (*lower)[lane] = lane & distance ? b[lane] : a[lane + distance];
    }
#else
    lanes of_upper, of_lower; // constants once the loop is unrolled; lane LANES + i is lane i of b
    UNROLL for (int lane = 0; lane < LANES; lane++) {
        of_upper[lane] = lane & distance ? LANES + lane - distance : lane;
        of_lower[lane] = lane & distance ? LANES + lane : lane + distance;
    }
    *upper = __builtin_shuffle(a, b, of_upper);
    *lower = __builtin_shuffle(a, b, of_lower);
#endif
}

INLINE void transpose(vector square[LANES]) {
    UNROLL for (int i = 0; i < LANES; i++) if (!(i & 1)) exchange(&square[i], &square[i + 1], 1);
    UNROLL for (int i = 0; i < LANES; i++) if (!(i & 2)) exchange(&square[i], &square[i + 2], 2);
#if LANES >= 8
    UNROLL for (int i = 0; i < LANES; i++) if (!(i & 4)) exchange(&square[i], &square[i + 4], 4);
#endif
#if LANES >= 16
    UNROLL for (int i = 0; i < LANES; i++) if (!(i & 8)) exchange(&square[i], &square[i + 8], 8);
#endif
}

// Writes features of LANES tokens, x [tokens][x_stride], to columns [features][stride]; zeros after the last token.
static void to_columns(const float *x, int64_t x_stride, int64_t tokens, int64_t features, float *columns, int64_t stride) {
    int64_t feature = 0;
    for (; feature + LANES <= features; feature += LANES) {
        vector square[LANES];
        UNROLL for (int i = 0; i < LANES; i++) square[i] = i < tokens ? load(x + i * x_stride + feature) : (vector){0};
        transpose(square);
        UNROLL for (int i = 0; i < LANES; i++) store(columns + (feature + i) * stride, square[i]);
    }
    for (; feature < features; feature++)
        for (int i = 0; i < LANES; i++) columns[feature * stride + i] = i < tokens ? x[i * x_stride + feature] : 0;
}

// The inverse; writes nothing after the last token.
static void from_columns(const float *columns, int64_t stride, int64_t tokens, int64_t features, float *x) {
    int64_t feature = 0;
    for (; feature + LANES <= features; feature += LANES) {
        vector square[LANES];
        UNROLL for (int i = 0; i < LANES; i++) square[i] = load(columns + (feature + i) * stride);
        transpose(square);
        UNROLL for (int i = 0; i < LANES; i++) if (i < tokens) store(x + i * features + feature, square[i]);
    }
    for (; feature < features; feature++)
        for (int i = 0; i < LANES && i < tokens; i++) x[i * features + feature] = columns[feature * stride + i];
}

// ---- Active columns ---------------------------------------------------------------------------------------------------------

typedef struct {
    int64_t *start;   // [G + 1], of each row of blocks in `columns`
    int64_t *columns; // where each active column's feature begins in memory of `stride` elements per feature
    float *scratch;
} Plan;

// Returns 64 blocks of a mask of N as bits, from `block` on, a multiple of 64; 0 past the last one.
static uint64_t read_blocks(const uint8_t *mask, int64_t N, int64_t block) {
    uint64_t bits = 0;
    int64_t left = N - block;
    for (int i = 0; i < 8 && 8 * i < left; i++) bits |= (uint64_t)mask[block / 8 + i] << 8 * i;
    return left < 64 ? bits & (((uint64_t)1 << left) - 1) : bits;
}

// Returns the number of active blocks, or -1; the plan is filled, and to be freed, where they are num_active.
static int64_t prepare(Plan *plan, const uint8_t *mask, int64_t num_active, int64_t G, int64_t J, int64_t U, int64_t stride,
                       int64_t scratch_size) {
    int64_t N = G * J, found = 0, used = 0, g = 0;
    for (int64_t block = 0; block < N; block += 64) found += __builtin_popcountll(read_blocks(mask, N, block));
    if (found != num_active) return found;
    plan->start = malloc((G + 1) * sizeof *plan->start);
    plan->columns = malloc((found * U + 1) * sizeof *plan->columns);
    plan->scratch = aligned_alloc(64, (scratch_size * sizeof *plan->scratch + 64) / 64 * 64);
    if (!plan->start || !plan->columns || !plan->scratch) {
        free(plan->start), free(plan->columns), free(plan->scratch);
        return -1;
    }
    plan->start[0] = 0;
    for (int64_t first = 0; first < N; first += 64)
        for (uint64_t bits = read_blocks(mask, N, first); bits; bits &= bits - 1) {
            int64_t block = first + __builtin_ctzll(bits);
            while (block >= (g + 1) * J) plan->start[++g] = used;
            for (int64_t u = 0; u < U; u++) plan->columns[used++] = ((block - g * J) * U + u) * stride;
        }
    while (g < G) plan->start[++g] = used;
    return found;
}

static void finish(Plan *plan) { free(plan->start), free(plan->columns), free(plan->scratch); }

// ---- y = x @ W.T + bias -----------------------------------------------------------------------------------------------------

// Computes num_tokens x num_vectors * LANES outputs; stores those of the first `tokens` tokens.
INLINE void product_tile(int num_tokens, int num_vectors, const float *x, const int64_t *columns, int64_t count,
                         const float *values, int64_t V, const float *bias, float *y, int64_t R, int64_t tokens) {
    vector sums[TOKENS][2];
    UNROLL for (int t = 0; t < num_tokens; t++)
        UNROLL for (int i = 0; i < num_vectors; i++) sums[t][i] = bias ? load(bias + i * LANES) : (vector){0};
    for (int64_t c = 0; c < count; c++, values += V) {
        const float *scalars = x + columns[c];
        vector weights[2];
        if (c < num_tokens && c < tokens) // outputs come into the cache while the sums run; else the stores would wait
            UNROLL for (int i = 0; i < num_vectors; i++) __builtin_prefetch(y + c * R + i * LANES, 1);
        UNROLL for (int i = 0; i < num_vectors; i++) weights[i] = load(values + i * LANES);
        UNROLL for (int t = 0; t < num_tokens; t++)
            UNROLL for (int i = 0; i < num_vectors; i++) sums[t][i] += scalars[t] * weights[i];
    }
    UNROLL for (int t = 0; t < num_tokens; t++)
        if (t < tokens)
            UNROLL for (int i = 0; i < num_vectors; i++) store(y + t * R + i * LANES, sums[t][i]);
}

// x [tokens][C], values [num_active][U][V], bias [R] or NULL, y [tokens][R].
int64_t block_product(const float *x, int64_t tokens, const float *values, int64_t num_active, const uint8_t *mask,
                      const float *bias, float *y, int64_t G, int64_t J, int64_t U, int64_t V, int64_t threads) {
    Plan plan;
    int64_t C = J * U, R = G * V, found = prepare(&plan, mask, num_active, G, J, U, ROW, threads * C * ROW);
    if (found != num_active) return found;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; token += TOKENS) {
        float *columns = plan.scratch + omp_get_thread_num() * C * ROW;
        int64_t left = tokens - token;
        for (int64_t t = 0; t < TOKENS; t += LANES) to_columns(x + (token + t) * C, C, left - t, C, columns + t, ROW);
        for (int64_t g = 0; g < G; g++) {
            const int64_t *offsets = plan.columns + plan.start[g];
            int64_t count = plan.start[g + 1] - plan.start[g];
            for (int64_t v = 0; v < V;) {
                const float *vectors = values + plan.start[g] * V + v, *first = bias ? bias + g * V + v : NULL;
                float *to = y + token * R + g * V + v;
                if (v + PAIR <= V) {
                    product_tile(SCALARS, 2, columns, offsets, count, vectors, V, first, to, R, left);
                    if (left > SCALARS)
                        product_tile(SCALARS, 2, columns + SCALARS, offsets, count, vectors, V, first, to + SCALARS * R, R,
                                     left - SCALARS);
                    v += PAIR;
                } else {
                    product_tile(TOKENS, 1, columns, offsets, count, vectors, V, first, to, R, left);
                    v += LANES;
                }
            }
        }
    }
    finish(&plan);
    return found;
}

// ---- dx = dy @ W ------------------------------------------------------------------------------------------------------------

// Calls TILE(n), whose n is a constant, until `done` has grown to `count`.
#define IN_TILES(LARGEST, TILE, done, count)                                                                                   \
    for (; done + LARGEST <= count; done += LARGEST) TILE(LARGEST);                                                            \
    for (; done + 4 <= count; done += 4) TILE(4);                                                                              \
    for (; done + 2 <= count; done += 2) TILE(2);                                                                              \
    for (; done < count; done++) TILE(1);

// Adds what one row of blocks gives, dy [V][TRIPLE], to num_columns features of dx [C][TRIPLE]. Brings V lines from `ahead` on
// into the cache.
INLINE void transposed_tile(int num_columns, const float *dy, const float *values, int64_t V, const int64_t *columns,
                            float *dx, const float *ahead) {
    vector sums[FEWER][3];
    UNROLL for (int c = 0; c < num_columns; c++)
        UNROLL for (int i = 0; i < 3; i++) {
            __builtin_prefetch(dx + columns[c] + i * LANES, 1);
            sums[c][i] = (vector){0};
        }
    for (int64_t v = 0; v < V; v++, dy += TRIPLE) {
        vector grads[3];
        __builtin_prefetch(ahead + v * LINE, 1, 2);
        UNROLL for (int i = 0; i < 3; i++) grads[i] = load(dy + i * LANES);
        UNROLL for (int c = 0; c < num_columns; c++)
            UNROLL for (int i = 0; i < 3; i++) sums[c][i] += values[c * V + v] * grads[i];
    }
    UNROLL for (int c = 0; c < num_columns; c++)
        UNROLL for (int i = 0; i < 3; i++) {
            float *to = dx + columns[c] + i * LANES;
            store(to, load(to) + sums[c][i]);
        }
}

// dy [tokens][R], values [num_active][U][V], dx [tokens][C].
int64_t block_transposed_product(const float *dy, int64_t tokens, const float *values, int64_t num_active,
                                 const uint8_t *mask, float *dx, int64_t G, int64_t J, int64_t U, int64_t V,
                                 int64_t threads) {
    Plan plan;
    int64_t C = J * U, R = G * V;
    int64_t found = prepare(&plan, mask, num_active, G, J, U, TRIPLE, threads * (R + C) * TRIPLE);
    if (found != num_active) return found;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t token = 0; token < tokens; token += TRIPLE) {
        float *dy_columns = plan.scratch + omp_get_thread_num() * (R + C) * TRIPLE, *dx_columns = dy_columns + R * TRIPLE;
        int64_t left = tokens - token, brought = 0; // of the memory of these tokens' dx: their stores would wait for it
        for (int64_t t = 0; t < TRIPLE; t += LANES) to_columns(dy + (token + t) * R, R, left - t, R, dy_columns + t, TRIPLE);
        memset(dx_columns, 0, C * TRIPLE * sizeof *dx_columns);
        for (int64_t g = 0; g < G; g++) {
            int64_t done = plan.start[g];
#define TILE(n)                                                                                                                \
    transposed_tile(n, dy_columns + g * V * TRIPLE, values + done * V, V, plan.columns + done, dx_columns,                     \
                    dx + token * C + brought),                                                                                 \
        brought = smaller(brought + V * LINE, smaller(left, TRIPLE) * C)
            IN_TILES(FEWER, TILE, done, plan.start[g + 1])
#undef TILE
        }
        for (int64_t t = 0; t < TRIPLE; t += LANES)
            from_columns(dx_columns + t, TRIPLE, left - t, C, dx + (token + t) * C);
    }
    finish(&plan);
    return found;
}

// ---- The active blocks of dy.T @ x ------------------------------------------------------------------------------------------

// Rows of up to PAIR elements that come into the cache while sums run, because they are needed next.
typedef struct {
    const float *row;
    int64_t stride, left, at_once;
} Ahead;

INLINE void bring_rows(Ahead *ahead) {
    for (int64_t i = smaller(ahead->at_once, ahead->left); i > 0; i--, ahead->left--, ahead->row += ahead->stride)
        UNROLL for (int j = 0; j < PAIR; j += LINE) __builtin_prefetch(ahead->row + j);
}

// Adds `tokens` products of num_columns features, x [C][CHUNK], with num_vectors vectors of dy to those columns' gradients.
// Brings num_next columns after these, and rows ahead, into the cache.
INLINE void gradient_tile(int num_columns, int num_vectors, const float *x, const int64_t *columns, int64_t num_next,
                          const float *dy, int64_t tokens, int is_first, float *gradient, int64_t V, Ahead *ahead) {
    vector sums[ADDRESSES][2];
    const float *scalars[ADDRESSES];
    UNROLL for (int c = 0; c < num_columns; c++) {
        scalars[c] = x + columns[c];
        UNROLL for (int i = 0; i < num_vectors; i++) sums[c][i] = (vector){0};
    }
    for (int64_t start = 0; start < tokens; start += LINE) {
        for (int64_t c = num_columns; c < num_columns + num_next; c++) __builtin_prefetch(x + columns[c] + start);
        bring_rows(ahead);
        for (int64_t t = start; t < smaller(start + LINE, tokens); t++, dy += num_vectors * LANES) {
            vector grads[2];
            UNROLL for (int i = 0; i < num_vectors; i++) grads[i] = load(dy + i * LANES);
            UNROLL for (int c = 0; c < num_columns; c++)
                UNROLL for (int i = 0; i < num_vectors; i++) sums[c][i] += scalars[c][t] * grads[i];
        }
    }
    // Sums of sums of CHUNK products are more exact than one long sum.
    UNROLL for (int c = 0; c < num_columns; c++)
        UNROLL for (int i = 0; i < num_vectors; i++) {
            float *to = gradient + c * V + i * LANES;
            if (!is_first) sums[c][i] += load(to);
            store(to, sums[c][i]);
        }
}

// Adds a chunk of tokens to the gradient of some active columns, [done, end), of one row of blocks, for num_vectors vectors of
// its rows. next: dy of the chunk that follows.
INLINE void add_chunk(int num_vectors, const float *x, const int64_t *columns, int64_t done, int64_t end, const float *dy,
                      const float *next, int64_t R, int64_t V, int64_t tokens, int is_first, float *gradient) {
    float packed[CHUNK * PAIR]; // what every tile reads, in order
    for (int64_t t = 0; t < tokens; t++)
        UNROLL for (int i = 0; i < num_vectors; i++)
            store(packed + (t * num_vectors + i) * LANES, load(dy + t * R + i * LANES));
    Ahead ahead = {next, R, tokens, LINE * ADDRESSES / (end - done + 1) + 1};
#define TILE(n)                                                                                                                \
    gradient_tile(n, num_vectors, x, columns + done, smaller(ADDRESSES, end - done - n), packed, tokens, is_first,             \
                  gradient + done * V, V, &ahead)
    IN_TILES(ADDRESSES, TILE, done, end)
#undef TILE
}

// Returns the largest divisor that isn't above the root.
static int64_t middle_divisor(int64_t number) {
    int64_t divisor = 1;
    for (int64_t n = 2; n * n <= number; n++)
        if (number % n == 0) divisor = n;
    return divisor;
}

// Returns the first of a row's active columns whose feature isn't before this one.
static int64_t first_column(const Plan *plan, int64_t g, int64_t feature) {
    int64_t column = plan->start[g];
    while (column < plan->start[g + 1] && plan->columns[column] < feature * CHUNK) column++;
    return column;
}

// dy [tokens][R], x [tokens][C], gradient [num_active][U][V].
int64_t block_active_gradient(const float *dy, const float *x, int64_t tokens, const uint8_t *mask, float *gradient,
                              int64_t num_active, int64_t G, int64_t J, int64_t U, int64_t V, int64_t threads) {
    Plan plan;
    int64_t C = J * U, R = G * V, found = prepare(&plan, mask, num_active, G, J, U, CHUNK, threads * C * CHUNK);
    if (found != num_active) return found;
    if (tokens == 0) memset(gradient, 0, num_active * U * V * sizeof *gradient);
    // Each thread has a share of the features and a share of the rows. It transposes its features for itself: to read what
    // another thread has just written would take longer.
    int64_t feature_shares = middle_divisor(threads), row_shares = threads / feature_shares;
    int64_t pairs = (V + PAIR - 1) / PAIR; // of vectors in a block; the last may be one vector
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t share = 0; share < threads; share++) {
        int64_t first = share / row_shares * C / feature_shares, last = (share / row_shares + 1) * C / feature_shares;
        float *columns = plan.scratch + share * C * CHUNK;
        for (int64_t token = 0; token < tokens; token += CHUNK) {
            int64_t size = smaller(CHUNK, tokens - token);
            for (int64_t t = 0; t < size; t += LANES)
                to_columns(x + (token + t) * C + first, C, size - t, last - first, columns + first * CHUNK + t, CHUNK);
            for (int64_t item = share % row_shares; item < G * pairs; item += row_shares) {
                int64_t g = item / pairs, v = item % pairs * PAIR, after = smaller(item + row_shares, G * pairs - 1);
                int64_t done = first_column(&plan, g, first), end = first_column(&plan, g, last);
                const float *grads = dy + token * R + g * V + v;
                const float *next = dy + token * R + after / pairs * V + after % pairs * PAIR;
                if (v + PAIR <= V)
                    add_chunk(2, columns, plan.columns, done, end, grads, next, R, V, size, token == 0, gradient + v);
                else
                    add_chunk(1, columns, plan.columns, done, end, grads, next, R, V, size, token == 0, gradient + v);
            }
        }
    }
    finish(&plan);
    return found;
}
