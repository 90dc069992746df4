/* Two inner loops of generating on CPUs, for one thread: the bank's products for a few tokens a slot, and attention of
 * one new token a sequence over its row of the cache. Both are bound by reading A, B, keys and values once from memory,
 * which batched products of a library do not reach at these shapes. Compiled on the machine it runs on; see native.py.
 *
 * Vectors are GCC's generic ones: any processor. Weights, keys and values are bf16 or fp32, sums are fp32.
 */
#include <stdint.h>
#include <string.h>

#define W 16
typedef float vec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
typedef uint16_t bf16;

static inline vec load_bf16(const bf16 *p) {
    hvec h;
    memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uvec) << 16);
}
static inline vec load_fp32(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline float one_bf16(bf16 b) {
    uint32_t u = (uint32_t)b << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline float one_fp32(float f) { return f; }
static inline bf16 to_bf16(float f) { /* to nearest, ties to even, as torch rounds */
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline float to_fp32(float f) { return f; }
typedef float vec8 __attribute__((vector_size(32)));
typedef float vec4 __attribute__((vector_size(16)));
static inline float sum(vec v) {
    vec8 a, b;
    vec4 c, d;
    memcpy(&a, &v, 32), memcpy(&b, (char *)&v + 32, 32);
    a += b;
    memcpy(&c, &a, 16), memcpy(&d, (char *)&a + 16, 16);
    c += d;
    return (c[0] + c[1]) + (c[2] + c[3]);
}

/* e^x for x <= 0, to 2e-7 of the value: 2^i times a Taylor polynomial of 2^f, |f| <= 1/2. */
static inline vec exp_neg(vec x) {
    typedef int32_t ivec __attribute__((vector_size(4 * W)));
    x = (vec)((uvec)x & (uvec)(x > -87.0f)) + (vec)((uvec)(x - x - 87.0f) & (uvec)(x <= -87.0f));
    vec t = x * 1.44269504f;
    ivec i = __builtin_convertvector(t - 0.5f, ivec);
    vec f = (t - __builtin_convertvector(i, vec)) * 0.69314718f;
    vec p = 1 + f * (1 + f * (0.5f + f * (1 / 6.f + f * (1 / 24.f + f * (1 / 120.f + f * (1 / 720.f))))));
    return p * (vec)((i + 127) << 23);
}

/* y[t] += B_s (A_s x[t]) for the tokens of each segment (slot, begin, end), of `parts` layers over the same x.
 * x: [N, I] with a row stride. Part p has a: [S, R, I], b: [S, R, O] and writes y at y + begin, [N, O] with a row stride;
 * layout: [parts, 4] of the addresses of a and b, begin, O. ranks: [S], how much of R a slot uses.
 * room: floats, 4 * (I + R). */
#define TOKENS 4
#define WIDE 4
#define LORA(T, O_OF, ONE, LOAD)                                                                                       \
    static void lora_part_##T(T *y, int64_t y_stride, const float *wide, int n, const T *a, const T *b, int64_t rank,  \
                              int64_t R, int64_t I, int64_t O, float *h) {                                             \
        for (int64_t k = 0; k < rank; k++) {                                                                           \
            vec acc[TOKENS] = {{0}};                                                                                   \
            const T *row = a + k * I;                                                                                  \
            int64_t i = 0;                                                                                             \
            for (; i + W <= I; i += W) {                                                                               \
                vec w = LOAD(row + i);                                                                                 \
                for (int t = 0; t < TOKENS; t++) acc[t] += w * load_fp32(wide + t * I + i);                            \
            }                                                                                                          \
            for (int t = 0; t < TOKENS; t++) {                                                                         \
                float s = sum(acc[t]);                                                                                 \
                for (int64_t j = i; j < I; j++) s += ONE(row[j]) * wide[t * I + j];                                    \
                h[t * R + k] = s;                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        int64_t o = 0;                                                                                                 \
        for (; o + WIDE * W <= O; o += WIDE * W) {                                                                     \
            vec acc[TOKENS][WIDE];                                                                                     \
            memset(acc, 0, sizeof acc);                                                                                \
            for (int64_t k = 0; k < rank; k++)                                                                         \
                for (int v = 0; v < WIDE; v++) {                                                                       \
                    vec u = LOAD(b + k * O + o + v * W);                                                               \
                    for (int t = 0; t < TOKENS; t++) acc[t][v] += u * h[t * R + k];                                    \
                }                                                                                                      \
            for (int t = 0; t < n; t++)                                                                                \
                for (int v = 0; v < WIDE; v++) {                                                                       \
                    T *out = y + t * y_stride + o + v * W;                                                             \
                    for (int j = 0; j < W; j++) out[j] = O_OF(ONE(out[j]) + acc[t][v][j]);                             \
                }                                                                                                      \
        }                                                                                                              \
        for (; o < O; o++)                                                                                             \
            for (int t = 0; t < n; t++) {                                                                              \
                float s = 0;                                                                                           \
                for (int64_t k = 0; k < rank; k++) s += ONE(b[k * O + o]) * h[t * R + k];                              \
                T *out = y + t * y_stride + o;                                                                         \
                *out = O_OF(ONE(*out) + s);                                                                            \
            }                                                                                                          \
    }                                                                                                                  \
    void lora_##T(T *y, int64_t y_stride, const T *x, int64_t x_stride, const int64_t *layout, int64_t parts,          \
                  const int64_t *ranks, const int64_t *segments, int64_t count, int64_t R, int64_t I, float *room) {   \
        float *wide = room, *h = room + TOKENS * I;                                                                    \
        for (int64_t g = 0; g < count; g++) {                                                                          \
            int64_t slot = segments[3 * g], end = segments[3 * g + 2];                                                 \
            for (int64_t t0 = segments[3 * g + 1]; t0 < end; t0 += TOKENS) {                                           \
                int n = end - t0 < TOKENS ? (int)(end - t0) : TOKENS;                                                  \
                for (int t = 0; t < TOKENS; t++)                                                                       \
                    for (int64_t i = 0; i < I; i++)                                                                    \
                        wide[t * I + i] = t < n ? ONE(x[(t0 + t) * x_stride + i]) : 0;                                 \
                for (int64_t p = 0; p < parts; p++) {                                                                  \
                    const int64_t *part = layout + 4 * p;                                                              \
                    int64_t O = part[3];                                                                               \
                    const T *a = (const T *)(intptr_t)part[0] + slot * R * I;                                          \
                    const T *b = (const T *)(intptr_t)part[1] + slot * R * O;                                          \
                    lora_part_##T(y + t0 * y_stride + part[2], y_stride, wide, n, a, b, ranks[slot], R, I, O, h);      \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }
LORA(bf16, to_bf16, one_bf16, load_bf16)
LORA(float, to_fp32, one_fp32, load_fp32)

/* One new token for each of N sequences: stores its key and value in its row at its position, then attends to the row.
 * q: [H, N, D], k and v: [K, N, D], each with strides of head and token; slabs: [R, K, L, D]; out: [N, H, D].
 * window: how many positions back a token sees; 0: all. scores: floats, GROUPS * (L + 16). D is 32, 64 or 128.
 * Query heads that share a key head go through its keys together, GROUPS at a time. */
#define GROUPS 4
#define ATTEND_WIDE(T, O_OF, LOAD, DW)                                                                                 \
    static inline __attribute__((always_inline)) void attend_row_##T##_##DW(                                          \
        T *out, const T *qs, int64_t q_head, int n, const T *ks, const T *vs, int64_t first, int64_t last, int64_t L,  \
        float scale, float *scores) {                                                                                  \
        const int D = DW * W;                                                                                          \
        vec query[GROUPS][DW];                                                                                         \
        for (int g = 0; g < GROUPS; g++)                                                                               \
            for (int d = 0; d < DW; d++) query[g][d] = LOAD(qs + (g < n ? g : 0) * q_head + d * W) * scale;            \
        for (int64_t l = first; l <= last; l++) {                                                                      \
            vec acc[GROUPS] = {{0}};                                                                                   \
            for (int d = 0; d < DW; d++) {                                                                             \
                vec key = LOAD(ks + l * D + d * W);                                                                    \
                for (int g = 0; g < GROUPS; g++)                                                                       \
                    if (g < n) acc[g] += query[g][d] * key;                                                            \
            }                                                                                                          \
            for (int g = 0; g < GROUPS; g++)                                                                           \
                if (g < n) scores[g * (L + W) + l] = sum(acc[g]);                                                            \
        }                                                                                                              \
        float total[GROUPS];                                                                                           \
        for (int g = 0; g < n; g++) {                                                                                  \
            float *s = scores + g * (L + W), most = s[first], all = 0;                                                       \
            for (int64_t l = first; l <= last; l++) most = s[l] > most ? s[l] : most;                                  \
            for (int64_t l = first; l <= last; l += W) { /* past the end is room that nobody reads */                  \
                vec e = exp_neg(load_fp32(s + l) - most);                                                              \
                memcpy(s + l, &e, sizeof e);                                                                           \
            }                                                                                                          \
            for (int64_t l = first; l <= last; l++) all += s[l];                                                       \
            total[g] = all;                                                                                            \
        }                                                                                                              \
        vec mixed[GROUPS][DW];                                                                                         \
        memset(mixed, 0, sizeof mixed);                                                                                \
        for (int64_t l = first; l <= last; l++)                                                                        \
            for (int d = 0; d < DW; d++) {                                                                             \
                vec value = LOAD(vs + l * D + d * W);                                                                  \
                for (int g = 0; g < GROUPS; g++)                                                                       \
                    if (g < n) mixed[g][d] += value * scores[g * (L + W) + l];                                               \
            }                                                                                                          \
        for (int g = 0; g < n; g++)                                                                                    \
            for (int d = 0; d < DW; d++)                                                                               \
                for (int i = 0; i < W; i++) out[g * D + d * W + i] = O_OF(mixed[g][d][i] / total[g]);                  \
    }
#define ATTEND_CASE(T, DW, N)                                                                                          \
    attend_row_##T##_##DW(o, qs, q_head, N, ks, vs, first, last, L, scale, scores)
#define ATTEND_COUNT(T, DW)                                                                                            \
    if (now == 1) ATTEND_CASE(T, DW, 1);                                                                               \
    else if (now == 2) ATTEND_CASE(T, DW, 2);                                                                          \
    else ATTEND_CASE(T, DW, now);
#define ATTEND(T, O_OF, LOAD)                                                                                          \
    ATTEND_WIDE(T, O_OF, LOAD, 2)                                                                                      \
    ATTEND_WIDE(T, O_OF, LOAD, 4)                                                                                      \
    ATTEND_WIDE(T, O_OF, LOAD, 8)                                                                                      \
    void attend_##T(T *out, const T *q, int64_t q_head, int64_t q_token, const T *k, int64_t k_head, int64_t k_token,  \
                    const T *v, int64_t v_head, int64_t v_token, T *keys, T *values, const int64_t *rows,              \
                    const int64_t *positions, int64_t N, int64_t H, int64_t K, int64_t D, int64_t L, float scale,      \
                    int64_t window, float *scores) {                                                                   \
        int64_t G = H / K;                                                                                             \
        for (int64_t n = 0; n < N; n++)                                                                                \
            for (int64_t j = 0; j < K; j++) {                                                                          \
                T *ks = keys + (rows[n] * K + j) * L * D, *vs = values + (rows[n] * K + j) * L * D;                    \
                int64_t last = positions[n], first = window && last >= window ? last - window + 1 : 0;                 \
                memcpy(ks + last * D, k + j * k_head + n * k_token, D * sizeof(T));                                    \
                memcpy(vs + last * D, v + j * v_head + n * v_token, D * sizeof(T));                                    \
                for (int64_t g = 0; g < G; g += GROUPS) {                                                              \
                    int now = G - g < GROUPS ? (int)(G - g) : GROUPS;                                                  \
                    const T *qs = q + (j * G + g) * q_head + n * q_token;                                              \
                    T *o = out + (n * H + j * G + g) * D;                                                              \
                    switch (D / W) {                                                                                   \
                    case 2: ATTEND_COUNT(T, 2) break;                                                                  \
                    case 4: ATTEND_COUNT(T, 4) break;                                                                  \
                    case 8: ATTEND_COUNT(T, 8) break;                                                                  \
                    }                                                                                                  \
                }                                                                                                      \
            }                                                                                                          \
    }
ATTEND(bf16, to_bf16, load_bf16)
ATTEND(float, to_fp32, load_fp32)
