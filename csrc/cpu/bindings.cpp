// vmf_kernels._native: operator.h for Python. Pointers come as integers; whoever calls keeps their memory alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "operator.h"

namespace py = pybind11;
using namespace vmf::cpu;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Execution execution_of(const std::string& isa, Products products, int threads, double least_work) {
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + "; expected at least 1");
  return {isa_named(isa), products, threads, least_work};
}

Logits logits_of(const std::vector<Address>& pieces, int prototypes, std::ptrdiff_t stride) {
  if (pieces.size() > Logits::MOST_PIECES)
    throw std::invalid_argument(std::to_string(pieces.size()) + " pieces of logits; expected at most " +
                                std::to_string(Logits::MOST_PIECES));
  Logits logits{{}, prototypes, stride};
  for (std::size_t i = 0; i < pieces.size(); ++i) logits.pieces[i] = pointer<float>(pieces[i]);
  return logits;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The streaming operator on a CPU (csrc/cpu); vmf_kernels.backends.native checks what it passes in.";
  m.attr("ROW_PADDING") = ROW_PADDING;
  m.attr("MOST_PIECES") = Logits::MOST_PIECES;
  py::enum_<Products>(m, "Products", py::module_local()).value("fp32", Products::fp32).value("bf16", Products::bf16);
  py::enum_<Stored>(m, "Stored", py::module_local())
      .value("fp32", Stored::fp32)
      .value("bf16", Stored::bf16)
      .value("fp16", Stored::fp16);
  py::enum_<Norms>(m, "Norms", py::module_local())
      .value("free", Norms::free)
      .value("fixed", Norms::fixed)
      .value("magnitude", Norms::magnitude);

  py::class_<Execution>(m, "Execution", py::module_local())
      .def(py::init(&execution_of), py::kw_only(), py::arg("isa"), py::arg("products"), py::arg("threads"),
           py::arg("least_work"));
  py::class_<Weight>(m, "Weight", py::module_local())
      .def(py::init([](Address data, Stored stored, std::ptrdiff_t stride, int prototypes, int dim) {
             return Weight{pointer<const void>(data), stored, stride, prototypes, dim};
           }),
           py::kw_only(), py::arg("data"), py::arg("stored"), py::arg("stride"), py::arg("prototypes"), py::arg("dim"));
  py::class_<Logits>(m, "Logits", py::module_local())
      .def(py::init(&logits_of), py::kw_only(), py::arg("pieces"), py::arg("prototypes"), py::arg("stride"));
  py::class_<Score>(m, "Score", py::module_local())
      .def(py::init([](const Weight& weight, Address bias, Address features, float uniform, float row_factor, int rows,
                       const Logits& logits, Address top, Address mass, Address moment, Address other_bias, Norms norms,
                       Address magnitude, Address norm, Address gain) {
             return Score{weight,
                          pointer<const float>(bias),
                          pointer<const float>(features),
                          uniform,
                          row_factor,
                          rows,
                          logits,
                          pointer<float>(top),
                          pointer<float>(mass),
                          pointer<float>(moment),
                          pointer<const float>(other_bias),
                          nullptr,
                          nullptr,
                          norms,
                          pointer<const float>(magnitude),
                          pointer<float>(norm),
                          pointer<float>(gain)};
           }),
           py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("features"),
           py::arg("uniform"), py::arg("row_factor"), py::arg("rows"), py::arg("logits"), py::arg("top"), py::arg("mass"), py::arg("moment"),
           py::arg("other_bias") = 0, py::arg("norms") = Norms::free, py::arg("magnitude") = 0, py::arg("norm") = 0,
           py::arg("gain") = 0);
  py::class_<PullBack>(m, "PullBack", py::module_local())
      .def(py::init([](Norms norms, Address norm, Address magnitude, Address slope, Address magnitude_gradient) {
             return PullBack{norms, pointer<const float>(norm), pointer<const float>(magnitude),
                             pointer<const float>(slope), pointer<float>(magnitude_gradient)};
           }),
           py::kw_only(), py::arg("norms"), py::arg("norm"), py::arg("magnitude"), py::arg("slope"),
           py::arg("magnitude_gradient"));
  py::class_<Gather>(m, "Gather", py::module_local())
      .def(py::init([](const Weight& weight, Address gain, const Logits& logits, std::ptrdiff_t teacher_column,
                       int student_rows, int teacher_rows, int images, int student_views, int teacher_views,
                       Address student_top, Address student_mass, Address student_moment, Address teacher_top,
                       Address teacher_mass, Address teacher_moment, Address view_weights, Address image_weights,
                       Address features, float scale, Address feature_gradient, Address weight_gradient,
                       Address bias_gradient, Address usage, bool first, const PullBack* pull_back, Address column_top,
                       Address column_mass) {
             return Gather{weight,
                           pointer<const float>(gain),
                           logits,
                           teacher_column,
                           student_rows,
                           teacher_rows,
                           images,
                           student_views,
                           teacher_views,
                           pointer<const float>(student_top),
                           pointer<const float>(student_mass),
                           pointer<const float>(student_moment),
                           pointer<const float>(teacher_top),
                           pointer<const float>(teacher_mass),
                           pointer<const float>(teacher_moment),
                           pointer<const float>(view_weights),
                           pointer<const float>(image_weights),
                           pointer<const float>(features),
                           scale,
                           pointer<float>(feature_gradient),
                           pointer<float>(weight_gradient),
                           pointer<float>(bias_gradient),
                           pointer<float>(usage),
                           first,
                           pull_back,
                           nullptr,
                           nullptr,
                           pointer<float>(column_top),
                           pointer<float>(column_mass)};
           }),
           py::keep_alive<1, 26>(), py::kw_only(), py::arg("weight"), py::arg("gain"), py::arg("logits"),
           py::arg("teacher_column"), py::arg("student_rows"), py::arg("teacher_rows"), py::arg("images"),
           py::arg("student_views"), py::arg("teacher_views"), py::arg("student_top"), py::arg("student_mass"),
           py::arg("student_moment"), py::arg("teacher_top"), py::arg("teacher_mass"), py::arg("teacher_moment"),
           py::arg("view_weights"), py::arg("image_weights"), py::arg("features"), py::arg("scale"),
           py::arg("feature_gradient"), py::arg("weight_gradient"), py::arg("bias_gradient"), py::arg("usage"),
           py::arg("first"), py::arg("pull_back").none(true), py::arg("column_top") = 0, py::arg("column_mass") = 0);
  py::class_<Sums>(m, "Sums", py::module_local())
      .def_readonly("student_entropy", &Sums::student_entropy)
      .def_readonly("teacher_entropy", &Sums::teacher_entropy)
      .def_readonly("weight", &Sums::weight);

  m.def("available", [] {
    std::vector<std::string> names;
    for (const Isa isa : available()) names.emplace_back(name_of(isa));
    return names;
  });
  m.def("score_workspace", &score_workspace);
  m.def(
      "score", [](const Score& s, const Execution& run, Address workspace) { score(s, run, pointer<void>(workspace)); },
      py::call_guard<py::gil_scoped_release>());
  m.def("gather_workspace", &gather_workspace);
  m.def(
      "gather",
      [](const Gather& g, const Execution& run, Address workspace) { return gather(g, run, pointer<void>(workspace)); },
      py::call_guard<py::gil_scoped_release>());
  m.def("step_workspace", &step_workspace);
  m.def(
      "step",
      [](const Score& student, const Score& teacher, const Gather& g, const Execution& run, Address workspace) {
        return step(student, teacher, g, run, pointer<void>(workspace));
      },
      py::call_guard<py::gil_scoped_release>());
  py::class_<StoredLogits>(m, "StoredLogits", py::module_local())
      .def(py::init([](const Logits& logits, int prototypes, int rows) { return StoredLogits{logits, prototypes, rows}; }),
           py::kw_only(), py::arg("logits"), py::arg("prototypes"), py::arg("rows"));
  m.def("stored_workspace", &stored_workspace);
  m.def(
      "sum_over_prototypes",
      [](const StoredLogits& s, Address bias, Address result, const Execution& run, Address workspace) {
        sum_over_prototypes(s, pointer<const float>(bias), pointer<float>(result), run, pointer<void>(workspace));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "sum_over_rows",
      [](const StoredLogits& s, Address offset, Address result, const Execution& run, Address workspace) {
        sum_over_rows(s, pointer<const float>(offset), pointer<float>(result), run, pointer<void>(workspace));
      },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "dot",
      [](Address a, Address b, std::size_t count) { return dot(pointer<const float>(a), pointer<const float>(b), count); },
      py::call_guard<py::gil_scoped_release>());
}
