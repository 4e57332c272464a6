// What Python offers the ops: its signals, looked at on the main thread alone, and its exceptions.
//
// Exceptions cross the ops and torch as pybind11's error_already_set, which torch's own bindings
// turn back into the Python exception that it holds. Its layout has been the same since pybind11
// 2.10; the tests see to it that this build's is torch's.
#include "host/python.h"

#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <pthread.h>
#endif

#include <exception>
#include <utility>

namespace py = pybind11;

namespace knnext {
namespace {

bool on_main_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();  // also in a child, whichever thread forked it
#else
  return pthread_main_np() != 0;
#endif
}

// What a handler raised, from wants_stop() to throw_stop(): on the main thread, with the loop that
// both ends in between.
std::exception_ptr raised;

bool wants_stop() {
  if (!on_main_thread() || !Py_IsInitialized()) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool stop = PyErr_CheckSignals() != 0;
  if (stop) raised = std::make_exception_ptr(py::error_already_set());
  PyGILState_Release(state);
  return stop;
}

void throw_stop() {
  std::rethrow_exception(std::exchange(raised, nullptr));
}

void throw_out_of_memory(const char* message) {
  const PyGILState_STATE state = PyGILState_Ensure();
  std::exception_ptr error;
  try {
    py::set_error(py::module_::import("torch").attr("OutOfMemoryError"), message);
    error = std::make_exception_ptr(py::error_already_set());
  } catch (...) {
    error = std::current_exception();
  }
  PyGILState_Release(state);
  std::rethrow_exception(error);
}

constexpr Caller kPython{wants_stop, throw_stop, throw_out_of_memory};

}  // namespace

const Caller* python_caller() {
  return &kPython;
}

}  // namespace knnext
