// Loads and stores of V numbers at once, and of one number whose dtype is known only at run time.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "verbs.h"

namespace frs::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;
struct Any {};  // a level's own dtype, read from its table entry

template <class T, int V>
struct alignas(sizeof(T) * V) Packet {
  T at[V];
};

template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

enum class Use { once, again };  // once: the line is the first to leave the caches

template <Use USE, class W>
__device__ __forceinline__ W load_word(const void* from) {
  const W* word = static_cast<const W*>(from);
  return USE == Use::once ? __ldcs(word) : *word;
}

template <class T, int V>
__device__ __forceinline__ Packet<T, V> unpack(const typename Word<sizeof(T) * V>::type& word) {
  Packet<T, V> packet;
  memcpy(&packet, &word, sizeof(packet));
  return packet;
}

template <class T, int V>
__device__ __forceinline__ void store(T* to, const Packet<T, V>& packet) {
  using W = typename Word<sizeof(T) * V>::type;
  W word;
  memcpy(&word, &packet, sizeof(word));
  __stcs(reinterpret_cast<W*>(to), word);
}

// The larger number; a NaN if one of them is, which fmax would drop.
__device__ __forceinline__ double larger(double a, double b) { return b > a || b != b ? b : a; }
__device__ __forceinline__ float larger(float a, float b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return b > a || b != b ? b : a;
#endif
}

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(f16 v) { return __half2float(v); }

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  static __device__ __forceinline__ float of(float v) { return v; }
  static __device__ __forceinline__ float of(double v) { return static_cast<float>(v); }
};
template <>
struct Narrow<double> {
  static __device__ __forceinline__ double of(double v) { return v; }
};
template <>
struct Narrow<bf16> {
  static __device__ __forceinline__ bf16 of(float v) { return __float2bfloat16_rn(v); }
  static __device__ __forceinline__ bf16 of(double v) { return __double2bfloat16(v); }
};
template <>
struct Narrow<f16> {
  static __device__ __forceinline__ f16 of(float v) { return __float2half_rn(v); }
  static __device__ __forceinline__ f16 of(double v) { return __double2half(v); }
};

// The same of two numbers at once, in one word.
template <class T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t c;
  if constexpr (std::is_same_v<T, bf16>)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
#else
  T x[2], y[2];
  memcpy(x, &a, 4), memcpy(y, &b, 4);
  for (int i = 0; i < 2; ++i)
    if (const float v = widen(y[i]); v > widen(x[i]) || v != v) x[i] = y[i];
  memcpy(&a, x, 4);
  return a;
#endif
}

// Two at once: one conversion instruction, where two and a merge are three.
__device__ __forceinline__ void narrow_pair(float a, float b, bf16* to) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  to[0] = pair.x;
  to[1] = pair.y;
}
__device__ __forceinline__ void narrow_pair(float a, float b, f16* to) {
  const __half2 pair = __floats2half2_rn(a, b);
  to[0] = pair.x;
  to[1] = pair.y;
}

template <class T, class A, int V>
__device__ __forceinline__ Packet<T, V> narrow(const A (&values)[V]) {
  Packet<T, V> packet;
  if constexpr (sizeof(T) == 2 && sizeof(A) == 4 && V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2) narrow_pair(values[i], values[i + 1], packet.at + i);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) packet.at[i] = Narrow<T>::of(values[i]);
  }
  return packet;
}

__host__ __device__ inline int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Calls f with a pointer of the dtype's type. The branch is the same for a whole block.
template <class F>
__device__ __forceinline__ auto with_dtype(void* data, DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64: return f(static_cast<double*>(data));
    case DType::f32: return f(static_cast<float*>(data));
    case DType::bf16: return f(static_cast<bf16*>(data));
    default: return f(static_cast<f16*>(data));
  }
}

__device__ __forceinline__ double read_number(const void* data, DType dtype) {
  return with_dtype(const_cast<void*>(data), dtype, [](auto* p) { return static_cast<double>(widen(*p)); });
}

