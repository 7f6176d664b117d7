// The Python module lowbit._native: packed matrices and their products, the decoder, attention, the searches of encoders and algorithms, packing.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "bf16.h"
#include "decoder.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace lowbit;

namespace {

template <class T>
using Array1 = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Array2 = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T>
using Out2 = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& message) {
    if (!condition) throw nb::value_error(message.c_str());
}

const Kernels* chosen(const std::string& isa) {
    const Kernels* found = kernels(isa);
    require(found != nullptr, "isa is '" + isa + "', which this processor does not have or this build has not; known are portable, avx2, avx512, neon");
    return found;
}

struct Packed {
    Matrix matrix;
    Memory memory;

    std::vector<int32_t> order;

    Packed(int64_t rows, int64_t cols, int bits, int64_t group, int scales, int zeros, float zero, std::optional<std::vector<int>> table, std::optional<Array1<int32_t>> inputs, int64_t most, int64_t super) {
        require(rows > 0 && cols > 0, "rows and cols must be positive");
        require(bits >= 1 && bits <= 8 && bits != 7, "bits must be 1, 2, 3, 4, 5, 6 or 8");
        require(group > 0 && cols % group == 0, "group must divide cols");
        require(scales >= 0 && scales <= 2 && zeros >= 0 && zeros <= 3, "scales are of kind 0, 1 or 2, zeros of 0 to 3");
        matrix.rows = rows, matrix.cols = cols, matrix.bits = bits, matrix.group = group;
        matrix.block = largest_block(bits, group, most);
        require(matrix.block > 0, "a group of " + std::to_string(group) + " holds no whole unit of codes of " + std::to_string(bits) + " bits");
        matrix.scales = Real(scales), matrix.zeros = Zeros(zeros), matrix.zero = zero;
        require(super >= 0 && (super & (super - 1)) == 0 && (!super || (cols / group % super == 0 && (matrix.zeros == Zeros::constant || matrix.zeros == Zeros::minima))),
                "super-blocks are of a power of two of groups, which divides those of a row, with minima or one zero-point");
        matrix.super = super;
        if (table) {
            require(bits == 4 && (table->size() == 16 || table->size() == 32), "a table has 16 values of one byte, or twice 16 (high bytes, low bytes), for codes of 4 bits");
            matrix.tables = int(table->size() / 16);
            for (size_t i = 0; i < table->size(); i++) matrix.table[i / 16][i % 16] = uint8_t((*table)[i]);
        }
        if (inputs) {
            std::vector<bool> met(size_t(cols), false);
            require(int64_t(inputs->shape(0)) == cols, "order has a number for each column");
            for (int64_t k = 0; k < cols; k++) {
                const int32_t at = inputs->data()[k];
                require(at >= 0 && at < cols && !met[size_t(at)], "order holds each column once");
                met[size_t(at)] = true;
            }
            order.assign(inputs->data(), inputs->data() + cols);
            matrix.order = order.data();
        }
        memory = allocate(matrix.bytes());
        matrix.data = memory.get();
    }

    void fill(int64_t first, Array2<uint8_t> codes, Array2<float> scales, std::optional<Array2<float>> zeros, int threads) {
        const int64_t count = int64_t(codes.shape(0));
        require(!matrix.super, "scales of super-blocks come from ggml's blocks: fill_blocks");
        require(first % ROWS == 0 && first >= 0 && first + count <= matrix.rows, "rows to fill begin at a multiple of 16 and end within the matrix");
        require(int64_t(codes.shape(1)) == matrix.cols, "codes have another number of columns");
        require(int64_t(scales.shape(0)) == count && int64_t(scales.shape(1)) == matrix.groups(), "scales are [rows, groups]");
        require((matrix.zeros == Zeros::constant) == !zeros, "zeros are given where each group has its own, and else not");
        require(!zeros || (int64_t(zeros->shape(0)) == count && int64_t(zeros->shape(1)) == matrix.groups()), "zeros are [rows, groups]");
        nb::gil_scoped_release release;
        const int64_t groups = matrix.groups(), tiles = (count + ROWS - 1) / ROWS;
        parallel(int(std::min<int64_t>(threads, tiles)), [&](int id, int total) {
            const int64_t from = tiles * id / total * ROWS, to = std::min(count, tiles * (id + 1) / total * ROWS);
            if (from < to)
                pack(matrix, memory.get(), first + from, {to - from, codes.data() + from * matrix.cols, scales.data() + from * groups, zeros ? zeros->data() + from * groups : nullptr});
        });
    }

