// One warp holds a prototype in registers, spread over its lanes: the norm is known before anything is written, and every
// byte moves once. Rows whose alignment permits it move in 16-byte pieces, others element by element.
#include "prototypes.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace vmf::cuda {
namespace {

constexpr int LANES = 32;
constexpr int WARPS = 8;  // of a block
constexpr int BLOCK_THREADS = WARPS * LANES;
constexpr int PACKED_BY_A_WARP = 8;  // prototypes, one after the other; then each has a lane of its own for its normaliser
static_assert(PAD_TO % (WARPS * PACKED_BY_A_WARP) == 0, "a block writes no row beyond the padding");

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LARGEST = 1e18f;  // of kappa/nu: its square stays finite, and the expansion is linear long before

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ float from_float(float x) {
  return x;
}
template <>
__device__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __half from_float(float x) {
  return __float2half_rn(x);
}

// What a lane has side by side; fp32 beside 16-bit weights takes two loads.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Piece {
  T at[N];
};

// A row of [., D] over the lanes of a warp: lane l has N columns from (c lanes + l) N on for each chunk c, 0 from D on.
template <int N, int CHUNKS>
struct Row {
  float at[CHUNKS][N];

  static __device__ int column(int chunk) { return (chunk * LANES + threadIdx.x % LANES) * N; }

  template <class T>
  __device__ void load(const T* p_row, int dim) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      Piece<T, N> b_piece{};
      if (column(c) < dim) b_piece = *reinterpret_cast<const Piece<T, N>*>(p_row + column(c));
#pragma unroll
      for (int n = 0; n < N; ++n) at[c][n] = to_float(b_piece.at[n]);
    }
  }

  template <class T>
  __device__ void store(T* p_row, int width) const {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      Piece<T, N> b_piece;
#pragma unroll
      for (int n = 0; n < N; ++n) b_piece.at[n] = from_float<T>(at[c][n]);
      if (column(c) < width) *reinterpret_cast<Piece<T, N>*>(p_row + column(c)) = b_piece;
    }
  }

  // a this + b other
  __device__ void combine(float a, const Row& other, float b) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int n = 0; n < N; ++n) at[c][n] = a * at[c][n] + b * other.at[c][n];
  }

  __device__ void scale(float factor) {
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int n = 0; n < N; ++n) at[c][n] *= factor;
  }

  // Inner product over D, fp32, the same in every lane; its order of additions is fixed.
  __device__ float dot(const Row& other) const {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int n = 0; n < N; ++n) sum = fmaf(at[c][n], other.at[c][n], sum);
#pragma unroll
    for (int distance = LANES / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    return sum;
  }
};

template <int COUNT>
__device__ float polynomial(float t, const float (&coefficients)[COUNT]) {
  float value = coefficients[COUNT - 1];
#pragma unroll
  for (int i = COUNT - 2; i >= 0; --i) value = value * t + coefficients[i];
  return value;
}

// z = kappa/nu within the range of the expansion; NaN stays NaN, which fminf would hide.
__device__ float relative_concentration(float kappa, float order) {
  const float z = kappa / order;
  return z > LARGEST ? LARGEST : z;
}

// log C(kappa) - log C(0) by the uniform expansion.
__device__ float debye_log_constant(float kappa, const Expansion& e) {
  const float z = relative_concentration(kappa, e.order);
  const float s = sqrtf(1 + z * z);
  const float d = z * (z / (1 + s));
  return e.order * (log1pf(d / 2) - d) + log1pf(d) / 2 + (d / s) * polynomial(1 / s, e.coefficients);
}

// I_{nu+1}/I_nu by the uniform expansion.
__device__ float debye_ratio(float kappa, const Expansion& e) {
  const float z = relative_concentration(kappa, e.order);
  const float s = sqrtf(1 + z * z);
  const float t = 1 / s;
  return z / (1 + s) - (z * t) * t * (polynomial(t, e.slopes) / e.order);
}

