// Attention: Dao et al., "FlashAttention", arXiv:2205.14135, algorithms 1 and 4: blocks of scores that stay in the cache, a running maximum and sum for each row, and in the backward pass the scores
// made again from q, k and the logarithm of the sum. Products of bfloat16 pairs (VDPBF16PS) added in float32; softmax in float32.
//
// All products are of one kind: C [m, n] += A B, where A gives pairs of bfloat16 (32 bits), broadcast to all lanes, and B holds rows of 32-bit pairs. Pairs lie along the summed
// dimension, so a matrix is laid out in one of two ways: "columns" [dim / 2][rows] (the matrix transposed, pairs kept) or "pairs" [rows / 2][dim] (two rows interleaved).
#include "bf16.h"

#include "matrix.h"
#include "threads.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

namespace lowbit {
namespace {

constexpr int64_t ROWS_AT_ONCE = 48, LANES = 64;  // of a block of scores
constexpr int MR = 6, NV = 4;                     // of a block of registers: rows, vectors of 16 lanes
using Pairs = uint32_t;

int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// C [m, 16 v] (+)= sum over p of A[row * a_row + p * a_pair] . B[p * b_row + lane]. A function of its own: inlined, the compiler would store the sums in each turn.
template <int M, int V>
__attribute__((noinline)) void product(int64_t pairs, const Pairs* A, int64_t a_row, int64_t a_pair, const Pairs* B, int64_t b_row, float* C, int64_t c_row, bool add) {
    __m512 sum[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sum[m][v] = add ? _mm512_loadu_ps(C + m * c_row + 16 * v) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh b[V];
        for (int v = 0; v < V; v++) b[v] = (__m512bh)_mm512_loadu_si512(B + p * b_row + 16 * v);
        for (int m = 0; m < M; m++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(int(A[m * a_row + p * a_pair]));
            for (int v = 0; v < V; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], a, b[v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(C + m * c_row + 16 * v, sum[m][v]);
}

template <int V>
void strip(int64_t rows, int64_t pairs, const Pairs* A, int64_t a_row, int64_t a_pair, const Pairs* B, int64_t b_row, float* C, int64_t c_row, bool add) {
    for (; rows >= MR; rows -= MR, A += MR * a_row, C += MR * c_row) product<MR, V>(pairs, A, a_row, a_pair, B, b_row, C, c_row, add);
    for (; rows >= 2; rows -= 2, A += 2 * a_row, C += 2 * c_row) product<2, V>(pairs, A, a_row, a_pair, B, b_row, C, c_row, add);
    if (rows) product<1, V>(pairs, A, a_row, a_pair, B, b_row, C, c_row, add);
}

// lanes is a multiple of 16.
void multiply(int64_t rows, int64_t lanes, int64_t pairs, const Pairs* A, int64_t a_row, int64_t a_pair, const Pairs* B, int64_t b_row, float* C, int64_t c_row, bool add) {
    for (; lanes >= 16 * NV; lanes -= 16 * NV, B += 16 * NV, C += 16 * NV) strip<NV>(rows, pairs, A, a_row, a_pair, B, b_row, C, c_row, add);
    for (; lanes >= 32; lanes -= 32, B += 32, C += 32) strip<2>(rows, pairs, A, a_row, a_pair, B, b_row, C, c_row, add);
    if (lanes) strip<1>(rows, pairs, A, a_row, a_pair, B, b_row, C, c_row, add);
}

// e^x for x <= 0 or so, by the polynomial of kernels.inc's fast_exp (Cephes); relative error about 1e-7. Below -87 it is 0; NaN stays NaN, so that what is wrong before attention shows behind it.
__m512 exponential(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f}) y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ), y, n);
}

void store_half(uint16_t* p, __m512 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x)); }
__m512i widened(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
__m512 load_half(const uint16_t* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(widened(p), 16)); }
const Pairs* pairs_of(const uint16_t* p) { return reinterpret_cast<const Pairs*>(p); }

