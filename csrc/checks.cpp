#include "checks.h"

#include <cmath>
#include <limits>

namespace knnext {
namespace {

constexpr std::initializer_list<ScalarType> kFloats = {ScalarType::Half, ScalarType::BFloat16,
                                                       ScalarType::Float};
constexpr std::initializer_list<ScalarType> kAllFloats = {ScalarType::Half, ScalarType::BFloat16,
                                                          ScalarType::Float, ScalarType::Double};

void check_queries_keys(const char* op, const Tensor& queries, const Tensor& keys,
                        std::initializer_list<ScalarType> dtypes = kFloats) {
  check_tensor(op, "queries", queries, dtypes, {-1, -1}, "(Q, D)");
  if (queries.size(1) < 1) fail(op, "queries must have D >= 1, got " + describe(queries));
  const std::string shape = "(N, " + number_text(queries.size(1)) + ")";
  check_tensor(op, "keys", keys, {queries.scalar_type()}, {-1, queries.size(1)}, shape);
  check_device(op, "keys", keys, "queries", queries);
}

void check_k(const char* op, int64_t k) {
  if (k < 1) fail(op, "k must be at least 1, got " + number_text(k));
}

void check_row_parameter(const char* op, const char* name, const Tensor& parameter,
                         const Tensor& distances) {
  const bool scalar = parameter.dim() == 0;
  const bool rows = parameter.dim() == 1 && parameter.size(0) == distances.size(0);
  if (!(scalar || rows) || !is_one_of(parameter.scalar_type(), kAllFloats))
    fail(op, std::string(name) + " must be a number or a " + dtype_names(kAllFloats) +
                 " tensor of shape () or (" + number_text(distances.size(0)) + ",), got " +
                 describe(parameter));
  check_device(op, name, parameter, "distances", distances);
}

}  // namespace

Metric parse_metric(const char* op, const std::string& metric) {
  if (metric == "l2") return Metric::kL2;
  if (metric == "ip") return Metric::kIp;
  fail(op, "metric must be \"l2\" or \"ip\", got \"" + metric + "\"");
}

SearchShape check_knn_search(const Tensor& queries, const Tensor& keys, int64_t k,
                             const std::string& metric, const std::optional<Tensor>& key_sqnorms,
                             int64_t index_offset, const std::optional<Tensor>& init_distances,
                             const std::optional<Tensor>& init_indices, const char* op) {
  check_queries_keys(op, queries, keys);
  check_k(op, k);
  SearchShape shape{queries.size(0), keys.size(0), queries.size(1), k, 0, parse_metric(op, metric)};
  if (key_sqnorms) {
    const std::string wanted = "(" + number_text(shape.num_keys) + ",)";
    check_tensor(op, "key_sqnorms", *key_sqnorms, {ScalarType::Float}, {shape.num_keys}, wanted);
    check_device(op, "key_sqnorms", *key_sqnorms, "queries", queries);
  }
  if (index_offset < 0)
    fail(op, "index_offset must be at least 0, got " + number_text(index_offset));
  const int64_t most = std::numeric_limits<int64_t>::max() - shape.num_keys;
  if (index_offset > most)
    fail(op, "index_offset must be at most 2^63 - 1 - N = " + number_text(most) + ", got " +
                 number_text(index_offset));
  if (init_distances.has_value() != init_indices.has_value())
    fail(op, std::string("init_distances and init_indices must be given together, got init_") +
                 (init_distances ? "distances" : "indices") + " alone");
  if (init_distances) {
    const std::string rows = "(" + number_text(shape.num_queries) + ", ";
    check_tensor(op, "init_distances", *init_distances, {ScalarType::Float},
                 {shape.num_queries, -1}, rows + "m)");
    shape.num_init = init_distances->size(1);
    check_tensor(op, "init_indices", *init_indices, {ScalarType::Long},
                 {shape.num_queries, shape.num_init}, rows + number_text(shape.num_init) + ")");
    check_device(op, "init_distances", *init_distances, "queries", queries);
    check_device(op, "init_indices", *init_indices, "queries", queries);
  }
  return shape;
}

SearchShape check_knn_search_codes(const Tensor& queries, const Tensor& keys, const Tensor& codes,
                                   const Tensor& code_stats, const Tensor& center, int64_t k,
                                   const std::string& metric,
                                   const std::optional<Tensor>& key_sqnorms, int64_t index_offset,
                                   const std::optional<Tensor>& init_distances,
                                   const std::optional<Tensor>& init_indices) {
  const char* op = "knn_search_codes";
  const SearchShape shape = check_knn_search(queries, keys, k, metric, key_sqnorms, index_offset,
                                             init_distances, init_indices, op);
  const std::string rows = "(" + number_text(shape.num_keys) + ", ", dim = number_text(shape.dim);
  check_tensor(op, "codes", codes, {ScalarType::Char}, {shape.num_keys, shape.dim},
               rows + dim + ")");
  check_tensor(op, "code_stats", code_stats, {ScalarType::Float}, {shape.num_keys, 3}, rows + "3)");
  check_tensor(op, "center", center, {ScalarType::Float}, {shape.dim}, "(" + dim + ",)");
  check_device(op, "codes", codes, "queries", queries);
  check_device(op, "code_stats", code_stats, "queries", queries);
  check_device(op, "center", center, "queries", queries);
  return shape;
}

void check_encode_keys(const Tensor& keys, const Tensor& center) {
  const char* op = "encode_keys";
  check_tensor(op, "keys", keys, kFloats, {-1, -1}, "(N, D)");
  if (keys.size(1) < 1) fail(op, "keys must have D >= 1, got " + describe(keys));
  check_tensor(op, "center", center, {ScalarType::Float}, {keys.size(1)},
               "(" + number_text(keys.size(1)) + ",)");
  check_device(op, "center", center, "keys", keys);
}

void check_key_sqnorms(const Tensor& keys) {
  check_tensor("key_sqnorms", "keys", keys, kFloats, {-1, -1}, "(N, D)");
  if (keys.size(1) < 1) fail("key_sqnorms", "keys must have D >= 1, got " + describe(keys));
}

Metric check_rescore(const Tensor& queries, const Tensor& keys, const Tensor& indices,
                     const std::string& metric) {
  check_queries_keys("rescore", queries, keys, queries.is_cuda() ? kFloats : kAllFloats);
  check_tensor("rescore", "indices", indices, {ScalarType::Long}, {queries.size(0), -1},
               "(" + number_text(queries.size(0)) + ", m)");
  check_device("rescore", "indices", indices, "queries", queries);
  return parse_metric("rescore", metric);
}

void check_merge_topk(const Tensor& distances, const Tensor& indices, int64_t k) {
  const char* op = "merge_topk";
  check_tensor(op, "distances", distances, {ScalarType::Float}, {-1, -1}, "(Q, m)");
  check_tensor(op, "indices", indices, {ScalarType::Long}, {distances.size(0), distances.size(1)},
               shape_text(distances));
  check_device(op, "indices", indices, "distances", distances);
  check_k(op, k);
}

MixShape check_neighbors(const char* op, const Tensor& distances, const Tensor& tokens) {
  const auto wide_too = {ScalarType::Float, ScalarType::Double};
  if (distances.is_cuda())
    check_tensor(op, "distances", distances, {ScalarType::Float}, {-1, -1}, "(Q, k)");
  else
    check_tensor(op, "distances", distances, wide_too, {-1, -1}, "(Q, k)");
  check_tensor(op, "tokens", tokens, {ScalarType::Long, ScalarType::Int},
               {distances.size(0), distances.size(1)}, shape_text(distances));
  check_device(op, "tokens", tokens, "distances", distances);
  return {distances.size(0), distances.size(1), 0, distances.scalar_type() == ScalarType::Double};
}

void check_vocab_size(const char* op, int64_t vocab_size) {
  if (vocab_size < 1) fail(op, "vocab_size must be at least 1, got " + number_text(vocab_size));
}

void check_lm_logits(const char* op, const Tensor& lm_logits, const Tensor& distances) {
  check_tensor(op, "lm_logits", lm_logits, kAllFloats, {distances.size(0), -1},
               "(" + number_text(distances.size(0)) + ", V)");
  if (lm_logits.size(1) < 1) fail(op, "lm_logits must have V >= 1, got " + describe(lm_logits));
  check_device(op, "lm_logits", lm_logits, "distances", distances);
}

void check_targets(const char* op, const Tensor& targets, const Tensor& distances) {
  check_tensor(op, "targets", targets, {ScalarType::Long, ScalarType::Int}, {distances.size(0)},
               "(" + number_text(distances.size(0)) + ",)");
  check_device(op, "targets", targets, "distances", distances);
}

void check_temperature(const char* op, double temperature, const Tensor&) {
  if (!(temperature > 0) || !std::isfinite(temperature))
    fail(op, "temperature must be a finite number above 0, got " + number_text(temperature));
}

void check_temperature(const char* op, const Tensor& temperature, const Tensor& distances) {
  check_row_parameter(op, "temperature", temperature, distances);
}

void check_lmbda(const char* op, double lmbda, const Tensor&) {
  if (!(lmbda >= 0 && lmbda <= 1)) fail(op, "lmbda must lie in [0, 1], got " + number_text(lmbda));
}

void check_lmbda(const char* op, const Tensor& lmbda, const Tensor& distances) {
  check_row_parameter(op, "lmbda", lmbda, distances);
}

void check_output_rows(const char* op, const char* name, const Tensor& rows,
                       const Tensor& distances) {
  check_tensor(op, name, rows, {distances.scalar_type()}, {distances.size(0)},
               "(" + number_text(distances.size(0)) + ",)");
  check_device(op, name, rows, "distances", distances);
}

void check_output(const char* op, const char* name, const Tensor& output, const Tensor& distances,
                  int64_t vocab_size) {
  check_tensor(op, name, output, {distances.scalar_type()}, {distances.size(0), vocab_size},
               "(" + number_text(distances.size(0)) + ", V)");
  check_device(op, name, output, "distances", distances);
}

void check_order(const Tensor& order, const Tensor& indices) {
  const int64_t places = indices.size(0) * indices.size(1);
  check_tensor("rescore", "order", order, {ScalarType::Long}, {places}, "(Q m,)");
  check_device("rescore", "order", order, "indices", indices);
}

void check_rescore_grad(const Tensor& grad, const Tensor& queries, const Tensor& indices) {
  const bool wide = queries.scalar_type() == ScalarType::Double;
  check_tensor("rescore", "grad", grad, {wide ? ScalarType::Double : ScalarType::Float},
               {indices.size(0), indices.size(1)}, shape_text(indices));
  check_device("rescore", "grad", grad, "indices", indices);
}

}  // namespace knnext
