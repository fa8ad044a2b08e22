// torch's tensors for the operators: what is refused of them and in which words, as the structs of verbs.h, and new
// ones. ops.cpp and row_ops.cpp alone see this, and with it torch's headers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

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
  throw std::runtime_error(message.str());
}

// A tensor, and what the checks and the structs of verbs.h ask of it, asked once: each question is a call into torch,
// and on small levels those calls are most of an operator's time.
struct Given {
  explicit Given(const Tensor& t)
      : tensor(&t),
        dim(t.dim()),
        size(t.sizes().data()),
        stride(t.strides().data()),
        type(t.scalar_type()),
        device(t.device()) {}

  int64_t numel() const {
    int64_t product = 1;
    for (int64_t i = 0; i < dim; ++i) product *= size[i];
    return product;
  }

  const Tensor* tensor;
  int64_t dim;
  const int64_t *size, *stride;
  ScalarType type;
  torch::stable::Device device;
};
using Levels = std::vector<Given>;

std::ostream& operator<<(std::ostream& out, const Given& given) {
  out << "(";
  for (int64_t i = 0; i < given.dim; ++i) out << (i ? ", " : "") << given.size[i];
  return out << ")";
}

// "imitate: student[2] (1, 3)"
struct Name {
  const char *verb, *argument;
  size_t level;
  const Given& given;
  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    return out << name.verb << ": " << name.argument << "[" << name.level << "] " << name.given;
  }
};

// The text of a string argument, which is freed. An operator takes handles, since torch's own conversion to std::string
// loses one, 48 bytes a call: ToImpl<std::string> in stableivalue_conversions.h, up to torch 2.13.
std::string text_of(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: throw std::runtime_error("needs float32, float64, bfloat16 or float16");
  }
}

ScalarType scalar_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// fp64 as soon as one tensor is fp64, else fp32.
DType accumulated(DType so_far, const Levels& levels) {
  const auto wide = [](const Given& given) { return given.type == ScalarType::Double; };
  return std::any_of(levels.begin(), levels.end(), wide) ? DType::f64 : so_far;
}

void require_device(const Name& name, const Given& like) {
  require(name.given.device == like.device, name, " is on another device than the rest; one device is needed");
}

Levels checked_levels(const char* verb, const char* argument, const Tensors& tensors) {
  require(!tensors.empty(), verb, ": ", argument, " is empty; it needs (N, C, H, W) tensors, one a level");
  Levels levels(tensors.begin(), tensors.end());
  for (size_t i = 0; i < levels.size(); ++i) {
    const Name name{verb, argument, i, levels[i]};
    require(is_float(levels[i].type), name, " must be float32, float64, bfloat16 or float16");
    require(levels[i].dim == 4 && levels[i].size[1] > 0, name,
            " does not fit: levels are (N, C, H, W), one a level, with C at least 1");
    require_device(name, levels[0]);
  }
  return levels;
}

void require_number(const char* verb, const Tensor& factor, const torch::stable::Device& device) {
  require(factor.defined(), verb, ": factor is None");
  const Given given(factor);
  require(is_float(given.type), verb, ": factor must be float32, float64, bfloat16 or float16");
  require(given.dim == 0, verb, ": factor must be 0-dim, got ", given);
  require(given.device == device, verb, ": factor is on another device than the levels; move it there");
}

[[maybe_unused]] int64_t positions(const Given& level) { return level.size[0] * level.size[2] * level.size[3]; }

// The stride of an axis of size 1 is arbitrary, so that of the positions is taken from the axes that count.
View view(const Given& t, const void* data) {
  const int64_t h = t.stride[2], w = t.stride[3], height = t.size[2], width = t.size[3];
  int64_t p = -1;
  if (height <= 1 && width <= 1)
    p = 1;
  else if (height <= 1)
    p = w;
  else if (width <= 1)
    p = h;
  else if (h == width * w)
    p = w;
  return {const_cast<void*>(data), t.stride[0], t.size[1] > 1 ? t.stride[1] : 1, h, w, p, dtype_of(t.type)};
}

// The level of its first operand: the student, or for score the teacher.
Level level_of(const Given& t, int64_t first) {
  const View v = view(t, nullptr);
  const bool interleaved = t.size[1] > 1 && v.c == 1 && (v.p != 1 || t.size[2] * t.size[3] == 1);
  return {t.size[0], t.size[1], t.size[2], t.size[3], first, interleaved, {}, {}, {}};
}

Tensor empty(int64_t dims, const int64_t* shape, const int64_t* strides, ScalarType dtype, const Given& like) {
  AtenTensorHandle made;
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const auto device = torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.device.type()));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape, strides, type, device, like.device.index(), &made));
  return Tensor(made);
}

Tensor vector_of(int64_t size, ScalarType dtype, const Given& like) {
  const int64_t stride = 1;
  return empty(1, &size, &stride, dtype, like);
}

// With the strides that torch.empty_like gives. It is asked where they are neither of the two usual ones.
Tensor empty_like(const Given& t) {
  const int64_t c = t.size[1], h = t.size[2], w = t.size[3];
  const int64_t planar[] = {c * h * w, h * w, w, 1}, interleaved[] = {c * h * w, 1, w * c, c};
  const auto has = [&](const int64_t (&strides)[4]) {
    for (int64_t i = 0; i < 4; ++i)
      if (t.size[i] != 1 && t.stride[i] != strides[i]) return false;
    return true;
  };
  if (t.numel() > 0 && (has(planar) || has(interleaved))) return empty(4, t.size, t.stride, t.type, t);
  return torch::stable::empty_like(*t.tensor);
}

}  // namespace
}  // namespace frs