// A 16 x 16 block of 32-bit numbers, transposed.
void transpose16(const Pairs* in, int64_t in_row, int64_t rows, Pairs* out, int64_t out_row) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = i < rows ? _mm512_loadu_si512(in + i * in_row) : _mm512_setzero_si512();
    for (int i = 0; i < 8; i++) b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + 2 + j]);
            a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + 2 + j]);
        }
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88), b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(out + i * out_row, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_si512(out + (4 + i) * out_row, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
        _mm512_storeu_si512(out + (8 + i) * out_row, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
        _mm512_storeu_si512(out + (12 + i) * out_row, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
    }
}

// "columns": out [dim / 2][up(rows, LANES)], zeros behind the rows.
void columns(const uint16_t* in, int64_t in_row, int64_t rows, int64_t dim, Pairs* out) {
    const int64_t width = up(rows, LANES);
    for (int64_t r = 0; r < width; r += 16)
        for (int64_t p = 0; p < dim / 2; p += 16) transpose16(pairs_of(in + r * in_row) + p, in_row / 2, std::clamp<int64_t>(rows - r, 0, 16), out + p * width + r, width);
}

// "pairs": out [up(rows, LANES) / 2][dim], zeros behind the rows.
void interleaved(const uint16_t* in, int64_t in_row, int64_t rows, int64_t dim, Pairs* out) {
    for (int64_t r = 0; r < up(rows, LANES); r += 2)
        for (int64_t c = 0; c < dim; c += 16) {
            const __m512i low = r < rows ? widened(in + r * in_row + c) : _mm512_setzero_si512(), high = r + 1 < rows ? widened(in + (r + 1) * in_row + c) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + r / 2 * dim + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

class Scratch {  // of a thread: one piece of memory, handed out in parts of 64 bytes
  public:
    explicit Scratch(int64_t bytes) : memory_(allocate(bytes + 64)) {}
    void begin() { used_ = 0; }
    template <class T>
    T* take(int64_t count) {
        T* part = reinterpret_cast<T*>(memory_.get() + used_);
        used_ += up(count * int64_t(sizeof(T)), 64);
        return part;
    }

  private:
    Memory memory_;
    int64_t used_ = 0;
};

template <class Work>
void each_head(const Attention& a, int threads, int64_t bytes, Work work) {
    std::atomic<int64_t> next{0};
    const int64_t total = a.batch * a.heads;
    parallel(int(std::min<int64_t>(threads, total)), [&](int, int) {
        Scratch scratch(bytes);
        for (int64_t i; (i = next++) < total;) {
            scratch.begin();
            work(scratch, i / a.heads, i % a.heads);
        }
    });
}

template <class T>
struct Rows {  // of one head
    T* data;
    int64_t row;
};
using In = Rows<const uint16_t>;
using Out = Rows<uint16_t>;

void forward_head(const Attention& a, Scratch& scratch, In q, In k, In v, Out out, float* lse) {
    const int64_t dim = a.dim, width = up(a.keys, LANES);
    Pairs* const K = scratch.take<Pairs>(dim / 2 * width);
    Pairs* const V = scratch.take<Pairs>(width / 2 * dim);
    columns(k.data, k.row, a.keys, dim, K);
    interleaved(v.data, v.row, a.keys, dim, V);
    alignas(64) float S[ROWS_AT_ONCE * LANES], O[ROWS_AT_ONCE * LARGEST_DIM];
    alignas(64) uint16_t P[ROWS_AT_ONCE * LANES];
    float most[ROWS_AT_ONCE], sum[ROWS_AT_ONCE];
    for (int64_t first = 0; first < a.queries; first += ROWS_AT_ONCE) {
        const int64_t rows = std::min(ROWS_AT_ONCE, a.queries - first), last = a.causal ? first + rows : a.keys;
        std::fill_n(O, rows * dim, 0.0f);
        std::fill_n(most, rows, -INFINITY);
        std::fill_n(sum, rows, 0.0f);
        for (int64_t key = 0; key < last; key += LANES) {
            multiply(rows, LANES, dim / 2, pairs_of(q.data + first * q.row), q.row / 2, 1, K + key, width, S, LANES, false);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t seen = std::clamp<int64_t>((a.causal ? first + r + 1 : a.keys) - key, 0, LANES);
                const uint64_t visible = seen == 64 ? ~0ull : (1ull << seen) - 1;
                __m512 s[4];
                __m512 top = _mm512_set1_ps(-INFINITY);
                for (int i = 0; i < 4; i++) {
                    s[i] = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), __mmask16(visible >> 16 * i), _mm512_load_ps(S + r * LANES + 16 * i), _mm512_set1_ps(a.scale));
                    top = _mm512_max_ps(top, s[i]);
                }
                const float before = most[r], now = std::max(before, _mm512_reduce_max_ps(top));
                __m512 total = _mm512_setzero_ps();
                for (int i = 0; i < 4; i++) {
                    s[i] = _mm512_maskz_mov_ps(__mmask16(visible >> 16 * i), exponential(_mm512_sub_ps(s[i], _mm512_set1_ps(now))));
                    total = _mm512_add_ps(total, s[i]);
                    store_half(P + r * LANES + 16 * i, s[i]);
                }
                if (now > before) {
                    const float shrink = before == -INFINITY ? 0.0f : std::exp(before - now);
                    sum[r] *= shrink, most[r] = now;
                    for (int64_t c = 0; c < dim; c += 16) _mm512_store_ps(O + r * dim + c, _mm512_mul_ps(_mm512_load_ps(O + r * dim + c), _mm512_set1_ps(shrink)));
                }
                sum[r] += _mm512_reduce_add_ps(total);
            }
            multiply(rows, dim, LANES / 2, pairs_of(P), LANES / 2, 1, V + key / 2 * dim, dim, O, dim, true);
        }
        for (int64_t r = 0; r < rows; r++) {
            lse[first + r] = most[r] + std::log(sum[r]);
            for (int64_t c = 0; c < dim; c += 16) store_half(out.data + (first + r) * out.row + c, _mm512_mul_ps(_mm512_load_ps(O + r * dim + c), _mm512_set1_ps(1 / sum[r])));
        }
    }
}

void backward_head(const Attention& a, Scratch& scratch, In q, In k, In v, In out, const float* lse_given, In g, Out to_q, Out to_k, Out to_v) {
    const int64_t dim = a.dim, width = up(a.queries, LANES);
    Pairs *const Qc = scratch.take<Pairs>(dim / 2 * width), *const Gc = scratch.take<Pairs>(dim / 2 * width);
    Pairs *const Qp = scratch.take<Pairs>(dim / 2 * width), *const Gp = scratch.take<Pairs>(dim / 2 * width);
    Pairs* const Kp = scratch.take<Pairs>(dim / 2 * up(a.keys, LANES));
    float* const dQ = scratch.take<float>(dim * width);  // [dim][width]
    float *const lse = scratch.take<float>(width), *const delta = scratch.take<float>(width);
    columns(q.data, q.row, a.queries, dim, Qc);
    columns(g.data, g.row, a.queries, dim, Gc);
    interleaved(q.data, q.row, a.queries, dim, Qp);
    interleaved(g.data, g.row, a.queries, dim, Gp);
    interleaved(k.data, k.row, a.keys, dim, Kp);
    std::fill_n(dQ, dim * width, 0.0f);
    for (int64_t i = 0; i < width; i++) {
        lse[i] = i < a.queries ? lse_given[i] : INFINITY;  // no probability behind the last query
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < dim && i < a.queries; c += 16) sum = _mm512_fmadd_ps(load_half(out.data + i * out.row + c), load_half(g.data + i * g.row + c), sum);
        delta[i] = _mm512_reduce_add_ps(sum);
    }
    alignas(64) float S[ROWS_AT_ONCE * LANES], dP[ROWS_AT_ONCE * LANES], dK[ROWS_AT_ONCE * LARGEST_DIM], dV[ROWS_AT_ONCE * LARGEST_DIM];
    alignas(64) uint16_t P[ROWS_AT_ONCE * LANES], dS[ROWS_AT_ONCE * LANES];
    alignas(64) Pairs dSp[ROWS_AT_ONCE / 2 * LANES];
    const __m512 scale = _mm512_set1_ps(a.scale);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t key = 0; key < a.keys; key += ROWS_AT_ONCE) {
        const int64_t rows = std::min(ROWS_AT_ONCE, a.keys - key);
        std::fill_n(dK, rows * dim, 0.0f);
        std::fill_n(dV, rows * dim, 0.0f);
        for (int64_t query = a.causal ? key / LANES * LANES : 0; query < width; query += LANES) {
            multiply(rows, LANES, dim / 2, pairs_of(k.data + key * k.row), k.row / 2, 1, Qc + query, width, S, LANES, false);
            multiply(rows, LANES, dim / 2, pairs_of(v.data + key * v.row), v.row / 2, 1, Gc + query, width, dP, LANES, false);
            for (int64_t r = 0; r < rows; r++)
                for (int i = 0; i < 4; i++) {
                    const int64_t at = r * LANES + 16 * i, column = query + 16 * i;
                    const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(int(column)));
                    const __mmask16 visible = a.causal ? _mm512_cmp_epi32_mask(place, _mm512_set1_epi32(int(key + r)), _MM_CMPINT_NLT) : __mmask16(0xffff);
                    const __m512 p = _mm512_maskz_mov_ps(visible, exponential(_mm512_fmsub_ps(_mm512_load_ps(S + at), scale, _mm512_loadu_ps(lse + column))));
                    const __m512 ds = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_load_ps(dP + at), _mm512_loadu_ps(delta + column)));
                    store_half(P + at, p);
                    store_half(dS + at, ds);
                    const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(ds));
                    Pairs* const pair = dSp + r / 2 * LANES + 16 * i;
                    _mm512_store_si512(pair, r % 2 ? _mm512_or_si512(_mm512_load_si512(pair), _mm512_slli_epi32(half, 16)) : half);
                }
            multiply(rows, dim, LANES / 2, pairs_of(P), LANES / 2, 1, Gp + query / 2 * dim, dim, dV, dim, true);
            multiply(rows, dim, LANES / 2, pairs_of(dS), LANES / 2, 1, Qp + query / 2 * dim, dim, dK, dim, true);
            multiply(dim, LANES, (rows + 1) / 2, Kp + key / 2 * dim, 1, dim, dSp, LANES, dQ + query, width, true);
        }
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < dim; c += 16) {
                store_half(to_k.data + (key + r) * to_k.row + c, _mm512_mul_ps(_mm512_load_ps(dK + r * dim + c), scale));
                store_half(to_v.data + (key + r) * to_v.row + c, _mm512_load_ps(dV + r * dim + c));
            }
    }
    for (int64_t query = 0; query < a.queries; query += 16)
        for (int64_t c = 0; c < dim; c += 16) {
            alignas(64) Pairs block[256];
            transpose16(reinterpret_cast<const Pairs*>(dQ + c * width + query), width, 16, block, 16);
            for (int64_t r = 0; r < std::min<int64_t>(16, a.queries - query); r++)
                store_half(to_q.data + (query + r) * to_q.row + c, _mm512_mul_ps(_mm512_castsi512_ps(_mm512_load_si512(block + 16 * r)), scale));
        }
}