// log C_D(kappa) - log C_D(0), nats: the expansion, then the recurrence down to D/2 - 1.
__device__ float log_vmf_constant(float kappa, const Expansion& e) {
  float log_constant = debye_log_constant(kappa, e);
  if (e.steps == 0) return log_constant;
  float ratio = debye_ratio(kappa, e);
  for (int step = 0; step < e.steps; ++step) {
    const float scaled = kappa * ratio, twice = 2 * (e.order - step);
    log_constant -= log1pf(scaled / twice);
    ratio = kappa / (twice + scaled);
  }
  return log_constant;
}

// A_D(kappa), minus the slope of log_vmf_constant.
__device__ float mean_resultant_length(float kappa, const Expansion& e) {
  float ratio = debye_ratio(kappa, e);
  for (int step = 0; step < e.steps; ++step) ratio = kappa / (2 * (e.order - step) + kappa * ratio);
  return ratio;
}

// A zero row has no direction: it stays zero and gets no gradient.
__device__ float reciprocal_or_zero(float norm) { return norm > 0 ? 1 / norm : 0; }

__device__ float inverse_temperature(const StoredPrototypes& prototypes) {
  return 1 / static_cast<float>(*prototypes.temperature);
}

// Base-2 bias of prototype i_k, whose effective norm is given.
__device__ float bias_of(const Packing& packing, int i_k, float norm) {
  const StoredPrototypes& prototypes = packing.prototypes;
  if (i_k >= prototypes.count) return 2 * packing.lowest_bias * LOG2_E;  // weighs nothing beside one that is left out
  float bias = packing.extra_bias == nullptr ? 0 : packing.extra_bias[i_k];
  if (prototypes.temperature != nullptr) bias += log_vmf_constant(norm * inverse_temperature(prototypes), prototypes.expansion);
  return (bias < packing.lowest_bias ? packing.lowest_bias : bias) * LOG2_E;  // not fmaxf, which would hide a NaN
}

struct Networks {
  Packing network[MOST_NETWORKS];
};

// Prototypes as stored -> as the passes read them: effective, cast, padded with zeros, and their bias. Grid (blocks of
// prototypes, networks).
template <class Weight, class Packed, int N, int CHUNKS>
__global__ void __launch_bounds__(BLOCK_THREADS) pack_prototypes_kernel(const __grid_constant__ Networks networks) {
  // not by an index, which takes a stack on some parts
  const Packing& packing = blockIdx.y == 0 ? networks.network[0] : networks.network[1];
  const StoredPrototypes& prototypes = packing.prototypes;
  const int i_first = (blockIdx.x * WARPS + threadIdx.x / LANES) * PACKED_BY_A_WARP;
  const auto* p_weight = static_cast<const Weight*>(prototypes.weight);
  const auto dim_of = [&](int i_k) { return i_k < prototypes.count ? prototypes.dim : 0; };
  float norm_of_mine = 0;  // lane i: of the warp's prototype i
  Row<N, CHUNKS> row, next;
  next.load(p_weight + i_first * prototypes.stride, dim_of(i_first));
  for (int i_k = i_first; i_k < i_first + PACKED_BY_A_WARP; ++i_k) {
    row = next;
    // on its way while this one is reduced; the loop's last is not used
    next.load(p_weight + (i_k + 1) * prototypes.stride, i_k + 1 < i_first + PACKED_BY_A_WARP ? dim_of(i_k + 1) : 0);
    float norm = sqrtf(row.dot(row));
    if (prototypes.kind == Kind::weight_norm) {
      const float magnitude = i_k < prototypes.count ? prototypes.magnitude[i_k] : 0;
      row.scale(magnitude * reciprocal_or_zero(norm));
      norm = fabsf(magnitude);
    } else if (prototypes.kind == Kind::normalized) {
      row.scale(reciprocal_or_zero(norm));
    }
    row.store(static_cast<Packed*>(packing.packed) + static_cast<std::int64_t>(i_k) * packing.width, packing.width);
    if (i_k - i_first == threadIdx.x % LANES) norm_of_mine = norm;
  }
  const int i_mine = threadIdx.x % LANES;
  if (i_mine >= PACKED_BY_A_WARP) return;
  packing.bias[i_first + i_mine] = bias_of(packing, i_first + i_mine, norm_of_mine);
  if (packing.norm != nullptr) packing.norm[i_first + i_mine] = norm_of_mine;
}

