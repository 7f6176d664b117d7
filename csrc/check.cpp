// Compares every instruction set that this processor has with the portable kernels, on random matrices of all widths, and those with sums in float64. Needs no Python: it runs under an emulator, too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "matrix.h"

using namespace lowbit;

namespace {

int failures = 0;

void expect(bool condition, const char* what, const std::string& isa, int bits, int64_t m, double error) {
    if (condition) return;
    failures++;
    std::printf("%s: %s at %d bits, %d rows: error %g\n", isa.c_str(), what, bits, int(m), error);
}

void products(const std::string& isa, int bits, int tables, Zeros zeros, Real scales, int64_t group) {
    std::mt19937 random(bits * 100 + int(zeros) * 10 + int(scales));
    std::uniform_real_distribution<float> uniform(-1, 1);
    Matrix w;
    w.rows = 37, w.cols = 256, w.bits = bits, w.group = group, w.block = largest_block(bits, group), w.scales = scales, w.zeros = zeros, w.tables = tables;
    w.zero = zeros == Zeros::constant ? float(1 << (tables ? 8 * tables - 1 : bits - 1)) : 0;
    for (auto& table : w.table)
        for (auto& value : table) value = uint8_t(random());
    Memory memory = allocate(w.bytes());
    w.data = memory.get();
    std::vector<uint8_t> codes(size_t(w.rows * w.cols));
    std::vector<float> s(size_t(w.rows * w.groups())), z(s.size()), x(size_t(9 * w.cols));
    for (auto& code : codes) code = uint8_t(random() % (1u << bits));
    for (auto& scale : s) scale = 0.01f + 0.01f * std::fabs(uniform(random));
    for (auto& zero : z) zero = zeros == Zeros::codes ? float(random() % (1u << bits)) : uniform(random);
    for (auto& value : x) value = uniform(random);
    pack(w, memory.get(), 0, {w.rows, codes.data(), s.data(), zeros == Zeros::constant ? nullptr : z.data()});
    const Kernels* k = kernels(isa);
    const int64_t blocks = w.cols / w.block;
    std::vector<int8_t> q(x.size());
    std::vector<float> a(size_t(9 * blocks)), sums(a.size()), row(size_t(w.cols));
    k->round(x.data(), w.cols, 9, {w.cols, w.block, q.data(), a.data(), sums.data()});
    std::vector<uint8_t> scratch(size_t(panel_bytes(9)));
    for (int64_t m : {1, 3, 4, 9}) {
        std::vector<float> y(size_t(m * w.rows), 0.5f);
        k->matmul(w, {w.cols, w.block, q.data(), a.data(), sums.data()}, m, y.data(), w.rows, true, 0, w.tiles(), scratch.data());
        double worst = 0, largest = 0;
        for (int64_t r = 0; r < w.rows; r++) {
            unpack_row(w, r, row.data());
            for (int64_t i = 0; i < m; i++) {
                double sum = 0.5;
                for (int64_t c = 0; c < w.cols; c++) sum += double(row[size_t(c)]) * q[size_t(i * w.cols + c)] * a[size_t(i * blocks + c / w.block)];
                worst = std::max(worst, std::fabs(sum - y[size_t(i * w.rows + r)]));
                largest = std::max(largest, std::fabs(sum));
            }
        }
        expect(worst <= 2e-6 * largest, "a product differs", isa, bits, m, worst / largest);
    }
}

void steps(const std::string& isa) {
    const Kernels *k = kernels(isa), *p = portable_kernels();
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-2, 2);
    const int64_t n = 75, dim = 80;
    std::vector<float> x(size_t(n * dim)), w(x.size()), y(x.size()), z(x.size()), scores(n), other(n);
    for (auto& value : x) value = uniform(random);
    for (auto& value : w) value = uniform(random);
    auto near = [&](const std::vector<float>& a, const std::vector<float>& b, const char* what) {
        double worst = 0;
        for (size_t i = 0; i < a.size(); i++) worst = std::max(worst, double(std::fabs(a[i] - b[i]) / (1 + std::fabs(b[i]))));
        expect(worst < 3e-6, what, isa, 0, 0, worst);
    };
    k->rms_norm(x.data(), w.data(), 1e-5f, n * dim, y.data()), p->rms_norm(x.data(), w.data(), 1e-5f, n * dim, z.data());
    near(y, z, "rms_norm differs");
    for (int kind : {0, 1}) {
        y = x, z = x;
        k->gate(y.data(), w.data(), n * dim, kind), p->gate(z.data(), w.data(), n * dim, kind);
        near(y, z, "gate differs");
    }
    std::vector<uint16_t> keys(x.size()), values(x.size());
    const Row half{16, dim};
    k->to_half(x.data(), keys.data(), n * dim), p->to_half(x.data(), values.data(), n * dim);
    expect(keys == values, "to_half differs", isa, 0, 0, 0);
    p->to_half(w.data(), values.data(), n * dim);
    std::vector<float> out(dim), expected(dim);
    for (float cap : {0.f, 3.f}) {
        const uint8_t *a = reinterpret_cast<const uint8_t*>(keys.data()), *b = reinterpret_cast<const uint8_t*>(values.data());
        k->attend(w.data(), a, b, n, half, 0.3f, cap, scores.data(), out.data()), p->attend(w.data(), a, b, n, half, 0.3f, cap, other.data(), expected.data());
        near(out, expected, "attend differs");
    }
    for (int bits : {8, 4}) {
        const Row row{bits, 64};
        std::vector<uint8_t> a(size_t(n * row.bytes())), b(a.size());
        for (int64_t j = 0; j < n; j++) k->keep(x.data() + j * 64, row, a.data() + j * row.bytes()), p->keep(x.data() + j * 64, row, b.data() + j * row.bytes());
        expect(a == b, "keep differs", isa, bits, 0, 0);
        out.assign(64, 0), expected.assign(64, 0);
        k->attend(w.data(), a.data(), b.data(), n, row, 0.3f, 0, scores.data(), out.data()), p->attend(w.data(), a.data(), b.data(), n, row, 0.3f, 0, other.data(), expected.data());
        near(out, expected, "attend over a rounded cache differs");
    }
    // Queries together against one by one: the tokens from `position` on, with and without a window.
    for (int64_t window : {0, 20})
        for (float cap : {0.f, 3.f}) {
            const int64_t m = 37, position = n - m;
            std::vector<float> together(size_t(m * dim)), alone(together.size()), scratch(static_cast<size_t>(attend_scratch(dim)));
            const uint8_t *a = reinterpret_cast<const uint8_t*>(keys.data()), *b = reinterpret_cast<const uint8_t*>(values.data());
            k->attend_many(w.data(), dim, m, position, window, a, b, half, 0.3f, cap, scratch.data(), together.data(), dim);
            for (int64_t i = 0; i < m; i++) {
                const int64_t from = window ? position + i - window + 1 : 0;
                p->attend(w.data() + i * dim, a + from * half.bytes(), b + from * half.bytes(), position + i + 1 - from, half, 0.3f, cap, other.data(), alone.data() + i * dim);
            }
            near(together, alone, "attend_many differs");
        }
    for (int bits : {1, 2, 3, 4, 5, 6, 8}) {
        std::vector<uint32_t> words(size_t(5 * 4 * bits));
        for (auto& word : words) word = uint32_t(random());
        Coded c;
        c.rows = 5, c.cols = 128, c.group = 64, c.row_words = 4 * bits, c.bits = bits, c.words = words.data(), c.scales = x.data();
        for (int i = 0; i < 256; i++) c.table[i] = w[size_t(i)];
        for (const float* zeros : {static_cast<const float*>(nullptr), static_cast<const float*>(w.data())}) {
            c.zeros = zeros;
            std::vector<float> a(640), b(640);
            std::vector<uint16_t> c16(640), d16(640);
            k->decode(c, 0, 5, a.data(), false), p->decode(c, 0, 5, b.data(), false);
            k->decode(c, 0, 5, c16.data(), true), p->decode(c, 0, 5, d16.data(), true);
            expect(a == b && c16 == d16, "decode differs", isa, bits, 0, 0);
        }
    }
    for (Real type : {Real::f32, Real::f16}) {
        Dense d{n, dim, type, type == Real::f32 ? static_cast<const void*>(x.data()) : keys.data()};
        std::vector<float> a(size_t(5 * n)), b(size_t(5 * n));
        k->dense(d, w.data(), dim, 5, a.data(), n, false, 0, n), p->dense(d, w.data(), dim, 5, b.data(), n, false, 0, n);
        near(a, b, "dense differs");
    }
}

