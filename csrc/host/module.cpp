// The pybind11 module knnext._host: what was built, and the host arithmetic behind the search.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "host/python.h"
#include "plan/cuda.h"
#include "plan/search.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

py::list names(const std::vector<knnext::cpu::Isa>& paths) {
  py::list list;
  for (const auto isa : paths) list.append(knnext::cpu::name(isa));
  return list;
}

py::dict build_info() {
  return py::dict("version"_a = KNNEXT_VERSION, "torch_version"_a = KNNEXT_TORCH_VERSION,
                  "torch_target"_a = "2.10", "cuda_version"_a = KNNEXT_CUDA_VERSION,
                  "cuda_archs"_a = KNNEXT_CUDA_ARCHS, "compiler"_a = __VERSION__,
                  "vector_paths"_a = names(knnext::cpu::built_paths()));
}

std::string plan_text(const knnext::SearchPlan& plan) {
  return "SearchPlan(kernel='" + plan.kernel + "', tiles=" + std::to_string(plan.query_tile) + "x" +
         std::to_string(plan.key_tile) + "x" + std::to_string(plan.dim_tile) +
         ", passes=" + std::to_string(plan.num_passes) +
         ", workspace_bytes=" + std::to_string(plan.workspace_bytes) + ")";
}

// What a test says, or what the process may choose from.
knnext::Sm90 hopper(const std::optional<std::string>& wish) {
  return wish ? knnext::sm90_switch(*wish) : knnext::built_sm90();
}

py::list scan_crossovers() {
  int count = 0;
  const knnext::ScanCrossover* rows = knnext::scan_crossovers(count);
  py::list table;
  for (const auto* row = rows; row != rows + count; ++row)
    table.append(py::dict("kernel"_a = knnext::name_of(row->kernel),
                          "min_queries"_a = row->min_queries, "max_queries"_a = row->max_queries,
                          "min_keys"_a = row->min_keys, "basis"_a = row->basis,
                          "reason"_a = row->reason));
  return table;
}

py::dict plan_cuda(int64_t queries, int64_t entries, int64_t dim, int64_t k, int element_bytes,
                   std::pair<int, int> capability, int num_units, int64_t merge_columns,
                   bool key_norms, std::optional<std::string> sm90, bool aligned) {
  const knnext::CudaSearchExtras extras{merge_columns, 0, key_norms};
  const knnext::CudaSearchPlan plan =
      knnext::plan_cuda_search({queries, entries, dim, k, element_bytes, capability.first,
                                capability.second, num_units, hopper(sm90), aligned},
                               extras);
  py::list steps;
  for (int i = 0; i < plan.num_steps; ++i) {
    const knnext::ScanStep& step = plan.steps[i];
    steps.append(py::dict("rows"_a = step.rows, "wanted"_a = step.wanted,
                          "capacity"_a = step.capacity, "dense"_a = step.dense,
                          "strides"_a = std::pair(step.strides[0], step.strides[1])));
  }
  return py::dict(
      "kernel"_a = knnext::name_of(plan.kernel.kernel), "because"_a = plan.kernel.because,
      "owner_query_tile"_a = plan.owner.query_tile, "owner_stages"_a = plan.owner.stages,
      "owner_shared_bytes"_a = plan.owner.shared_bytes, "shape"_a = plan.shape.name,
      "query_tile"_a = plan.shape.query_tile, "resident"_a = plan.resident,
      "shared_bytes"_a = plan.shared_bytes, "fallback_shared_bytes"_a = plan.fallback_shared_bytes,
      "chunk_keys"_a = plan.chunk_keys, "num_chunks"_a = plan.num_chunks,
      "queries_per_pass"_a = plan.queries_per_pass, "num_passes"_a = plan.num_passes,
      "list_words"_a = plan.list_words, "owners"_a = plan.owners,
      "owner_words"_a = plan.owner_words, "steps"_a = steps,
      "shared_limit"_a = knnext::max_shared_bytes(capability.first, capability.second),
      "workspace_bytes"_a = plan.workspace_bytes);
}

