// What the driver computes on: numbers of every dtype, tensors of every layout in memory of exactly their size, and the
// comparison that counts the failures.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "verbs.h"

namespace {

using namespace frs;
using Real = long double;

std::mt19937_64 rng;
int failures = 0, checks = 0;
Real worst = 0;  // error over bound

int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }
double normal(double mean, double spread) { return std::normal_distribution<double>(mean, spread)(rng); }

constexpr DType DTYPES[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
const char* const NAMES[] = {"f32", "f64", "bf16", "f16"};
int bytes(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }
int mantissa(DType d) { return d == DType::f64 ? 52 : d == DType::f32 ? 23 : d == DType::bf16 ? 7 : 10; }
int least_exponent(DType d) { return d == DType::f64 ? -1022 : d == DType::f16 ? -14 : -126; }
Real roundoff(DType d) { return std::ldexp(Real(1), -mantissa(d) - 1); }

Real ulp(Real v, DType d) {
  const int e = v == 0 ? least_exponent(d) : std::max(std::ilogb(v), least_exponent(d));
  return std::ldexp(Real(1), e - mantissa(d));
}

double read(const void* at, DType d) {
  if (d == DType::f64) return *static_cast<const double*>(at);
  if (d == DType::f32) return *static_cast<const float*>(at);
  if (d == DType::f16) return static_cast<double>(*static_cast<const _Float16*>(at));
  const uint32_t bits = uint32_t(*static_cast<const uint16_t*>(at)) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

void write(void* at, DType d, double v) {
  if (d == DType::f64) *static_cast<double*>(at) = v;
  if (d == DType::f32) *static_cast<float*>(at) = static_cast<float>(v);
  if (d == DType::f16) *static_cast<_Float16*>(at) = static_cast<_Float16>(v);
  if (d != DType::bf16) return;
  const float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  *static_cast<uint16_t*>(at) = static_cast<uint16_t>(bits >> 16);
}

void expect(bool good, const std::string& what, Real got, Real want, Real bound) {
  ++checks;
  if (good) return;
  if (++failures <= 20)
    std::fprintf(stderr, "FAILED %s: %.9Lg, not %.9Lg within %.3Lg\n", what.c_str(), got, want, bound);
}

// `rounding` is half an ulp of a result that is rounded once more, to its own dtype.
void near(Real got, Real want, Real bound, const std::string& what, Real rounding = 0) {
  const Real error = std::fabs(got - want) - rounding;
  const bool good = std::isnan(want) ? std::isnan(got) : error <= bound;
  if (good && !std::isnan(want) && bound > 0) worst = std::max(worst, error / bound);
  expect(good, what, got, want, bound + rounding);
}

enum Layout {
  contiguous,
  channels_last,
  misaligned,
  misaligned_last,
  batch_gap,
  batch_gap_last,
  packed_rows,
  channel_gap,
  channel_gap_last,
  rows_apart,
  every_other,
  transposed,
  LAYOUTS,
  far_images = LAYOUTS,
  far_channels
};
const char* const LAYOUT_NAMES[] = {"contiguous",     "channels_last", "misaligned",  "misaligned_last",  "batch_gap",
                                    "batch_gap_last", "packed_rows",   "channel_gap", "channel_gap_last", "rows_apart",
                                    "every_other",    "transposed",    "far_images",  "far_channels"};
bool is_last(Layout l) {
  return l == channels_last || l == misaligned_last || l == channel_gap_last || l == batch_gap_last || l == packed_rows;
}

struct Shape {
  int64_t n, c, h, w;
  int64_t positions() const { return h * w; }
};

struct Tensor {
  Shape shape;
  Layout layout;
  View view{};
  std::unique_ptr<char[], void (*)(char*)> memory{nullptr, [](char* p) { delete[] p; }};
  std::vector<char> before;  // nothing where images or channels are far apart
  int64_t size = 0;          // bytes

  Tensor(Shape s, DType dtype, Layout l) : shape(s), layout(l) {
    view.dtype = dtype;
    const auto [n, c, h, w] = s;
    int64_t lead = 0;
    switch (layout) {
      case channels_last:
      case misaligned_last: strides(h * w * c, 1, w * c, c); break;
      case channel_gap: strides(c * (h * w + 8), h * w + 8, w, 1); break;             // 8: lines stay aligned
      case channel_gap_last: strides(h * w * (c + 3), 1, w * (c + 3), c + 3); break;  // 3: rows of odd length
      case batch_gap_last: strides(h * w * c + 1, 1, w * c, c); break;
      case packed_rows: strides((h * w + 5) * c, 1, w * c, c); break;  // of (N, P, C)
      case batch_gap: strides((c + 1) * h * w + 1, h * w, w, 1); break;
      case rows_apart: strides(c * h * (w + 2), h * (w + 2), w + 2, 1); break;
      case every_other: strides(c * h * 2 * w, h * 2 * w, 2 * w, 2); break;
      case transposed: strides(c * h * w, h * w, 1, h); break;
      default: strides(c * h * w, h * w, w, 1);
    }
    if (layout == far_images) view.n = (int64_t(1) << 31) + 8;
    if (layout == far_channels) view.c = (int64_t(1) << 31) + 8, view.n = c * view.c;
    if (layout == misaligned || layout == misaligned_last) lead = 1;
    const bool empty = n * h * w == 0;
    const int64_t span = empty ? 0 : 1 + (n - 1) * view.n + (c - 1) * view.c + (h - 1) * view.h + (w - 1) * view.w;
    size = (lead + span) * bytes(dtype);
    if (is_far()) {
      void* map = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (map == MAP_FAILED) std::exit(77);
      memory = {static_cast<char*>(map), [](char*) {}};
    } else {
      memory.reset(new char[size]);
      std::memset(memory.get(), 0xff, size);  // NaN in every dtype
    }
    view.data = memory.get() + lead * bytes(dtype);
    view.p = h == 1 || w == 1 || view.h == w * view.w ? (w == 1 ? view.h : view.w) : -1;
    if (h * w == 1) view.p = is_last(layout) ? c : 1;
    if (c == 1 && is_last(layout)) view.c = 1;
    // The strides of axes of size 1 mean nothing.
    if (n == 1) view.n = 12345678901;
    if (c == 1 && !is_last(layout)) view.c = 12345678901;
    if (h == 1) view.h = 12345678901;
    if (w == 1) view.w = 12345678901;
  }
  void strides(int64_t n, int64_t c, int64_t h, int64_t w) { view.n = n, view.c = c, view.h = h, view.w = w; }
  void* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t i = (shape.n > 1) * n * view.n + (shape.c > 1) * c * view.c + (shape.h > 1) * h * view.h +
                      (shape.w > 1) * w * view.w;
    return static_cast<char*>(view.data) + i * bytes(view.dtype);
  }
  double get(int64_t n, int64_t c, int64_t p) const { return read(at(n, c, p / shape.w, p % shape.w), view.dtype); }
  void set(int64_t n, int64_t c, int64_t p, double v) { write(at(n, c, p / shape.w, p % shape.w), view.dtype, v); }
  void fill(double mean, double spread) {
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t c = 0; c < shape.c; ++c)
        for (int64_t p = 0; p < shape.positions(); ++p) set(n, c, p, normal(mean, spread));
  }
  bool is_far() const { return layout >= LAYOUTS; }
  void remember() {
    if (!is_far()) before.assign(memory.get(), memory.get() + size);
  }
  bool is_as_remembered() const { return std::equal(before.begin(), before.end(), memory.get()); }
  // True if memory between the numbers of this view still holds what was remembered.
  bool gaps_are_kept() {
    if (is_far()) return true;
    std::vector<char> now(memory.get(), memory.get() + size);
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t c = 0; c < shape.c; ++c)
        for (int64_t p = 0; p < shape.positions(); ++p) {
          const auto* number = static_cast<char*>(at(n, c, p / shape.w, p % shape.w));
          std::memcpy(now.data() + (number - memory.get()), before.data() + (number - memory.get()), bytes(view.dtype));
        }
    return now == before;
  }
};

struct Numbers {  // exactly as many numbers of f32 or f64
  std::unique_ptr<char[]> memory;
  DType dtype;
  Numbers(int64_t count, DType d) : memory(new char[count * bytes(d)]), dtype(d) {
    std::memset(memory.get(), 0xff, count * bytes(d));
  }
  void* data() { return memory.get(); }
  double get(int64_t i) const { return read(memory.get() + i * bytes(dtype), dtype); }
  void set(int64_t i, double v) { write(memory.get() + i * bytes(dtype), dtype, v); }
};

std::unique_ptr<char[]> garbage(int64_t count) {
  auto memory = std::make_unique<char[]>(count);
  std::memset(memory.get(), 0xff, count);
  return memory;
}

}  // namespace
