// The module vmf_kernels._cuda: pointers and streams come as integers, 0 for none; a cudaError is raised as RuntimeError.
// vmf_kernels/backends/cuda, its only caller, checks shapes, dtypes and devices. Importing it calls nothing of CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cctype>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "prototypes.h"
#include "stream.h"

#ifndef VMF_CUDA_ARCHS
#error "VMF_CUDA_ARCHS is the list of parts that the kernels are compiled for, such as -DVMF_CUDA_ARCHS=\"80 90a 100\""
#endif
#ifndef VMF_SOURCE_DIGEST
#error "VMF_SOURCE_DIGEST is csrc/digest.py's number of these sources: it tells a module that is of others"
#endif
#define VMF_TEXT_OF(...) #__VA_ARGS__
#define VMF_TEXT(...) VMF_TEXT_OF(__VA_ARGS__)

namespace py = pybind11;
using namespace pybind11::literals;
using namespace vmf::cuda;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Where a call goes. The device is set and not only assumed: a runtime linked statically has no say in torch's idea of it.
struct Queue {
  int device;
  Address stream;
};

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is raised here; left behind, the check after the next launch would find it
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// 13000 for 13.0
int version(cudaError_t (*get)(int*), const char* what) {
  int found = 0;
  check(get(&found), what);
  return found;
}

template <class Call>
void launch(const char* what, Queue queue, Call call) {
  check(cudaSetDevice(queue.device), what);
  check(call(at<CUstream_st>(queue.stream)), what);
}

// Whether a wait that does not end traps.
#if defined(VMF_BOUNDED_WAITS)
constexpr bool HAS_BOUNDED_WAITS = true;
#else
constexpr bool HAS_BOUNDED_WAITS = false;
#endif

// "80 90a 100", with or without quotes -> {"80", "90a", "100"}
std::vector<std::string> archs() {
  std::vector<std::string> found(1);
  for (const char c : std::string(VMF_TEXT(VMF_CUDA_ARCHS))) {
    if (std::isalnum(static_cast<unsigned char>(c)))
      found.back() += c;
    else if (!found.back().empty())
      found.emplace_back();
  }
  if (found.back().empty()) found.pop_back();
  return found;
}

template <int COUNT>
void copy(const std::vector<float>& from, float (&to)[COUNT], const char* name) {
  if (from.size() != COUNT)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(from.size()) + " elements; expected " +
                                std::to_string(COUNT) + ", of an expansion of three terms");
  for (int i = 0; i < COUNT; ++i) to[i] = from[i];
}

Expansion expansion(float order, int steps, const std::vector<float>& coefficients, const std::vector<float>& slopes) {
  Expansion made{};
  made.order = order;
  made.steps = steps;
  copy(coefficients, made.coefficients, "coefficients");
  copy(slopes, made.slopes, "slopes");
  return made;
}

StoredPrototypes stored_prototypes(Stored stored, Kind kind, int count, int dim, std::int64_t stride, Address weight,
                                   Address magnitude, Address temperature, const Expansion& expansion) {
  StoredPrototypes made{};
  made.stored = stored;
  made.kind = kind;
  made.count = count;
  made.dim = dim;
  made.stride = stride;
  made.weight = at<const void>(weight);
  made.magnitude = at<const float>(magnitude);
  made.temperature = at<const double>(temperature);
  made.expansion = expansion;
  return made;
}

void bind_prototypes(py::module_& module) {
  py::enum_<Stored>(module, "Stored", py::module_local())
      .value("fp32", Stored::fp32)
      .value("bf16", Stored::bf16)
      .value("fp16", Stored::fp16);
  py::enum_<Kind>(module, "Kind", py::module_local())
      .value("linear", Kind::linear)
      .value("normalized", Kind::normalized)
      .value("weight_norm", Kind::weight_norm);
  py::class_<Expansion>(module, "Expansion", py::module_local())
      .def(py::init(&expansion), py::kw_only(), "order"_a, "steps"_a, "coefficients"_a, "slopes"_a);
  py::class_<StoredPrototypes>(module, "StoredPrototypes", py::module_local())
      .def(py::init(&stored_prototypes), py::kw_only(), "stored"_a, "kind"_a, "count"_a, "dim"_a, "stride"_a, "weight"_a,
           "magnitude"_a, "temperature"_a, "expansion"_a);
  py::class_<Packing>(module, "Packing", py::module_local())
      .def(py::init([](const StoredPrototypes& prototypes, Element element, int width, int padded, float lowest_bias,
                       Address extra_bias, Address packed, Address bias, Address norm) {
             return Packing{prototypes,       element,         width,          padded, lowest_bias, at<const float>(extra_bias),
                            at<void>(packed), at<float>(bias), at<float>(norm)};
           }),
           "prototypes"_a, py::kw_only(), "element"_a, "width"_a, "padded"_a, "lowest_bias"_a, "extra_bias"_a, "packed"_a,
           "bias"_a, "norm"_a);
  module.def(
      "pack_prototypes",
      [](const std::vector<Packing>& networks, Queue queue) {
        launch("preparing prototypes", queue, [&](cudaStream_t stream) {
          return pack_prototypes(networks.data(), static_cast<int>(networks.size()), stream);
        });
      },
      "networks"_a, "queue"_a);
  module.def(
      "pull_back",
      [](const StoredPrototypes& prototypes, Queue queue, Address bias_gradient, Address gradient, Address magnitude_gradient) {
        const PullBack way_back{prototypes, at<const float>(bias_gradient), at<float>(gradient), at<float>(magnitude_gradient)};
        launch("pulling gradients back", queue, [&](cudaStream_t stream) { return pull_back(way_back, stream); });
      },
      "prototypes"_a, "queue"_a, py::kw_only(), "bias_gradient"_a, "gradient"_a, "magnitude_gradient"_a);
}

