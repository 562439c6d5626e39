// Preparation of the prototypes and its backward, each one pass over the weights: equations (1) and (7) of
// vmf_kernels/README.md. The results are those of prototype_kernels.py of the Triton backend, up to rounding.
//
// Legend: K prototypes, D embedding dim.
#pragma once

#include <cuda_runtime_api.h>
#include <cstdint>

#include "stream.h"

namespace vmf::cuda {

enum class Stored { fp32, bf16, fp16 };
enum class Kind { linear, normalized, weight_norm };

constexpr int MOST_DIMS = 1024;
constexpr int PAD_TO = 256;  // prototypes, with their padding, are a multiple of this

// The uniform expansion of log C_D and A_D in fp32 (vmf_kernels/bessel.py): its order, how many steps of the recurrence
// lead from there down to D/2 - 1, and the coefficients of t^0, t^1, ...
struct Expansion {
  static constexpr int COEFFICIENT_COUNT = 9, SLOPE_COUNT = 10;  // of three terms
  float order;
  int steps;
  float coefficients[COEFFICIENT_COUNT];
  float slopes[SLOPE_COUNT];
};

struct StoredPrototypes {
  Stored stored;
  Kind kind;
  int count, dim;             // K, D <= most_dims
  std::int64_t stride;        // elements between rows of the weight
  const void* weight;         // [K, D]
  const float* magnitude;     // [K], or nullptr where the kind is not weight_norm
  const double* temperature;  // [] on the device, or nullptr: no normaliser
  Expansion expansion;        // read where there is a normaliser
};

struct Packing {
  StoredPrototypes prototypes;
  Element element;
  int width, padded;        // D and K with their padding: multiples of 64 and of pad_to
  float lowest_bias;        // nats; a bias below it becomes it, the padding's is twice it
  const float* extra_bias;  // [K] nats, or nullptr
  void* packed;             // [padded, width] effective prototypes, 0 in the padding
  float* bias;              // [padded] log2(e) (extra bias + log C_D(||w_k||/tau))
  float* norm;              // [padded] what kappa is formed from, for biases to come, or nullptr
};

struct PullBack {
  StoredPrototypes prototypes;
  const float* bias_gradient;  // [K], read where there is a normaliser
  float* gradient;             // [K, D] at w_k, 16-byte aligned; becomes that at the weight
  float* magnitude_gradient;   // [K], or nullptr where the kind is not weight_norm
};

// One network, or two with the same K, D, element and padding: one launch where their weights have one dtype and alignment.
constexpr int MOST_NETWORKS = 2;
cudaError_t pack_prototypes(const Packing* networks, int count, cudaStream_t stream);
cudaError_t pull_back(const PullBack& pull_back, cudaStream_t stream);

}  // namespace vmf::cuda
