// The column pass, equations (5) and (6): sums over rows for each prototype. No block writes where another does, and each
// walks over the rows in their order: no atomics, bitwise repeatable.
//
// Legend: S / T student / teacher rows, K prototypes, D embedding dim (width, padded); base-2 logits. Row r weighs in through
// its offset: 2^(l - offset_r) = unit n_r p_r. Here the prototypes are the queries, and the rows what streams past.
#include "launch.cuh"
#include "stream.cuh"

namespace vmf::cuda {

// Weights relative to offsets that are known, and their sums, of two prototypes: 8 h + the thread's first.
struct KnownOffsets {
  float scale;
  float bias[2];
  float mass[2] = {};  // over the thread's own columns until `finish`

  // An offset of +inf gives a weight of 0.
  template <int N>
  VMF_DEVICE void weigh(float (&logits)[N], const float* p_offset, const float*) {
    const float* p_mine = p_offset + column_of_thread();
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float2 offset = *reinterpret_cast<const float2*>(p_mine + 2 * i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        add(h, logits[i + 2 * h], offset.x);
        add(h, logits[i + 2 * h + 1], offset.y);
      }
    }
  }

  template <int N>
  VMF_DEVICE void rescale(float (&)[N]) const {}

  VMF_DEVICE void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      mass[h] += __shfl_xor_sync(~0u, mass[h], 1);
      mass[h] += __shfl_xor_sync(~0u, mass[h], 2);
    }
  }

 private:
  VMF_DEVICE void add(int h, float& logit, float offset) {
    logit = exp2_fast(fmaf(logit, scale, bias[h] - offset));
    mass[h] += logit;
  }
};

namespace {

// What of shared memory's scalars is which.
enum Scalar { STUDENT_SCALE, TEACHER_SCALE, FACTOR };

// Registers 4 j + 2 h + c are prototype i_k + 8 h, column 8 j + c from the thread's first. [K, D] has no padding.
template <int N>
VMF_DEVICE void store_vectors(const ColumnPass& pass, const float (&sums)[N], float factor, int i_k, int i_column) {
  const bool in_pairs = pass.dim % 2 == 0;  // as every row of [K, D] then starts at a multiple of 8 bytes
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const int o_k = i_k + i / 2 % 2 * 8, o_column = i_column + i / 4 * 8;
    if (o_k >= pass.prototype_count || o_column >= pass.dim) continue;
    float* p_mine = pass.vectors + static_cast<size_t>(o_k) * pass.dim + o_column;
    if (in_pairs) {
      *reinterpret_cast<float2*>(p_mine) = float2{factor * sums[i], factor * sums[i + 1]};
    } else {
      p_mine[0] = factor * sums[i];
      if (o_column + 1 < pass.dim) p_mine[1] = factor * sums[i + 1];
    }
  }
}

VMF_DEVICE void store_masses(const ColumnPass& pass, const float (&student)[2], const float (&teacher)[2], int i_k) {
  if (lane_of_thread() % 4 != 0) return;
  const float unit = *pass.unit;
  const float total = *pass.total == 0.0f ? 1.0f : *pass.total;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int o_k = i_k + 8 * h;
    if (o_k >= pass.prototype_count) continue;
    pass.usage[o_k] = teacher[h] / unit / total;
    if (pass.bias_gradient) pass.bias_gradient[o_k] = (student[h] - teacher[h]) / unit;
  }
}

struct ColumnMaps {
  CUtensorMap student_keys, student_features, teacher_keys, teacher_features, cotangents;
};

VMF_DEVICE Walk student_walk(const ColumnMaps& maps, const ColumnPass& pass, int i_k, int tile) {
  return {&maps.student_keys, &maps.student_features, nullptr, pass.student_offset, nullptr, i_k, 0, pass.student_rows / tile};
}

