#include "decoder.h"

#include "bf16.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace lowbit {

constexpr int64_t MANY = 8;  // tokens from which on attention goes by blocks of queries

bool takes_bf16(const Kernels* kernels, const Dense& w, int64_t m) {
    return m >= MANY && w.type == Real::bf16 && w.cols % 32 == 0 && std::strcmp(kernels->name, "avx512") == 0 && bf16_supported();
}

struct Decoder::Scratch {
    std::vector<uint8_t> panel;
    std::vector<float> scores;
};

struct Decoder::Worker {
    int id, count;
    Scratch& scratch;
    // This thread's share of n things, in pieces of unit.
    std::pair<int64_t, int64_t> share(int64_t n, int64_t unit = 1) const {
        const int64_t pieces = (n + unit - 1) / unit;
        return {std::min(n, pieces * id / count * unit), std::min(n, pieces * (id + 1) / count * unit)};
    }
};

Decoder::Decoder(const Shape& shape, int64_t context, int threads, const Kernels* kernels, int cache_bits)
    : shape_(shape), context_(context), threads_(threads), k_(kernels), row_{cache_bits, shape.head_dim} {}

int64_t Decoder::cache_bytes() const { return int64_t(blocks.size()) * 2 * shape_.kv_heads * context_ * row_.bytes(); }

void Decoder::open(int64_t slot) {
    if (int64_t(caches_.size()) <= slot) caches_.resize(size_t(slot + 1));
    Cache& cache = caches_[size_t(slot)];
    while (cache.keys.size() < blocks.size()) {
        cache.keys.push_back(allocate(shape_.kv_heads * context_ * row_.bytes()));
        cache.values.push_back(allocate(shape_.kv_heads * context_ * row_.bytes()));
    }
}

// Room for so many tokens at once, of texts of at most this length.
void Decoder::prepare(int64_t rows, int64_t length) {
    const Shape& s = shape_;
    const int64_t wide = std::max({s.hidden, s.heads * s.head_dim, s.ffn});
    const int64_t qkv = (s.heads + 2 * s.kv_heads) * s.head_dim;
    auto grow = [](auto& buffer, int64_t size) { if (int64_t(buffer.size()) < size) buffer.resize(size_t(size)); };
    grow(x_, rows * s.hidden), grow(qkv_, rows * qkv), grow(attended_, rows * s.heads * s.head_dim), grow(hidden_, rows * 2 * s.ffn), grow(normed_, rows * s.hidden);
    grow(codes_, rows * wide), grow(halves_, rows >= MANY && bf16_supported() ? rows * wide : 0), grow(scales_, rows * wide / 8), grow(sums_, rows * wide / 8);
    while (int(scratch_.size()) < threads_) scratch_.push_back(std::make_shared<Scratch>());
    for (auto& scratch : scratch_) grow(scratch->panel, std::max(panel_bytes(rows), dense_scratch(wide, rows))), grow(scratch->scores, std::max(length, attend_scratch(s.head_dim)));
}

void Decoder::forward(const int64_t* tokens, int64_t n, int64_t start, float* logits, bool all, int64_t slot) {
    open(slot);
    prepare(std::min(n, CHUNK), start + n);
    for (int64_t done = 0; done < n; done += CHUNK) {
        const int64_t count = std::min(CHUNK, n - done);
        chunk({tokens + done, count, start + done, slot}, all ? logits + done * shape_.vocabulary : logits, done + count == n, all);
    }
}

void Decoder::forward_many(const int64_t* tokens, const int64_t* positions, const int64_t* slots, int64_t n, float* logits) {
    for (int64_t i = 0; i < n; i++) open(slots[i]);
    prepare(std::min(n, CHUNK), *std::max_element(positions, positions + n) + 1);
    for (int64_t done = 0; done < n; done += CHUNK)
        chunk({tokens + done, std::min(CHUNK, n - done), 0, 0, positions + done, slots + done}, logits + done * shape_.vocabulary, true, true);
}