    void fill_blocks(Array2<uint8_t> blocks, const std::string& name, int threads) {
        const BlockType* type = block_type(name);
        require(type != nullptr, "blocks of type '" + name + "' are not known here");
        require(int64_t(blocks.shape(0)) == matrix.rows && matrix.cols % type->weights == 0 && int64_t(blocks.shape(1)) == matrix.cols / type->weights * type->bytes, "blocks are [rows, cols / weights * bytes of a block]");
        require(matrix.group == type->group && matrix.bits >= type->bits && matrix.super == (type->super ? type->weights / type->group : 0) && !matrix.tables && !matrix.order, "the matrix has other groups than the blocks");
        require(matrix.zeros == (type->minima ? Zeros::minima : Zeros::constant) && (type->super || matrix.scales != Real::bf16), "the matrix has other zero-points or scales than the blocks");
        nb::gil_scoped_release release;
        const int64_t tiles = matrix.tiles(), row_bytes = matrix.cols / type->weights * type->bytes;
        parallel(int(std::min<int64_t>(threads, tiles)), [&](int id, int total) {
            const int64_t from = tiles * id / total * ROWS, to = std::min(matrix.rows, tiles * (id + 1) / total * ROWS);
            if (from < to) pack_blocks(matrix, memory.get(), from, to - from, *type, blocks.data() + from * row_bytes);
        });
    }

    void row(int64_t index, nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) const {
        require(index >= 0 && index < matrix.rows && int64_t(out.shape(0)) == matrix.cols, "row or size out of range");
        unpack_row(matrix, index, out.data());
    }
};

struct Buffers {
    std::vector<int8_t> codes;
    std::vector<float> scales, sums;
    std::vector<std::vector<uint8_t>> panels;
};

Inputs inputs(Buffers& b, const Matrix& w, int64_t m) {
    const int64_t blocks = w.cols / w.block;
    if (int64_t(b.codes.size()) < m * w.cols) b.codes.resize(size_t(m * w.cols));
    if (int64_t(b.scales.size()) < m * blocks) b.scales.resize(size_t(m * blocks)), b.sums.resize(size_t(m * blocks));
    return {w.cols, w.block, b.codes.data(), b.scales.data(), b.sums.data(), w.order};
}

constexpr int64_t AT_ONCE = 512;  // rows of inputs

void matmul(const Packed& w, Array2<float> x, Out2<float> y, int threads, const std::string& isa) {
    const Kernels* k = chosen(isa);
    const int64_t m = int64_t(x.shape(0)), cols = w.matrix.cols, rows = w.matrix.rows;
    require(int64_t(x.shape(1)) == cols && int64_t(y.shape(0)) == m && int64_t(y.shape(1)) == rows, "x is [m, cols] and y [m, rows]");
    nb::gil_scoped_release release;
    static thread_local Buffers buffers;
    if (int(buffers.panels.size()) < threads) buffers.panels.resize(size_t(threads));
    for (int64_t done = 0; done < m; done += AT_ONCE) {
        const int64_t n = std::min(AT_ONCE, m - done), blocks = cols / w.matrix.block;
        Inputs in = inputs(buffers, w.matrix, n);
        Barrier barrier;
        Buffers& shared = buffers;
        parallel(threads, [&](int id, int count) {
            auto& panel = shared.panels[size_t(id)];
            if (int64_t(panel.size()) < panel_bytes(n)) panel.resize(size_t(panel_bytes(n)));
            if (n >= count) {
                const int64_t a = n * id / count, b = n * (id + 1) / count;
                k->round(x.data() + (done + a) * cols, cols, b - a, {cols, in.block, in.codes + a * cols, in.scales + a * blocks, in.sums + a * blocks, in.order});
            } else if (id < n) {
                k->round(x.data() + (done + id) * cols, cols, 1, {cols, in.block, in.codes + id * cols, in.scales + id * blocks, in.sums + id * blocks, in.order});
            }
            barrier.wait(count);
            const int64_t pieces = (w.matrix.tiles() + 3) / 4, tiles = w.matrix.tiles();
            k->matmul(w.matrix, in, n, y.data() + done * rows, rows, false, std::min(tiles, pieces * id / count * 4), std::min(tiles, pieces * (id + 1) / count * 4), panel.data());
        });
    }
}

// Rows of float32, float16 or bfloat16 (as int16), where they lie; the array must outlive it.
struct DenseRows {
    Dense dense;
    DenseRows(nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro> array, int type) {
        require(type >= 0 && type <= 2 && array.itemsize() == size_t(type == 0 ? 4 : 2), "type is 0 (float32), 1 (float16) or 2 (bfloat16), of 4 or 2 bytes");
        dense = {int64_t(array.shape(0)), int64_t(array.shape(1)), Real(type), array.data()};
    }
};

