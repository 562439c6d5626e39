// Every launch that the streaming passes are made for, at the sizes of masked patches: launch_cases CAPABILITY.
//
// Addresses are made up: nothing is read or written, since launches are recorded (recording_runtime.cpp).
#include "recording_runtime.h"
#include "stream.h"

#include <cstdint>
#include <cstdlib>
#include <string>

namespace {

using vmf::cuda::ColumnPass;
using vmf::cuda::Element;
using vmf::cuda::RowPass;

constexpr int kWidths[] = {64, 128, 192, 256, 384};
constexpr int kRows = 3771, kOddRows = 640, kPrototypes = 65536, kSplits = 3;  // 30 and 5 blocks
constexpr std::uintptr_t kFirstAddress = std::uintptr_t{1} << 40, kAddressStep = std::uintptr_t{1} << 32;

template <typename T>
T* address(int index) {
  return reinterpret_cast<T*>(kFirstAddress + index * kAddressStep);
}

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Rows {
  const char* name;
  bool has_values, own_values, has_value_bias;
};
constexpr Rows kRowModes[] = {
    {"no values", false, false, false},
    {"keys as values", true, false, false},
    {"own values", true, true, false},
    {"own values, value bias", true, true, true},
};

RowPass row_case(Element element, int width, const Rows& mode, int rows, int blocks_in_cluster) {
  RowPass pass{};
  pass.element = element;
  pass.width = width;
  pass.rows = round_up(rows, vmf::cuda::row_tile());
  pass.prototypes = kPrototypes;
  pass.splits = kSplits;
  pass.split_size = round_up((kPrototypes + kSplits - 1) / kSplits, vmf::cuda::prototype_tile(width, mode.own_values));
  pass.features = address<void>(0);
  pass.keys = address<void>(1);
  pass.values = !mode.has_values ? nullptr : address<void>(mode.own_values ? 2 : 1);
  pass.bias = address<float>(3);
  pass.value_bias = mode.has_value_bias ? address<float>(4) : nullptr;
  pass.temperature = address<double>(5);
  pass.statistics = address<float>(6);
  pass.barycentre = mode.has_values ? address<float>(7) : nullptr;
  pass.blocks_in_cluster = blocks_in_cluster;
  return pass;
}

struct Columns {
  const char* name;
  bool has_vectors, has_bias_gradient;
};
constexpr Columns kColumnModes[] = {{"vectors", true, false}, {"vectors, bias gradient", true, true}, {"usage", false, false}};

ColumnPass column_case(Element element, int width, const Columns& mode, int blocks_in_cluster) {
  ColumnPass pass{};
  pass.element = element;
  pass.width = width;
  pass.prototypes = kPrototypes;
  pass.prototype_count = kPrototypes - 3;  // shorter than their padding, as dims are
  pass.dim = width - 8;
  pass.teacher_rows = round_up(kRows, vmf::cuda::row_tile());
  if (mode.has_vectors) {
    pass.student_rows = pass.teacher_rows;
    pass.student_keys = address<void>(0);
    pass.student_features = address<void>(1);
    pass.cotangents = address<void>(4);
    pass.student_bias = address<float>(5);
    pass.student_offset = address<float>(7);
    pass.student_temperature = address<double>(9);
    pass.vectors = address<float>(13);
  }
  pass.teacher_keys = address<void>(2);
  pass.teacher_features = address<void>(3);
  pass.teacher_bias = address<float>(6);
  pass.teacher_offset = address<float>(8);
  pass.teacher_temperature = address<double>(10);
  pass.unit = address<float>(11);
  pass.total = address<float>(12);
  pass.bias_gradient = mode.has_bias_gradient ? address<float>(14) : nullptr;
  pass.usage = address<float>(15);
  pass.blocks_in_cluster = blocks_in_cluster;
  return pass;
}

void run_cases(Element element, int width, int blocks_in_cluster, int capability) {
  const std::string which = std::string(element == Element::bf16 ? "bf16" : "fp16") + " D" + std::to_string(width);
  const std::string suffix = blocks_in_cluster == 1 ? "" : ", in clusters";
  for (const Rows& mode : kRowModes) {
    start_case("row_pass " + which + ", " + mode.name + suffix, capability);
    end_case(vmf::cuda::row_pass(row_case(element, width, mode, kRows, blocks_in_cluster), nullptr));
  }
  for (const Columns& mode : kColumnModes) {
    start_case("column_pass " + which + ", " + mode.name + suffix, capability);
    end_case(vmf::cuda::column_pass(column_case(element, width, mode, blocks_in_cluster), nullptr));
  }
}

// What cannot pair up: the runtime would refuse it in clusters.
void run_odd_case(int capability) {
  start_case("row_pass bf16 D256, own values, an odd number of blocks, in clusters", capability);
  end_case(vmf::cuda::row_pass(row_case(Element::bf16, 256, kRowModes[2], kOddRows, 2), nullptr));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return EXIT_FAILURE;
  const int capability = std::atoi(arguments[1]);
  for (const int blocks_in_cluster : {1, 2})
    for (const Element element : {Element::bf16, Element::fp16})
      for (const int width : kWidths) run_cases(element, width, blocks_in_cluster, capability);
  run_odd_case(capability);
  return EXIT_SUCCESS;
}
