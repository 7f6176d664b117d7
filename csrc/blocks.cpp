#include "blocks.h"

#include <cstring>

#include "matrix.h"

namespace lowbit {
namespace {

constexpr BlockType TYPES[] = {
    {"q4_0", 32, 18, 32, 4, 8, false, false},   {"q4_1", 32, 20, 32, 4, 0, true, false},    {"q5_0", 32, 22, 32, 5, 16, false, false}, {"q5_1", 32, 24, 32, 5, 0, true, false},
    {"q8_0", 32, 34, 32, 8, 128, false, false}, {"q2_k", 256, 84, 16, 2, 0, true, true},    {"q3_k", 256, 110, 16, 3, 4, false, true}, {"q4_k", 256, 144, 32, 4, 0, true, true},
    {"q5_k", 256, 176, 32, 5, 0, true, true},   {"q6_k", 256, 210, 16, 6, 32, false, true},
};
enum { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K };

float half_at(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return to_float(bits, Real::f16);
}

// Fields of BITS bits: code j * width + l of a part is field j of byte l; up > 0: above the bits that are in out.
template <int BITS>
void fields(const uint8_t* in, int64_t parts, int64_t width, uint8_t* out, int up = 0) {
    for (int64_t p = 0; p < parts; p++, in += width)
        for (int j = 0; j < 8 / BITS; j++, out += width)
            for (int64_t l = 0; l < width; l++) out[l] = uint8_t((up ? out[l] : 0) | (in[l] >> (j * BITS) & ((1 << BITS) - 1)) << up);
}

template <int BITS>
void join(const uint8_t* codes, int64_t parts, int64_t width, uint8_t* out, int down = 0) {
    for (int64_t p = 0; p < parts; p++, out += width) {
        std::memset(out, 0, size_t(width));
        for (int j = 0; j < 8 / BITS; j++, codes += width)
            for (int64_t l = 0; l < width; l++) out[l] = uint8_t(out[l] | (codes[l] >> down & ((1 << BITS) - 1)) << (j * BITS));
    }
}

void six_bits(const uint8_t* s, float* scales, float* minima) {
    for (int i = 0; i < 4; i++) {
        scales[i] = float(s[i] & 63), scales[4 + i] = float((s[8 + i] & 15) | s[i] >> 6 << 4);
        minima[i] = float(s[4 + i] & 63), minima[4 + i] = float(s[8 + i] >> 4 | s[4 + i] >> 6 << 4);
    }
}

void six_bits_of(const uint8_t* ls, const uint8_t* lm, uint8_t* s) {
    for (int i = 0; i < 4; i++) {
        s[i] = uint8_t(ls[i] | ls[4 + i] >> 4 << 6), s[4 + i] = uint8_t(lm[i] | lm[4 + i] >> 4 << 6);
        s[8 + i] = uint8_t((ls[4 + i] & 15) | (lm[4 + i] & 15) << 4);
    }
}

void fifth_bits(const uint8_t* p, uint8_t* codes) {
    uint32_t high;
    std::memcpy(&high, p, 4);
    for (int i = 0; i < 32; i++) codes[i] = uint8_t(codes[i] | (high >> i & 1) << 4);
}

}  // namespace

const BlockType* block_type(const std::string& name) {
    for (const BlockType& type : TYPES)
        if (name == type.name) return &type;
    return nullptr;
}

void take_apart(const BlockType& t, const uint8_t* in, int64_t cols, uint8_t* codes, float* scales, float* minima, float* d, float* dmin) {
    const auto which = &t - TYPES;
    for (int64_t block = 0; block < cols / t.weights; block++, in += t.bytes, codes += t.weights, scales += t.weights / t.group, minima += t.minima ? t.weights / t.group : 0, d++, dmin++) {
        switch (which) {
            case Q4_0: *scales = half_at(in), fields<4>(in + 2, 1, 16, codes); break;
            case Q4_1: *scales = half_at(in), *minima = -half_at(in + 2), fields<4>(in + 4, 1, 16, codes); break;
            case Q5_0: *scales = half_at(in), fields<4>(in + 6, 1, 16, codes), fifth_bits(in + 2, codes); break;
            case Q5_1: *scales = half_at(in), *minima = -half_at(in + 2), fields<4>(in + 8, 1, 16, codes), fifth_bits(in + 4, codes); break;
            case Q8_0:
                *scales = half_at(in);
                for (int i = 0; i < 32; i++) codes[i] = in[2 + i] ^ 128;
                break;
            case Q2_K:
                for (int i = 0; i < 16; i++) scales[i] = float(in[i] & 15), minima[i] = float(in[i] >> 4);
                fields<2>(in + 16, 2, 32, codes), *d = half_at(in + 80), *dmin = half_at(in + 82);
                break;
            case Q3_K:
                fields<2>(in + 32, 2, 32, codes), fields<1>(in, 1, 32, codes, 2), *d = half_at(in + 108);
                for (int i = 0; i < 16; i++) scales[i] = float(((in[96 + i % 8] >> i / 8 * 4 & 15) | (in[104 + i % 4] >> i / 4 * 2 & 3) << 4) - 32);
                break;
            case Q4_K: *d = half_at(in), *dmin = half_at(in + 2), six_bits(in + 4, scales, minima), fields<4>(in + 16, 4, 32, codes); break;
            case Q5_K: *d = half_at(in), *dmin = half_at(in + 2), six_bits(in + 4, scales, minima), fields<4>(in + 48, 4, 32, codes), fields<1>(in + 16, 1, 32, codes, 4); break;
            case Q6_K:
                fields<4>(in, 2, 64, codes), fields<2>(in + 128, 2, 32, codes, 4), *d = half_at(in + 208);
                for (int i = 0; i < 16; i++) scales[i] = float(int8_t(in[192 + i]));
                break;
        }
    }
}

void put_together(const BlockType& t, const uint8_t* codes, const uint8_t* scales, const uint8_t* minima, uint16_t d, uint16_t dmin, uint8_t* out) {
    auto half = [&](int at, uint16_t value) { std::memcpy(out + at, &value, 2); };
    auto fifth = [&](uint8_t* to) {
        uint32_t high = 0;
        for (int i = 0; i < 32; i++) high |= uint32_t(codes[i] >> 4 & 1) << i;
        std::memcpy(to, &high, 4);
    };
    switch (&t - TYPES) {
        case Q4_0: half(0, d), join<4>(codes, 1, 16, out + 2); break;
        case Q4_1: half(0, d), half(2, dmin), join<4>(codes, 1, 16, out + 4); break;
        case Q5_0: half(0, d), fifth(out + 2), join<4>(codes, 1, 16, out + 6); break;
        case Q5_1: half(0, d), half(2, dmin), fifth(out + 4), join<4>(codes, 1, 16, out + 8); break;
        case Q2_K:
            for (int i = 0; i < 16; i++) out[i] = uint8_t(scales[i] | minima[i] << 4);
            join<2>(codes, 2, 32, out + 16), half(80, d), half(82, dmin);
            break;
        case Q3_K:
            join<1>(codes, 1, 32, out, 2), join<2>(codes, 2, 32, out + 32), join<4>(scales, 1, 8, out + 96), join<2>(scales, 1, 4, out + 104, 4), half(108, d);
            break;
        case Q4_K: half(0, d), half(2, dmin), six_bits_of(scales, minima, out + 4), join<4>(codes, 4, 32, out + 16); break;
        case Q5_K: half(0, d), half(2, dmin), six_bits_of(scales, minima, out + 4), join<1>(codes, 1, 32, out + 16, 4), join<4>(codes, 4, 32, out + 48); break;
        case Q6_K:
            join<4>(codes, 2, 64, out), join<2>(codes, 2, 32, out + 128, 4), half(208, d);
            for (int i = 0; i < 16; i++) out[192 + i] = scales[i] ^ 128;
            break;
    }
}

}  // namespace lowbit
