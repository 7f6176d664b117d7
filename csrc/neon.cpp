// NEON with dot products (Armv8.2 and newer: Apple M1, Graviton 2, Cortex-A76 and what followed them).
#include "layout.h"
#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace lowbit::neon {
constexpr const char* NAME = "neon";

struct Vec {
    struct Bytes { uint8x16_t v[4]; };
    struct Ints { int32x4_t v[4]; };
    struct Floats { float32x4_t v[4]; };
    using Table = uint8x16_t;
    static constexpr bool in_place = false;
    static constexpr int NT = 1, MR = 4;

    template <class T, class F> static inline __attribute__((always_inline)) T each(F f) { return T{{f(0), f(1), f(2), f(3)}}; }
    static Bytes load(const uint8_t* p) { return each<Bytes>([&](int i) { return vld1q_u8(p + 16 * i); }); }
    static void store_bytes(uint8_t* p, Bytes b) { for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, b.v[i]); }
    template <int MASK> static Bytes low(Bytes b) { return each<Bytes>([&](int i) { return vandq_u8(b.v[i], vdupq_n_u8(MASK)); }); }
    template <int N> static Bytes shift(Bytes b) { if constexpr (N == 0) return b; else return each<Bytes>([&](int i) { return vshrq_n_u8(b.v[i], N); }); }
    template <int N> static Bytes pack_or(Bytes a, Bytes b) { return each<Bytes>([&](int i) { return vorrq_u8(a.v[i], vshlq_n_u8(b.v[i], N)); }); }
    static Table table(const uint8_t* p) { return vld1q_u8(p); }
    static Bytes lookup(Table t, Bytes b) { return each<Bytes>([&](int i) { return vqtbl1q_u8(t, b.v[i]); }); }

    static Ints none() { return each<Ints>([](int) { return vdupq_n_s32(0); }); }
    static Ints fill(int32_t v) { return each<Ints>([&](int) { return vdupq_n_s32(v); }); }
    static Ints dot(Ints acc, Bytes w, int32_t four) {
        const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
#if defined(__ARM_FEATURE_MATMUL_INT8)
        return each<Ints>([&](int i) { return vusdotq_s32(acc.v[i], w.v[i], x); });
#else
        // The instruction takes signed bytes: the highest bit, which it would count as -128, is multiplied apart and taken away.
        const uint8x16_t top = vdupq_n_u8(0x80);
        return each<Ints>([&](int i) {
            const int32x4_t low = vdotq_s32(acc.v[i], vreinterpretq_s8_u8(vbicq_u8(w.v[i], top)), x);
            return vsubq_s32(low, vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(vandq_u8(w.v[i], top)), x));
        });
#endif
    }
    static Ints add(Ints a, Ints b) { return each<Ints>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); }); }
    template <int N> static Ints down(Ints a) { return each<Ints>([&](int i) { return vshrq_n_s32(a.v[i], N); }); }
    template <int N> static Ints up(Ints a) { return each<Ints>([&](int i) { return vshlq_n_s32(a.v[i], N); }); }
    static Ints up8(Ints a) { return up<8>(a); }

    static Floats zero() { return set(0); }
    static Floats set(float v) { return each<Floats>([&](int) { return vdupq_n_f32(v); }); }
    static Floats load_f32(const float* p) { return each<Floats>([&](int i) { return vld1q_f32(p + 4 * i); }); }
    static Floats load_f16(const uint16_t* p) { return each<Floats>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); }); }
    static Floats load_bf16(const uint16_t* p) { return each<Floats>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); }); }
    static Floats load_u8(const uint8_t* p) {
        const uint8x16_t b = vld1q_u8(p);
        const uint16x8_t l = vmovl_u8(vget_low_u8(b)), h = vmovl_u8(vget_high_u8(b));
        return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(l))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(l))), vcvtq_f32_u32(vmovl_u16(vget_low_u16(h))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(h)))}};
    }
    static Floats load_i8(const int8_t* p) {
        const int8x16_t b = vld1q_s8(p);
        const int16x8_t l = vmovl_s8(vget_low_s8(b)), h = vmovl_s8(vget_high_s8(b));
        return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(l))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(l))), vcvtq_f32_s32(vmovl_s16(vget_low_s16(h))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(h)))}};
    }
    static Floats from(Ints a) { return each<Floats>([&](int i) { return vcvtq_f32_s32(a.v[i]); }); }
    static Floats mul(Floats a, Floats b) { return each<Floats>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
    static Floats plus(Floats a, Floats b) { return each<Floats>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
    static Floats larger(Floats a, Floats b) { return each<Floats>([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); }); }
    static Floats magnitude(Floats a) { return each<Floats>([&](int i) { return vabsq_f32(a.v[i]); }); }
    static Floats fma(Floats a, Floats b, Floats c) { return each<Floats>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
    static Floats fnma(Floats a, Floats b, Floats c) { return each<Floats>([&](int i) { return vfmsq_f32(c.v[i], a.v[i], b.v[i]); }); }
    static void store(float* p, Floats v) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v.v[i]); }
    static void store_f16(uint16_t* p, Floats v) { for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.v[i]))); }
    static float half(uint16_t h) { __fp16 value; std::memcpy(&value, &h, 2); return value; }
    static float sum(Floats v) { return vaddvq_f32(vaddq_f32(vaddq_f32(v.v[0], v.v[1]), vaddq_f32(v.v[2], v.v[3]))); }
    static float largest(Floats v) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(v.v[0], v.v[1]), vmaxq_f32(v.v[2], v.v[3]))); }
};

#include "kernels.inc"
}  // namespace lowbit::neon
const lowbit::Kernels* lowbit::neon_kernels() { return &neon::table; }
#else
const lowbit::Kernels* lowbit::neon_kernels() { return nullptr; }
#endif
