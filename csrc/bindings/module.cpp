// The border between Python and the core, and the only file that includes pybind11: a table of contents.
// Every entry names its arguments, releases the interpreter's lock, calls the core, and returns. Policy is Python's.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <system_error>

#include "xlm_ds/error.hpp"
#include "xlm_ds/index_format.hpp"

namespace py = pybind11;

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
}
