// The operators as torch sees them: checks, outputs. Compiled once for each library: with USE_CUDA it registers
// the CUDA implementations over csrc/cuda/, without it the schemas and the CPU implementations over csrc/cpu/.
//
// The schemas are Python's (frs_kernels/ops.py). Errors are std::invalid_argument, which Python sees as ValueError,
// before anything is allocated or written.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
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

// The arguments of a score and where its results go. The levels are checked.
struct Scoring {
  explicit Scoring(const Tensors& logits) : dtype(accumulated(DType::f32, logits)) {
    int64_t first = 0;
    for (const Tensor& z : logits) {
      levels.push_back(level_of(z, first));
      levels.back().teacher = view(z, z.const_data_ptr());
      first += positions(z);
    }
    const int64_t count = static_cast<int64_t>(levels.size());
    scores = vector_of(first, scalar_type(dtype), logits[0]);
    mass = vector_of(count, scalar_type(dtype), logits[0]);
    call = {levels.data(), count, dtype, scores.mutable_data_ptr(), mass.mutable_data_ptr()};
  }

  DType dtype;
  std::vector<Level> levels;
  Tensor scores, mass;
  Score call;
};

std::tuple<Tensor, Tensor> score_op(Tensors logits) {
  require_levels("score", "logits", logits);
  const Queue queue(logits[0]);
  Scoring scoring(logits);
  Tensor workspace = vector_of(score_workspace(scoring.call), ScalarType::Byte, logits[0]);
  score(scoring.call, workspace.mutable_data_ptr(), queue.stream);
  return {scoring.scores, scoring.mass};
}

Loss loss_of(const char* verb, const std::string& name) {
  std::string valid;
  Loss found = Loss::COUNT;
  for (int i = 0; i < static_cast<int>(Loss::COUNT); ++i)
    EveryLoss::with(static_cast<Loss>(i), [&](auto loss) {
      const std::string known = Traits<decltype(loss)::value>::name;
      if (known == name) found = loss;
      valid += (valid.empty() ? "'" : ", '") + known + "'";
    });
  require(found != Loss::COUNT, verb, ": loss '", name, "' is unknown; the valid ones are ", valid);
  return found;
}

bool takes_logits(Loss loss) {
  bool takes = false;
  EveryLoss::with(loss, [&](auto known) { takes = Traits<decltype(known)::value>::takes_logits; });
  return takes;
}

// The columns of the table of entries and terms, as frs_kernels/reference.py describes them.
struct Columns {
  std::vector<int64_t> level, term;
  std::vector<double> scale, eps;
  std::vector<std::string> loss;
  std::vector<double> weight;
  std::vector<std::optional<Tensor>> factor;
  std::vector<double> temperature, beta;
  std::vector<bool> want_grad;
  bool want_loss;
};

// The arguments of an imitate and where its results go. Everything is checked before anything is allocated.
struct Imitation {
  // `sizes`: each level's (N, H, W), as far as it is known; else what the entries say.
  Imitation(const char* verb, const Tensors& student, const Tensors& teacher, const Columns& columns,
            const Tensors* logits)
      : verb(verb), count(student.size()), want_loss(columns.want_loss) {
    require_levels(verb, "student", student);
    require_levels(verb, "teacher", teacher);
    require(student.size() == teacher.size(), verb, ": student has ", count, " entries, teacher ", teacher.size(),
            "; they must have the same shape in every entry");
    for (size_t i = 0; i < count; ++i) {
      const Name s{verb, "student", i, student[i]};
      require(std::ranges::equal(student[i].sizes(), teacher[i].sizes()), s, ", teacher ", Shape{teacher[i]},
              "; they must have the same shape in every entry");
      require_device({verb, "teacher", i, teacher[i]}, student[0]);
    }
    set_terms(columns, student[0]);
    set_entries(columns, student, logits);
    dtype = accumulated(accumulated(DType::f32, student), teacher);
  }

  // The masks must be there in full: `scores` has a number a position, `norm` one a level.
  void check_scores(const Tensor& scores, const Tensor& norm, const Tensor& like) const {
    for (const auto& [name, t] : {std::pair{"scores", &scores}, std::pair{"norm", &norm}}) {
      require(t->defined(), verb, ": ", name, " is None");
      require(t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double, verb, ": ", name,
              " must be float32 or float64");
      require(t->dim() == 1 && t->is_contiguous(), verb, ": ", name, " ", Shape{*t}, " must be 1-dim and contiguous");
      require(t->device() == like.device(), verb, ": ", name, " is on another device than the levels; move it there");
    }
    require(scores.scalar_type() == norm.scalar_type(), verb, ": scores and norm must have one dtype");
    require(scores.numel() == total_positions && norm.numel() == level_count, verb,
            ": scores must hold one number a position, norm one a level: ", total_positions, " and ", level_count,
            ", got ", scores.numel(), " and ", norm.numel());
  }

