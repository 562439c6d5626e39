// The parts into which a pass splits the prototypes: their number, and the threads that take them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "operator.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace vmf::cpu {

// Parts of the prototypes: enough to keep many threads busy to the end, few enough that a copy of dz for each is small.
constexpr int MOST_PARTS = 32;
constexpr int LEAST_PART = 480;                             // prototypes: a few blocks
constexpr std::size_t PARTS_BYTES = std::size_t(16) << 20;  // of all copies of dz, if this allows
constexpr int FEWEST_PARTS = 8;                             // at least so many parts

inline int threads_for(double products, const Execution& run) {
  return int(std::clamp(products / std::max(run.least_work, 1.0), 1.0, double(run.threads)));
}

inline int part_count(int prototypes) { return std::clamp(prototypes / LEAST_PART, 1, MOST_PARTS); }

// The number of parts of a gathering pass, each of which has its own dz.
inline int part_count(const Gather& g) {
  const std::size_t part = sizeof(float) * std::max<std::size_t>(1, std::size_t(g.student_rows) * g.weight.dim);
  const int most = int(std::min<std::size_t>(MOST_PARTS, PARTS_BYTES / part));
  return std::min(part_count(g.weight.prototypes), std::max(most, FEWEST_PARTS));
}

// Calls body(part, thread, first prototype, last); uses fewer threads than requested if there are fewer parts.
template <class Body>
void for_each_part(int parts, int prototypes, int threads, Body&& body) {
  // parts begin on even prototypes: bf16 products take them in pairs
  const auto first = [&](int part) {
    return part == parts ? prototypes : int(std::int64_t(part) * prototypes / parts) / 2 * 2;
  };
#if defined(_OPENMP)
#pragma omp parallel for num_threads(std::min(threads, parts)) schedule(dynamic, 1)
#endif
  for (int part = 0; part < parts; ++part) {
#if defined(_OPENMP)
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    body(part, thread, first(part), first(part + 1));
  }
}

}  // namespace vmf::cpu
