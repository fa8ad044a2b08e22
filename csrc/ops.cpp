// The operators as torch sees them: checks, outputs. Compiled once for each library: with USE_CUDA it registers
// the CUDA implementations over csrc/cuda/, without it the CPU implementations over csrc/cpu/.
//
// The schemas are Python's (frs_kernels/ops.py). Errors are std::invalid_argument, which Python sees as ValueError,
// before anything is allocated or written.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "tensors.h"

namespace frs {

// csrc/cpu/backend.cpp
const char* instructions();
void prefer_huge_pages(void* data, int64_t bytes);

namespace {

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
      require(std::isfinite(temperature) && temperature > 0, verb, ": temperature must be positive and finite, got ",
              temperature);
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
      const bool fits =
          student[i].size(0) == of->size(0) && student[i].size(2) == of->size(2) && student[i].size(3) == of->size(3);
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
    const auto has = [&](const int64_t (&strides)[4]) {
      for (int64_t i = 0; i < 4; ++i)
        if (t.size(i) != 1 && t.stride(i) != strides[i]) return false;
      return true;
    };
    // The strides that torch.empty_like gives; it is asked where they are neither of the two usual ones.
    if (t.numel() > 0 && t.is_contiguous() && has(planar))
      return empty(4, t.sizes().data(), t.strides().data(), t.scalar_type(), t);
    if (t.numel() > 0 && has(interleaved)) return empty(4, t.sizes().data(), t.strides().data(), t.scalar_type(), t);
    return torch::stable::empty_like(t);
  }
};

std::tuple<Tensor, Tensor, Tensors> imitate_op(Tensors student, Tensors teacher, Tensor scores, Tensor norm,
                                               std::vector<int64_t> level, std::vector<int64_t> term,
                                               std::vector<double> scale, std::vector<double> eps,
                                               std::vector<std::string> loss, std::vector<double> weight,
                                               std::vector<std::optional<Tensor>> factor,
                                               std::vector<double> temperature, std::vector<double> beta,
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
