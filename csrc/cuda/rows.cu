// The row pass, equation (2): an online softmax of each row over the prototypes, and its barycentre, unnormalised.
//
// Legend: R rows, K prototypes, D embedding dim (width, padded), N splits of the prototypes; base-2 logits.
#include "launch.cuh"
#include "stream.cuh"

namespace vmf::cuda {

constexpr float LOWEST = -1e38f;  // a first running maximum: finite, for (-inf) - (-inf) would be NaN

// Running maximum, and sums relative to it, of two rows: 8 h + the thread's first. The maximum is the row's; the sums are over
// the thread's own columns until `finish`, as all four threads of a row rescale them alike.
struct OnlineSoftmax {
  float scale;
  bool has_value_bias;
  float top[2] = {LOWEST, LOWEST}, decay[2] = {1.0f, 1.0f};
  float mass[2] = {}, moment[2] = {}, value_bias[2] = {};  // sums of 2^(l - top) times 1, l - top, bias

  // logits [registers of 64 x 2 N] -> 2^(l - top)
  template <int N>
  VMF_DEVICE void weigh(float (&logits)[N], const float* p_bias, const float* p_value_bias) {
    raise_top(logits, p_bias + column_of_thread());
    const float* p_mine = p_value_bias + column_of_thread();
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float2 b = has_value_bias ? *reinterpret_cast<const float2*>(p_mine + 2 * i) : float2{};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        add(h, logits[i + 2 * h], b.x);
        add(h, logits[i + 2 * h + 1], b.y);
      }
    }
  }

  // The sums of all keys before the last tile, relative to its maximum.
  template <int N>
  VMF_DEVICE void rescale(float (&sums)[N]) const {
    // exact where no maximum rose, which is so of most tiles
    if (__all_sync(~0u, decay[0] == 1.0f && decay[1] == 1.0f)) return;
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] *= decay[i / 2 % 2];
  }

  VMF_DEVICE void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      mass[h] = sum_of_row(mass[h]);
      moment[h] = sum_of_row(moment[h]);
      value_bias[h] = sum_of_row(value_bias[h]);
    }
  }

 private:
  // logits become l; the maximum is raised, and what was summed so far is made relative to it.
  template <int N>
  VMF_DEVICE void raise_top(float (&logits)[N], const float* p_bias) {
    float new_top[2] = {top[0], top[1]};
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float2 b = *reinterpret_cast<const float2*>(p_bias + 2 * i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        logits[i + 2 * h] = fmaf(logits[i + 2 * h], scale, b.x);
        logits[i + 2 * h + 1] = fmaf(logits[i + 2 * h + 1], scale, b.y);
        new_top[h] = fmaxf(new_top[h], fmaxf(logits[i + 2 * h], logits[i + 2 * h + 1]));
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      new_top[h] = fmaxf(new_top[h], __shfl_xor_sync(~0u, new_top[h], 1));
      new_top[h] = fmaxf(new_top[h], __shfl_xor_sync(~0u, new_top[h], 2));
      const float shift = top[h] - new_top[h];
      top[h] = new_top[h];
      decay[h] = exp2_fast(shift);
      moment[h] = decay[h] * fmaf(shift, mass[h], moment[h]);
      mass[h] *= decay[h];
      value_bias[h] *= decay[h];
    }
  }

  VMF_DEVICE void add(int h, float& logit, float bias) {
    const float deviation = logit - top[h];
    logit = exp2_fast(deviation);
    mass[h] += logit;
    moment[h] = fmaf(logit, deviation, moment[h]);
    value_bias[h] = fmaf(logit, bias, value_bias[h]);
  }

  static VMF_DEVICE float sum_of_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
  }
};

namespace {

VMF_DEVICE void store_statistics(const RowPass& pass, const OnlineSoftmax& softmax, int i_row, int i_split) {
  if (lane_of_thread() % 4 != 0) return;
  const size_t step = static_cast<size_t>(pass.splits) * pass.rows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* p_mine = pass.statistics + static_cast<size_t>(i_split) * pass.rows + i_row + 8 * h;
    p_mine[0] = softmax.top[h];
    p_mine[step] = softmax.mass[h];
    p_mine[2 * step] = softmax.moment[h];
    p_mine[3 * step] = softmax.value_bias[h];
  }
}

// Registers 4 j + 2 h + c are row i_row + 8 h, column 8 j + c from the thread's first.
template <int N>
VMF_DEVICE void store_barycentre(const RowPass& pass, const float (&sums)[N], int i_row, int i_split, int i_column) {
  float* p_block = pass.barycentre + (static_cast<size_t>(i_split) * pass.rows + i_row) * pass.width + i_column;
#pragma unroll
  for (int i = 0; i < N; i += 2)
    *reinterpret_cast<float2*>(p_block + i / 2 % 2 * 8 * pass.width + i / 4 * 8) = float2{sums[i], sums[i + 1]};
}

struct RowMaps {
  CUtensorMap features, keys, values;
};

