// The streaming operator on a CPU: raw pointers and sizes in, nothing of Python or torch.
//
// Legend: R rows, S / T student / teacher rows, K prototypes, D embedding dim, G / V teacher / student views, B images.
// Logits are base 2: l_kr = multiplier_k <w_k, x_r> + bias_k, laid out [K, R]. Equations: vmf_kernels/README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vmf::cpu {

enum class Isa { portable, avx2, avx512, avx512bf16, amx_bf16 };
enum class Products { fp32, bf16 };  // dtype of what is multiplied; sums are fp32
enum class Stored { fp32, bf16, fp16 };
enum class Norms { free, fixed, magnitude };  // w_k = v_k, v_k / ||v_k||, g_k v_k / ||v_k||

// Where and how a call runs.
struct Execution {
  Isa isa;
  Products products;
  int threads;        // at most
  double least_work;  // products per thread: no thread is woken for fewer
};

// A workspace is 64-byte aligned and has at least the bytes that score_workspace or gather_workspace say.

// Prototypes as stored.
struct Weight {
  const void* data;  // [K, D], elements of a row adjacent
  Stored stored;
  std::ptrdiff_t stride;  // elements from row to row
  int prototypes, dim;
};

// Rows of logits are padded to a multiple of this, which is a multiple of every instruction set's vector.
constexpr int ROW_PADDING = 16;
constexpr int padded_rows(int rows) { return (rows + ROW_PADDING - 1) / ROW_PADDING * ROW_PADDING; }

// Logits of a chunk of rows, [K, stride], in pieces with an equal number of prototypes: an allocator gets large pieces from the
// system anew each time, and page faults are expensive.
struct Logits {
  static constexpr int MOST_PIECES = 64;
  float* pieces[MOST_PIECES];  // 64-byte aligned; the first is null where there are no logits
  int prototypes;              // of a piece; the last may have fewer
  std::ptrdiff_t stride;       // from prototype to prototype, a multiple of ROW_PADDING
};

// Rows against one network's prototypes: their logits, and an online softmax over the prototypes.
struct Score {
  Weight weight;
  const float* bias;      // [K] nats, or null
  const float* features;  // [R, D] contiguous
  float uniform;          // the multiplier of all prototypes, which a gain multiplies unless the norms are free
  float row_factor;       // multiplies the features before the products
  int rows;
  Logits logits;  // receives padded_rows(R) columns; or none
  float* top;     // [R] max_k l
  float* mass;    // [R] sum_k 2^(l - top)
  float* moment;  // [R] sum_k 2^(l - top) (l - top)
  // The same logits with another bias in place of `bias`: their maximum and mass, from the same products. Or null.
  const float* other_bias = nullptr;  // [K] base 2
  float* other_top = nullptr;         // [R]
  float* other_mass = nullptr;        // [R]
  // Unless the norms are free, the multipliers are uniform times a gain, which is found with the norm beside the products.
  Norms norms = Norms::free;
  const float* magnitude = nullptr;  // [K] g, or null for 1
  float* norm = nullptr;             // [K] receives ||v_k||, and then gain too; or null
  float* gain = nullptr;             // [K] receives g_k / ||v_k||; 0 for a row of zeros, which has no direction
};

// From the gradient at the effective prototype to that at the stored one, equation (7).
struct PullBack {
  Norms norms;
  const float* norm;          // [K] ||v_k||
  const float* magnitude;     // [K] g, or null
  const float* slope;         // [K] slope of the bias in ||w_k||, or null without normaliser
  float* magnitude_gradient;  // [K], or null
};

// Further sums of a gathering pass over its rows, with the weights of their pairs; entropies in nats.
struct Sums {
  double student_entropy = 0, teacher_entropy = 0, weight = 0;
};

