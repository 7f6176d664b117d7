// Products of bfloat16 (AVX-512 BF16): attention over whole sequences, forward and backward, for calibration, evaluation and training (the decoder has its own, over a cache), and dense weights
// times many rows of inputs.
#pragma once
#include <cstdint>

#include "layout.h"

namespace lowbit {

// [batch, heads, length, dim], dim contiguous.
template <class T>
struct Heads {
    T* data;
    int64_t batch, head, row;  // strides, in numbers
    T* at(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

struct Attention {
    int64_t batch, heads, groups, queries, keys, dim;  // groups: heads that share keys and values
    float scale;
    bool causal;  // query i sees keys 0 to i; queries equals keys
};

constexpr int64_t LARGEST_DIM = 256;

bool bf16_supported();  // by this build and this processor
// out = softmax(scale q k^T) v and the logarithm of each row's sum, lse [batch, heads, queries].
void attention_forward(const Attention& a, Heads<const uint16_t> q, Heads<const uint16_t> k, Heads<const uint16_t> v, Heads<uint16_t> out, float* lse, int threads);
// Gradients of q, k and v; those of shared keys and values are not added up: to_k and to_v have as many heads as q.
void attention_backward(const Attention& a, Heads<const uint16_t> q, Heads<const uint16_t> k, Heads<const uint16_t> v, Heads<const uint16_t> out, const float* lse, Heads<const uint16_t> gradient,
                        Heads<uint16_t> to_q, Heads<uint16_t> to_k, Heads<uint16_t> to_v, int threads);

// y[i][row] = (add ? y : 0) + sum_k W[row][k] x[i][k] for the rows first to last (first a multiple of 64) of bfloat16 weights and inputs x [m][cols]; cols is a multiple of 32.
// scratch: dense_scratch(cols, m) bytes.
void dense_bf16(const Dense& w, const uint16_t* x, int64_t m, float* y, int64_t stride, bool add, int64_t first, int64_t last, uint8_t* scratch);
int64_t dense_scratch(int64_t cols, int64_t m);
void to_bf16(const float* x, uint16_t* y, int64_t n);  // n is a multiple of 16

}  // namespace lowbit
