// The vector maths of the CPU backend, one function each, for test_cpu.py to compare with fp64.
#include "cpu/rows.h"

using namespace frs;
using namespace frs::FRS_ISA;

namespace {

template <class F>
void each(const float* in, float* out, int64_t size, const F& f) {
  for (int64_t i = 0; i < size; i += WIDTH) store(out + i, f(load<F32>(in + i)));
}

}  // namespace

// `size` is a multiple of 16, the widest vector.
extern "C" {

int width() { return WIDTH; }

void probe_exp_neg(const float* a, float* out, int64_t size) {
  each(a, out, size, [](F32 v) { return exp_neg(v); });
}

// Of x against -x / 2, x / 2 and x itself, one after another.
void probe_slope(const float* x, float* out, int64_t size) {
  each(x, out, size, [](F32 v) { return bernoulli<false>(v, v * -0.5f).slope; });
  each(x, out + size, size, [](F32 v) { return bernoulli<false>(v, v * 0.5f).slope; });
  each(x, out + 2 * size, size, [](F32 v) { return bernoulli<false>(v, v).slope; });
}

void probe_log1p(const float* e, float* out, int64_t size) {
  each(e, out, size, [](F32 v) { return Primitives<F32>::log1p(v); });
}

void probe_sigmoid(const float* x, float* out, int64_t size) {
  each(x, out, size, [](F32 v) { return sigmoid(v); });
}

// Any size: the end that fills no vector is part of what is tested.
void probe_widen(const void* in, int dtype, float* out, int64_t size) {
  Buffer<float> buffer;
  for (int64_t i = 0; i < size; i += ROW) {
    const int64_t part = at_most(ROW, size - i);
    widen_run(buffer.values, static_cast<const uint16_t*>(in) + i, static_cast<DType>(dtype), part);
    memcpy(out + i, buffer.values, part * sizeof(float));
  }
}

void probe_narrow(const float* in, int dtype, void* out, int64_t size) {
  Buffer<float> buffer;
  for (int64_t i = 0; i < size; i += ROW) {
    const int64_t part = at_most(ROW, size - i);
    memcpy(buffer.values, in + i, part * sizeof(float));
    narrow_run(static_cast<uint16_t*>(out) + i, static_cast<DType>(dtype), buffer.values, part);
  }
}
}
