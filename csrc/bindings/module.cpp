// The border between Python and the core, and the only file that includes pybind11: a table of contents.
// Every entry names its arguments, releases the interpreter's lock, calls the core, and returns. Policy is Python's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <optional>
#include <system_error>

#include "xlm_ds/bpe.hpp"
#include "xlm_ds/error.hpp"
#include "xlm_ds/index_format.hpp"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

/// std::system_error carries an errno: as OSError(errno, message) Python makes FileNotFoundError and its kin of it.
void translate_system_error(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::system_error& e) {
    const py::object exception = py::reinterpret_borrow<py::object>(PyExc_OSError)(e.code().value(), e.what());
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "the C++ core of xlm_ds; its contract is _core.pyi";
  py::register_exception<xlm_ds::InputError>(m, "InputError", PyExc_ValueError);
  py::register_exception_translator(&translate_system_error);

  using Unlock = py::call_guard<py::gil_scoped_release>;

  // bpe
  py::class_<xlm_ds::Bpe>(m, "Bpe")
      .def(py::init<const std::filesystem::path&, const std::optional<std::filesystem::path>&>(), "codes_path"_a,
           "vocab_path"_a = py::none(), Unlock())
      .def("apply_line", [](const xlm_ds::Bpe& bpe, const py::bytes& line) { return py::bytes(bpe.apply(line)); }, "line"_a)
      .def("apply_file", &xlm_ds::Bpe::apply_file, "input_path"_a, "output_path"_a, "threads"_a = 1, Unlock());
  m.def("count_words", &xlm_ds::count_words, "paths"_a, "output_path"_a, Unlock());
}
