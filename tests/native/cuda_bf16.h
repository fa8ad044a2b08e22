// bf16 on the host: the conversions csrc/cuda uses, rounding to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (v != v) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// Rounded once: a float in between is rounded to odd, which leaves the second rounding its choice.
inline __nv_bfloat16 __double2bfloat16(double v) {
  float f = static_cast<float>(v);
  if (f == f && f != v) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((f > v) == (v > 0)) --bits;
    bits |= 1;
    std::memcpy(&f, &bits, 4);
  }
  return __float2bfloat16_rn(f);
}

inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
