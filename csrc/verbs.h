// What ops.cpp hands to a backend: plain structs, checked and allocated, and the three verbs that take them.
//
//     score     S_p = max_k sigmoid(z_pk),  M_l = sum_p S_p
//     imitate   loss_l = sum_p share_p sum_c value(x_pc, z_pc),  share_p = S_p / norm_l  (0 where norm_l is 0)
//               gradient = weight * factor * share_p * slope(x_pc, z_pc)
//     scale_    gradient *= factor
#pragma once

#include <cstdint>

#include "pointwise.h"

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

struct Imitate {
  const Level* levels;
  int64_t count;
  DType dtype;        // what is computed in, and of total and per_level: f32 or f64
  DType score_dtype;  // of scores and norm: f32 or f64
  const void* scores;
  const void* norm;
  const void* factor;  // a number on the device, or null for 1
  DType factor_dtype;
  double weight, temperature;
  Loss loss;
  bool want_grad;
  void* total;      // null where the loss is not wanted
  void* per_level;  // one a level
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

// A backend implements these. `workspace` has as many bytes as the verb's *_workspace says, aligned to 16; `stream` is
// the device's queue, unused on a CPU.
int64_t score_workspace(const Score&);
int64_t imitate_workspace(const Imitate&);
void score(const Score&, void* workspace, void* stream);
void imitate(const Imitate&, void* workspace, void* stream);
void scale(const Scale&, void* stream);

}  // namespace frs
