// The Python module _C: build_info() and nothing else. No torch header is included, so it loads wherever
// Python does and can explain why the operator libraries do not.
#include <pybind11/pybind11.h>

#include "build_record.h"  // kBuildRecord, written by setup.py

namespace py = pybind11;

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

const char* architecture() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "other";
#endif
}

py::dict build_info() {
  py::dict info = py::module_::import("json").attr("loads")(kBuildRecord);
  info["compiler"] = compiler();
  info["architecture"] = architecture();
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about how the compiled operations were built.";
  module.def("build_info", &build_info, "What was built, with what, and why something was not.");
}