void dense_matmul(const DenseRows& w, Array2<float> x, Out2<float> y, int threads, const std::string& isa) {
    const Kernels* k = chosen(isa);
    const int64_t m = int64_t(x.shape(0));
    require(int64_t(x.shape(1)) == w.dense.cols && int64_t(y.shape(0)) == m && int64_t(y.shape(1)) == w.dense.rows, "x is [m, cols] and y [m, rows]");
    nb::gil_scoped_release release;
    if (takes_bf16(k, w.dense, m)) {
        std::vector<uint16_t> halves(size_t(m * w.dense.cols));
        to_bf16(x.data(), halves.data(), m * w.dense.cols);
        parallel(threads, [&](int id, int count) {
            const int64_t pieces = (w.dense.rows + 63) / 64;
            const Memory scratch = allocate(dense_scratch(w.dense.cols, m));
            dense_bf16(w.dense, halves.data(), m, y.data(), w.dense.rows, false, pieces * id / count * 64, std::min(w.dense.rows, pieces * (id + 1) / count * 64), scratch.get());
        });
        return;
    }
    parallel(threads, [&](int id, int count) {
        const int64_t pieces = (w.dense.rows + 15) / 16;
        k->dense(w.dense, x.data(), w.dense.cols, m, y.data(), w.dense.rows, false, std::min(w.dense.rows, pieces * id / count * 16), std::min(w.dense.rows, pieces * (id + 1) / count * 16));
    });
}

using Part = std::variant<const Packed*, const DenseRows*>;
using Vector = std::optional<Array1<float>>;

Linear linear_of(const std::vector<Part>& parts, const Vector& bias, int64_t rows, int64_t cols, const char* name) {
    Linear made;
    for (const Part& part : parts) {
        Linear::Part p;
        if (auto packed = std::get_if<const Packed*>(&part)) {
            p.packed = true, p.matrix = (*packed)->matrix;
            require(p.matrix.cols == cols, std::string(name) + " has another number of columns");
        } else {
            p.dense = std::get<const DenseRows*>(part)->dense;
            require(p.dense.cols == cols, std::string(name) + " has another number of columns");
        }
        made.parts.push_back(p);
    }
    require(made.rows() == rows, std::string(name) + " has " + std::to_string(made.rows()) + " rows; expected " + std::to_string(rows));
    require(!bias || int64_t(bias->shape(0)) == rows, std::string(name) + ": the bias has another size");
    made.bias = bias ? bias->data() : nullptr;
    return made;
}

const float* vector_of(const Vector& v, int64_t size, const char* name) {
    require(!v || int64_t(v->shape(0)) == size, std::string(name) + " has another size");
    return v ? v->data() : nullptr;
}

void decode(nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> words, int bits, Array1<float> table, Array2<float> scales, std::optional<Array2<float>> zeros,
            nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> out, int threads, const std::string& isa, bool through_half) {
    const Kernels* k = chosen(isa);
    Coded w;
    w.through_half = through_half;
    w.rows = int64_t(out.shape(0)), w.cols = int64_t(out.shape(1)), w.bits = bits;
    const int64_t groups = int64_t(scales.shape(1));
    require(bits >= 1 && bits <= 8 && bits != 7, "bits must be 1, 2, 3, 4, 5, 6 or 8");
    require(groups > 0 && w.cols % groups == 0 && w.cols / groups % 32 == 0, "a group is a multiple of 32 columns");
    require(int64_t(words.shape(0)) == w.rows && int64_t(words.shape(1)) == w.cols * bits / 8 && int64_t(scales.shape(0)) == w.rows, "words are [rows, cols * bits / 8] and scales [rows, groups]");
    require(!zeros || (int64_t(zeros->shape(0)) == w.rows && int64_t(zeros->shape(1)) == groups), "zeros are as scales");
    require(zeros || int64_t(table.shape(0)) == int64_t(1) << bits, "the table has a value for each code");
    require(out.itemsize() == 2 || out.itemsize() == 4, "out is float32 or bfloat16");
    w.group = w.cols / groups, w.row_words = w.cols * bits / 32, w.words = reinterpret_cast<const uint32_t*>(words.data());
    w.scales = scales.data(), w.zeros = zeros ? zeros->data() : nullptr;
    if (!zeros) std::copy_n(table.data(), size_t(1) << bits, w.table);
    nb::gil_scoped_release release;
    parallel(threads, [&](int id, int count) { k->decode(w, w.rows * id / count, w.rows * (id + 1) / count, out.data(), out.itemsize() == 2); });
}

bool encode(Array2<float> x, const std::string& name, std::optional<Array1<float>> importance, nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> out, int threads, const std::string& isa) {
    const Kernels* k = chosen(isa);
    const int64_t rows = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
    Encoding e;
    e.type = block_type(name), e.x = x.data(), e.cols = cols, e.out = out.data();
    require(e.type != nullptr && (e.type->super || (importance && e.type->bits < 8)), "blocks of type '" + name + "' are not made here");
    require(cols % e.type->weights == 0 && int64_t(out.shape(0)) == rows && int64_t(out.shape(1)) == cols / e.type->weights * e.type->bytes, "out is [rows, cols / weights * bytes of a block]");
    require(!importance || int64_t(importance->shape(0)) == cols, "importance is [cols]");
    e.importance = importance ? importance->data() : nullptr;
    nb::gil_scoped_release release;
    std::vector<float> means(importance && !e.type->super ? size_t(rows) : 0);
    e.means = means.empty() ? nullptr : means.data();
    const int64_t per_row = cols / e.type->weights;
    std::atomic<bool> fine = true;
    parallel(int(std::min<int64_t>(threads, std::max<int64_t>(rows, 1))), [&](int id, int count) {
        const int64_t first = rows * id / count, last = rows * (id + 1) / count;
        for (int64_t r = first; r < last && e.means; r++) {
            double sum = 0;
            for (int64_t c = 0; c < cols; c++) sum += double(e.x[r * cols + c]) * double(e.x[r * cols + c]);
            means[size_t(r)] = float(sum / double(cols));
        }
        if (!k->encode(e, first * per_row, last * per_row)) fine = false;
    });
    return fine;
}