void bind_row_pass(py::module_& module) {
  module.def(
      "row_pass",
      [](Queue queue, Element element, int width, int rows, int prototypes, int splits, int split_size, Address features,
         Address keys, Address values, Address bias, Address value_bias, Address temperature, Address statistics,
         Address barycentre, int blocks_in_cluster) {
        RowPass pass{};
        pass.element = element;
        pass.width = width;
        pass.rows = rows;
        pass.prototypes = prototypes;
        pass.splits = splits;
        pass.split_size = split_size;
        pass.features = at<const void>(features);
        pass.keys = at<const void>(keys);
        pass.values = at<const void>(values);
        pass.bias = at<const float>(bias);
        pass.value_bias = at<const float>(value_bias);
        pass.temperature = at<const double>(temperature);
        pass.statistics = at<float>(statistics);
        pass.barycentre = at<float>(barycentre);
        pass.blocks_in_cluster = blocks_in_cluster;
        launch("the row pass", queue, [&](cudaStream_t stream) { return row_pass(pass, stream); });
      },
      "queue"_a, py::kw_only(), "element"_a, "width"_a, "rows"_a, "prototypes"_a, "splits"_a, "split_size"_a, "features"_a,
      "keys"_a, "values"_a, "bias"_a, "value_bias"_a, "temperature"_a, "statistics"_a, "barycentre"_a,
      "blocks_in_cluster"_a = 1);
}

// One network in the column pass.
struct Side {
  int rows;
  Address keys, features, bias, offset, temperature;
};

void bind_column_pass(py::module_& module) {
  py::class_<Side>(module, "Side", py::module_local())
      .def(py::init([](int rows, Address keys, Address features, Address bias, Address offset, Address temperature) {
             return Side{rows, keys, features, bias, offset, temperature};
           }),
           py::kw_only(), "rows"_a, "keys"_a, "features"_a, "bias"_a, "offset"_a, "temperature"_a);
  module.def(
      "column_pass",
      [](Queue queue, const Side& student, const Side& teacher, Element element, int width, int prototypes, int prototype_count,
         int dim, Address cotangents, Address unit, Address total, Address vectors, Address bias_gradient, Address usage,
         int blocks_in_cluster) {
        ColumnPass pass{};
        pass.element = element;
        pass.width = width;
        pass.prototypes = prototypes;
        pass.prototype_count = prototype_count;
        pass.dim = dim;
        pass.student_rows = student.rows;
        pass.teacher_rows = teacher.rows;
        pass.student_keys = at<const void>(student.keys);
        pass.student_features = at<const void>(student.features);
        pass.student_bias = at<const float>(student.bias);
        pass.student_offset = at<const float>(student.offset);
        pass.student_temperature = at<const double>(student.temperature);
        pass.teacher_keys = at<const void>(teacher.keys);
        pass.teacher_features = at<const void>(teacher.features);
        pass.teacher_bias = at<const float>(teacher.bias);
        pass.teacher_offset = at<const float>(teacher.offset);
        pass.teacher_temperature = at<const double>(teacher.temperature);
        pass.cotangents = at<const void>(cotangents);
        pass.unit = at<const float>(unit);
        pass.total = at<const float>(total);
        pass.vectors = at<float>(vectors);
        pass.bias_gradient = at<float>(bias_gradient);
        pass.usage = at<float>(usage);
        pass.blocks_in_cluster = blocks_in_cluster;
        launch("the column pass", queue, [&](cudaStream_t stream) { return column_pass(pass, stream); });
      },
      "queue"_a, "student"_a, "teacher"_a, py::kw_only(), "element"_a, "width"_a, "prototypes"_a, "prototype_count"_a, "dim"_a,
      "cotangents"_a, "unit"_a, "total"_a, "vectors"_a, "bias_gradient"_a, "usage"_a, "blocks_in_cluster"_a = 1);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The CUDA kernels of vmf_kernels.backends.cuda.";
  module.attr("archs") = archs();
  module.attr("source_digest") = VMF_TEXT(VMF_SOURCE_DIGEST);
  module.attr("has_bounded_waits") = HAS_BOUNDED_WAITS;
  module.def("runtime_version", [] { return version(cudaRuntimeGetVersion, "asking for the runtime's version"); });
  // 0 where there is no driver
  module.def("driver_version", [] { return version(cudaDriverGetVersion, "asking for the driver's version"); });
  py::enum_<Element>(module, "Element", py::module_local()).value("bf16", Element::bf16).value("fp16", Element::fp16);
  py::class_<Queue>(module, "Queue", py::module_local())
      .def(py::init([](int device, Address stream) { return Queue{device, stream}; }), py::kw_only(), "device"_a, "stream"_a);
  bind_prototypes(module);
  module.def("row_tile", &row_tile);
  module.def("prototype_tile", &prototype_tile, py::kw_only(), "width"_a, "own_values"_a);
  module.def("column_parts", &column_parts, py::kw_only(), "width"_a);
  bind_row_pass(module);
  bind_column_pass(module);
}