// Gradient at w_k -> at the stored weight, in place, and at the magnitude: equation (7). One warp, one prototype.
template <class Weight, int N, int CHUNKS>
__global__ void __launch_bounds__(BLOCK_THREADS) pull_back_kernel(const PullBack pull_back) {
  const StoredPrototypes& prototypes = pull_back.prototypes;
  const std::int64_t i_k = blockIdx.x * WARPS + threadIdx.x / LANES;
  if (i_k >= prototypes.count) return;
  float* p_gradient = pull_back.gradient + i_k * prototypes.dim;
  Row<N, CHUNKS> weight, gradient;
  weight.load(static_cast<const Weight*>(prototypes.weight) + i_k * prototypes.stride, prototypes.dim);
  gradient.load(p_gradient, prototypes.dim);
  const float norm = sqrtf(weight.dot(weight)), inverse_norm = reciprocal_or_zero(norm);
  const float magnitude = prototypes.kind == Kind::weight_norm ? prototypes.magnitude[i_k] : norm;
  float radial = 0;  // loss gradient at ||w_k||, through the normaliser
  if (prototypes.temperature != nullptr) {
    const float scale = inverse_temperature(prototypes);
    radial = -pull_back.bias_gradient[i_k] * mean_resultant_length(fabsf(magnitude) * scale, prototypes.expansion) * scale;
  }
  if (prototypes.kind == Kind::linear) {
    gradient.combine(1, weight, radial * inverse_norm);
  } else {
    const float along = gradient.dot(weight) * inverse_norm;
    float gain = inverse_norm;
    if (prototypes.kind == Kind::weight_norm) {
      gain *= magnitude;
      const float sign = magnitude > 0 ? 1 : magnitude < 0 ? -1 : 0;
      if (threadIdx.x % LANES == 0) pull_back.magnitude_gradient[i_k] = along + radial * sign;
    }
    gradient.combine(1, weight, -along * inverse_norm);
    gradient.scale(gain);
  }
  gradient.store(p_gradient, prototypes.dim);
}

template <int VALUE>
struct Constant {
  static constexpr int value = VALUE;
};
template <class T>
struct Type {
  using type = T;
};

template <class Use>
cudaError_t with_stored(Stored stored, Use use) {
  switch (stored) {
    case Stored::fp32: return use(Type<float>());
    case Stored::bf16: return use(Type<__nv_bfloat16>());
    case Stored::fp16: return use(Type<__half>());
  }
  return cudaErrorInvalidValue;
}

template <class Use>
cudaError_t with_element(Element element, Use use) {
  return element == Element::bf16 ? use(Type<__nv_bfloat16>()) : use(Type<__half>());
}

// Chunks that hold this many columns, N a lane: few sizes, the ones that heads use without a chunk to spare.
template <int N, class Use>
cudaError_t with_chunks(int columns, Use use) {
  const int chunks = (columns + N * LANES - 1) / (N * LANES);
  if constexpr (N == 1) {
    return chunks <= 8 ? use(Constant<8>()) : use(Constant<MOST_DIMS / LANES>());
  } else {
    if (chunks <= 1) return use(Constant<1>());
    if (chunks <= 2) return use(Constant<2>());
    if constexpr (N == 4)
      if (chunks <= 3) return use(Constant<3>());
    return use(Constant<MOST_DIMS / (N * LANES)>());
  }
}

// Whether every row of the weight consists of whole, aligned pieces of 16 bytes.
template <class Weight>
bool is_aligned(const StoredPrototypes& prototypes) {
  constexpr int piece = 16 / sizeof(Weight);
  return reinterpret_cast<std::uintptr_t>(prototypes.weight) % 16 == 0 && prototypes.stride % piece == 0 &&
         prototypes.dim % piece == 0;
}

