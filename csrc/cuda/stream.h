// The streaming passes for Hopper: raw pointers and sizes in, nothing of Python or torch.
//
// Legend: R rows, K prototypes, D embedding dim, N splits of the prototypes. Logits are base 2:
// l_rk = log2(e) / temperature <x_r, w_k> + bias_k. Matrices are row-major and contiguous, every pointer 16-byte aligned.
// Equations: vmf_kernels/README.md.
#pragma once

#include <cuda_runtime_api.h>

namespace vmf::cuda {

enum class Element { bf16, fp16 };

// [R] rows against [K] prototypes, equation (2), in N parts that are merged afterwards in their order.
struct RowPass {
  Element element;
  int width;                  // D padded: 64, 128, 192, 256 or 384
  int rows;                   // R, a multiple of row_tile()
  int prototypes;             // K padded to a multiple of 256
  int splits, split_size;     // N parts of split_size prototypes each, of which the last may be short or empty
  const void* features;       // [R, width]
  const void* keys;           // [K, width]
  const void* values;         // [K, width]; == keys: one tile serves both products; nullptr: no barycentre
  const float* bias;          // [K] base 2, finite; the padding's is lower than any
  const float* value_bias;    // [K] base 2, or nullptr: the summed value bias is then 0; only where values are own
  const double* temperature;  // [] on the device
  float* statistics;          // [4, N, R] running maximum, mass, first moment, summed value bias
  float* barycentre;          // [N, R, width] unnormalised, or nullptr where values are
  int blocks_in_cluster = 1;  // 1, or 2: see below
};

// Both networks' rows against the prototypes, equations (5) and (6): one block of threads owns a block of prototypes.
struct ColumnPass {
  Element element;
  int width, prototypes;           // as in RowPass
  int prototype_count, dim;        // K, D without padding
  int student_rows, teacher_rows;  // multiples of row_tile()
  const void *student_keys, *student_features, *teacher_keys, *teacher_features, *cotangents;
  const float *student_bias, *teacher_bias;      // [K padded] base 2
  const float *student_offset, *teacher_offset;  // [R] base 2: 2^(l - offset) = unit n p; +inf for no weight
  const double *student_temperature, *teacher_temperature;
  const float *unit, *total;  // [] on the device: power of two of the offsets; sum of the teacher rows' weights
  float* vectors;             // [K, D], or nullptr: then only the usage, and nothing of the student is read
  float* bias_gradient;       // [K] beta, or nullptr
  float* usage;               // [K] sum_t n_t q_t / total
  int blocks_in_cluster = 1;  // 1, or 2: see below
};

// blocks_in_cluster 2: two blocks of threads at a time stream keys and values together, and each reads half of them. The
// results are the same to the bit. Blocks run alone all the same at width 64, where nothing is summed but weights, and where
// the row pass has an odd number of blocks: to pad R further would cost more than sharing saves.

// What R is padded to.
int row_tile();

// What split_size is a multiple of.
int prototype_tile(int width, bool own_values);

// How many blocks share the columns of one block of rows' barycentre.
int column_parts(int width);

// Launch on the stream of the current device. cudaErrorNotSupported: this build has no code for the device;
// cudaErrorInvalidValue: sizes or alignment that the comments above exclude.
cudaError_t row_pass(const RowPass&, cudaStream_t);
cudaError_t column_pass(const ColumnPass&, cudaStream_t);

}  // namespace vmf::cuda