// From stored logits of both networks to the gradients: G = n p - A^T q, then dz = G W and dW = G^T z.
struct Gather {
  Weight weight;      // the student's
  const float* gain;  // [K] w_k = gain_k v_k, or null
  Logits logits;      // the student's rows, from teacher_column on the teacher's; each padded
  std::ptrdiff_t teacher_column;
  int student_rows, teacher_rows, images, student_views, teacher_views;
  const float* student_top;     // [S] from Score, and so on
  const float* student_mass;    // [S]
  const float* student_moment;  // [S]
  const float* teacher_top;     // [T]
  const float* teacher_mass;    // [T]
  const float* teacher_moment;  // [T]
  const float* view_weights;    // [G, V] a: the pair of row g B + b and row v B + b weighs a_gv r_b
  const float* image_weights;   // [B] r, or null for 1
  const float* features;        // [S, D] contiguous student rows, or null: no dW
  float scale;                  // inverse student temperature
  float* feature_gradient;      // [S, D] overwritten
  float* weight_gradient;       // [K, D] contiguous, or null
  float* bias_gradient;         // [K] beta, equation (6); added to
  float* usage;                 // [K] sum_t n_t q_t; added to
  bool first;                   // weight gradient, beta and usage are written, not added to
  const PullBack* pull_back;    // with the last chunk of rows, or null
  // Sums over the teacher rows of its other softmax, sum_t 2^(l_tk - offset_t), as a maximum to which the chunks add, and a
  // mass relative to it; or null. l has the target's bias: the caller adds other_bias - bias to the logarithm.
  const float* other_top = nullptr;   // [T] from Score
  const float* other_mass = nullptr;  // [T]
  float* column_top = nullptr;        // [K]
  float* column_mass = nullptr;       // [K]
};

// Whether the pairs of a gathering pass are folded as a product of all rows. With one image every teacher row may be paired
// with every student row (pairs without weight have coefficient 0), and from so many teacher views on a product is faster than
// a step for each of them (bench/LOG.md).
constexpr int VIEWS_OF_A_PRODUCT = 8;
__attribute__((always_inline)) inline bool folds_by_product(const Gather& g) {  // no copy of one instruction set for all
  return g.images == 1 && g.teacher_views >= VIEWS_OF_A_PRODUCT && g.student_rows > 0;
}

// Instruction sets this machine can run, the best last.
//
// The first call asks Linux for the registers of a matrix unit, if there is one. What is granted holds for the whole process;
// from then on a thread's alternate signal stack must have room for them. If Linux refuses, the matrix unit counts as absent.
std::vector<Isa> available();
const char* name_of(Isa);
Isa isa_named(const std::string&);

std::size_t score_workspace(const Score&, const Execution&);
void score(const Score&, const Execution&, void* workspace);
std::size_t gather_workspace(const Gather&, const Execution&);
Sums gather(const Gather&, const Execution&, void* workspace);

// Both networks' scores and the gathering pass in one call: logits are stored where `gather` expects them; the student's norms
// and gains and the sums over the prototypes stay in the workspace. Only if this rank has all prototypes; otherwise ranks merge
// the sums in between.
std::size_t step_workspace(const Score& student, const Score& teacher, const Gather&, const Execution&);
Sums step(Score student, Score teacher, Gather gather, const Execution&, void* workspace);

// The logits that a score has stored, for sums with other biases and offsets than its own.
struct StoredLogits {
  Logits logits;
  int prototypes, rows;
};
std::size_t stored_workspace(const StoredLogits&, const Execution&);
// [R] result_r = log2 sum_k 2^(l_kr + bias_k); bias may be null.
void sum_over_prototypes(const StoredLogits&, const float* bias, float* result, const Execution&, void* workspace);
// [K] result_k = log2 sum_r 2^(l_kr - offset_r).
void sum_over_rows(const StoredLogits&, const float* offset, float* result, const Execution&, void* workspace);

// sum_i a_i b_i in fp64, in one order.
double dot(const float* a, const float* b, std::size_t count);

}  // namespace vmf::cpu