void in_parts(int threads, int64_t count, int64_t least, const std::function<void(int64_t, int64_t)>& run) {
    nb::gil_scoped_release release;
    parallel(int(std::max<int64_t>(1, std::min<int64_t>(threads, count / least))), [&](int id, int total) { run(count * id / total, count * (id + 1) / total); });
}

void search_iq4(Array2<float> x, Array2<float> w, Array1<float> values, float lowest, nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out, int threads, const std::string& isa) {
    const Kernels* k = chosen(isa);
    const int64_t groups = int64_t(x.shape(0));
    require(int64_t(x.shape(1)) == 32 && int64_t(w.shape(0)) == groups && int64_t(w.shape(1)) == 32 && int64_t(out.shape(0)) == groups && values.shape(0) == 513, "x and w are [groups, 32], values [513], out [groups]");
    in_parts(threads, groups, 64, [&](int64_t first, int64_t last) { k->search_iq4(x.data(), w.data(), values.data(), lowest, first, last, out.data()); });
}

using Codes1 = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void round_e8p(Array2<float> x, Array2<float> table, Array1<float> half, Array1<int32_t> row_of, Array1<uint8_t> odd_row, Out2<float> points, Codes1 codes, int threads, const std::string& isa) {
    const Kernels* k = chosen(isa);
    const int64_t n = int64_t(x.shape(0)), count = int64_t(half.shape(0));
    require(x.shape(1) == 8 && points.shape(1) == 8 && int64_t(points.shape(0)) == n && int64_t(codes.shape(0)) == n, "x and points are [n, 8], codes [n]");
    require(table.shape(0) == 8 && int64_t(table.shape(1)) == count && count > 0 && count % 16 == 0 && row_of.shape(0) == 6561 && odd_row.shape(0) == 256, "table is [8, count], half [count], of a multiple of 16; row_of [6561], odd_row [256]");
    const Lattice l{count, table.data(), half.data(), row_of.data(), odd_row.data()};
    in_parts(threads, n, 64, [&](int64_t first, int64_t last) { k->round_e8p(l, x.data(), first, last, points.data(), codes.data()); });
}

void nearest(Array2<float> x, Array2<float> table, Array1<float> half, Codes1 found, int threads, const std::string& isa) {
    const Kernels* k = chosen(isa);
    const int64_t n = int64_t(x.shape(0)), count = int64_t(half.shape(0));
    require(x.shape(1) == 8 && table.shape(0) == 8 && int64_t(table.shape(1)) == count && count > 0 && count % 16 == 0 && int64_t(found.shape(0)) == n, "x is [n, 8], table [8, count], half [count], of a multiple of 16, found [n]");
    in_parts(threads, n, 64, [&](int64_t first, int64_t last) { k->nearest(table.data(), half.data(), count, x.data(), first, last, found.data()); });
}

using Ranges2 = std::optional<Array2<float>>;

// Columns first to last of a block of GPTQ's loop; what "descend" means by the names is in layout.h.
void gptq_columns(Out2<float> W, Out2<float> Q, Out2<float> error, Array2<float> U, Ranges2 P, Array2<float> divisor, Array2<float> scale, Ranges2 offset, Ranges2 low, Ranges2 high, Array1<int64_t> share,
                  Array1<float> inverse, float least, float most, int64_t first, int64_t last, bool descend, int threads, const std::string& isa) {
    const Kernels* k = chosen(isa);
    Panel p;
    p.columns = int64_t(W.shape(0)), p.rows = int64_t(W.shape(1)), p.first = first, p.last = last, p.W = W.data(), p.Q = Q.data(), p.error = error.data(), p.U = U.data();
    require(p.columns > 0 && p.columns <= Panel::MOST && 0 <= first && first <= last && last <= p.columns, "a block has at most 64 columns, of which first to last are rounded");
    for (const auto& each : {Q, error}) require(int64_t(each.shape(0)) == p.columns && int64_t(each.shape(1)) == p.rows, "Q and error are as W, [columns, rows]");
    require(int64_t(U.shape(0)) == p.columns && int64_t(U.shape(1)) == p.columns && (!P || (int64_t(P->shape(0)) == p.columns && int64_t(P->shape(1)) == p.columns)), "U and P are [columns, columns]");
    const int64_t shares = int64_t(scale.shape(0));
    auto ranges = [&](const Ranges2& each) -> const float* {
        require(!each || (int64_t(each->shape(0)) == shares && int64_t(each->shape(1)) == p.rows), "scales and what belongs to them are [shares, rows]");
        return each ? each->data() : nullptr;
    };
    p.P = P ? P->data() : nullptr, p.divisor = ranges(divisor), p.scale = ranges(scale), p.offset = ranges(offset), p.low = ranges(low), p.high = ranges(high);
    require((p.low == nullptr) == (p.high == nullptr), "low and high are given together");
    require(int64_t(share.shape(0)) == p.columns && int64_t(inverse.shape(0)) == p.columns, "share and inverse are [columns]");
    for (int64_t i = 0; i < p.columns; i++) require(share.data()[i] >= 0 && share.data()[i] < shares, "a column's share is out of range");
    p.share = share.data(), p.inverse = inverse.data(), p.least = least, p.most = most;
    in_parts(threads, (p.rows + 15) / 16, 4, [&](int64_t from, int64_t to) { (descend ? k->descend : k->feedback)(p, from * 16, std::min(p.rows, to * 16)); });
}

