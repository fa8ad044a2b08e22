// The operators as torch sees them: schema, checks, outputs. Compiled once for each library: with USE_CUDA it registers
// the CUDA implementations over csrc/cuda/, without it the schemas and the CPU implementations over csrc/cpu/.
//
// Errors are std::invalid_argument, which Python sees as ValueError, before anything is allocated or written.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "verbs.h"

namespace frs {

// csrc/cpu/backend.cpp
const char* instructions();
void prefer_huge_pages(void* data, int64_t bytes);

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

int64_t positions(const Tensors& levels) {
  return std::accumulate(levels.begin(), levels.end(), int64_t{0},
                         [](int64_t sum, const Tensor& level) { return sum + positions(level); });
}

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

// Levels as a backend takes them; `order` decides in what order memory is walked.
std::vector<Level> table(const Tensors& order) {
  std::vector<Level> levels;
  int64_t first = 0;
  for (const Tensor& t : order) {
    const View v = view(t, nullptr);
    const int64_t size = t.size(2) * t.size(3);
    const bool interleaved = t.size(1) > 1 && v.c == 1 && (v.p != 1 || size == 1);
    levels.push_back({t.size(0), t.size(1), t.size(2), t.size(3), first, interleaved, {}, {}, {}});
    first += positions(t);
  }
  return levels;
}

Tensor empty(std::vector<int64_t> shape, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(shape, dtype, std::nullopt, like.device());
}

struct Queue {  // the device and stream that the tensors' work goes to
#ifdef USE_CUDA
  explicit Queue(const Tensor& like) : guard(like.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
#else
  explicit Queue(const Tensor&) {}
#endif
  void* stream = nullptr;
};

std::tuple<Tensor, Tensor> score_op(Tensors logits) {
  require_levels("score", "logits", logits);
  const DType dtype = accumulated(DType::f32, logits);
  const Tensor& like = logits[0];
  std::vector<Level> levels = table(logits);
  for (size_t i = 0; i < logits.size(); ++i) levels[i].teacher = view(logits[i], logits[i].const_data_ptr());

  const Queue queue(like);
  const int64_t count = static_cast<int64_t>(levels.size());
  Tensor scores = empty({positions(logits)}, scalar_type(dtype), like);
  Tensor mass = empty({count}, scalar_type(dtype), like);
  const Score call{levels.data(), count, dtype, scores.mutable_data_ptr(), mass.mutable_data_ptr()};
  Tensor workspace = empty({score_workspace(call)}, ScalarType::Byte, like);
  score(call, workspace.mutable_data_ptr(), queue.stream);
  return {scores, mass};
}

Loss loss_of(const std::string& name) {
  if (name == "mse") return Loss::mse;
  if (name == "bce") return Loss::bce;
  require(name == "kl", "imitate: loss '", name, "' is unknown; the valid ones are 'mse', 'bce', 'kl'");
  return Loss::kl;
}

std::tuple<Tensor, Tensor, Tensors> imitate_op(Tensors student, Tensors teacher, Tensor scores, Tensor norm,
                                               std::optional<Tensor> factor, double weight, std::string loss,
                                               double temperature, bool want_loss, bool want_grad) {
  require_levels("imitate", "student", student);
  require_levels("imitate", "teacher", teacher);
  require(student.size() == teacher.size(), "imitate: student has ", student.size(), " levels, teacher ",
          teacher.size(), "; they must have the same shape at every level");
  for (size_t i = 0; i < student.size(); ++i) {
    const Name s{"imitate", "student", i, student[i]}, t{"imitate", "teacher", i, teacher[i]};
    require(std::ranges::equal(student[i].sizes(), teacher[i].sizes()), s, ", teacher ", Shape{teacher[i]},
            "; they must have the same shape at every level");
    require_device(t, student[0]);
  }
  const Tensor& like = student[0];
  const int64_t count = static_cast<int64_t>(student.size());
  for (const auto& [name, t] : {std::pair{"scores", &scores}, std::pair{"norm", &norm}}) {
    require(t->defined(), "imitate: ", name, " is None");
    require(t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double, "imitate: ", name,
            " must be float32 or float64");
    require(t->dim() == 1 && t->is_contiguous(), "imitate: ", name, " ", Shape{*t}, " must be 1-dim and contiguous");
    require(t->device() == like.device(), "imitate: ", name, " is on another device than the levels; move it there");
  }
  require(scores.scalar_type() == norm.scalar_type(), "imitate: scores and norm must have one dtype");
  require(scores.numel() == positions(student) && norm.numel() == count,
          "imitate: scores must hold one number a position, norm one a level: ", positions(student), " and ", count,
          ", got ", scores.numel(), " and ", norm.numel());
  if (factor) require_number("imitate", *factor, like);
  require(std::isfinite(temperature) && temperature > 0, "imitate: temperature must be positive and finite, got ",
          temperature);
  require(want_loss || want_grad, "imitate: nothing is wanted: set want_loss, want_grad or both");

  const DType dtype = accumulated(accumulated(DType::f32, student), teacher);
  std::vector<Level> levels = table(student);
  Imitate call{levels.data(),
               count,
               dtype,
               dtype_of(scores),
               scores.const_data_ptr(),
               norm.const_data_ptr(),
               factor ? factor->const_data_ptr() : nullptr,
               factor ? dtype_of(*factor) : dtype,
               weight,
               temperature,
               loss_of(loss),
               want_grad,
               nullptr,
               nullptr};
  const Queue queue(like);
  Tensors grads;
  for (size_t i = 0; i < levels.size(); ++i) {
    levels[i].student = view(student[i], student[i].const_data_ptr());
    levels[i].teacher = view(teacher[i], teacher[i].const_data_ptr());
    if (want_grad) {
      grads.push_back(torch::stable::empty_like(student[i]));
      levels[i].grad = view(grads[i], grads[i].mutable_data_ptr());
#ifndef USE_CUDA
      prefer_huge_pages(levels[i].grad.data, grads[i].numel() * static_cast<int64_t>(grads[i].element_size()));
#endif
    }
  }
  Tensor total = empty(want_loss ? std::vector<int64_t>{} : std::vector<int64_t>{0}, scalar_type(dtype), like);
  Tensor per_level = empty({want_loss ? count : 0}, scalar_type(dtype), like);
  if (want_loss) {
    call.total = total.mutable_data_ptr();
    call.per_level = per_level.mutable_data_ptr();
  }
  Tensor workspace = empty({imitate_workspace(call)}, ScalarType::Byte, like);
  imitate(call, workspace.mutable_data_ptr(), queue.stream);
  return {total, per_level, grads};
}

enum class Memory { dense, gaps, overlap };

// How t lies in memory, in whatever order of axes; an overlap is taken for one where a stride is less than what lies
// within it.
Memory memory_of(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != 1) axes.emplace_back(t.stride(i), t.size(i));
  std::sort(axes.begin(), axes.end());
  int64_t within = 1;
  for (const auto& [stride, size] : axes) {
    if (stride < within) return Memory::overlap;
    within = stride * (size - 1) + within;
  }
  return within == t.numel() ? Memory::dense : Memory::gaps;
}

void scale_op(Tensors grads, Tensor factor) {
  for (size_t i = 0; i < grads.size(); ++i) {
    const Name name{"scale_", "grads", i, grads[i]};
    require(is_float(grads[i]), name, " must be float32, float64, bfloat16 or float16");
    require_device(name, grads[0]);
    require(grads[i].numel() == 0 || memory_of(grads[i]) != Memory::overlap, name,
            " overlaps itself in memory, so that a number would be multiplied twice; clone it");
  }
  require_number("scale_", factor, grads.empty() ? factor : grads[0]);
  const Queue queue(factor);
  std::vector<Run> runs;
  for (Tensor& grad : grads) {
    if (grad.numel() == 0) continue;
    if (memory_of(grad) == Memory::dense) {
      runs.push_back({grad.mutable_data_ptr(), grad.numel(), dtype_of(grad)});
    } else {
      StableIValue stack[] = {torch::stable::detail::from(grad), torch::stable::detail::from(factor)};
      STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack, TORCH_ABI_VERSION));
      torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that came back
    }
  }
  const Scale call{runs.data(), static_cast<int64_t>(runs.size()), factor.const_data_ptr(), dtype_of(factor)};
  if (!runs.empty()) scale(call, queue.stream);
}

