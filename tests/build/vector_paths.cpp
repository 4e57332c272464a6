// Compares the NEON path with the plain one, to the bit, without torch: test_arm.py compiles this
// with the kernels for 64-bit ARM and runs it under qemu. Every product is summed in one order, so
// nothing may differ but the payload of a NaN.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/isa.h"
#include "cpu/search/candidates.h"
#include "cpu/search/kernels.h"
#include "cpu/vector/row_loops.h"

using namespace knnext::cpu;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kDims[] = {1, 3, 4, 7, 16, 63, 64, 65, 127, 128, 129, 300};
constexpr int64_t kLengths[] = {0, 1, 3, 4, 5, 15, 16, 17, 33, 1023, 1024, 1025, 2050};

int failures = 0;
int64_t checked = 0;
std::mt19937 generator(7);

void complain(const char* what, int64_t at, double got, double wanted) {
  if (++failures <= 20)
    std::printf("FAILED %s at %ld: %.9g, not %.9g\n", what, long(at), got, wanted);
}

template <class T>
bool same_bits(T a, T b) {
  return (a != a && b != b) || std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class T>
void same(const char* what, const T* got, const T* wanted, int64_t n) {
  for (int64_t i = 0; i < n; ++i, ++checked)
    if (!same_bits(got[i], wanted[i])) complain(what, i, got[i], wanted[i]);
}

std::vector<float> normal(int64_t n, float scale = 1.0f) {
  std::normal_distribution<float> draw(0.0f, scale);
  std::vector<float> out(n);
  for (float& x : out) x = draw(generator);
  return out;
}

// Rows of one element type, made from float32 by the plain path.
std::vector<char> rows_of(Element element, const std::vector<float>& x) {
  const int64_t bytes = element == Element::kFloat ? 4 : 2;
  std::vector<char> out(x.size() * bytes + 64);
  kSumLoopsPlain.narrow[int(element)](x.data(), int64_t(x.size()), out.data());
  return out;
}

// Products, norms and lists of `queries` against `keys`, whatever the path's register tile.
struct Scores {
  std::vector<float> products, sqnorms;
  std::vector<uint64_t> entries;
};

Scores scores(const SearchKernels& kernels, Element element, const std::vector<char>& queries,
              int num_queries, const std::vector<char>& keys, int num_keys, int64_t dims) {
  const int64_t bytes = element == Element::kFloat ? 4 : 2, stride = dims + 5;
  Scores out{std::vector<float>(num_queries * num_keys), std::vector<float>(num_keys), {}};
  const int width = kernels.panel_keys;
  for (int first = 0; first < num_keys; first += width) {
    const int count = std::min(width, num_keys - first);
    std::vector<float> panel(dims * width), norms(width), products(kMaxTileRows * width);
    kernels.pack[int(element)](keys.data() + first * stride * bytes, stride, count, dims,
                               panel.data());
    kernels.sqnorms(panel.data(), dims, norms.data());
    std::copy_n(norms.data(), count, out.sqnorms.data() + first);
    std::fill(norms.begin() + count, norms.end(), kInf);
    for (int q = 0; q < num_queries; q += kernels.tile_rows) {
      const int rows = std::min(kernels.tile_rows, num_queries - q);
      std::vector<float> tile(dims * kernels.tile_rows), row(dims);
      std::vector<std::vector<uint64_t>> memory(rows, std::vector<uint64_t>(256));
      std::vector<QueryList> lists;
      for (int i = 0; i < rows; ++i) {
        kernels.widen[int(element)](queries.data() + (q + i) * stride * bytes, dims, row.data());
        for (int64_t d = 0; d < dims; ++d) tile[d * kernels.tile_rows + i] = row[d];
        lists.push_back({memory[i].data(), 0, 2.0f * dims, float(dims), 1.0f});
      }
      kernels.multiply(tile.data(), panel.data(), dims, rows, products.data());
      for (int i = 0; i < rows; ++i)
        std::copy_n(products.data() + i * width, count,
                    out.products.data() + (q + i) * num_keys + first);
      // Where NaN is the least, the keys holding it are listed too.
      const bool nan_is_least = dims % 2;
      kernels.filter(
          {products.data(), norms.data(), rows, uint32_t(first), -2.0f, 0.0f, nan_is_least},
          {64, 128}, lists.data());
      for (const QueryList& list : lists)
        out.entries.insert(out.entries.end(), list.entries, list.entries + list.size);
    }
  }
  std::sort(out.entries.begin(), out.entries.end());
  return out;
}

// A sweep's distances are those of the direct form; its products and norms are those of plain
// lanes.
void check_sweeps(Element element, int64_t dims, const std::vector<char>& queries,
                  const std::vector<char>& keys) {
  const int64_t stride = dims + 5, bytes = stride * (element == Element::kFloat ? 4 : 2);
  const int e = int(element), num_queries = 7, num_keys = 8;  // fewer than either path's panel
  std::vector<float> wide(num_queries * dims);
  for (int q = 0; q < num_queries; ++q)
    kPlainKernels.widen[e](queries.data() + q * bytes, dims, wide.data() + q * dims);
  for (int form = 0; form < 3; ++form) {
    std::vector<float> scores[2], norms[2];
    int path = 0;
    for (const SearchKernels* kernels : {&kPlainKernels, &kNeonKernels}) {
      const int width = kernels->panel_keys;
      std::vector<float> out(num_queries * width, 0.0f), sqnorms(width, 0.0f);
      kernels->sweep[form][e]({keys.data(), stride, num_keys, dims, wide.data(), num_queries,
                               out.data(), sqnorms.data()});
      for (int q = 0; q < num_queries; ++q)
        scores[path].insert(scores[path].end(), &out[q * width], &out[q * width] + num_keys);
      norms[path++].assign(sqnorms.begin(), sqnorms.begin() + num_keys);
    }
    same("sweep", scores[1].data(), scores[0].data(), num_queries * num_keys);
    same("sweep's norms", norms[1].data(), norms[0].data(), num_keys);
    for (int q = 0; form < 2 && q < num_queries; ++q)
      for (int key = 0; key < num_keys; ++key) {
        const auto direct = form ? kNeonKernels.direct_ip[e] : kNeonKernels.direct_l2[e];
        const float wanted = direct(&wide[q * dims], keys.data() + key * bytes, dims);
        same("sweep and direct", &scores[1][q * num_keys + key], &wanted, 1);
      }
  }
}

void check_tiles(Element element, int64_t dims) {
  const int num_queries = 11, num_keys = 31;  // no multiple of any register tile
  std::vector<float> x = normal((num_keys + 1) * (dims + 5));
  x[dims / 2] = kInf;
  x[2 * (dims + 5)] = std::nanf("");
  const auto queries = rows_of(element, normal((num_queries + 1) * (dims + 5)));
  const auto keys = rows_of(element, x);
  const auto plain = scores(kPlainKernels, element, queries, num_queries, keys, num_keys, dims);
  const auto neon = scores(kNeonKernels, element, queries, num_queries, keys, num_keys, dims);
  same("products", neon.products.data(), plain.products.data(), num_queries * num_keys);
  same("sqnorms", neon.sqnorms.data(), plain.sqnorms.data(), num_keys);
  if (neon.entries != plain.entries || plain.entries.empty())
    complain("filter", dims, double(neon.entries.size()), double(plain.entries.size()));

  const std::vector<float> query = normal(dims);
  const int e = int(element);
  const int64_t stride = (dims + 5) * (element == Element::kFloat ? 4 : 2);
  for (int key = 0; key < num_keys; ++key) {
    const void* row = keys.data() + key * stride;
    const float neon_d[] = {kNeonKernels.direct_l2[e](query.data(), row, dims),
                            kNeonKernels.direct_ip[e](query.data(), row, dims)};
    const float plain_d[] = {kPlainKernels.direct_l2[e](query.data(), row, dims),
                             kPlainKernels.direct_ip[e](query.data(), row, dims)};
    same("direct", neon_d, plain_d, 2);
  }
  check_sweeps(element, dims, queries, keys);
}

// Every half and bfloat16 to float32, and floats of every kind to both.
void check_conversions() {
  std::vector<uint16_t> all(65536);
  for (int i = 0; i < 65536; ++i) all[i] = uint16_t(i);
  std::vector<float> a(65536), b(65536), c(65536), d(65536);
  for (int kind : {0, 1}) {
    kSumLoopsPlain.widen[kind](all.data(), 65536, a.data());
    kSumLoopsNeon.widen[kind](all.data(), 65536, b.data());
    kNeonKernels.widen[kind](all.data(), 65536, c.data());
    kPlainKernels.widen[kind](all.data(), 65536, d.data());
    same("widen, row loops", b.data(), a.data(), 65536);
    same("widen, tiles", c.data(), a.data(), 65536);
    same("widen, plain tiles", d.data(), a.data(), 65536);
    // Between neighbors, at the middle (a tie) and beside it; and any bits at all.
    std::vector<float> x;
    for (int i = 0; i < 65535; ++i) {
      const float middle = a[i] / 2 + a[i + 1] / 2;
      for (float y : {a[i], middle, std::nextafter(middle, kInf), std::nextafter(middle, -kInf)})
        x.push_back(y);
    }
    for (int i = 0; i < 200000; ++i) {
      const uint32_t bits = generator();
      float y;
      std::memcpy(&y, &bits, 4);
      x.push_back(y);
    }
    const int64_t n = int64_t(x.size());
    std::vector<uint16_t> plain(n), neon(n);
    kSumLoopsPlain.narrow[kind](x.data(), n, plain.data());
    kSumLoopsNeon.narrow[kind](x.data(), n, neon.data());
    std::vector<float> plain_back(n), neon_back(n);
    kSumLoopsPlain.widen[kind](plain.data(), n, plain_back.data());
    kSumLoopsPlain.widen[kind](neon.data(), n, neon_back.data());
    same(kind ? "narrow to bfloat16" : "narrow to half", neon_back.data(), plain_back.data(), n);
  }
}

// In ulp of the float32 result.
void check_accuracy(const char* what, void (*loop)(float*, int64_t), double (*exact)(double),
                    const std::vector<float>& x, double most) {
  std::vector<float> y = x;
  loop(y.data(), int64_t(y.size()));
  for (size_t i = 0; i < x.size(); ++i, ++checked) {
    const double wanted = exact(x[i]);
    const double ulp = std::nextafter(std::fabs(float(wanted)), kInf) - std::fabs(float(wanted));
    if (std::fabs(y[i] - wanted) > most * ulp) complain(what, int64_t(i), y[i], wanted);
  }
}

void check_exp_and_log() {
  std::vector<float> x, positive;
  for (int i = 0; i <= 200000; ++i) x.push_back(-87.0f * i / 200000);
  for (int i = 0; i <= 200000; ++i) positive.push_back(std::exp2(-126.0 + 253.9 * i / 200000));
  for (const auto& loops : {kRowLoopsPlain, kRowLoopsNeon}) {
    check_accuracy("exp", loops.exp, std::exp, x, 1.0);
    check_accuracy("log", loops.log, std::log, positive, 2.0);
  }
}

template <class F>
void check_map(const char* what, const std::vector<float>& x, F run) {
  std::vector<float> plain = x, neon = x;
  run(kRowLoopsPlain, plain.data());
  run(kRowLoopsNeon, neon.data());
  same(what, neon.data(), plain.data(), int64_t(x.size()));
}

void check_row_loops(int64_t n) {
  std::vector<float> x = normal(n, 20.0f), y = normal(n), distances(n);
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; ++i) {
    x[i] = i % 7 == 5 ? -kInf : -std::fabs(x[i]);
    distances[i] = std::fabs(y[i]) * 30;
    ids[i] = i % 5 == 4 ? -1 : int32_t(generator() % 9);
  }
  const std::vector<int64_t> wide_ids(ids.begin(), ids.end());
  check_map("exp", x, [&](const RowLoops<float>& l, float* v) { l.exp(v, n); });
  check_map("log", distances, [&](const RowLoops<float>& l, float* v) { l.log(v, n); });
  check_map("log_add_exp", x,
            [&](const RowLoops<float>& l, float* v) { l.log_add_exp(v, y.data(), n); });
  std::vector<Survey<float>> surveys;
  check_map("clean", x, [&](const RowLoops<float>& l, float* v) {
    surveys.push_back(l.clean_int32(distances.data(), ids.data(), n, v));
    surveys.push_back(l.clean_int64(distances.data(), wide_ids.data(), n, v));
  });
  for (const auto& s : surveys)
    if (!same_bits(s.nearest, surveys[0].nearest) || s.has_nan != surveys[0].has_nan ||
        s.lowest != surveys[0].lowest || s.highest != surveys[0].highest)
      complain("survey", n, s.nearest, surveys[0].nearest);
  check_map("match", x, [&](const RowLoops<float>& l, float* v) {
    const float nearest = l.match_int32(distances.data(), ids.data(), 3, n, v);
    if (n) v[0] += nearest == kInf ? 0 : nearest;
  });
  const double sums[] = {kRowLoopsPlain.sum_exp(distances.data(), n, 0.5f, 3.0f),
                         kRowLoopsNeon.sum_exp(distances.data(), n, 0.5f, 3.0f)};
  same("sum_exp", sums + 1, sums, 1);

  const std::vector<double> wide(x.begin(), x.end());
  const auto half = rows_of(Element::kHalf, x), brain = rows_of(Element::kBFloat16, x);
  const void* logits[] = {half.data(), brain.data(), x.data(), wide.data()};
  std::vector<int64_t> at(n);
  for (int64_t i = 0; i < n; ++i) at[i] = n - 1 - i;
  for (int kind = 0; kind < 4; ++kind) {
    const auto plain = kRowLoopsPlain.max_sum[kind](logits[kind], n);
    const auto neon = kRowLoopsNeon.max_sum[kind](logits[kind], n);
    same("max", &neon.max, &plain.max, 1);
    same("sum", &neon.sum, &plain.sum, 1);
    const auto plain_g = kRowLoopsPlain.grad_sums[kind](logits[kind], y.data(), n);
    const auto neon_g = kRowLoopsNeon.grad_sums[kind](logits[kind], y.data(), n);
    same("grad_sums", &neon_g.all, &plain_g.all, 1);
    same("grad_sums, live", &neon_g.live, &plain_g.live, 1);
    check_map("shift", y, [&](const RowLoops<float>& l, float* v) {
      l.shift[kind](logits[kind], n, 1.5f, 0.25f, v);
    });
    check_map("gather", y, [&](const RowLoops<float>& l, float* v) {
      l.gather[kind](logits[kind], at.data(), n, v);
    });
    for (const bool scatter : {false, true})
      check_map(scatter ? "scatter" : "logit_gradient", y, [&](const RowLoops<float>& l, float* v) {
        std::vector<double> out(n + 1);
        if (scatter)
          l.scatter[kind](y.data(), at.data(), n, out.data());
        else
          l.logit_gradient[kind](logits[kind], y.data(), n, 0.5f, 0.75f, 0.3f, out.data());
        kRowLoopsPlain.gather[kind](out.data(), at.data(), n, v);
      });
  }
  for (int kind = 0; kind < 3; ++kind)
    for (const bool difference : {false, true}) {
      std::vector<float> plain = y, neon = y;
      for (const bool first : {true, false}) {
        const SumLoops& loops = first ? kSumLoopsPlain : kSumLoopsNeon;
        float* sum = first ? plain.data() : neon.data();
        if (difference)
          loops.add_difference[kind](distances.data(), logits[kind], n, 0.3f, sum);
        else
          loops.add[kind](logits[kind], n, 0.3f, sum);
      }
      same("sums of rows", neon.data(), plain.data(), n);
    }
}

}  // namespace

int main() {
  for (const Element element : {Element::kHalf, Element::kBFloat16, Element::kFloat})
    for (const int64_t dims : kDims) check_tiles(element, dims);
  check_conversions();
  check_exp_and_log();
  for (const int64_t n : kLengths) check_row_loops(n);
  const bool chosen = isa() == Isa::kNeon && &search_kernels() == &kNeonKernels &&
                      &row_loops<float>() == &kRowLoopsNeon && &sum_loops() == &kSumLoopsNeon;
  if (!chosen) complain("the chosen path", 0, double(int(isa())), double(int(Isa::kNeon)));
  std::printf("%s: %ld values, %d failures\n", name(isa()), long(checked), failures);
  return failures != 0;
}
