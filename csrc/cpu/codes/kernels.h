// The inner loops of the search by codes, one set for each vector path.
//
// Codes are multiplied in words of four bytes: four key codes of one byte where the processor
// multiplies bytes (VNNI: unsigned times signed, so key codes are shifted by 128), elsewhere two of
// 16 bits. Sums are whole numbers, exact in any order, so there is nothing to keep in step.
#pragma once

#include <cstdint>

#include "cpu/codes/bound.h"
#include "cpu/search/kernels.h"

namespace knnext::cpu {

constexpr int kFewCodeRows = 4;  // queries that rows of codes are multiplied with at once

struct CodeTile {
  const int32_t* products;  // (rows, panel keys)
  KeyTerms keys;            // of the panel
  int rows;
  uint32_t first_key;
};

struct CodeKernels {
  int tile_rows;    // queries of one register tile; both as plan/cpu.cpp has them
  int panel_keys;   // keys of one register tile
  int word_codes;   // dimensions of a word: 4 or 2
  int key_shift;    // what was added to key codes in a panel
  int block_codes;  // that a vector of words holds

  // Walsh-Hadamard transform of x (n,), n a power of two, without its factor.
  void (*hadamard)(float* x, int64_t n);
  // Rows of codes, `stride` apart, into a panel (words, panel_keys); no codes after the last row.
  void (*pack)(const int8_t* rows, int64_t stride, int num_rows, int64_t dim, uint32_t* panel);
  // products (rows, panel_keys) of a query tile (words, tile_rows) and a panel; `start` (rows,)
  // makes good the shift.
  void (*multiply)(const uint32_t* tile, const int32_t* start, const uint32_t* panel, int64_t words,
                   int rows, int32_t* products);
  // The same of rows of codes where they lie, for few queries: (rows, query_words) words each,
  // zeros after the last code. Reads block_codes from wherever a row's last block begins.
  void (*multiply_rows)(const uint32_t* queries, int64_t query_words, const int32_t* start,
                        const int8_t* keys, int num_keys, int64_t dim, int rows, int32_t* products);
  // Appends keys whose lower bound lies below a query's threshold. Indexed by Metric.
  void (*filter[2])(const CodeTile& tile, const CodedForm& form, const Selection& selection,
                    CodedQuery* queries, QueryList* lists);

  int64_t words(int64_t dim) const { return (dim + word_codes - 1) / word_codes; }
};

const CodeKernels& code_kernels();  // those of isa()

extern const CodeKernels kPlainCodeKernels;
#if defined(__x86_64__)
extern const CodeKernels kAvx2CodeKernels;
extern const CodeKernels kAvx2VnniCodeKernels;
extern const CodeKernels kAvx512CodeKernels;
extern const CodeKernels kAvx512VnniCodeKernels;
#elif defined(__aarch64__)
extern const CodeKernels kNeonCodeKernels;
#endif

}  // namespace knnext::cpu