constexpr int64_t DEPTH = 2048;  // columns of a panel of weights, which stays in the cache

}  // namespace

bool bf16_supported() { return supported("avx512") && __builtin_cpu_supports("avx512bf16"); }

void attention_forward(const Attention& a, Heads<const uint16_t> q, Heads<const uint16_t> k, Heads<const uint16_t> v, Heads<uint16_t> out, float* lse, int threads) {
    each_head(a, threads, 2 * a.dim * up(a.keys, LANES) * 2, [&](Scratch& scratch, int64_t b, int64_t h) {
        const int64_t shared = h / a.groups;
        forward_head(a, scratch, {q.at(b, h), q.row}, {k.at(b, shared), k.row}, {v.at(b, shared), v.row}, {out.at(b, h), out.row}, lse + (b * a.heads + h) * a.queries);
    });
}

void attention_backward(const Attention& a, Heads<const uint16_t> q, Heads<const uint16_t> k, Heads<const uint16_t> v, Heads<const uint16_t> out, const float* lse, Heads<const uint16_t> g,
                        Heads<uint16_t> to_q, Heads<uint16_t> to_k, Heads<uint16_t> to_v, int threads) {
    const int64_t width = up(a.queries, LANES), bytes = (8 * width + 2 * up(a.keys, LANES)) * a.dim + 4 * a.dim * width + 8 * width;
    each_head(a, threads, bytes, [&](Scratch& scratch, int64_t b, int64_t h) {
        const int64_t shared = h / a.groups;
        backward_head(a, scratch, {q.at(b, h), q.row}, {k.at(b, shared), k.row}, {v.at(b, shared), v.row}, {out.at(b, h), out.row}, lse + (b * a.heads + h) * a.queries, {g.at(b, h), g.row}, {to_q.at(b, h), to_q.row},
                      {to_k.at(b, h), to_k.row}, {to_v.at(b, h), to_v.row});
    });
}

