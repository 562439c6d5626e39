// vmf_kernels._native: operator.h for Python, which passes tensors and keeps them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "tensors.h"

using namespace vmf::cpu;

namespace {

void* address(std::uintptr_t start) { return reinterpret_cast<void*>(start); }

Execution execution_of(const std::string& isa, Products products, int threads, double least_work) {
  if (threads < 1) throw std::invalid_argument("threads is " + std::to_string(threads) + "; expected at least 1");
  return {isa_named(isa), products, threads, least_work};
}

Norms norms_of(const std::string& kind) {
  if (kind == "linear") return Norms::free;
  if (kind == "normalized") return Norms::fixed;
  if (kind == "weight_norm") return Norms::magnitude;
  throw std::invalid_argument("prototypes are " + kind + "; expected linear, normalized or weight_norm");
}

Score score_of(py::handle weight, py::handle bias, py::handle features, float uniform, float row_factor,
               const py::tuple& logits, py::handle sums, py::handle other_bias, const std::string& norms, py::handle magnitude,
               py::handle found) {
  Score s{weight_of(weight)};
  const int count = s.weight.prototypes;
  s.rows = int(size_of(features, 0));
  s.bias = floats(bias, count);
  s.features = floats(features, std::size_t(s.rows) * s.weight.dim);
  s.uniform = uniform, s.row_factor = row_factor;
  s.logits = logits_of(logits, count, padded_rows(s.rows));
  s.top = floats(sums, std::size_t(3) * s.rows);
  if (s.top) s.mass = s.top + s.rows, s.moment = s.mass + s.rows;
  s.other_bias = floats(other_bias, count);
  s.norms = norms_of(norms);
  s.magnitude = floats(magnitude, count);
  s.norm = floats(found, std::size_t(2) * count);
  if (s.norm) s.gain = s.norm + count;
  return s;
}

PullBack pull_back_of(int prototypes, const std::string& norms, py::handle norm, py::handle magnitude, py::handle slope,
                      py::handle magnitude_gradient) {
  return {norms_of(norms), floats(norm, prototypes), floats(magnitude, prototypes), floats(slope, prototypes),
          floats(magnitude_gradient, prototypes)};
}

// [3, R] top, mass and moment.
void set_sums(py::handle sums, int rows, const float*& top, const float*& mass, const float*& moment) {
  top = floats(sums, std::size_t(3) * rows);
  if (top) mass = top + rows, moment = mass + rows;
}

Gather gather_of(py::handle weight, py::handle found, const py::tuple& logits, int teacher_column, int images,
                 py::handle student_sums, py::handle teacher_sums, py::handle view_weights, py::handle image_weights,
                 py::handle features, float scale, py::handle feature_gradient, py::handle weight_gradient,
                 py::handle bias_gradient, py::handle usage, py::handle columns, bool first, const PullBack* pull_back) {
  Gather g{weight_of(weight)};
  const int count = g.weight.prototypes, dim = g.weight.dim;
  g.teacher_views = int(size_of(view_weights, 0)), g.student_views = int(size_of(view_weights, 1)), g.images = images;
  g.student_rows = features.is_none() ? 0 : g.student_views * images, g.teacher_rows = g.teacher_views * images;
  const float* norm = floats(found, std::size_t(2) * count);
  if (norm) g.gain = norm + count;
  g.teacher_column = teacher_column;
  g.logits = logits_of(logits, count, teacher_column + padded_rows(g.teacher_rows));
  set_sums(student_sums, g.student_rows, g.student_top, g.student_mass, g.student_moment);
  set_sums(teacher_sums, g.teacher_rows, g.teacher_top, g.teacher_mass, g.teacher_moment);
  g.view_weights = floats(view_weights, std::size_t(g.teacher_views) * g.student_views);
  g.image_weights = floats(image_weights, images);
  g.features = floats(features, std::size_t(g.student_rows) * dim);
  g.scale = scale;
  g.feature_gradient = floats(feature_gradient, std::size_t(g.student_rows) * dim);
  g.weight_gradient = floats(weight_gradient, std::size_t(count) * dim);
  g.bias_gradient = floats(bias_gradient, count);
  g.usage = floats(usage, count);
  g.first = first, g.pull_back = pull_back;
  g.column_top = floats(columns, std::size_t(2) * count);
  if (g.column_top) g.column_mass = g.column_top + count;
  return g;
}

StoredLogits stored_of(const py::tuple& logits, int prototypes, int rows) {
  return {logits_of(logits, prototypes, padded_rows(rows)), prototypes, rows};
}

void define_tasks(py::module_& m) {
  const py::none none;
  py::class_<Execution>(m, "Execution", py::module_local())
      .def(py::init(&execution_of), py::kw_only(), py::arg("isa"), py::arg("products"), py::arg("threads"),
           py::arg("least_work"));
  py::class_<Score>(m, "Score", py::module_local())
      .def(py::init(&score_of), py::kw_only(), py::arg("weight"), py::arg("bias"), py::arg("features"), py::arg("uniform"),
           py::arg("row_factor"), py::arg("logits"), py::arg("sums"), py::arg("other_bias"), py::arg("norms"),
           py::arg("magnitude"), py::arg("found"));
  py::class_<PullBack>(m, "PullBack", py::module_local())
      .def(py::init(&pull_back_of), py::kw_only(), py::arg("prototypes"), py::arg("norms"), py::arg("norm"),
           py::arg("magnitude"), py::arg("slope"), py::arg("magnitude_gradient"));
  py::class_<Gather>(m, "Gather", py::module_local())
      .def(py::init(&gather_of), py::keep_alive<1, 19>(), py::kw_only(), py::arg("weight"), py::arg("found"), py::arg("logits"),
           py::arg("teacher_column"), py::arg("images"), py::arg("student_sums"), py::arg("teacher_sums"),
           py::arg("view_weights"), py::arg("image_weights"), py::arg("features") = none, py::arg("scale"),
           py::arg("feature_gradient") = none, py::arg("weight_gradient") = none, py::arg("bias_gradient") = none,
           py::arg("usage"), py::arg("columns"), py::arg("first") = false, py::arg("pull_back") = none);
  py::class_<StoredLogits>(m, "StoredLogits", py::module_local())
      .def(py::init(&stored_of), py::kw_only(), py::arg("logits"), py::arg("prototypes"), py::arg("rows"));
  py::class_<Sums>(m, "Sums", py::module_local())
      .def_readonly("student_entropy", &Sums::student_entropy)
      .def_readonly("teacher_entropy", &Sums::teacher_entropy)
      .def_readonly("weight", &Sums::weight);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The streaming operator on a CPU (csrc/cpu); it checks the tensors that it gets.";
  m.attr("ROW_PADDING") = ROW_PADDING;
  m.attr("MOST_PIECES") = Logits::MOST_PIECES;
  py::enum_<Products>(m, "Products", py::module_local()).value("fp32", Products::fp32).value("bf16", Products::bf16);
  define_tasks(m);

  m.def("available", [] {
    std::vector<std::string> names;
    for (const Isa isa : available()) names.emplace_back(name_of(isa));
    return names;
  });
  m.def("score_workspace", &score_workspace);
  m.def("gather_workspace", &gather_workspace);
  m.def("step_workspace", &step_workspace);
  m.def("stored_workspace", &stored_workspace);
  m.def("score", [](const Score& s, const Execution& run, std::uintptr_t workspace) {
    const py::gil_scoped_release released;
    score(s, run, address(workspace));
  });
  m.def("gather", [](const Gather& g, const Execution& run, std::uintptr_t workspace) {
    const py::gil_scoped_release released;
    return gather(g, run, address(workspace));
  });
  m.def("step",
        [](const Score& student, const Score& teacher, const Gather& g, const Execution& run, std::uintptr_t workspace) {
          const py::gil_scoped_release released;
          return step(student, teacher, g, run, address(workspace));
        });
  m.def("sum_over_prototypes",
        [](const StoredLogits& s, py::handle bias, py::handle result, const Execution& run, std::uintptr_t workspace) {
          const float* from = floats(bias, s.prototypes);
          float* to = floats(result, s.rows);
          const py::gil_scoped_release released;
          sum_over_prototypes(s, from, to, run, address(workspace));
        });
  m.def("sum_over_rows",
        [](const StoredLogits& s, py::handle offset, py::handle result, const Execution& run, std::uintptr_t workspace) {
          const float* from = floats(offset, s.rows);
          float* to = floats(result, s.prototypes);
          const py::gil_scoped_release released;
          sum_over_rows(s, from, to, run, address(workspace));
        });
  // From the sums of all chunks to means and the loss: `usage` [K] is divided by the weight of all pairs.
  m.def("conclude", [](py::handle usage, std::size_t prototypes, float weight, py::handle loss, float value, py::handle summary,
                       const std::array<float, 3>& means) {
    float* of = floats(usage, prototypes);
    for (std::size_t k = 0; k < prototypes; ++k) of[k] /= weight;
    *floats(loss, 1) = value;
    std::copy(means.begin(), means.end(), floats(summary, means.size()));
  });
  m.def("dot", [](py::handle a, py::handle b, std::size_t count) { return dot(floats(a, count), floats(b, count), count); });
}
