// scale_: gradient *= factor in place.
#include "isa.h"
#include "rows.h"

namespace frs::FRS_ISA {

double number(const void* data, DType dtype) { return one(data, dtype, 0); }

void scale_run(const Run& run, int64_t begin, int64_t end, double factor) {
  if (run.dtype == DType::f64) {
    auto* v = static_cast<double*>(run.data);
    for (int64_t i = begin; i < end; ++i) v[i] *= factor;
  } else if (run.dtype == DType::f32) {
    auto* v = static_cast<float*>(run.data);
    const auto narrow = static_cast<float>(factor);
    for (int64_t i = begin; i < end; ++i) v[i] *= narrow;
  } else {
    Buffer<float> wide;
    const auto narrow = static_cast<float>(factor);
    for (int64_t i = begin; i < end; i += ROW) {
      const int64_t size = at_most(ROW, end - i);
      auto* v = static_cast<uint16_t*>(run.data) + i;
      widen_run(wide.values, v, run.dtype, size);
      for (int64_t k = 0; k < size; ++k) wide.values[k] *= narrow;
      narrow_run(v, run.dtype, wide.values, size);
    }
  }
}

}  // namespace frs::FRS_ISA