// V elements of type T as a thread holds them between load and use: as they come from memory, which takes half of the
// registers in 16 bits. `Any` is widened at once.
template <class T, class A, int V>
struct Held {
  using Element = std::conditional_t<std::is_same_v<T, Any>, A, T>;
  typename Word<sizeof(Element) * V>::type word;

  template <Use USE>
  __device__ __forceinline__ void fetch(const void* data, int64_t at, DType dtype) {
    if constexpr (std::is_same_v<T, Any>) {
      static_assert(V == 1);
      const A value =
          with_dtype(const_cast<void*>(data), dtype, [at](auto* p) { return static_cast<A>(widen(p[at])); });
      memcpy(&word, &value, sizeof(word));
    } else {
      word = load_word<USE, decltype(word)>(static_cast<const T*>(data) + at);
    }
  }

  __device__ __forceinline__ Packet<Element, V> packet() const { return unpack<Element, V>(word); }

  // As what is computed in. A bf16 is the upper half of a float: of a word of two, one takes a shift, one a mask.
  __device__ __forceinline__ void widen_to(A (&to)[V]) const {
    if constexpr (std::is_same_v<T, bf16> && V > 1) {
      uint32_t words[V / 2];
      memcpy(words, &word, sizeof(words));
#pragma unroll
      for (int i = 0; i < V / 2; ++i) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
    } else {
      const auto numbers = packet();
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = widen(numbers.at[i]);
    }
  }
};

// The largest so far of V numbers each, in the registers that the maximum works on.
template <class T, class A, int V>
struct Top {
  static constexpr bool PAIRS = sizeof(T) == 2 && V > 1;
  static constexpr int SIZE = PAIRS ? V / 2 : V;
  using Word = std::conditional_t<PAIRS, uint32_t, A>;
  Word at[SIZE];

  static __device__ __forceinline__ Word most(Word a, Word b) {
    if constexpr (PAIRS)
      return larger_pair<T>(a, b);
    else
      return larger(a, b);
  }

  __device__ __forceinline__ Top() {
    constexpr uint32_t NOTHING = std::is_same_v<T, bf16> ? 0xff80ff80u : 0xfc00fc00u;  // minus infinity, twice
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if constexpr (PAIRS)
        at[i] = NOTHING;
      else
        at[i] = -INFINITY;
  }
  __device__ __forceinline__ void take(const Held<T, A, V>& held) {
    if constexpr (PAIRS) {
      uint32_t words[SIZE];
      memcpy(words, &held.word, sizeof(words));
#pragma unroll
      for (int i = 0; i < SIZE; ++i) at[i] = most(at[i], words[i]);
    } else {
      const auto packet = held.packet();
#pragma unroll
      for (int i = 0; i < SIZE; ++i) at[i] = most(at[i], A(widen(packet.at[i])));
    }
  }
  // With that of the lane `offset` threads on.
  __device__ __forceinline__ void meet(uint32_t offset) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) at[i] = most(at[i], __shfl_down_sync(0xffffffffu, at[i], offset));
  }
  __device__ __forceinline__ void widen_to(A (&to)[V]) const {
    if constexpr (PAIRS) {
      T numbers[V];
      memcpy(numbers, at, sizeof(numbers));
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = widen(numbers[i]);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = at[i];
    }
  }
};

template <class T, class A, int V>
__device__ __forceinline__ void put(void* data, int64_t at, DType dtype, const A (&values)[V]) {
  if constexpr (std::is_same_v<T, Any>) {
    static_assert(V == 1);
    const double value = values[0];
    with_dtype(data, dtype, [at, value](auto* p) { p[at] = Narrow<std::remove_pointer_t<decltype(p)>>::of(value); });
  } else {
    store<T, V>(static_cast<T*>(data) + at, narrow<T>(values));
  }
}

}  // namespace frs::cuda
