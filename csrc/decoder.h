// A whole language model of the Llama kind: norms, attention with rotary positions, a gated feed-forward network; one description for its families.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "matrix.h"
#include "threads.h"

namespace lowbit {

// One or several matrices with the same input, whose outputs lie one after the other.
struct Linear {
    struct Part {
        bool packed = false;
        Matrix matrix;
        Dense dense;
        int64_t rows() const { return packed ? matrix.rows : dense.rows; }
    };
    std::vector<Part> parts;
    const float* bias = nullptr;
    int64_t rows() const {
        int64_t n = 0;
        for (const Part& part : parts) n += part.rows();
        return n;
    }
};

struct Block {
    const float *input_norm = nullptr, *attention_norm = nullptr;  // before attention; after it (Gemma, OLMo 2), on its output
    const float *ffn_norm = nullptr, *output_norm = nullptr;       // before and after the feed-forward network
    const float *q_norm = nullptr, *k_norm = nullptr;              // of each head, or with norm_all of all heads together
    Linear qkv, o, gate_up, down;
    int64_t window = 0;  // tokens that attention looks back, 0: all
    int rope = 0;        // which table of cosines and sines; -1: none
};

struct Shape {
    int64_t hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, ffn = 0, vocabulary = 0;
    float eps = 1e-5f, attention_scale = 0, attention_cap = 0, logit_cap = 0, embedding_scale = 1, residual_scale = 1, logit_scale = 1;
    int activation = 0;     // 0: SiLU, 1: GELU by tanh
    bool norm_all = false;  // q_norm and k_norm over all heads together
    int64_t rope_half = 0;  // pairs that are turned
};

// Whether rows of bfloat16 weights are multiplied with m rows of inputs in bfloat16.
bool takes_bf16(const Kernels* kernels, const Dense& w, int64_t m);

class Decoder {
  public:
    // cache_bits: of a number of the cache, 16, 8 or 4.
    Decoder(const Shape& shape, int64_t context, int threads, const Kernels* kernels, int cache_bits);

    std::vector<Block> blocks;
    const float* final_norm = nullptr;
    Linear embedding, head;  // embedding: one part, read by rows
    struct Table {
        const float *cosine, *sine;  // [context][rope_half]
    };
    std::vector<Table> ropes;

    // The tokens at positions start, start + 1, ... of one text; logits of the last, or of every one with all: [1 or n][vocabulary]. Texts (slot 0, 1, ...) have a cache each.
    void forward(const int64_t* tokens, int64_t n, int64_t start, float* logits, bool all, int64_t slot);
    // One token each of n texts, at their own positions; logits [n][vocabulary]. The slots differ.
    void forward_many(const int64_t* tokens, const int64_t* positions, const int64_t* slots, int64_t n, float* logits);
    int64_t context() const { return context_; }
    int64_t cache_bytes() const;
    const Shape& shape() const { return shape_; }

    static constexpr int64_t CHUNK = 256;  // tokens at once

  private:
    struct Worker;
    // Tokens that are computed together: of one text from position start on, or each of a text of its own.
    struct Step {
        const int64_t* tokens;
        int64_t n, start = 0, slot = 0;
        const int64_t *positions = nullptr, *slots = nullptr;
        int64_t position(int64_t i) const { return positions ? positions[i] : start + i; }
        int64_t text(int64_t i) const { return slots ? slots[i] : slot; }
    };
    void prepare(int64_t rows, int64_t length);
    void open(int64_t slot);
    void chunk(const Step& step, float* logits, bool last, bool all);
    void layer(Worker& w, const Block& block, int64_t index, const Step& step);
    void attention(Worker& w, const Block& block, int64_t index, const Step& step);
    void linear(Worker& w, const Linear& of, const float* x, int64_t stride, int64_t n, float* y, int64_t y_stride, bool add);

    Shape shape_;
    int64_t context_;
    int threads_;
    const Kernels* k_;
    Row row_;
    Barrier barrier_;
    struct Cache {
        std::vector<Memory> keys, values;  // of each block, [kv head][context] rows
    };
    std::vector<Cache> caches_;
    std::vector<float> x_, qkv_, attended_, hidden_, normed_;
    struct Scratch;
    std::vector<std::shared_ptr<Scratch>> scratch_;
    std::vector<int8_t> codes_;
    std::vector<uint16_t> halves_;
    std::vector<float> scales_, sums_;
};

}  // namespace lowbit