template <int BITS>
void pack_row(const uint8_t* codes, int64_t count, uint32_t* words) {
    for (; count > 0; count -= 32, codes += 32, words += BITS) {
        uint8_t some[32] = {};
        std::memcpy(some, codes, size_t(std::min<int64_t>(count, 32)));
        uint32_t made[BITS + 1] = {};
        for (int j = 0; j < 32; j++) {
            made[j * BITS / 32] |= uint32_t(some[j]) << (j * BITS % 32);
            if (j * BITS % 32 + BITS > 32) made[j * BITS / 32 + 1] |= uint32_t(some[j]) >> (32 - j * BITS % 32);
        }
        std::memcpy(words, made, size_t(std::min<int64_t>(BITS, (count * BITS + 31) / 32)) * 4);
    }
}

template <int BITS>
void unpack_row_of(const uint32_t* words, int64_t count, uint8_t* codes) {
    for (; count > 0; count -= 32, codes += 32, words += BITS) {
        uint32_t some[BITS + 1] = {};
        std::memcpy(some, words, size_t(std::min<int64_t>(BITS, (count * BITS + 31) / 32)) * 4);
        uint8_t made[32];
        for (int j = 0; j < 32; j++) {
            uint32_t code = some[j * BITS / 32] >> (j * BITS % 32);
            if (j * BITS % 32 + BITS > 32) code |= some[j * BITS / 32 + 1] << (32 - j * BITS % 32);
            made[j] = uint8_t(code & ((1u << BITS) - 1));
        }
        std::memcpy(codes, made, size_t(std::min<int64_t>(count, 32)));
    }
}

using Words2 = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes2 = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void pack_words(Codes2 codes, int bits, Words2 words, bool unpack, int threads) {
    const int64_t rows = int64_t(codes.shape(0)), count = int64_t(codes.shape(1)), stored = int64_t(words.shape(1));
    require(bits >= 1 && bits <= 8 && int64_t(words.shape(0)) == rows && stored == (count * bits + 31) / 32, "words are [rows, ceil(count * bits / 32)]");
    in_parts(threads, rows, 16, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            uint8_t* c = codes.data() + r * count;
            uint32_t* w = reinterpret_cast<uint32_t*>(words.data()) + r * stored;
            switch (bits) {
#define CASE(B) case B: unpack ? unpack_row_of<B>(w, count, c) : pack_row<B>(c, count, w); break
                CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8);
#undef CASE
            }
        }
    });
}

using Half4 = nb::ndarray<uint16_t, nb::ndim<4>, nb::device::cpu>;  // bfloat16, [batch, heads, length, dim]

Heads<uint16_t> heads_of(const Half4& x, int64_t batch, int64_t heads, int64_t length, int64_t dim, const char* name) {
    require(int64_t(x.shape(0)) == batch && int64_t(x.shape(1)) == heads && int64_t(x.shape(2)) == length && int64_t(x.shape(3)) == dim, std::string(name) + " has another shape");
    require(x.stride(3) == 1 && x.stride(2) % 2 == 0, std::string(name) + ": the numbers of a row are not beside each other, or rows begin at odd places");
    return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
}

Heads<const uint16_t> read_only(const Heads<uint16_t>& x) { return {x.data, x.batch, x.head, x.row}; }

struct AttentionCall {
    Attention a;
    Heads<uint16_t> q, k, v, out;
    float* lse;

