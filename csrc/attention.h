// Attention over whole sequences in bfloat16, forward and backward, for calibration, evaluation and training (the decoder has its own, for one row over a cache).
#pragma once
#include <cstdint>

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

bool attention_supported();  // AVX-512 BF16
// out = softmax(scale q k^T) v and the logarithm of each row's sum, lse [batch, heads, queries].
void attention_forward(const Attention& a, Heads<const uint16_t> q, Heads<const uint16_t> k, Heads<const uint16_t> v, Heads<uint16_t> out, float* lse, int threads);
// Gradients of q, k and v; those of shared keys and values are not added up: to_k and to_v have as many heads as q.
void attention_backward(const Attention& a, Heads<const uint16_t> q, Heads<const uint16_t> k, Heads<const uint16_t> v, Heads<const uint16_t> out, const float* lse, Heads<const uint16_t> gradient,
                        Heads<uint16_t> to_q, Heads<uint16_t> to_k, Heads<uint16_t> to_v, int threads);

}  // namespace lowbit