  // Allocates the results. The scores are checked or have just been made.
  void allocate(const Tensors& student, const Tensors& teacher, const Tensor& scores, const Tensor& norm) {
    const Tensor& like = student[0];
    for (size_t i = 0; i < count; ++i) {
      Entry& entry = entries[i];
      entry.student = view(student[i], student[i].const_data_ptr());
      entry.teacher = view(teacher[i], teacher[i].const_data_ptr());
      if (!wanted[i]) continue;
      grads.push_back(empty_like(student[i]));
      Tensor& grad = grads.back();
      entry.grad = view(grad, grad.mutable_data_ptr());
#ifndef USE_CUDA
      prefer_huge_pages(entry.grad.data, grad.numel() * static_cast<int64_t>(grad.element_size()));
#endif
    }
    const int64_t rows = static_cast<int64_t>(terms.size() + count), none = 0, one = 1;
    total = want_loss ? empty(0, nullptr, nullptr, scalar_type(dtype), like)
                      : empty(1, &none, &one, scalar_type(dtype), like);
    values = vector_of(want_loss ? rows : 0, scalar_type(dtype), like);
    call = {entries.data(),
            static_cast<int64_t>(count),
            terms.data(),
            static_cast<int64_t>(terms.size()),
            dtype,
            dtype_of(scores),
            scores.const_data_ptr(),
            norm.const_data_ptr(),
            want_loss ? total.mutable_data_ptr() : nullptr,
            want_loss ? values.mutable_data_ptr() : nullptr};
  }

  const char* verb;
  size_t count;
  bool want_loss;
  DType dtype;
  std::vector<Entry> entries;
  std::vector<Term> terms;
  std::vector<bool> wanted;  // the gradient of an entry
  int64_t total_positions = 0, level_count = 0;
  Tensor total, values;
  Tensors grads;
  Imitate call;

 private:
  void set_terms(const Columns& columns, const Tensor& like) {
    const size_t size = columns.loss.size();
    require(size > 0, verb, ": loss is empty; it needs a name a term");
    require(columns.weight.size() == size && columns.factor.size() == size && columns.temperature.size() == size &&
                columns.beta.size() == size && columns.want_grad.size() == size,
            verb, ": weight, factor, temperature, beta and want_grad must have an element a term, as loss has: ", size);
    bool any = columns.want_loss;
    for (size_t t = 0; t < size; ++t) {
      const double temperature = columns.temperature[t], beta = columns.beta[t];
      require(std::isfinite(temperature) && temperature > 0, verb,
              ": temperature must be positive and finite, got ", temperature);
      require(std::isfinite(beta) && beta >= 0, verb, ": beta must be zero or more and finite, got ", beta);
      const std::optional<Tensor>& factor = columns.factor[t];
      if (factor) require_number(verb, *factor, like);
      const Loss loss = loss_of(verb, columns.loss[t]);
      terms.push_back({loss, columns.weight[t], factor ? factor->const_data_ptr() : nullptr,
                       factor ? dtype_of(*factor) : DType::f32, takes_logits(loss) ? temperature : 1.0, beta});
      any |= columns.want_grad[t];
    }
    require(any, verb, ": nothing is wanted: set want_loss, want_grad or both");
  }

  void set_entries(const Columns& columns, const Tensors& student, const Tensors* logits) {
    require(columns.level.size() == count && columns.term.size() == count && columns.scale.size() == count &&
                columns.eps.size() == count,
            verb, ": level, term, scale and eps must have an element an entry, as student has: ", count);
    std::vector<const Tensor*> of_level(logits ? logits->size() : count);
    std::vector<bool> has_entry(of_level.size()), term_has(terms.size());
    if (logits)
      for (size_t l = 0; l < logits->size(); ++l) of_level[l] = &(*logits)[l];
    for (size_t i = 0; i < count; ++i) {
      const Name name{verb, "student", i, student[i]};
      const int64_t level = columns.level[i], term = columns.term[i];
      require(level >= 0 && level < static_cast<int64_t>(of_level.size()), name, ": there is no level ", level);
      require(term >= 0 && term < static_cast<int64_t>(terms.size()), name, ": there is no term ", term);
      const Tensor*& of = of_level[level];
      if (of == nullptr) of = &student[i];
      has_entry[level] = term_has[term] = true;
      const bool fits = student[i].size(0) == of->size(0) && student[i].size(2) == of->size(2) &&
                        student[i].size(3) == of->size(3);
      require(fits, name, " differs in N, H or W from level ", level, ", ", Shape{*of});
    }
    while (!logits && !of_level.empty() && of_level.back() == nullptr) of_level.pop_back();
    std::vector<int64_t> first;
    for (size_t l = 0; l < of_level.size(); ++l) {
      require(has_entry[l], verb, ": level ", l, " has no entry; levels are numbered from 0 without a gap");
      first.push_back(total_positions);
      total_positions += positions(*of_level[l]);
    }
    level_count = static_cast<int64_t>(of_level.size());
    for (size_t t = 0; t < terms.size(); ++t) require(term_has[t], verb, ": term ", t, " has no entry");
    for (size_t i = 0; i < count; ++i) {
      const int64_t level = columns.level[i], term = columns.term[i];
      entries.push_back({level_of(student[i], first[level]), level, term, columns.scale[i], columns.eps[i]});
      wanted.push_back(columns.want_grad[term]);
    }
  }