// The searches make the same bytes with every instruction set.
void searches(const std::string& isa) {
    const Kernels *k = kernels(isa), *p = portable_kernels();
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    const int64_t rows = 5, cols = 512, n = rows * cols;
    std::vector<float> x(static_cast<size_t>(n)), w(x.size()), importance(cols), means(rows, 0.001f);
    for (auto& value : x) value = 0.02f * normal(random);
    for (auto& value : w) value = 0.01f + std::fabs(normal(random));
    for (auto& value : importance) value = 0.01f + std::fabs(normal(random));
    for (const char* name : {"q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1"})
        for (bool weighted : {false, true}) {
            Encoding e;
            e.type = block_type(name), e.x = x.data(), e.cols = cols, e.importance = weighted ? importance.data() : nullptr, e.means = e.type->super ? nullptr : means.data();
            if (!weighted && !e.type->super) continue;
            const int64_t blocks = n / e.type->weights;
            std::vector<uint8_t> a(size_t(blocks * e.type->bytes)), b(a.size());
            e.out = a.data(), k->encode(e, 0, blocks);
            e.out = b.data(), p->encode(e, 0, blocks);
            expect(a == b, name, isa, e.type->bits, weighted, 0);
            // The blocks as a matrix: products are those of its rows.
            Matrix m;
            m.rows = rows, m.cols = cols, m.bits = e.type->bits == 3 ? 4 : e.type->bits, m.group = e.type->group, m.block = largest_block(m.bits, m.group), m.scales = Real::f16;
            m.zeros = e.type->minima ? Zeros::minima : Zeros::constant, m.zero = float(e.type->zero), m.super = e.type->super ? e.type->weights / e.type->group : 0;
            const Memory memory = allocate(m.bytes());
            m.data = memory.get();
            pack_blocks(m, memory.get(), 0, rows, *e.type, a.data());
            std::vector<int8_t> q(size_t(6 * cols));
            std::vector<float> scales(size_t(6 * cols / m.block)), sums(scales.size()), row(cols);
            k->round(w.data(), cols, 5, {cols, m.block, q.data(), scales.data(), sums.data()});
            std::vector<uint8_t> scratch(size_t(panel_bytes(5)));
            for (int64_t count : {1, 5}) {
                std::vector<float> y(size_t(count * rows));
                k->matmul(m, {cols, m.block, q.data(), scales.data(), sums.data()}, count, y.data(), rows, false, 0, m.tiles(), scratch.data());
                double worst = 0, largest = 0;
                for (int64_t r = 0; r < rows; r++) {
                    unpack_row(m, r, row.data());
                    for (int64_t i = 0; i < count; i++) {
                        double sum = 0, size = 0;
                        for (int64_t c = 0; c < cols; c++) {
                            const double term = double(row[size_t(c)]) * q[size_t(i * cols + c)] * scales[size_t((i * cols + c) / m.block)];
                            sum += term, size += std::fabs(term);
                        }
                        worst = std::max(worst, std::fabs(sum - y[size_t(i * rows + r)])), largest = std::max(largest, size);
                    }
                }
                expect(worst <= 2e-6 * largest, name, isa, m.bits, count, worst / largest);
            }
        }
    std::vector<float> values(513), a(size_t(n / 32)), b(a.size());
    for (int i = 0; i < 513; i++) values[size_t(i)] = std::floor(float(i - 256) / 32) * 16;
    k->search_iq4(x.data(), w.data(), values.data(), -127, 0, n / 32, a.data()), p->search_iq4(x.data(), w.data(), values.data(), -127, 0, n / 32, b.data());
    expect(a == b, "search_iq4 differs", isa, 4, 0, 0);
    std::vector<int64_t> found(size_t(n / 8)), other(found.size());
    k->nearest(w.data(), importance.data(), 48, x.data(), 0, n / 8, found.data()), p->nearest(w.data(), importance.data(), 48, x.data(), 0, n / 8, other.data());
    expect(found == other, "nearest differs", isa, 0, 0, 0);
    for (bool down : {false, true}) {
        const int64_t columns = 24, lanes = 37;
        std::vector<int64_t> share(columns);
        for (int64_t i = 0; i < columns; i++) share[size_t(i)] = i / 8;
        std::vector<float> made[2][3];
        for (int which = 0; which < 2; which++) {
            for (auto& each : made[which]) each.assign(size_t(columns * lanes), 0.f);
            std::copy_n(x.begin(), columns * lanes, made[which][0].begin());
            Panel panel;
            panel.rows = lanes, panel.columns = columns, panel.first = 3, panel.last = 20, panel.W = made[which][0].data(), panel.Q = made[which][1].data(), panel.error = made[which][2].data();
            panel.U = x.data() + 100, panel.P = down ? nullptr : x.data() + 700, panel.divisor = w.data(), panel.scale = w.data(), panel.offset = down ? nullptr : x.data();
            panel.share = share.data(), panel.inverse = w.data() + 50, panel.least = -8, panel.most = 7;
            const Kernels* run = which ? p : k;
            (down ? run->descend : run->feedback)(panel, 0, lanes);
        }
        for (int part = 0; part < 3; part++) expect(made[0][part] == made[1][part], "GPTQ's columns differ", isa, part, down, 0);
    }
}

}  // namespace

int main() {
    for (const char* isa : {"portable", "avx2", "avx512", "neon"}) {
        if (!supported(isa)) continue;
        for (int bits : {1, 2, 3, 4, 5, 6, 8})
            for (Zeros zeros : {Zeros::constant, Zeros::codes, Zeros::reals, Zeros::minima})
                for (Real scales : {Real::f32, Real::f16, Real::bf16}) products(isa, bits, 0, zeros, scales, 64);
        for (int tables : {1, 2}) products(isa, 4, tables, Zeros::constant, Real::f32, 32);
        products(isa, 2, 0, Zeros::constant, Real::f16, 16), products(isa, 8, 0, Zeros::codes, Real::f16, 256);
        steps(isa);
        searches(isa);
        std::printf("%s: checked\n", isa);
    }
    return failures ? 1 : 0;
}
