// What ops.cpp hands to a backend: plain structs, checked and allocated, and the verbs that take them.
//
//     score     S_p = max_k sigmoid(z_pk),  M_l = sum_p S_p
//     imitate   value_e  = sum_p share_p sum_c value(x_pc, z_pc)   of an entry, share_p = scale S_p / (norm_l + eps)
//                                                                  joint: norm_l is the sum of all levels' norms
//                                                                  softmax_kl has a value a group, not a channel
//               value_t  = the sum of its entries' values           of a term
//               total    = sum_t weight_t factor_t value_t
//               gradient = weight_t factor_t share_p slope(x_pc, z_pc)
//     scale_    gradient *= factor
//     moments   value_l = scale_l times the mean over a level's rows, total = weight factor sum_l value_l, and of every
//               row the numbers that its gradient needs (row_losses.h)
//     moments_backward   gradient = weight factor slope(s, t, numbers)
#pragma once

#include <cstdint>

#include "pointwise.h"
#include "row_losses.h"

namespace frs {

enum class DType : int32_t { f32, f64, bf16, f16 };

// One tensor (N, C, H, W) of a level: strides in elements. Positions count h * W + w; p is their stride, or -1 where
// rows are apart so that they have none.
struct View {
  void* data;
  int64_t n, c, h, w, p;
  DType dtype;
};

struct Level {
  int64_t n, c, h, w;           // sizes
  int64_t first;                // its first position in the flat scores
  bool interleaved;             // in what order the first operand's memory is walked: channels innermost, or positions
  View student, teacher, grad;  // score reads the teacher alone; grad.data is null where it is not wanted

  FRS_INLINE int64_t positions() const { return h * w; }  // of one image
};

struct Score {
  const Level* levels;
  int64_t count;
  DType dtype;   // of scores and mass: f32 or f64
  void* scores;  // one a position, level after level
  void* mass;    // one a level
};

// What the entries of a term have in common.
struct Term {
  Loss loss;
  double weight;
  const void* factor;  // a number on the device, or null for 1
  DType factor_dtype;
  double temperature;  // 1 where the loss takes no logits
  double beta;         // of a loss of groups how many channels each has; 0: all of an entry's
};

// A student's tensor and its teacher.
struct Entry : Level {
  int64_t level, term;
  double scale, eps;
  int64_t group = 0;  // of a loss of groups: how many channels each has
};

struct Imitate {
  const Entry* entries;
  int64_t count;
  const Term* terms;
  int64_t term_count;
  DType dtype;        // what is computed in, and of total and values: f32 or f64
  DType score_dtype;  // of scores and norm: f32 or f64
  const void* scores;
  const void* norm;  // one a level
  int64_t joint;     // how many levels, where every entry's norm is the sum of theirs, else 0
  void* total;       // null where the losses are not wanted
  void* values;      // one a term, then one an entry
};

struct Run {  // a dense tensor as a flat run of numbers
  void* data;
  int64_t size;
  DType dtype;
};

struct Scale {
  const Run* runs;
  int64_t count;
  const void* factor;  // a number on the device
  DType factor_dtype;
};

struct Moments {
  const Level* levels;  // first: the number of a level's first row
  int64_t count;
  RowLoss loss;
  const double* scale;  // one a level
  double weight, temperature, eps;
  const void* factor;  // a number on the device, or null for 1
  DType factor_dtype;
  DType dtype;  // what is computed in, and of total, values and rows: f32 or f64
  void* total;
  void* values;  // their sum, then one a level
  void* rows;    // NUMBERS a row
};

struct MomentsBackward {
  const Level* levels;
  int64_t count;
  RowLoss loss;
  double weight, temperature;
  const void* factor;
  DType factor_dtype;
  DType dtype;  // what is computed in, and of rows
  const void* rows;
};

// A backend implements these. `workspace` has as many bytes as the verb's *_workspace says, aligned to 16; `stream` is
// the device's queue, unused on a CPU. distill is score, then imitate with its scores and its mass as the norm, in one
// workspace.
int64_t score_workspace(const Score&);
int64_t imitate_workspace(const Imitate&);
int64_t distill_workspace(const Score&, const Imitate&);
void score(const Score&, void* workspace, void* stream);
void imitate(const Imitate&, void* workspace, void* stream);
void distill(const Score&, const Imitate&, void* workspace, void* stream);
void scale(const Scale&, void* stream);
int64_t moments_workspace(const Moments&);
void moments(const Moments&, void* workspace, void* stream);
void moments_backward(const MomentsBackward&, void* stream);

}  // namespace frs