int64_t dense_scratch(int64_t cols, int64_t m) { return std::min(cols, DEPTH) * LANES * 2 + m * LANES * 4 + 64; }

void dense_bf16(const Dense& w, const uint16_t* x, int64_t m, float* y, int64_t stride, bool add, int64_t first, int64_t last, uint8_t* scratch) {
    Pairs* const panel = reinterpret_cast<Pairs*>(scratch);
    float* const tile = reinterpret_cast<float*>(scratch + std::min(w.cols, DEPTH) * LANES * 2);
    const uint16_t* const weights = static_cast<const uint16_t*>(w.data);
    for (int64_t row = first; row < last; row += LANES) {
        const int64_t rows = std::min(LANES, last - row);
        for (int64_t k = 0; k < w.cols; k += DEPTH) {
            const int64_t depth = std::min(DEPTH, w.cols - k);
            columns(weights + row * w.cols + k, w.cols, rows, depth, panel);
            const bool whole = rows == LANES;
            multiply(m, LANES, depth / 2, pairs_of(x + k), w.cols / 2, 1, panel, LANES, whole ? y + row : tile, whole ? stride : LANES, k > 0 || (whole && add));
        }
        for (int64_t i = 0; rows < LANES && i < m; i++)
            for (int64_t r = 0; r < rows; r++) y[i * stride + row + r] = (add ? y[i * stride + row + r] : 0.0f) + tile[i * LANES + r];
    }
}

void to_bf16(const float* x, uint16_t* y, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) store_half(y + i, _mm512_loadu_ps(x + i));
}

}  // namespace lowbit
#else
namespace lowbit {
bool bf16_supported() { return false; }
int64_t dense_scratch(int64_t, int64_t) { return 0; }
void dense_bf16(const Dense&, const uint16_t*, int64_t, float*, int64_t, bool, int64_t, int64_t, uint8_t*) {}
void to_bf16(const float*, uint16_t*, int64_t) {}
void attention_forward(const Attention&, Heads<const uint16_t>, Heads<const uint16_t>, Heads<const uint16_t>, Heads<uint16_t>, float*, int) {}
void attention_backward(const Attention&, Heads<const uint16_t>, Heads<const uint16_t>, Heads<const uint16_t>, Heads<const uint16_t>, const float*, Heads<const uint16_t>, Heads<uint16_t>, Heads<uint16_t>,
                        Heads<uint16_t>, int) {}
}  // namespace lowbit
#endif