// Grid (row blocks, splits, blocks that share the columns of the barycentre).
template <Element ELEMENT, int WIDTH, Values VALUES, int BLOCKS>
__global__ void __launch_bounds__(BLOCK_THREADS, 1)
    assign_rows(const __grid_constant__ RowMaps maps, const __grid_constant__ RowPass pass) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = Tile<WIDTH>;
  Shared<T>& shared = shared_memory<T>();
  const int i_split = blockIdx.y, i_part = part_of_block();
  const int first = min(i_split * pass.split_size, pass.prototypes);
  const int tiles = min(pass.split_size, pass.prototypes - first) / T::KEYS;
  const Walk walk{&maps.features,
                  &maps.keys,
                  &maps.values,
                  pass.bias,
                  VALUES == Values::own ? pass.value_bias : nullptr,
                  static_cast<int>(blockIdx.x) * QUERIES,
                  first,
                  tiles};
  if (threadIdx.x == 0) {
    prepare_barriers<T, BLOCKS>(shared);
    shared.scalars[0] = base_2_scale(pass.temperature);
  }
  Cluster<BLOCKS>::begin();
  if (group_of_thread() == CONSUMERS) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == CONSUMERS * GROUP) Producer<T, BLOCKS>{shared}.template stream<VALUES>(walk, 0);
    return Cluster<BLOCKS>::end();
  }
  grow_registers<CONSUMER_REGISTERS>();
  Consumer<T, ELEMENT, BLOCKS> consumer(shared);
  OnlineSoftmax softmax{shared.scalars[0], walk.value_bias != nullptr};
  const int i_row = walk.first_query + row_of_thread();
  if (tiles > 0) wait(&shared.query_full, 0);
  if constexpr (VALUES == Values::none) {
    consumer.weigh_keys(tiles, softmax);
  } else {
    float sums[T::SUMS] = {};  // fp32
    consumer.template add_values<VALUES>(tiles, softmax, sums);
    store_barycentre(pass, sums, i_row, i_split, i_part * T::PANEL + column_of_thread());
  }
  softmax.finish();
  if (i_part == 0) store_statistics(pass, softmax, i_row, i_split);
  Cluster<BLOCKS>::end();
#else
  __trap();
#endif
}

template <Element ELEMENT, int WIDTH, Values VALUES, int BLOCKS>
cudaError_t launch_rows(const RowPass& pass, cudaStream_t stream) {
  using T = Tile<WIDTH>;
  constexpr int BOX_ROWS = T::KEYS / BLOCKS;
  if (auto error = check_device(assign_rows<ELEMENT, WIDTH, VALUES, BLOCKS>)) return error;
  RowMaps maps;
  const void* values = VALUES == Values::own ? pass.values : pass.keys;
  if (auto error = encode_map(maps.features, pass, pass.features, pass.rows, QUERIES)) return error;
  if (auto error = encode_map(maps.keys, pass, pass.keys, pass.prototypes, BOX_ROWS)) return error;
  if (auto error = encode_map(maps.values, pass, values, pass.prototypes, BOX_ROWS)) return error;
  const dim3 grid(pass.rows / QUERIES, pass.splits, VALUES == Values::none ? 1 : T::PANELS);
  return launch<BLOCKS>(assign_rows<ELEMENT, WIDTH, VALUES, BLOCKS>, grid, sizeof(Shared<T>), stream, maps, pass);
}

template <Element ELEMENT, int WIDTH>
cudaError_t launch_rows_by_values(const RowPass& pass, cudaStream_t stream) {
  if (pass.values == nullptr) return launch_rows<ELEMENT, WIDTH, Values::none, 1>(pass, stream);
  return by_cluster<WIDTH>(pass, pass.rows / QUERIES, [&](auto blocks) {
    if (pass.values == pass.keys) return launch_rows<ELEMENT, WIDTH, Values::keys, blocks()>(pass, stream);
    return launch_rows<ELEMENT, WIDTH, Values::own, blocks()>(pass, stream);
  });
}

bool is_valid(const RowPass& pass) {
  const bool has_own_values = pass.values != nullptr && pass.values != pass.keys;
  return pass.rows > 0 && pass.rows % QUERIES == 0 && pass.prototypes > 0 && pass.prototypes % PROTOTYPE_PADDING == 0 &&
         pass.splits > 0 && pass.split_size > 0 && pass.split_size % prototype_tile(pass.width, false) == 0 &&
         static_cast<long>(pass.splits) * pass.split_size >= pass.prototypes && pass.splits <= MOST_SPLITS &&
         (pass.values == nullptr) == (pass.barycentre == nullptr) && (has_own_values || pass.value_bias == nullptr) &&
         has_valid_cluster(pass.blocks_in_cluster) &&
         are_aligned({pass.features, pass.keys, pass.values, pass.bias, pass.value_bias, pass.barycentre});
}

}  // namespace

int row_tile() { return QUERIES; }

static_assert(Tile<64>::KEYS == Tile<128>::KEYS && Tile<192>::KEYS == Tile<256>::KEYS && Tile<256>::KEYS == Tile<384>::KEYS,
              "prototype_tile names the tile of 128 and of 256 for all widths");

static_assert(Tile<64>::PANELS == 1 && Tile<128>::PANELS == 1 && Tile<192>::PANELS == 1 && Tile<256>::PANELS == 1,
              "column_parts names the parts of 256 for all widths up to it");

int prototype_tile(int width, bool) { return width <= 128 ? Tile<128>::KEYS : Tile<256>::KEYS; }

int column_parts(int width) { return width <= 256 ? Tile<256>::PANELS : Tile<384>::PANELS; }

cudaError_t row_pass(const RowPass& pass, cudaStream_t stream) {
  if (!is_valid(pass)) return cudaErrorInvalidValue;
  return by_width_and_element(
      pass, [&](auto width, auto element) { return launch_rows_by_values<element(), width()>(pass, stream); });
}

}  // namespace vmf::cuda