    AttentionCall(const Half4& q_, const Half4& k_, const Half4& v_, const Half4& out_, nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>& lse_, float scale, bool causal) {
        require(bf16_supported(), "this needs a processor with AVX-512 BF16");
        a = {int64_t(q_.shape(0)), int64_t(q_.shape(1)), 1, int64_t(q_.shape(2)), int64_t(k_.shape(2)), int64_t(q_.shape(3)), scale, causal};
        const int64_t kv_heads = int64_t(k_.shape(1));
        require(a.batch > 0 && a.heads > 0 && kv_heads > 0 && a.queries > 0 && a.keys > 0 && a.heads % kv_heads == 0, "sizes must be positive, and the heads of keys divide those of queries");
        require(a.dim > 0 && a.dim % 32 == 0 && a.dim <= LARGEST_DIM, "heads have a multiple of 32 channels, at most 256");
        require(!causal || a.queries == a.keys, "causal attention has as many queries as keys");
        a.groups = a.heads / kv_heads;
        q = heads_of(q_, a.batch, a.heads, a.queries, a.dim, "q"), out = heads_of(out_, a.batch, a.heads, a.queries, a.dim, "out");
        k = heads_of(k_, a.batch, kv_heads, a.keys, a.dim, "k"), v = heads_of(v_, a.batch, kv_heads, a.keys, a.dim, "v");
        require(int64_t(lse_.shape(0)) == a.batch && int64_t(lse_.shape(1)) == a.heads && int64_t(lse_.shape(2)) == a.queries, "lse is [batch, heads, queries]");
        lse = lse_.data();
    }
};

}  // namespace