VMF_DEVICE Walk teacher_walk(const ColumnMaps& maps, const ColumnPass& pass, int i_k, int tile) {
  return {&maps.teacher_keys,      &maps.teacher_features, &maps.cotangents, pass.teacher_offset, nullptr, i_k, 0,
          pass.teacher_rows / tile};
}

template <typename T, int BLOCKS>
VMF_DEVICE void prepare_columns(Shared<T>& shared, const ColumnPass& pass) {
  prepare_barriers<T, BLOCKS>(shared);
  shared.scalars[STUDENT_SCALE] = base_2_scale(pass.student_temperature);
  shared.scalars[TEACHER_SCALE] = base_2_scale(pass.teacher_temperature);
  shared.scalars[FACTOR] = static_cast<float>(1.0 / (*pass.student_temperature * *pass.unit));
}

// Grid (blocks of prototypes, 1, blocks that share the columns of the vectors). Student rows first; then the block's queries
// are replaced by the teacher's prototypes, and the same sums go on.
template <Element ELEMENT, int WIDTH, int BLOCKS>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    gather_columns(const __grid_constant__ ColumnMaps maps, const __grid_constant__ ColumnPass pass) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = Tile<WIDTH>;
  Shared<T>& shared = shared_memory<T>();
  if (threadIdx.x == 0) prepare_columns<T, BLOCKS>(shared, pass);
  Cluster<BLOCKS>::begin();
  const Walk student = student_walk(maps, pass, blockIdx.x * QUERIES, T::KEYS);
  const Walk teacher = teacher_walk(maps, pass, blockIdx.x * QUERIES, T::KEYS);
  if (group_of_thread() == CONSUMERS) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == CONSUMERS * GROUP) {
      Producer<T, BLOCKS> producer{shared};
      producer.template stream<Values::keys>(student, 0);
      producer.template stream<Values::own>(teacher, 1);
    }
    return Cluster<BLOCKS>::end();
  }
  grow_registers<CONSUMER_REGISTERS>();
  Consumer<T, ELEMENT, BLOCKS> consumer(shared);
  const int i_k = student.first_query + row_of_thread();
  float sums[T::SUMS] = {};  // fp32
  KnownOffsets p{shared.scalars[STUDENT_SCALE], {pass.student_bias[i_k], pass.student_bias[i_k + 8]}};
  KnownOffsets q{shared.scalars[TEACHER_SCALE], {pass.teacher_bias[i_k], pass.teacher_bias[i_k + 8]}};
  wait(&shared.query_full, 0);
  consumer.template add_values<Values::keys>(student.tiles, p, sums);
  wait(&shared.query_full, 1);
  consumer.template add_values<Values::own>(teacher.tiles, q, sums);
  store_vectors(pass, sums, shared.scalars[FACTOR], i_k, part_of_block() * T::PANEL + column_of_thread());
  p.finish();
  q.finish();
  if (part_of_block() == 0) store_masses(pass, p.mass, q.mass, i_k);
  Cluster<BLOCKS>::end();
#else
  __trap();
#endif
}

// Usage alone. Grid (blocks of prototypes).
template <Element ELEMENT, int WIDTH>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    gather_usage(const __grid_constant__ ColumnMaps maps, const __grid_constant__ ColumnPass pass) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = Tile<WIDTH>;
  Shared<T>& shared = shared_memory<T>();
  if (threadIdx.x == 0) {
    prepare_barriers<T, 1>(shared);
    shared.scalars[TEACHER_SCALE] = base_2_scale(pass.teacher_temperature);
  }
  __syncthreads();
  const Walk teacher = teacher_walk(maps, pass, blockIdx.x * QUERIES, T::KEYS);
  if (group_of_thread() == CONSUMERS) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == CONSUMERS * GROUP) Producer<T, 1>{shared}.template stream<Values::none>(teacher, 0);
    return;
  }
  grow_registers<CONSUMER_REGISTERS>();
  Consumer<T, ELEMENT, 1> consumer(shared);
  const int i_k = teacher.first_query + row_of_thread();
  KnownOffsets q{shared.scalars[TEACHER_SCALE], {pass.teacher_bias[i_k], pass.teacher_bias[i_k + 8]}};
  wait(&shared.query_full, 0);
  consumer.weigh_keys(teacher.tiles, q);
  q.finish();
  const float none[2] = {};
  store_masses(pass, none, q.mass, i_k);