// y = x W^T (+ bias), or y += it. All threads take part; the outputs are whole after the barrier at the end.
void Decoder::linear(Worker& w, const Linear& of, const float* x, int64_t stride, int64_t n, float* y, int64_t y_stride, bool add) {
    int64_t offset = 0, rounded = 0;
    const int32_t* order = nullptr;
    bool halved = false;
    for (const Linear::Part& part : of.parts) {
        if (part.packed) {
            Inputs in{part.matrix.cols, part.matrix.block, codes_.data(), scales_.data(), sums_.data()};
            if (rounded != in.block || order != part.matrix.order) {
                if (rounded) barrier_.wait(w.count);  // the others may still read
                const int64_t blocks = in.cols / in.block;
                order = part.matrix.order;
                if (n >= w.count) {
                    auto [first, last] = w.share(n);
                    k_->round(x + first * stride, stride, last - first, {in.cols, in.block, in.codes + first * in.cols, in.scales + first * blocks, in.sums + first * blocks, order});
                } else {
                    auto [first, last] = w.share(blocks);
                    const int64_t column = first * in.block;
                    for (int64_t i = 0; i < n; i++)
                        k_->round(x + i * stride + (order ? 0 : column), 0, 1,
                                  {(last - first) * in.block, in.block, in.codes + i * in.cols + column, in.scales + i * blocks + first, in.sums + i * blocks + first, order ? order + column : nullptr});
                }
                rounded = in.block;
                barrier_.wait(w.count);
            }
            auto [first, last] = w.share(part.matrix.tiles(), 4);
            k_->matmul(part.matrix, in, n, y + offset, y_stride, add, first, last, w.scratch.panel.data());
        } else if (takes_bf16(k_, part.dense, n)) {
            auto [from, to] = w.share(n);
            if (!halved) {
                for (int64_t i = from; i < to; i++) to_bf16(x + i * stride, halves_.data() + i * part.dense.cols, part.dense.cols);
                halved = true;
                barrier_.wait(w.count);
            }
            auto [first, last] = w.share(part.dense.rows, 64);
            dense_bf16(part.dense, halves_.data(), n, y + offset, y_stride, add, first, last, w.scratch.panel.data());
        } else {
            auto [first, last] = w.share(part.dense.rows, 16);
            k_->dense(part.dense, x, stride, n, y + offset, y_stride, add, first, last);
        }
        offset += part.rows();
    }
    barrier_.wait(w.count);
    if (of.bias) {
        auto [first, last] = w.share(n);
        for (int64_t i = first; i < last; i++)
            for (int64_t r = 0; r < offset; r++) y[i * y_stride + r] += of.bias[r];
        barrier_.wait(w.count);
    }
}

void Decoder::attention(Worker& w, const Block& block, int64_t index, const Step& step) {
    const Shape& s = shape_;
    const int64_t n = step.n, d = s.head_dim, width = (s.heads + 2 * s.kv_heads) * d, group = s.heads / s.kv_heads;
    auto keys = [&](int64_t i) { return caches_[size_t(step.text(i))].keys[size_t(index)].get(); };
    auto values = [&](int64_t i) { return caches_[size_t(step.text(i))].values[size_t(index)].get(); };
    if (block.q_norm && s.norm_all) {
        auto [first, last] = w.share(n);
        for (int64_t i = first; i < last; i++) {
            float* q = qkv_.data() + i * width;
            k_->rms_norm(q, block.q_norm, s.eps, s.heads * d, q);
            k_->rms_norm(q + s.heads * d, block.k_norm, s.eps, s.kv_heads * d, q + s.heads * d);
        }
        barrier_.wait(w.count);
    }
    auto prepare = [&](float* head, const float* norm, int64_t i) {
        if (norm && !s.norm_all) k_->rms_norm(head, norm, s.eps, d, head);
        if (block.rope >= 0) k_->rope(head, ropes[size_t(block.rope)].cosine + step.position(i) * s.rope_half, ropes[size_t(block.rope)].sine + step.position(i) * s.rope_half, s.rope_half);
    };
    auto [first, last] = w.share(n * s.kv_heads);
    for (int64_t job = first; job < last; job++) {  // keys and values go into the cache
        const int64_t i = job / s.kv_heads, h = job % s.kv_heads, place = (h * context_ + step.position(i)) * row_.bytes();
        float* key = qkv_.data() + i * width + (s.heads + h) * d;
        prepare(key, block.k_norm, i);
        k_->keep(key, row_, keys(i) + place);
        k_->keep(key + s.kv_heads * d, row_, values(i) + place);
    }
    if (n >= MANY && d % 16 == 0 && !step.positions) {
        auto [from, to] = w.share(n * s.heads);
        for (int64_t job = from; job < to; job++) prepare(qkv_.data() + job / s.heads * width + job % s.heads * d, block.q_norm, job / s.heads);
        barrier_.wait(w.count);
        // Late tokens see more than early ones: every thread takes each count-th piece.
        for (int64_t job = w.id; job < (n + QUERIES - 1) / QUERIES * s.heads; job += w.count) {
            const int64_t i = job / s.heads * QUERIES, h = job % s.heads, place = h / group * context_ * row_.bytes();
            k_->attend_many(qkv_.data() + i * width + h * d, width, std::min(QUERIES, n - i), step.position(i), block.window, keys(i) + place, values(i) + place, row_, s.attention_scale, s.attention_cap,
                            w.scratch.scores.data(), attended_.data() + i * s.heads * d + h * d, s.heads * d);
        }
        barrier_.wait(w.count);
        return;
    }
    barrier_.wait(w.count);
    for (int64_t job = w.id; job < n * s.heads; job += w.count) {
        const int64_t i = job / s.heads, h = job % s.heads, position = step.position(i);
        const int64_t from = block.window > 0 ? std::max<int64_t>(0, position - block.window + 1) : 0;
        float* q = qkv_.data() + i * width + h * d;
        prepare(q, block.q_norm, i);
        const int64_t place = (h / group * context_ + from) * row_.bytes();
        k_->attend(q, keys(i) + place, values(i) + place, position + 1 - from, row_, s.attention_scale, s.attention_cap, w.scratch.scores.data(), attended_.data() + i * s.heads * d + h * d);
    }
    barrier_.wait(w.count);
}