NB_MODULE(_native, m) {
    nb::set_leak_warnings(false);
    m.def("instruction_sets", [] {
        std::vector<std::string> found;
        for (const char* isa : {"avx512", "avx2", "neon", "portable"})
            if (supported(isa)) found.emplace_back(isa);
        return found;
    }, "The instruction sets of this build that this processor has, best first.");
    m.def("thread_source", [] { return std::string(thread_source()); }, "Whose threads are used: openmp (the runtime that is loaded already) or own.");
    m.attr("MOST_COLUMNS") = Panel::MOST;  // of gptq_columns
    m.def("largest_block", &largest_block, "bits"_a, "group"_a, "most"_a = MAX_BLOCK);
    nb::class_<Packed>(m, "Packed", "A matrix [rows, cols] of codes in groups, in the kernels' layout.")
        .def(nb::init<int64_t, int64_t, int, int64_t, int, int, float, std::optional<std::vector<int>>, std::optional<Array1<int32_t>>, int64_t, int64_t>(), "rows"_a, "cols"_a, "bits"_a, "group"_a, "scales"_a, "zeros"_a,
             "zero"_a, "table"_a.none(), "order"_a.none() = nb::none(), "block"_a = MAX_BLOCK, "super"_a = 0)
        .def("fill_blocks", &Packed::fill_blocks, "blocks"_a, "type"_a, "threads"_a = 1)
        .def("fill", &Packed::fill, "first"_a, "codes"_a, "scales"_a, "zeros"_a.none(), "threads"_a = 1)
        .def("row", &Packed::row, "index"_a, "out"_a.noconvert())
        .def_prop_ro("nbytes", [](const Packed& p) { return p.matrix.bytes(); })
        .def_prop_ro("rows", [](const Packed& p) { return p.matrix.rows; })
        .def_prop_ro("cols", [](const Packed& p) { return p.matrix.cols; })
        .def_prop_ro("bits", [](const Packed& p) { return p.matrix.bits; })
        .def_prop_ro("block", [](const Packed& p) { return p.matrix.block; });
    nb::class_<DenseRows>(m, "Dense").def(nb::init<nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>, int>(), "array"_a, "type"_a, nb::keep_alive<1, 2>());
    m.def("matmul", &matmul, "w"_a, "x"_a, "y"_a.noconvert(), "threads"_a, "isa"_a = "");
    m.def("dense_matmul", &dense_matmul, "w"_a, "x"_a, "y"_a.noconvert(), "threads"_a, "isa"_a = "");
    m.def("round_inputs", [](Array2<float> x, int64_t block, nb::ndarray<int8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> codes, Out2<float> scales, Out2<float> sums, const std::string& isa) {
        const int64_t rows = int64_t(x.shape(0)), cols = int64_t(x.shape(1));
        require(block > 0 && cols % block == 0 && int64_t(codes.shape(0)) == rows && int64_t(codes.shape(1)) == cols, "codes are as x, and block divides its columns");
        require(int64_t(scales.shape(0)) == rows && int64_t(scales.shape(1)) == cols / block && int64_t(sums.shape(0)) == rows && int64_t(sums.shape(1)) == cols / block, "scales and sums are [rows, blocks]");
        chosen(isa)->round(x.data(), cols, rows, {cols, block, codes.data(), scales.data(), sums.data()});
    }, "x"_a, "block"_a, "codes"_a.noconvert(), "scales"_a.noconvert(), "sums"_a.noconvert(), "isa"_a = "");

    m.def("encode", &encode, "x"_a, "type"_a, "importance"_a.none(), "out"_a.noconvert(), "threads"_a, "isa"_a = "", "ggml's blocks of x [rows, cols]; False where a scale does not fit float16.");
    m.def("gptq_columns", &gptq_columns, "W"_a.noconvert(), "Q"_a.noconvert(), "error"_a.noconvert(), "U"_a, "P"_a.none(), "divisor"_a, "scale"_a, "offset"_a.none(), "low"_a.none(), "high"_a.none(), "share"_a, "inverse"_a, "least"_a, "most"_a,
          "first"_a, "last"_a, "descend"_a, "threads"_a, "isa"_a = "");
    m.def("pack_words", &pack_words, "codes"_a.noconvert(), "bits"_a, "words"_a.noconvert(), "unpack"_a, "threads"_a);
    m.def("search_iq4", &search_iq4, "x"_a, "w"_a, "values"_a, "lowest"_a, "out"_a.noconvert(), "threads"_a, "isa"_a = "");
    m.def("round_e8p", &round_e8p, "x"_a, "table"_a, "half"_a, "row_of"_a, "odd_row"_a, "points"_a.noconvert(), "codes"_a.noconvert(), "threads"_a, "isa"_a = "");
    m.def("nearest", &nearest, "x"_a, "table"_a, "half"_a, "found"_a.noconvert(), "threads"_a, "isa"_a = "");
    m.def("decode", &decode, "words"_a, "bits"_a, "table"_a, "scales"_a, "zeros"_a.none(), "out"_a.noconvert(), "threads"_a, "isa"_a = "", "through_half"_a = false);
    using Lse = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
    m.def("attention_supported", &bf16_supported, "Whether this processor runs attention and attention_backward.");
    m.def("attention", [](Half4 q, Half4 k, Half4 v, Half4 out, Lse lse, float scale, bool causal, int threads) {
        const AttentionCall c(q, k, v, out, lse, scale, causal);
        nb::gil_scoped_release release;
        attention_forward(c.a, read_only(c.q), read_only(c.k), read_only(c.v), c.out, c.lse, threads);
    }, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "scale"_a, "causal"_a, "threads"_a);
    m.def("attention_backward", [](Half4 q, Half4 k, Half4 v, Half4 out, Lse lse, Half4 gradient, Half4 to_q, Half4 to_k, Half4 to_v, float scale, bool causal, int threads) {
        const AttentionCall c(q, k, v, out, lse, scale, causal);
        const Attention& a = c.a;
        const auto g = heads_of(gradient, a.batch, a.heads, a.queries, a.dim, "gradient"), dq = heads_of(to_q, a.batch, a.heads, a.queries, a.dim, "to_q");
        const auto dk = heads_of(to_k, a.batch, a.heads, a.keys, a.dim, "to_k"), dv = heads_of(to_v, a.batch, a.heads, a.keys, a.dim, "to_v");
        nb::gil_scoped_release release;
        attention_backward(a, read_only(c.q), read_only(c.k), read_only(c.v), read_only(c.out), c.lse, read_only(g), dq, dk, dv, threads);
    }, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "gradient"_a, "to_q"_a, "to_k"_a, "to_v"_a, "scale"_a, "causal"_a, "threads"_a);

    nb::class_<Decoder>(m, "Decoder", "A language model of the Llama kind.")
        .def("__init__", [](Decoder* self, nb::dict values, int64_t context, int threads, const std::string& isa, int cache_bits) {
            Shape s;
            auto whole = [&](const char* name) { return nb::cast<int64_t>(values[name]); };
            auto real = [&](const char* name) { return nb::cast<float>(values[name]); };
            s.hidden = whole("hidden"), s.heads = whole("heads"), s.kv_heads = whole("kv_heads"), s.head_dim = whole("head_dim"), s.ffn = whole("ffn"), s.vocabulary = whole("vocabulary");
            s.eps = real("eps"), s.attention_scale = real("attention_scale"), s.attention_cap = real("attention_cap"), s.logit_cap = real("logit_cap");
            s.embedding_scale = real("embedding_scale"), s.residual_scale = real("residual_scale"), s.logit_scale = real("logit_scale");
            s.activation = int(whole("activation")), s.norm_all = whole("norm_all") != 0, s.rope_half = whole("rope_half");
            require(s.hidden > 0 && s.heads > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0 && s.head_dim > 0 && s.ffn > 0 && s.vocabulary > 0 && context > 0 && threads > 0, "sizes must be positive, and kv_heads divide heads");
            require(s.rope_half >= 0 && 2 * s.rope_half <= s.head_dim, "rope_half is at most half of head_dim");
            require(cache_bits == 16 || cache_bits == 8 || cache_bits == 4, "cache_bits is 16, 8 or 4");
            require(cache_bits == 16 || s.head_dim % Row::GROUP == 0, "heads of " + std::to_string(s.head_dim) + " channels are no multiple of 32, which a rounded cache needs");
            new (self) Decoder(s, context, threads, chosen(isa), cache_bits);
        }, "shape"_a, "context"_a, "threads"_a, "isa"_a = "", "cache_bits"_a = 16)
        .def("add_rope", [](Decoder& d, Array2<float> cosine, Array2<float> sine) {
            for (auto& table : {cosine, sine})
                require(int64_t(table.shape(0)) >= d.context() && int64_t(table.shape(1)) == d.shape().rope_half, "cosines and sines are [context, rope_half]");
            d.ropes.push_back({cosine.data(), sine.data()});
        }, "cosine"_a, "sine"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>())
        .def("set_ends", [](Decoder& d, const std::vector<Part>& embedding, const std::vector<Part>& head, Array1<float> norm) {
            const Shape& s = d.shape();
            require(embedding.size() == 1, "the embedding is one matrix");
            d.embedding = linear_of(embedding, {}, s.vocabulary, s.hidden, "embedding");
            d.head = linear_of(head, {}, s.vocabulary, s.hidden, "head");
            d.final_norm = vector_of(norm, s.hidden, "final norm");
        }, "embedding"_a, "head"_a, "norm"_a)
        .def("add_block", [](Decoder& d, nb::dict norms, const std::vector<Part>& qkv, Vector qkv_bias, const std::vector<Part>& o, Vector o_bias, const std::vector<Part>& gate_up, Vector gate_up_bias,
                             const std::vector<Part>& down, Vector down_bias, int64_t window, int rope) {
            const Shape& s = d.shape();
            Block b;
            auto norm = [&](const char* name, int64_t size) -> const float* { return norms.contains(name) ? vector_of(nb::cast<Vector>(norms[name]), size, name) : nullptr; };
            b.input_norm = norm("input", s.hidden), b.attention_norm = norm("attention", s.hidden), b.ffn_norm = norm("ffn", s.hidden), b.output_norm = norm("output", s.hidden);
            b.q_norm = norm("q", s.norm_all ? s.heads * s.head_dim : s.head_dim), b.k_norm = norm("k", s.norm_all ? s.kv_heads * s.head_dim : s.head_dim);
            require((b.q_norm == nullptr) == (b.k_norm == nullptr), "q and k have both a norm or none");
            b.qkv = linear_of(qkv, qkv_bias, (s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden, "qkv");
            b.o = linear_of(o, o_bias, s.hidden, s.heads * s.head_dim, "o");
            b.gate_up = linear_of(gate_up, gate_up_bias, 2 * s.ffn, s.hidden, "gate and up");
            b.down = linear_of(down, down_bias, s.hidden, s.ffn, "down");
            require(rope >= -1 && rope < int(d.ropes.size()) && window >= 0, "rope names a table, or is -1");
            b.window = window, b.rope = rope;
            d.blocks.push_back(b);
        }, "norms"_a, "qkv"_a, "qkv_bias"_a.none(), "o"_a, "o_bias"_a.none(), "gate_up"_a, "gate_up_bias"_a.none(), "down"_a, "down_bias"_a.none(), "window"_a, "rope"_a)
        .def("forward", [](Decoder& d, Array1<int64_t> tokens, int64_t start, Out2<float> logits, bool all, int64_t slot) {
            const int64_t n = int64_t(tokens.shape(0));
            require(slot >= 0 && slot < 1024, "slot is a number from 0 to 1023");
            require(n > 0 && start >= 0 && start + n <= d.context(), "positions are out of the context");
            require(int64_t(logits.shape(0)) == (all ? n : 1) && int64_t(logits.shape(1)) == d.shape().vocabulary, "logits are [1 or n, vocabulary]");
            require(d.final_norm != nullptr && !d.blocks.empty(), "the decoder is not complete");
            for (int64_t i = 0; i < n; i++) require(tokens.data()[i] >= 0 && tokens.data()[i] < d.shape().vocabulary, "a token is out of the vocabulary");
            nb::gil_scoped_release release;
            d.forward(tokens.data(), n, start, logits.data(), all, slot);
        }, "tokens"_a, "start"_a, "logits"_a.noconvert(), "all"_a = false, "slot"_a = 0)
        .def("forward_many", [](Decoder& d, Array1<int64_t> tokens, Array1<int64_t> positions, Array1<int64_t> slots, Out2<float> logits) {
            const int64_t n = int64_t(tokens.shape(0)), *slot = slots.data();
            require(n > 0 && int64_t(positions.shape(0)) == n && int64_t(slots.shape(0)) == n, "tokens, positions and slots are as many");
            require(int64_t(logits.shape(0)) == n && int64_t(logits.shape(1)) == d.shape().vocabulary, "logits are [n, vocabulary]");
            require(d.final_norm != nullptr && !d.blocks.empty(), "the decoder is not complete");
            for (int64_t i = 0; i < n; i++) {
                require(tokens.data()[i] >= 0 && tokens.data()[i] < d.shape().vocabulary, "a token is out of the vocabulary");
                require(positions.data()[i] >= 0 && positions.data()[i] < d.context(), "positions are out of the context");
                require(slot[i] >= 0 && slot[i] < 1024 && std::find(slot, slot + i, slot[i]) == slot + i, "slots are different numbers from 0 to 1023");
            }
            nb::gil_scoped_release release;
            d.forward_many(tokens.data(), positions.data(), slot, n, logits.data());
        }, "tokens"_a, "positions"_a, "slots"_a, "logits"_a.noconvert())
        .def_prop_ro("context", &Decoder::context)
        .def_prop_ro("cache_bytes", &Decoder::cache_bytes);
}
