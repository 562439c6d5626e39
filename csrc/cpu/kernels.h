// The functions that are compiled once per instruction set, as a table; operator.cpp splits the prototypes and calls them.
#pragma once

#include "operator.h"

namespace vmf::cpu {

// One thread's memory and range of prototypes, and the data that all threads read.
struct ScoreTask {
  const Score* score;
  const void* panels;  // features, from pack_features
  float* multiplier;   // [K] of all prototypes; a task writes its own unless the norms are free
  void* scratch;       // of score_scratch bytes, this thread's own
  float* statistics;   // [3 or 6, padded rows] top, mass, moment over the task's prototypes; then those with the other bias
  int first, last;     // prototypes
};
__attribute__((always_inline)) constexpr int statistics_of(const Score& s) { return s.other_bias ? 6 : 3; }
struct GatherTask {
  const Gather* gather;
  const void* panels;           // student features, from pack_values; null without dW
  const float* student_top;     // [padded S], +inf beyond S: rows of padding have weight 0
  const float* student_factor;  // [padded S], 0 beyond
  const float* teacher_top;     // [padded T], +inf beyond
  const float* teacher_factor;  // [padded T], 0 beyond
  const float* coefficient;     // [G, padded S], 0 beyond; packed by pack_coefficients if pairs are folded as a product
  const float* column_offset;   // [padded T] base-2 log-sum-exps with the other bias, +inf beyond; null without column sums
  void* scratch;                // of gather_scratch bytes, this thread's own
  float* feature_gradient;      // [padded S, padded D] over the task's prototypes
  int first, last;              // prototypes
};

struct StoredTask {
  const StoredLogits* stored;
  const float* bias;    // [K] base 2, or null
  float* statistics;    // [3, padded rows] top, mass, moment over the task's prototypes
  const float* offset;  // [padded R] base 2, +inf beyond R
  float* result;        // [K]
  int first, last;      // prototypes
};

struct Kernels {
  int lanes;
  // [R, D] -> panels [row tile][words of D][rows of the tile], as the logits' product reads them
  void (*pack_features)(const float* rows, int count, int dim, void* panels);
  std::size_t (*features_bytes)(int count, int dim);
  // [R, D] -> panels [column tile][words of R][columns of the tile], as the product of dW reads them
  void (*pack_values)(const float* rows, int count, int dim, void* panels);
  std::size_t (*values_bytes)(int count, int dim);
  // [G, padded S] -> fp32 panels [column tile][G][columns of the tile], as the product of pairs reads them
  void (*pack_coefficients)(const float* rows, int count, int columns, float* panels);
  std::size_t (*score_scratch)(const Score&);
  void (*score)(const ScoreTask&);
  std::size_t (*gather_scratch)(const Gather&);
  void (*gather)(const GatherTask&);
  void (*over_prototypes)(const StoredTask&);  // writes statistics
  void (*over_rows)(const StoredTask&);        // writes the result
};

// By dtype of the products; members are null if an instruction set has no functions of its own.
const Kernels* portable_kernels(Products);
const Kernels* avx2_kernels(Products);
const Kernels* avx512_kernels(Products);
const Kernels* avx512bf16_kernels(Products);
const Kernels* amx_bf16_kernels(Products);

}  // namespace vmf::cpu
