// torch's tensors for the operators: what is refused of them and in which words, as the structs of verbs.h, and new
// ones. ops.cpp alone sees this, and with it torch's headers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "verbs.h"

namespace frs {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

template <class... Words>
void require(bool condition, const Words&... words) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::invalid_argument(message.str());
}

struct Shape {
  const Tensor& of;
  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    out << "(";
    for (int64_t i = 0; i < shape.of.dim(); ++i) out << (i ? ", " : "") << shape.of.size(i);
    return out << ")";
  }
};

// "imitate: student[2] (1, 3)"
struct Name {
  const char *verb, *argument;
  size_t level;
  const Tensor& tensor;
  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    return out << name.verb << ": " << name.argument << "[" << name.level << "] " << Shape{name.tensor};
  }
};

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: throw std::invalid_argument("needs float32, float64, bfloat16 or float16");
  }
}

bool is_float(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

ScalarType scalar_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// fp64 as soon as one tensor is fp64, else fp32.
DType accumulated(DType so_far, const Tensors& levels) {
  const auto wide = [](const Tensor& t) { return t.scalar_type() == ScalarType::Double; };
  return std::any_of(levels.begin(), levels.end(), wide) ? DType::f64 : so_far;
}

void require_device(const Name& name, const Tensor& like) {
  require(name.tensor.device() == like.device(), name, " is on another device than the rest; one device is needed");
}

void require_levels(const char* verb, const char* argument, const Tensors& levels) {
  require(!levels.empty(), verb, ": ", argument, " is empty; it needs (N, C, H, W) tensors, one a level");
  for (size_t i = 0; i < levels.size(); ++i) {
    const Name name{verb, argument, i, levels[i]};
    require(is_float(levels[i]), name, " must be float32, float64, bfloat16 or float16");
    require(levels[i].dim() == 4 && levels[i].size(1) > 0, name,
            " does not fit: levels are (N, C, H, W), one a level, with C at least 1");
    require_device(name, levels[0]);
  }
}

void require_number(const char* verb, const Tensor& factor, const Tensor& like) {
  require(factor.defined(), verb, ": factor is None");
  require(is_float(factor), verb, ": factor must be float32, float64, bfloat16 or float16");
  require(factor.dim() == 0, verb, ": factor must be 0-dim, got ", Shape{factor});
  require(factor.device() == like.device(), verb, ": factor is on another device than the levels; move it there");
}

int64_t positions(const Tensor& level) { return level.size(0) * level.size(2) * level.size(3); }

// The stride of an axis of size 1 is arbitrary, so that of the positions is taken from the axes that count.
View view(const Tensor& t, const void* data) {
  const int64_t h = t.stride(2), w = t.stride(3), height = t.size(2), width = t.size(3);
  int64_t p = -1;
  if (height <= 1 && width <= 1)
    p = 1;
  else if (height <= 1)
    p = w;
  else if (width <= 1)
    p = h;
  else if (h == width * w)
    p = w;
  return {const_cast<void*>(data), t.stride(0), t.size(1) > 1 ? t.stride(1) : 1, h, w, p, dtype_of(t)};
}

// True where memory is walked with the channels innermost.
bool is_interleaved(const Tensor& t, const View& v) {
  return t.size(1) > 1 && v.c == 1 && (v.p != 1 || t.size(2) * t.size(3) == 1);
}

Level level_of(const Tensor& t, int64_t first) {
  return {t.size(0), t.size(1), t.size(2), t.size(3), first, is_interleaved(t, view(t, nullptr)), {}, {}, {}};
}

Tensor empty(int64_t dims, const int64_t* shape, const int64_t* strides, ScalarType dtype, const Tensor& like) {
  AtenTensorHandle made;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, shape, strides, type, device_type, like.get_device_index(), &made));
  return Tensor(made);
}

Tensor vector_of(int64_t size, ScalarType dtype, const Tensor& like) {
  const int64_t stride = 1;
  return empty(1, &size, &stride, dtype, like);
}

}  // namespace
}  // namespace frs
