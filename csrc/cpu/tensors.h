// Tensors of torch, read through Python: the module is built without torch and fits any version of it.
//
// Every pointer that the operator gets comes from `floats` or `weight_of`, so a tensor that does not fit is an error, not an
// access beyond its memory. Whoever calls keeps the tensors alive.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "operator.h"

namespace vmf::cpu {

namespace py = pybind11;

// What is looked up once and kept for the life of the process.
struct Torch {
  py::object tensor, parameter, dispatch, fp32, bf16, fp16;
  PyObject *dtype = name("dtype"), *is_cpu = name("is_cpu"), *shape = name("shape"), *numel = name("numel"),
           *stride = name("stride"), *is_contiguous = name("is_contiguous"), *data_ptr = name("data_ptr"),
           *torch_dispatch = name("__torch_dispatch__");

  static const Torch& get() {
    static const Torch* const kept = new Torch;  // never freed: at exit Python may be gone
    return *kept;
  }

 private:
  Torch() {
    const py::module_ torch = py::module_::import("torch");
    tensor = torch.attr("Tensor"), parameter = torch.attr("nn").attr("Parameter");
    dispatch = tensor.attr("__torch_dispatch__");
    fp32 = torch.attr("float32"), bf16 = torch.attr("bfloat16"), fp16 = torch.attr("float16");
  }
  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }
};

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
inline py::object attribute(py::handle of, PyObject* name) { return checked(PyObject_GetAttr(of.ptr(), name)); }
inline py::object result_of(py::handle of, PyObject* method) { return checked(PyObject_CallMethodNoArgs(of.ptr(), method)); }
inline std::size_t number_of(py::handle of, PyObject* method) {
  const std::size_t number = PyLong_AsSize_t(result_of(of, method).ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  return number;
}
inline std::ptrdiff_t number_at(const py::object& sizes, int index) {
  const std::ptrdiff_t number = PyLong_AsSsize_t(py::reinterpret_borrow<py::tuple>(sizes)[index].ptr());
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  return number;
}
inline std::ptrdiff_t size_of(py::handle tensor, int dim) { return number_at(attribute(tensor, Torch::get().shape), dim); }

[[noreturn]] inline void refuse(py::handle tensor, const std::string& expected) {
  const py::object got = py::str("{} of shape {} and strides {} on {}")
                             .format(tensor.attr("dtype"), py::list(tensor.attr("shape")), py::list(tensor.attr("stride")()),
                                     tensor.attr("device"));
  throw std::runtime_error("the native module was about to get " + got.cast<std::string>() + "; expected " + expected +
                           " (a fault of vmf_kernels: please report it)");
}

// Whether its memory holds its values: a subclass with its own dispatch may keep them elsewhere.
inline bool is_plain(py::handle tensor) {
  const Torch& torch = Torch::get();
  const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())));
  if (!type.is(torch.tensor) && !type.is(torch.parameter) && !attribute(type, torch.torch_dispatch).is(torch.dispatch))
    return false;
  return attribute(tensor, torch.is_cpu).ptr() == Py_True;
}

// The first of `count` adjacent fp32 numbers; null for None.
inline float* floats(py::handle tensor, std::size_t count) {
  if (tensor.is_none()) return nullptr;
  const Torch& torch = Torch::get();
  if (is_plain(tensor) && attribute(tensor, torch.dtype).is(torch.fp32) && number_of(tensor, torch.numel) == count &&
      result_of(tensor, torch.is_contiguous).ptr() == Py_True) {
    float* first = reinterpret_cast<float*>(number_of(tensor, torch.data_ptr));
    if (first || !count) return first;
  }
  refuse(tensor, std::to_string(count) + " contiguous fp32 numbers on the CPU");
}

// Stored prototypes, [K, D]; elements of a row must be adjacent.
inline Weight weight_of(py::handle tensor) {
  const Torch& torch = Torch::get();
  const py::object dtype = attribute(tensor, torch.dtype), shape = attribute(tensor, torch.shape);
  const bool stored = dtype.is(torch.fp32) || dtype.is(torch.bf16) || dtype.is(torch.fp16);
  const void* data = stored && is_plain(tensor) ? reinterpret_cast<const void*>(number_of(tensor, torch.data_ptr)) : nullptr;
  if (!data || py::len(shape) != 2) refuse(tensor, "a matrix of fp32, bf16 or fp16");
  const py::object strides = result_of(tensor, torch.stride);
  const std::ptrdiff_t prototypes = number_at(shape, 0), dim = number_at(shape, 1), stride = number_at(strides, 0);
  if (number_at(strides, 1) != 1 || (prototypes > 1 && stride < dim))
    refuse(tensor, "rows of adjacent elements that do not overlap");
  const Stored as = dtype.is(torch.fp32) ? Stored::fp32 : dtype.is(torch.bf16) ? Stored::bf16 : Stored::fp16;
  return {data, as, stride, int(prototypes), int(dim)};
}

// Logits of so many prototypes and columns: `given` is a list of tensors, [prototypes of a piece, stride], and the first
// column.
inline Logits logits_of(const py::tuple& given, int prototypes, std::ptrdiff_t columns) {
  const py::list pieces = given[0];
  const std::ptrdiff_t first = given[1].cast<std::ptrdiff_t>();
  Logits logits{{}, 1, 0};
  if (pieces.empty()) return logits;
  if (pieces.size() > Logits::MOST_PIECES)
    throw std::invalid_argument(std::to_string(pieces.size()) + " pieces of logits; expected at most " +
                                std::to_string(Logits::MOST_PIECES));
  logits.prototypes = int(size_of(pieces[0], 0)), logits.stride = size_of(pieces[0], 1);
  const std::ptrdiff_t most = logits.prototypes * std::ptrdiff_t(pieces.size());
  if (prototypes > most || first + columns > logits.stride)
    throw std::runtime_error("logits have room for " + std::to_string(logits.stride) + " columns of " + std::to_string(most) +
                             " prototypes, not for more");
  for (int i = 0, left = prototypes; left > 0; left -= logits.prototypes, ++i)
    logits.pieces[i] = floats(pieces[i], std::size_t(std::min(logits.prototypes, left)) * logits.stride) + first;
  return logits;
}

}  // namespace vmf::cpu
