// The operators as torch sees them: checks, outputs. Compiled once for each library: with USE_CUDA it registers
// the CUDA implementations over csrc/cuda/, without it the CPU implementations over csrc/cpu/.
//
// The schemas are Python's (frs_kernels/ops.py). Errors are std::runtime_error, before anything is allocated or
// written: Python sees a RuntimeError, as of torch's own operators, and from torch 2.15 on it sees no other.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "queue.h"
#include "tensors.h"

namespace frs {

const char* instructions();  // csrc/cpu/backend.cpp

namespace {

// The arguments of a score and where its results go.
struct Scoring {
  explicit Scoring(const Levels& logits) : dtype(accumulated(DType::f32, logits)) {
    int64_t first = 0;
    levels.reserve(logits.size());
    for (const Given& z : logits) {
      levels.push_back(level_of(z, first));
      levels.back().teacher = view(z, z.tensor->const_data_ptr());
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

std::tuple<Tensor, Tensor> score_op(const Tensors& logits) {
  const Levels levels = checked_levels("score", "logits", logits);
  const Queue queue(levels[0]);
  Scoring scoring(levels);
  Tensor workspace = vector_of(score_workspace(scoring.call), ScalarType::Byte, levels[0]);
  score(scoring.call, workspace.mutable_data_ptr(), queue.stream);
  return {scoring.scores, scoring.mass};
}

template <class F>
void for_each_loss(const F& f) {
  for (int i = 0; i < static_cast<int>(Loss::COUNT); ++i)
    EveryLoss::with(static_cast<Loss>(i), [&](auto loss) { f(loss.value, Traits<decltype(loss)::value>::name); });
}

Loss loss_of(const char* verb, const std::string& name) {
  Loss found = Loss::COUNT;
  for_each_loss([&](Loss loss, const char* known) { found = name == known ? loss : found; });
  if (found == Loss::COUNT) {
    std::string valid;
    for_each_loss([&](Loss, const char* known) { valid += (valid.empty() ? "'" : ", '") + std::string(known) + "'"; });
    require(false, verb, ": loss '", name, "' is unknown; the valid ones are ", valid);
  }
  return found;
}

bool takes_logits(Loss loss) {
  bool takes = false;
  EveryLoss::with(loss, [&](auto known) { takes = Traits<decltype(known)::value>::takes_logits; });
  return takes;
}

// The columns of the table of entries and terms, as frs_kernels/reference.py describes them; empty ones are the usual.
struct Columns {
  const std::vector<int64_t>&level, &term;
  const std::vector<double>&scale, &eps;
  const std::vector<std::string>& loss;
  const std::vector<double>& weight;
  const std::vector<std::optional<Tensor>>& factor;
  const std::vector<double>&temperature, &beta;
  const std::vector<bool>& want_grad;
  const bool want_loss, joint;

  // Level and term are not given: the entries are every term's levels in turn.
  bool in_turn() const { return level.empty() && term.empty(); }
};

// The arguments of an imitate and where its results go. Everything is checked before anything is allocated.
struct Imitation {
  // `logits`: the levels of a distill, or empty for the first term's teachers, which are then put there; else the
  // levels are what the entries say.
  Imitation(const char* verb, const Tensors& students, const Tensors& teachers, const Columns& columns, Levels* logits)
      : verb(verb),
        count(students.size()),
        want_loss(columns.want_loss),
        joint(columns.joint),
        student(checked_levels(verb, "student", students)),
        teacher(checked_levels(verb, "teacher", teachers)),
        dtype(accumulated(accumulated(DType::f32, student), teacher)) {
    require(count == teacher.size(), verb, ": student has ", count, " entries, teacher ", teacher.size(),
            "; they must have the same shape in every entry");
    for (size_t i = 0; i < count; ++i) {
      require(std::equal(student[i].size, student[i].size + 4, teacher[i].size), Name{verb, "student", i, student[i]},
              ", teacher ", teacher[i], "; they must have the same shape in every entry");
      require_device({verb, "teacher", i, teacher[i]}, student[0]);
    }
    set_terms(columns);
    const size_t turns = count / terms.size();
    require(!columns.in_turn() || count == turns * terms.size(), verb, ": without level and term, ", count,
            " entries must be the same levels for ", terms.size(), " terms");
    if (logits && logits->empty()) {
      require(columns.in_turn(), verb, ": logits is empty; it needs (N, C, H, W) tensors, one a level");
      logits->assign(teacher.begin(), teacher.begin() + turns);
    }
    set_entries(columns, logits, turns);
  }

  // The masks must be there in full: `scores` has a number a position, `norm` one a level.
  void check_scores(const Tensor& scores, const Tensor& norm) const {
    for (const auto& [name, tensor] : {std::pair{"scores", &scores}, std::pair{"norm", &norm}}) {
      require(tensor->defined(), verb, ": ", name, " is None");
      const Given given(*tensor);
      require(given.type == ScalarType::Float || given.type == ScalarType::Double, verb, ": ", name,
              " must be float32 or float64");
      require(given.dim == 1 && tensor->is_contiguous(), verb, ": ", name, " ", given, " must be 1-dim and contiguous");
      require(given.device == student[0].device, verb, ": ", name,
              " is on another device than the levels; move it there");
    }
    require(scores.scalar_type() == norm.scalar_type(), verb, ": scores and norm must have one dtype");
    require(scores.numel() == total_positions && norm.numel() == level_count, verb,
            ": scores must hold one number a position, norm one a level: ", total_positions, " and ", level_count,
            ", got ", scores.numel(), " and ", norm.numel());
  }

  // Allocates the results. The scores are checked or have just been made.
  void allocate(const Tensor& scores, const Tensor& norm) {
    grads.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      Entry& entry = entries[i];
      entry.student = view(student[i], student[i].tensor->const_data_ptr());
      entry.teacher = view(teacher[i], teacher[i].tensor->const_data_ptr());
      if (!terms_want[entry.term]) continue;
      grads.push_back(empty_like(student[i]));
      const Given grad(grads.back());
      entry.grad = view(grad, grads.back().mutable_data_ptr());
      prepare(entry.grad.data, grad.numel() * static_cast<int64_t>(grads.back().element_size()));
    }
    const int64_t rows = static_cast<int64_t>(terms.size() + count), none = 0, one = 1;
    total = empty(want_loss ? 0 : 1, &none, &one, scalar_type(dtype), student[0]);
    values = vector_of(want_loss ? rows : 0, scalar_type(dtype), student[0]);
    call = {entries.data(),
            static_cast<int64_t>(count),
            terms.data(),
            static_cast<int64_t>(terms.size()),
            dtype,
            dtype_of(scores.scalar_type()),
            scores.const_data_ptr(),
            norm.const_data_ptr(),
            joint ? level_count : 0,
            want_loss ? total.mutable_data_ptr() : nullptr,
            want_loss ? values.mutable_data_ptr() : nullptr};
  }

  const char* verb;
  size_t count;
  bool want_loss, joint;
  Levels student, teacher;
  DType dtype;
  std::vector<Entry> entries;
  std::vector<Term> terms;
  std::vector<bool> terms_want;  // the gradients of their entries
  int64_t total_positions = 0, level_count = 0;
  Tensor total, values;
  Tensors grads;
  Imitate call;

 private:
  void set_terms(const Columns& columns) {
    const size_t size = columns.loss.size();
    require(size > 0, verb, ": loss is empty; it needs a name a term");
    require(columns.weight.size() == size && columns.factor.size() == size && columns.temperature.size() == size &&
                columns.beta.size() == size && columns.want_grad.size() == size,
            verb, ": weight, factor, temperature, beta and want_grad must have an element a term, as loss has: ", size);
    bool any = columns.want_loss;
    terms.reserve(size);
    for (size_t t = 0; t < size; ++t) {
      const double temperature = columns.temperature[t], beta = columns.beta[t];
      require(std::isfinite(temperature) && temperature > 0, verb, ": temperature must be positive and finite, got ",
              temperature);
      require(std::isfinite(beta) && beta >= 0, verb, ": beta must be zero or more and finite, got ", beta);
      const std::optional<Tensor>& factor = columns.factor[t];
      if (factor) require_number(verb, *factor, student[0].device);
      const Loss loss = loss_of(verb, columns.loss[t]);
      terms.push_back({loss, columns.weight[t], factor ? factor->const_data_ptr() : nullptr,
                       factor ? dtype_of(factor->scalar_type()) : DType::f32, takes_logits(loss) ? temperature : 1.0,
                       beta});
      any |= columns.want_grad[t];
    }
    terms_want = columns.want_grad;
    require(any, verb, ": nothing is wanted: set want_loss, want_grad or both");
  }

  // The channels of a group, or 0 where the loss is pointwise.
  int64_t group_of(const Term& term, const Name& name, int64_t channels) const {
    if (!is_grouped(term.loss)) return 0;
    const double size = term.beta == 0 ? static_cast<double>(channels) : term.beta;
    require(std::fmod(size, 1) == 0 && std::fmod(static_cast<double>(channels), size) == 0, name, ": beta=", term.beta,
            ": a group of softmax_kl must have a whole number of channels that divides ", channels, ", or 0 for all");
    return static_cast<int64_t>(size);
  }

  void set_entries(const Columns& columns, const Levels* logits, size_t turns) {
    const auto fits = [&](const auto& column) { return column.empty() || column.size() == count; };
    require((columns.in_turn() || (columns.level.size() == count && columns.term.size() == count)) &&
                fits(columns.scale) && fits(columns.eps),
            verb, ": level, term, scale and eps must have an element an entry, as student has: ", count);
    const auto level_at = [&](size_t i) { return columns.in_turn() ? int64_t(i % turns) : columns.level[i]; };
    const auto term_at = [&](size_t i) { return columns.in_turn() ? int64_t(i / turns) : columns.term[i]; };
    std::vector<const Given*> of_level(logits ? logits->size() : count);
    std::vector<bool> has_entry(of_level.size()), term_has(terms.size());
    if (logits)
      for (size_t l = 0; l < logits->size(); ++l) of_level[l] = &(*logits)[l];
    for (size_t i = 0; i < count; ++i) {
      const Given& s = student[i];
      const Name name{verb, "student", i, s};
      const int64_t level = level_at(i), term = term_at(i);
      require(level >= 0 && level < static_cast<int64_t>(of_level.size()), name, ": there is no level ", level);
      require(term >= 0 && term < static_cast<int64_t>(terms.size()), name, ": there is no term ", term);
      const Given*& of = of_level[level];
      if (of == nullptr) of = &s;
      has_entry[level] = term_has[term] = true;
      const bool same = s.size[0] == of->size[0] && s.size[2] == of->size[2] && s.size[3] == of->size[3];
      require(same, name, " differs in N, H or W from level ", level, ", ", *of);
    }
    while (!logits && !of_level.empty() && of_level.back() == nullptr) of_level.pop_back();
    std::vector<int64_t> first(of_level.size());
    for (size_t l = 0; l < of_level.size(); ++l) {
      require(has_entry[l], verb, ": level ", l, " has no entry; levels are numbered from 0 without a gap");
      first[l] = total_positions;
      total_positions += positions(*of_level[l]);
    }
    level_count = static_cast<int64_t>(of_level.size());
    for (size_t t = 0; t < terms.size(); ++t) require(term_has[t], verb, ": term ", t, " has no entry");
    entries.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      const int64_t level = level_at(i);
      const double scale = columns.scale.empty() ? 1 : columns.scale[i], eps = columns.eps.empty() ? 0 : columns.eps[i];
      const int64_t group = group_of(terms[term_at(i)], Name{verb, "student", i, student[i]}, student[i].size[1]);
      entries.push_back({level_of(student[i], first[level]), level, term_at(i), scale, eps, group});
    }
  }
};

std::vector<std::string> texts_of(const std::vector<StringHandle>& handles) {
  std::vector<std::string> texts;
  texts.reserve(handles.size());
  for (StringHandle handle : handles) texts.push_back(text_of(handle));
  return texts;
}

std::tuple<Tensor, Tensor, Tensors> imitate_op(const Tensors& student, const Tensors& teacher, const Tensor& scores,
                                               const Tensor& norm, const std::vector<int64_t>& level,
                                               const std::vector<int64_t>& term, const std::vector<double>& scale,
                                               const std::vector<double>& eps, const std::vector<StringHandle>& loss,
                                               const std::vector<double>& weight,
                                               const std::vector<std::optional<Tensor>>& factor,
                                               const std::vector<double>& temperature, const std::vector<double>& beta,
                                               const std::vector<bool>& want_grad, bool want_loss, bool joint) {
  const std::vector<std::string> losses = texts_of(loss);
  const Columns columns{level,  term,        scale, eps,       losses,    weight,
                        factor, temperature, beta,  want_grad, want_loss, joint};
  Imitation imitation("imitate", student, teacher, columns, nullptr);
  imitation.check_scores(scores, norm);
  const Given& like = imitation.student[0];
  const Queue queue(like);
  imitation.allocate(scores, norm);
  Tensor workspace = vector_of(imitate_workspace(imitation.call), ScalarType::Byte, like);
  imitate(imitation.call, workspace.mutable_data_ptr(), queue.stream);
  return {imitation.total, imitation.values, std::move(imitation.grads)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors> distill_op(
    const Tensors& student, const Tensors& teacher, const Tensors& logits, const std::vector<int64_t>& level,
    const std::vector<int64_t>& term, const std::vector<double>& scale, const std::vector<double>& eps,
    const std::vector<StringHandle>& loss, const std::vector<double>& weight,
    const std::vector<std::optional<Tensor>>& factor, const std::vector<double>& temperature,
    const std::vector<double>& beta, const std::vector<bool>& want_grad, bool want_loss, bool joint) {
  const std::vector<std::string> losses = texts_of(loss);
  Levels levels = logits.empty() ? Levels{} : checked_levels("distill", "logits", logits);
  const Columns columns{level,  term,        scale, eps,       losses,    weight,
                        factor, temperature, beta,  want_grad, want_loss, joint};
  Imitation imitation("distill", student, teacher, columns, &levels);
  const Given& like = imitation.student[0];
  require_device({"distill", "logits", 0, levels[0]}, like);
  const Queue queue(like);
  Scoring scoring(levels);
  imitation.allocate(scoring.scores, scoring.mass);
  Tensor workspace = vector_of(distill_workspace(scoring.call, imitation.call), ScalarType::Byte, like);
  distill(scoring.call, imitation.call, workspace.mutable_data_ptr(), queue.stream);
  return {scoring.scores, scoring.mass, imitation.total, imitation.values, std::move(imitation.grads)};
}

enum class Memory { dense, gaps, overlap };

// How t lies in memory, in whatever order of axes; an overlap is taken for one where a stride is less than what lies
// within it.
Memory memory_of(const Given& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // stride, size
  axes.reserve(t.dim);
  for (int64_t i = 0; i < t.dim; ++i)
    if (t.size[i] != 1) axes.emplace_back(t.stride[i], t.size[i]);
  std::sort(axes.begin(), axes.end());
  int64_t within = 1;
  for (const auto& [stride, size] : axes) {
    if (stride < within) return Memory::overlap;
    within = stride * (size - 1) + within;
  }
  return within == t.numel() ? Memory::dense : Memory::gaps;
}

void scale_op(const Tensors& grads, const Tensor& factor) {
  const Levels given(grads.begin(), grads.end());
  std::vector<Run> runs;
  runs.reserve(given.size());
  Tensors apart;
  for (size_t i = 0; i < given.size(); ++i) {
    const Name name{"scale_", "grads", i, given[i]};
    require(is_float(given[i].type), name, " must be float32, float64, bfloat16 or float16");
    require_device(name, given[0]);
    const int64_t numel = given[i].numel();
    if (numel == 0) continue;
    const Memory memory = memory_of(given[i]);
    require(memory != Memory::overlap, name,
            " overlaps itself in memory, so that a number would be multiplied twice; clone it");
    if (memory == Memory::dense)
      runs.push_back({grads[i].mutable_data_ptr(), numel, dtype_of(given[i].type)});
    else
      apart.push_back(grads[i]);
  }
  require_number("scale_", factor, given.empty() ? factor.device() : given[0].device);
  const Queue queue{Given(factor)};
  for (const Tensor& grad : apart) {
    StableIValue stack[] = {torch::stable::detail::from(grad), torch::stable::detail::from(factor)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack, TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // takes the reference that came back
  }
  const Scale call{runs.data(), static_cast<int64_t>(runs.size()), factor.const_data_ptr(),
                   dtype_of(factor.scalar_type())};
  if (!runs.empty()) scale(call, queue.stream);
}

#ifndef USE_CUDA
std::string instructions_op() { return instructions(); }
#endif

}  // namespace
}  // namespace frs

#ifndef USE_CUDA
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