  static Tensor empty_like(const Tensor& t) {
    const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
    const int64_t planar[] = {c * h * w, h * w, w, 1}, interleaved[] = {c * h * w, 1, w * c, c};
    const auto has = [&](const int64_t(&strides)[4]) {
      for (int64_t i = 0; i < 4; ++i)
        if (t.size(i) != 1 && t.stride(i) != strides[i]) return false;
      return true;
    };
    // The strides that torch.empty_like gives; it is asked where they are neither of the two usual ones.
    if (t.numel() > 0 && t.is_contiguous() && has(planar)) return empty(4, t.sizes().data(), t.strides().data(), t.scalar_type(), t);
    if (t.numel() > 0 && has(interleaved)) return empty(4, t.sizes().data(), t.strides().data(), t.scalar_type(), t);
    return torch::stable::empty_like(t);
  }
};

std::tuple<Tensor, Tensor, Tensors> imitate_op(
    Tensors student, Tensors teacher, Tensor scores, Tensor norm, std::vector<int64_t> level, std::vector<int64_t> term,
    std::vector<double> scale, std::vector<double> eps, std::vector<std::string> loss, std::vector<double> weight,
    std::vector<std::optional<Tensor>> factor, std::vector<double> temperature, std::vector<double> beta,
    std::vector<bool> want_grad, bool want_loss) {
  const Columns columns{level, term, scale, eps, loss, weight, factor, temperature, beta, want_grad, want_loss};
  Imitation imitation("imitate", student, teacher, columns, nullptr);
  imitation.check_scores(scores, norm, student[0]);
  const Queue queue(student[0]);
  imitation.allocate(student, teacher, scores, norm);
  Tensor workspace = vector_of(imitate_workspace(imitation.call), ScalarType::Byte, student[0]);
  imitate(imitation.call, workspace.mutable_data_ptr(), queue.stream);
  return {imitation.total, imitation.values, imitation.grads};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors> distill_op(
    Tensors student, Tensors teacher, Tensors logits, std::vector<int64_t> level, std::vector<int64_t> term,
    std::vector<double> scale, std::vector<double> eps, std::vector<std::string> loss, std::vector<double> weight,
    std::vector<std::optional<Tensor>> factor, std::vector<double> temperature, std::vector<double> beta,
    std::vector<bool> want_grad, bool want_loss) {
  require_levels("distill", "logits", logits);
  const Columns columns{level, term, scale, eps, loss, weight, factor, temperature, beta, want_grad, want_loss};
  Imitation imitation("distill", student, teacher, columns, &logits);
  require_device({"distill", "logits", 0, logits[0]}, student[0]);
  const Queue queue(student[0]);
  Scoring scoring(logits);
  imitation.allocate(student, teacher, scoring.scores, scoring.mass);
  Tensor workspace = vector_of(distill_workspace(scoring.call, imitation.call), ScalarType::Byte, student[0]);
  distill(scoring.call, imitation.call, workspace.mutable_data_ptr(), queue.stream);
  return {scoring.scores, scoring.mass, imitation.total, imitation.values, imitation.grads};
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
#define FRS_KEY CUDA
#else
#define FRS_KEY CPU

STABLE_TORCH_LIBRARY_FRAGMENT(frs_kernels, library) { library.def("instructions() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(frs_kernels, CompositeExplicitAutograd, library) {
  library.impl("instructions", TORCH_BOX(&frs::instructions_op));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(frs_kernels, FRS_KEY, library) {
  library.impl("score", TORCH_BOX(&frs::score_op));
  library.impl("imitate", TORCH_BOX(&frs::imitate_op));
  library.impl("distill", TORCH_BOX(&frs::distill_op));
  library.impl("scale_", TORCH_BOX(&frs::scale_op));
}
