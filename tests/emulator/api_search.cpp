// knn_search on the emulator, with the plan's choices open to a test: small shapes can then meet
// what only large ones would.
#include <stdexcept>
#include <vector>

#include "cuda/search/params.h"
#include "emulator/api.h"

using namespace knnext;

namespace {

// As tests/emulator/test_search.py writes it.
struct Options {
  int64_t dtype, num_queries, num_keys, dim, k, inner_product, index_offset, num_init, refine;
  int64_t query_stride, key_stride;
  int64_t shape, resident;  // shape 0: the plan's own, 4, 5: Hopper's; resident -1: the plan's own
  int64_t chunk_keys, queries_per_pass;  // 0: the plan's own
  int64_t num_units, stride, second, rank, capacity, fail_all, owners, owner_words;
  int64_t stages;      // of kernel sm90_owner; 0: the plan's own
  int64_t cluster;     // of kernel sm90_filter; 0: its own choice
  int64_t num_failed;  // out: queries that took the path that cannot fail
};

void choose(const Options& o, CudaSearchPlan& plan) {
  if (o.shape == 4) {
    plan.kernel.kernel = ScanKernel::kSm90Owner;
    if (o.stages) plan.owner.stages = static_cast<int>(o.stages);
  } else if (o.shape == 5) {
    plan.kernel.kernel = ScanKernel::kSm90Filter;
  } else if (o.shape) {
    plan.shape = o.shape == 1 ? kScanFew : o.shape == 2 ? kScanSmall : kScanLarge;
    plan.resident = false;
  }
  if (o.resident >= 0) plan.resident = o.resident;
  const int64_t row = o.dim * (o.dtype == 2 ? 4 : 2);
  plan.shared_bytes = scan_shared_bytes(plan.shape, row, plan.resident);
  if (o.chunk_keys) {
    plan.chunk_keys = o.chunk_keys;
    plan.num_chunks = (o.num_keys + o.chunk_keys - 1) / o.chunk_keys;
  }
  if (o.queries_per_pass) plan.queries_per_pass = o.queries_per_pass;
  if (o.owners) plan.owners = o.owners;
  if (o.owner_words) plan.owner_words = o.owner_words;
}

}  // namespace

// From now on mma.sync adds as the tensor cores of this architecture do; wgmma is sm_90's.
EMULATED emulate_tensor_core(int64_t sm) {
  return emulate::guarded(0, [=] {
    emulate::settings.tensor_core = sm < 90 ? emulate::TensorCore{8, 24} : emulate::TensorCore{};
  });
}

EMULATED emulate_knn_search(uint64_t seed, Options* o, const void* queries, const void* keys,
                            const float* key_sqnorms, const float* init_distances,
                            const int64_t* init_indices, float* distances, int64_t* indices) {
  return emulate::guarded(seed, [=] {
    KnnSearchParams p{};
    p.queries = queries;
    p.keys = keys;
    p.query_stride = o->query_stride;
    p.key_stride = o->key_stride;
    p.num_queries = o->num_queries;
    p.num_keys = o->num_keys;
    p.dim = o->dim;
    p.k = o->k;
    p.dtype = static_cast<Dtype>(o->dtype);
    p.inner_product = o->inner_product;
    p.key_sqnorms = key_sqnorms;
    p.index_offset = o->index_offset;
    p.init_distances = init_distances;
    p.init_indices = init_indices;
    p.num_init = o->num_init;
    p.refine = o->refine;
    p.distances = distances;
    p.indices = indices;
    p.num_units = static_cast<int>(o->num_units);
    p.switches = {o->stride, o->second, o->rank, o->capacity, o->fail_all != 0, o->cluster};
    p.extras = search_extras(p);
    if (o->chunk_keys)
      p.extras.merge_columns = std::max(p.extras.merge_columns, 2 * p.k + p.num_init);
    const int bytes = p.dtype == Dtype::kFloat ? 4 : 2;
    p.plan = plan_cuda_search({p.num_queries, p.num_keys, p.dim, p.k, bytes, 9, 0, p.num_units},
                              p.extras);
    choose(*o, p.plan);
    const int64_t size = plan_cuda_buffers(p.plan, p.k, p.extras).bytes;
    std::vector<uint64_t> workspace(size / 8 + 32, ~uint64_t{0});
    p.workspace = reinterpret_cast<unsigned char*>(workspace.data());
    const unsigned long long before = failed_queries();
    knn_search_launch(p, nullptr);
    o->num_failed = static_cast<int64_t>(failed_queries() - before);
    for (int64_t i = size / 8; i < static_cast<int64_t>(workspace.size()); ++i)
      if (workspace[i] != ~uint64_t{0}) throw std::runtime_error("wrote behind the workspace");
  });
}
