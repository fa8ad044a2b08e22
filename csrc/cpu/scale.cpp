// scale_: gradient *= factor in place.
#include "isa.h"
#include "rows.h"

namespace frs::FRS_ISA {

double number(const void* data, DType dtype) { return one(data, dtype, 0); }

namespace {

template <class S>
inline void scale_values(S* v, int64_t size, float factor) {
  int64_t i = 0;
  for (; i + WIDTH <= size; i += WIDTH) store_narrow(v + i, load_wide(v + i) * factor);
  if (i < size) store_narrow(v + i, load_wide(v + i, size - i) * factor, size - i);
}

}  // namespace

void scale_run(const Run& run, int64_t begin, int64_t end, double factor) {
  const auto narrow = static_cast<float>(factor);
  switch (run.dtype) {
    case DType::f32: return scale_values(static_cast<float*>(run.data) + begin, end - begin, narrow);
    case DType::bf16: return scale_values(static_cast<Bf16*>(run.data) + begin, end - begin, narrow);
    case DType::f16: return scale_values(static_cast<F16*>(run.data) + begin, end - begin, narrow);
    case DType::f64:
      for (auto* v = static_cast<double*>(run.data); begin < end; ++begin) v[begin] *= factor;
  }
}

}  // namespace frs::FRS_ISA