void bind_plan(py::module_& m) {
  using knnext::SearchPlan;
  using knnext::ThresholdSample;
  py::class_<ThresholdSample>(m, "ThresholdSample")
      .def_readonly("sample", &ThresholdSample::sample)
      .def_readonly("rank", &ThresholdSample::rank)
      .def_readonly("capacity", &ThresholdSample::capacity)
      .def_readonly("expected", &ThresholdSample::expected);
  py::class_<SearchPlan>(m, "SearchPlan")
      .def(py::init([](int64_t queries, int64_t entries, int64_t dim, int64_t k, int element_bytes,
                       std::pair<int, int> capability, int num_units,
                       std::optional<std::string> sm90, bool aligned) {
             return knnext::plan_search({queries, entries, dim, k, element_bytes, capability.first,
                                         capability.second, num_units, hopper(sm90), aligned});
           }),
           py::kw_only(), "queries"_a, "entries"_a, "dim"_a, "k"_a, "element_bytes"_a = 2,
           "capability"_a = std::pair<int, int>(0, 0), "num_units"_a = 1, "sm90"_a = py::none(),
           "aligned"_a = true,
           "How a search would run. capability is the GPU's, (0, 0) for the CPU; num_units its\n"
           "multiprocessors, or the CPU's threads; sm90 what KNNEXT_SM90 says, \"0\", \"1\" or\n"
           "\"all\" (None: the variable itself, where the kernels were built); aligned whether "
           "rows\n"
           "start at multiples of 16 bytes.")
      .def_readonly("kernel", &SearchPlan::kernel)
      .def_readonly("because", &SearchPlan::because)
      .def_readonly("query_tile", &SearchPlan::query_tile)
      .def_readonly("key_tile", &SearchPlan::key_tile)
      .def_readonly("dim_tile", &SearchPlan::dim_tile)
      .def_readonly("queries_per_pass", &SearchPlan::queries_per_pass)
      .def_readonly("num_passes", &SearchPlan::num_passes)
      .def_readonly("threshold", &SearchPlan::threshold)
      .def_readonly("workspace_bytes", &SearchPlan::workspace_bytes)
      .def_readonly("bytes_read", &SearchPlan::bytes_read)
      .def_readonly("flop", &SearchPlan::flop)
      .def("__repr__", &plan_text);
  m.def("plan_threshold", &knnext::plan_threshold, "num_keys"_a, "k"_a);
  m.def("scan_crossovers", &scan_crossovers,
        "Which kernel scans the keys: the first row that holds decides.");
  m.def("plan_cuda", &plan_cuda, py::kw_only(), "queries"_a, "entries"_a, "dim"_a, "k"_a,
        "element_bytes"_a = 2, "capability"_a = std::pair<int, int>(9, 0), "num_units"_a = 132,
        "merge_columns"_a = 0, "key_norms"_a = true, "sm90"_a = py::none(), "aligned"_a = true,
        "Every size that the CUDA search works with, as a dict; for tests.");
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host side of knnext: what was built, and the plan of a search.";
  m.def("build_info", &build_info, "Versions, architectures and vector paths of this build.");
  m.def(
      "cpu_isa", [] { return knnext::cpu::name(knnext::cpu::isa()); },
      "The vector path in use, one of build_info()'s vector_paths.");
  m.def(
      "best_cpu_isa", [] { return knnext::cpu::name(knnext::cpu::best_isa()); },
      "The widest vector path of this processor.");
  m.def(
      "usable_cpu_isas", [] { return names(knnext::cpu::usable_paths()); },
      "Those of build_info()'s vector_paths that this processor has, the narrowest first.");
  m.def(
      "caller", [] { return reinterpret_cast<uintptr_t>(knnext::python_caller()); },
      "Address of what a library of ops is given by its knnext_set_caller.");
  m.def(
      "raise_out_of_memory",
      [](const std::string& message) {
        knnext::python_caller()->throw_out_of_memory(message.c_str());
      },
      "message"_a, "As the CUDA ops do where memory ends; for tests.");
  bind_plan(m);
}