// use(the weight's type, columns a lane has side by side, chunks)
template <class Use>
cudaError_t with_rows(const StoredPrototypes& prototypes, int columns, Use use) {
  return with_stored(prototypes.stored, [&](auto weight) {
    using Weight = typename decltype(weight)::type;
    constexpr int piece = 16 / sizeof(Weight);
    if (is_aligned<Weight>(prototypes))
      return with_chunks<piece>(columns, [&](auto chunks) { return use(weight, Constant<piece>(), chunks); });
    return with_chunks<1>(columns, [&](auto chunks) { return use(weight, Constant<1>(), chunks); });
  });
}

bool is_valid(const Packing& packing) {
  const StoredPrototypes& prototypes = packing.prototypes;
  return packing.padded % PAD_TO == 0 && packing.padded >= prototypes.count && packing.width >= prototypes.dim &&
         packing.width <= MOST_DIMS && packing.width % 64 == 0;
}

bool are_alike(const Packing& one, const Packing& other) {
  return one.prototypes.count == other.prototypes.count && one.prototypes.dim == other.prototypes.dim &&
         one.element == other.element && one.width == other.width && one.padded == other.padded;
}

// Whether one kernel reads the weights of both.
bool is_one_kernel(const Packing& one, const Packing& other) {
  if (one.prototypes.stored != other.prototypes.stored) return false;
  return with_stored(one.prototypes.stored, [&](auto weight) {
           using Weight = typename decltype(weight)::type;
           return is_aligned<Weight>(one.prototypes) == is_aligned<Weight>(other.prototypes) ? cudaSuccess
                                                                                             : cudaErrorNotSupported;
         }) == cudaSuccess;
}

// All networks by the kernel of the first.
cudaError_t launch_packing(const Networks& networks, int count, cudaStream_t stream) {
  const Packing& first = networks.network[0];
  return with_rows(first.prototypes, first.width, [&](auto weight, auto piece, auto chunks) {
    return with_element(first.element, [&](auto element) {
      using Weight = typename decltype(weight)::type;
      using Packed = typename decltype(element)::type;
      const dim3 grid(first.padded / (WARPS * PACKED_BY_A_WARP), count);
      pack_prototypes_kernel<Weight, Packed, decltype(piece)::value, decltype(chunks)::value>
          <<<grid, BLOCK_THREADS, 0, stream>>>(networks);
      return cudaGetLastError();
    });
  });
}

}  // namespace

cudaError_t pack_prototypes(const Packing* networks, int count, cudaStream_t stream) {
  if (count < 1 || count > MOST_NETWORKS) return cudaErrorInvalidValue;
  for (int i = 0; i < count; ++i)
    if (!is_valid(networks[i]) || !are_alike(networks[i], networks[0])) return cudaErrorInvalidValue;
  if (count == 2 && is_one_kernel(networks[0], networks[1])) return launch_packing({networks[0], networks[1]}, 2, stream);
  for (int i = 0; i < count; ++i)
    if (auto error = launch_packing({networks[i]}, 1, stream)) return error;
  return cudaSuccess;
}

cudaError_t pull_back(const PullBack& pull_back, cudaStream_t stream) {
  const StoredPrototypes& prototypes = pull_back.prototypes;
  if (prototypes.dim > MOST_DIMS || reinterpret_cast<std::uintptr_t>(pull_back.gradient) % 16 != 0)
    return cudaErrorInvalidValue;
  return with_rows(prototypes, prototypes.dim, [&](auto weight, auto piece, auto chunks) {
    using Weight = typename decltype(weight)::type;
    const int blocks = (prototypes.count + WARPS - 1) / WARPS;
    pull_back_kernel<Weight, decltype(piece)::value, decltype(chunks)::value><<<blocks, BLOCK_THREADS, 0, stream>>>(pull_back);
    return cudaGetLastError();
  });
}

}  // namespace vmf::cuda