void Decoder::layer(Worker& w, const Block& block, int64_t index, const Step& step) {
    const Shape& s = shape_;
    const int64_t n = step.n, h = s.hidden;
    auto normed = [&](const float* norm, const float* x, float* y) {
        auto [first, last] = w.share(n);
        for (int64_t i = first; i < last; i++) k_->rms_norm(x + i * h, norm, s.eps, h, y + i * h);
        barrier_.wait(w.count);
    };
    auto added = [&](const float* norm) {  // x += residual_scale * norm(what lies in normed_)
        auto [first, last] = w.share(n);
        for (int64_t i = first; i < last; i++) {
            float* y = normed_.data() + i * h;
            if (norm) k_->rms_norm(y, norm, s.eps, h, y);
            for (int64_t k = 0; k < h; k++) x_[size_t(i * h + k)] += s.residual_scale * y[k];
        }
        barrier_.wait(w.count);
    };
    auto output = [&](const Linear& of, const float* x, int64_t stride, const float* norm) {
        const bool direct = !norm && s.residual_scale == 1 && !of.bias;
        linear(w, of, x, stride, n, direct ? x_.data() : normed_.data(), h, direct);
        if (!direct) added(norm);
    };
    const float* x = x_.data();
    if (block.input_norm) normed(block.input_norm, x, normed_.data()), x = normed_.data();
    linear(w, block.qkv, x, h, n, qkv_.data(), (s.heads + 2 * s.kv_heads) * s.head_dim, false);
    attention(w, block, index, step);
    output(block.o, attended_.data(), s.heads * s.head_dim, block.attention_norm);
    x = x_.data();
    if (block.ffn_norm) normed(block.ffn_norm, x, normed_.data()), x = normed_.data();
    linear(w, block.gate_up, x, h, n, hidden_.data(), 2 * s.ffn, false);
    for (int64_t i = 0; i < n; i++) {
        auto [first, last] = w.share(s.ffn, 16);
        float* row = hidden_.data() + i * 2 * s.ffn;
        k_->gate(row + first, row + s.ffn + first, last - first, s.activation);
    }
    barrier_.wait(w.count);
    output(block.down, hidden_.data(), 2 * s.ffn, block.output_norm);
}

void Decoder::chunk(const Step& step, float* logits, bool last, bool all) {
    const Shape& s = shape_;
    const int64_t n = step.n, *tokens = step.tokens;
    parallel(threads_, [&](int id, int count) {
        Worker w{id, count, *scratch_[size_t(id)]};
        const Linear::Part& table = embedding.parts[0];
        auto [first, end] = w.share(n);
        for (int64_t i = first; i < end; i++) {
            float* x = x_.data() + i * s.hidden;
            if (table.packed) {
                unpack_row(table.matrix, tokens[i], x);
            } else if (table.dense.type == Real::f32) {
                std::memcpy(x, static_cast<const float*>(table.dense.data) + tokens[i] * s.hidden, size_t(s.hidden) * 4);
            } else {
                const uint16_t* row = static_cast<const uint16_t*>(table.dense.data) + tokens[i] * s.hidden;
                for (int64_t k = 0; k < s.hidden; k++) x[k] = to_float(row[k], table.dense.type);
            }
            if (s.embedding_scale != 1)
                for (int64_t k = 0; k < s.hidden; k++) x[k] *= s.embedding_scale;
        }
        barrier_.wait(count);
        for (size_t b = 0; b < blocks.size(); b++) layer(w, blocks[b], int64_t(b), step);
        if (!last && !all) return;
        const int64_t from = all ? 0 : n - 1, rows = n - from;
        auto [f, l] = w.share(rows);
        for (int64_t i = f; i < l; i++) k_->rms_norm(x_.data() + (from + i) * s.hidden, final_norm, s.eps, s.hidden, normed_.data() + i * s.hidden);
        barrier_.wait(count);
        linear(w, head, normed_.data(), s.hidden, rows, logits, s.vocabulary, false);
        if (s.logit_cap > 0 || s.logit_scale != 1) {
            auto [a, b] = w.share(rows * s.vocabulary);
            for (int64_t i = a; i < b; i++) logits[i] = s.logit_cap > 0 ? s.logit_cap * std::tanh(logits[i] * s.logit_scale / s.logit_cap) : logits[i] * s.logit_scale;
            barrier_.wait(count);
        }
    });
}

}  // namespace lowbit