#else
  __trap();
#endif
}

template <typename T, int BLOCKS>
cudaError_t encode_teacher(ColumnMaps& maps, const ColumnPass& pass) {
  if (auto error = encode_map(maps.teacher_keys, pass, pass.teacher_keys, pass.prototypes, QUERIES)) return error;
  return encode_map(maps.teacher_features, pass, pass.teacher_features, pass.teacher_rows, T::KEYS / BLOCKS);
}

template <typename T, int BLOCKS>
cudaError_t encode_student(ColumnMaps& maps, const ColumnPass& pass) {
  constexpr int BOX_ROWS = T::KEYS / BLOCKS;
  if (auto error = encode_map(maps.student_keys, pass, pass.student_keys, pass.prototypes, QUERIES)) return error;
  if (auto error = encode_map(maps.student_features, pass, pass.student_features, pass.student_rows, BOX_ROWS)) return error;
  return encode_map(maps.cotangents, pass, pass.cotangents, pass.teacher_rows, BOX_ROWS);
}

template <Element ELEMENT, int WIDTH>
cudaError_t launch_usage(const ColumnPass& pass, cudaStream_t stream) {
  using T = Tile<WIDTH>;
  ColumnMaps maps{};
  if (auto error = encode_teacher<T, 1>(maps, pass)) return error;
  const dim3 blocks(pass.prototypes / QUERIES);
  return launch<1>(gather_usage<ELEMENT, WIDTH>, blocks, sizeof(Shared<T>), stream, maps, pass);
}

template <Element ELEMENT, int WIDTH, int BLOCKS>
cudaError_t launch_columns(const ColumnPass& pass, cudaStream_t stream) {
  using T = Tile<WIDTH>;
  ColumnMaps maps{};
  if (auto error = encode_teacher<T, BLOCKS>(maps, pass)) return error;
  if (auto error = encode_student<T, BLOCKS>(maps, pass)) return error;
  const dim3 grid(pass.prototypes / QUERIES, 1, T::PANELS);
  return launch<BLOCKS>(gather_columns<ELEMENT, WIDTH, BLOCKS>, grid, sizeof(Shared<T>), stream, maps, pass);
}

bool is_valid(const ColumnPass& pass) {
  const bool has_students = pass.vectors != nullptr;
  return pass.prototypes > 0 && pass.prototypes % PROTOTYPE_PADDING == 0 && pass.prototype_count <= pass.prototypes &&
         has_valid_cluster(pass.blocks_in_cluster) && pass.teacher_rows > 0 && pass.teacher_rows % QUERIES == 0 &&
         (!has_students || (pass.student_rows > 0 && pass.student_rows % QUERIES == 0 && pass.dim <= pass.width)) &&
         are_aligned({pass.teacher_keys, pass.teacher_features, pass.teacher_offset, pass.vectors}) &&
         (!has_students || are_aligned({pass.student_keys, pass.student_features, pass.cotangents, pass.student_offset}));
}

}  // namespace

cudaError_t column_pass(const ColumnPass& pass, cudaStream_t stream) {
  if (!is_valid(pass)) return cudaErrorInvalidValue;
  return by_width_and_element(pass, [&](auto width, auto element) {
    if (auto error = check_device(gather_usage<element(), width()>)) return error;
    if (pass.vectors == nullptr) return launch_usage<element(), width()>(pass, stream);
    return by_cluster<width()>(pass, pass.prototypes / QUERIES,
                               [&](auto blocks) { return launch_columns<element(), width(), blocks()>(pass, stream); });
  });
}

}  // namespace vmf::cuda
