// The search by codes with NEON, without torch: test_arm.py compiles this with the kernels and
// tests/ops/code_bounds.cpp for 64-bit ARM, and runs it under qemu. Products are whole numbers and
// transforms only add, so both must have the plain path's bits; bounds must hold.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

extern "C" {
int64_t code_query_limit(int path, int64_t dim);
void code_products(int path, int few, int64_t dim, int64_t num_queries, const int16_t* queries,
                   int64_t num_keys, const int8_t* keys, int32_t* out);
void code_hadamard(int path, float* row, int64_t dim);
void code_bounds(int path, int metric, int refined, int flush, int64_t dim, const float* center,
                 int64_t num_queries, const float* queries, int64_t num_keys, const float* keys,
                 float* distances, float* bounds, uint8_t* listed, double* ideal);
}

namespace {

constexpr int kNeon = 1;
std::mt19937 generator(11);
int failures = 0;
int64_t checked = 0;

void check(bool good, const char* what, int64_t dim) {
  ++checked;
  if (!good && ++failures <= 20) std::printf("FAILED %s at D = %ld\n", what, long(dim));
}

void check_products(int64_t dim) {
  const int64_t num_keys = 31, limit = code_query_limit(kNeon, dim);
  std::uniform_int_distribution<int> key_code(-127, 127), query_code(-int(limit), int(limit));
  std::vector<int8_t> keys((num_keys + 64) * dim + 64);
  for (int8_t& code : keys) code = int8_t(key_code(generator));
  for (int few : {0, 1})
    for (int64_t rows = 1; rows <= (few ? 4 : 8); ++rows) {
      std::vector<int16_t> queries(rows * dim);
      for (int16_t& code : queries) code = int16_t(query_code(generator));
      std::vector<int32_t> out(rows * num_keys);
      code_products(kNeon, few, dim, rows, queries.data(), num_keys, keys.data(), out.data());
      for (int64_t q = 0; q < rows; ++q)
        for (int64_t i = 0; i < num_keys; ++i) {
          int64_t exact = 0;
          for (int64_t d = 0; d < dim; ++d) exact += queries[q * dim + d] * keys[i * dim + d];
          check(out[q * num_keys + i] == exact, "product", dim);
        }
    }
}

std::vector<float> normal(int64_t n, float mean, float spread) {
  std::normal_distribution<float> draw(mean, spread);
  std::vector<float> out(n);
  for (float& x : out) x = draw(generator);
  return out;
}

void check_hadamard(int64_t dim) {
  std::vector<float> plain = normal(dim, 0, 1), neon = plain;
  code_hadamard(0, plain.data(), dim);
  code_hadamard(kNeon, neon.data(), dim);
  check(std::memcmp(plain.data(), neon.data(), dim * 4) == 0, "transform", dim);
}

void check_bounds(int64_t dim, float mean, float spread, bool flush) {
  const int64_t rows = 9, count = 100;
  std::vector<float> keys = normal(count * dim, mean, spread),
                     queries = normal(rows * dim, mean, spread);
  std::copy_n(keys.begin(), dim, queries.begin());
  keys[3 * dim] = std::nanf("");
  keys[5 * dim] = 1e30f;
  const std::vector<float> center(dim, mean);
  std::vector<float> distances(rows * count), bounds(rows * count);
  std::vector<uint8_t> listed(rows * count);
  std::vector<double> ideal(rows * count);
  for (int metric : {0, 1})
    for (int refined : {0, 1}) {
      code_bounds(kNeon, metric, refined, flush, dim, center.data(), rows, queries.data(), count,
                  keys.data(), distances.data(), bounds.data(), listed.data(), ideal.data());
      for (int64_t i = 0; i < rows * count; ++i) {
        if (!std::isfinite(distances[i])) continue;
        // Of a key that no code bounds, what every distance is above; 0 times infinity is not
        // asked.
        const double most = std::max<double>(ideal[i], std::numeric_limits<float>::lowest());
        check(listed[i] && bounds[i] <= distances[i] && !(bounds[i] > most), "bound", dim);
      }
    }
}

}  // namespace

int main() {
  for (int64_t dim : {1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129, 300}) check_products(dim);
  for (int64_t dim = 1; dim <= 4096; dim *= 2) check_hadamard(dim);
  for (int64_t dim : {1, 3, 64, 65, 300})
    for (bool flush : {false, true}) {
      check_bounds(dim, 0, 1, flush);
      check_bounds(dim, 100, 0.5f, flush);
      check_bounds(dim, 0, 1e-36f, flush);
    }
  std::printf("codes: %ld checks, %d failures\n", long(checked), failures);
  return failures != 0;
}