#ifndef USE_CUDA
std::string instructions_op() { return instructions(); }
#endif

}  // namespace
}  // namespace frs

#ifdef USE_CUDA

STABLE_TORCH_LIBRARY_IMPL(frs_kernels, CUDA, library) {
  library.impl("score", TORCH_BOX(&frs::score_op));
  library.impl("imitate", TORCH_BOX(&frs::imitate_op));
  library.impl("scale_", TORCH_BOX(&frs::scale_op));
}

#else

STABLE_TORCH_LIBRARY(frs_kernels, library) {
  library.def("score(Tensor[] logits) -> (Tensor scores, Tensor mass)");
  library.def(
      "imitate(Tensor[] student, Tensor[] teacher, Tensor scores, Tensor norm, Tensor? factor, float weight, str loss, "
      "float temperature, bool want_loss, bool want_grad) -> (Tensor total, Tensor per_level, Tensor[] grads)");
  library.def("scale_(Tensor(a!)[] grads, Tensor factor) -> ()");
  library.def("instructions() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(frs_kernels, CPU, library) {
  library.impl("score", TORCH_BOX(&frs::score_op));
  library.impl("imitate", TORCH_BOX(&frs::imitate_op));
  library.impl("scale_", TORCH_BOX(&frs::scale_op));
}

STABLE_TORCH_LIBRARY_IMPL(frs_kernels, CompositeExplicitAutograd, library) {
  library.impl("instructions", TORCH_BOX(&frs::instructions_op));
}

#endif
