// AVX2 with FMA and F16C (Haswell, Zen and newer).
#include "layout.h"
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace lowbit::avx2 {
constexpr const char* NAME = "avx2";

struct Vec {
    struct Bytes { __m256i a, b; };
    using Ints = Bytes;
    struct Floats { __m256 a, b; };
    using Table = __m256i;
    static constexpr bool in_place = false;
    static constexpr int NT = 1, MR = 4;

    static const __m256i* at256(const void* p) { return reinterpret_cast<const __m256i*>(p); }
    static Bytes load(const uint8_t* p) { return {_mm256_loadu_si256(at256(p)), _mm256_loadu_si256(at256(p + 32))}; }
    static void store_bytes(uint8_t* p, Bytes v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a), _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.b); }
    template <int MASK> static Bytes low(Bytes v) { auto m = _mm256_set1_epi8(char(MASK)); return {_mm256_and_si256(v.a, m), _mm256_and_si256(v.b, m)}; }
    template <int N> static Bytes shift(Bytes v) { if constexpr (N == 0) return v; else return {_mm256_srli_epi16(v.a, N), _mm256_srli_epi16(v.b, N)}; }
    template <int N> static Bytes pack_or(Bytes v, Bytes w) { return {_mm256_or_si256(v.a, _mm256_slli_epi16(w.a, N)), _mm256_or_si256(v.b, _mm256_slli_epi16(w.b, N))}; }
    static Table table(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p))); }
    static Bytes lookup(Table t, Bytes v) { return {_mm256_shuffle_epi8(t, v.a), _mm256_shuffle_epi8(t, v.b)}; }

    static Ints none() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Ints fill(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
    // Sums of two products do not fit 16 bits where a byte has its highest bit: that bit is multiplied apart.
    static __m256i dot256(__m256i acc, __m256i w, __m256i x) {
        const auto ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(char(0x80));
        auto low = _mm256_maddubs_epi16(_mm256_andnot_si256(top, w), x), high = _mm256_maddubs_epi16(_mm256_and_si256(w, top), x);
        return _mm256_add_epi32(acc, _mm256_add_epi32(_mm256_madd_epi16(low, ones), _mm256_madd_epi16(high, ones)));
    }
    static Ints dot(Ints acc, Bytes w, int32_t four) {
        auto x = _mm256_set1_epi32(four);
        return {dot256(acc.a, w.a, x), dot256(acc.b, w.b, x)};
    }
    static Ints add(Ints v, Ints w) { return {_mm256_add_epi32(v.a, w.a), _mm256_add_epi32(v.b, w.b)}; }
    template <int N> static Ints down(Ints v) { return {_mm256_srai_epi32(v.a, N), _mm256_srai_epi32(v.b, N)}; }
    template <int N> static Ints up(Ints v) { return {_mm256_slli_epi32(v.a, N), _mm256_slli_epi32(v.b, N)}; }
    static Ints up8(Ints v) { return up<8>(v); }

    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Floats set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
    static Floats load_f32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static __m128i half256(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
    static Floats load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(half256(p)), _mm256_cvtph_ps(half256(p + 8))}; }
    static __m256 wide(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
    static Floats load_bf16(const uint16_t* p) { return {wide(half256(p)), wide(half256(p + 8))}; }
    static Floats load_u8(const uint8_t* p) {
        auto v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)))};
    }
    static Floats load_i8(const int8_t* p) {
        auto v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
    }
    static Floats from(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
    static Floats mul(Floats v, Floats w) { return {_mm256_mul_ps(v.a, w.a), _mm256_mul_ps(v.b, w.b)}; }
    static Floats plus(Floats v, Floats w) { return {_mm256_add_ps(v.a, w.a), _mm256_add_ps(v.b, w.b)}; }
    static Floats fma(Floats v, Floats w, Floats c) { return {_mm256_fmadd_ps(v.a, w.a, c.a), _mm256_fmadd_ps(v.b, w.b, c.b)}; }
    static Floats fnma(Floats v, Floats w, Floats c) { return {_mm256_fnmadd_ps(v.a, w.a, c.a), _mm256_fnmadd_ps(v.b, w.b, c.b)}; }
    static void store(float* p, Floats v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
    static void store_f16(uint16_t* p, Floats v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.a, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.b, _MM_FROUND_TO_NEAREST_INT));
    }
    static Floats larger(Floats v, Floats w) { return {_mm256_max_ps(v.a, w.a), _mm256_max_ps(v.b, w.b)}; }
    static Floats magnitude(Floats v) { auto m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)); return {_mm256_and_ps(v.a, m), _mm256_and_ps(v.b, m)}; }
    static float half(uint16_t h) { return _cvtsh_ss(h); }
    static float largest(Floats v) {
        auto t = _mm256_max_ps(v.a, v.b);
        auto h = _mm_max_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
        h = _mm_max_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
    }
    static float sum(Floats v) {
        auto t = _mm256_add_ps(v.a, v.b);
        auto h = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
        h = _mm_add_ps(h, _mm_movehl_ps(h, h));
        return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
    }
};

#include "kernels.inc"
}  // namespace lowbit::avx2
const lowbit::Kernels* lowbit::avx2_kernels() { return &avx2::table; }
#else
const lowbit::Kernels* lowbit::avx2_kernels() { return nullptr; }
#endif
