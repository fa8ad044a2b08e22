// The operators of the losses along rows as torch sees them: checks, outputs. Compiled once for each library, as
// ops.cpp is, over csrc/cpu/moments.cpp or csrc/cuda/moments.cu.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "queue.h"
#include "tensors.h"

namespace frs {
namespace {

RowLoss row_loss_of(const char* verb, const std::string& name) {
  RowLoss found = RowLoss::COUNT;
  std::string valid;
  for (int i = 0; i < static_cast<int>(RowLoss::COUNT); ++i)
    with_row_loss(static_cast<RowLoss>(i), [&](auto loss) {
      const char* known = RowTraits<decltype(loss)::value>::name;
      if (name == known) found = loss;
      valid += (valid.empty() ? "'" : ", '") + std::string(known) + "'";
    });
  require(found != RowLoss::COUNT, verb, ": loss '", name, "' is unknown; the valid ones are ", valid);
  return found;
}

// Student and teacher, checked, and what both verbs need of them. Everything is checked before anything is allocated.
struct Aligned {
  Aligned(const char* verb, const Tensors& students, const Tensors& teachers, const std::string& name,
          double temperature, const std::optional<Tensor>& factor)
      : loss(row_loss_of(verb, name)),
        student(checked_levels(verb, "student", students)),
        teacher(checked_levels(verb, "teacher", teachers)),
        dtype(accumulated(accumulated(DType::f32, student), teacher)),
        factor_data(nullptr),
        factor_dtype(DType::f32) {
    require(student.size() == teacher.size(), verb, ": student has ", student.size(), " levels, teacher ",
            teacher.size(), "; they must have the same shape in every level");
    require(std::isfinite(temperature) && temperature > 0, verb, ": temperature must be positive and finite, got ",
            temperature);
    if (factor) {
      require_number(verb, *factor, student[0].device);
      factor_data = factor->const_data_ptr();
      factor_dtype = dtype_of(factor->scalar_type());
    }
    bool per_image = false;
    with_row_loss(loss, [&](auto known) { per_image = RowTraits<decltype(known)::value>::per_image; });
    levels.reserve(student.size());
    for (size_t i = 0; i < student.size(); ++i) {
      const Given &s = student[i], &t = teacher[i];
      require(std::equal(s.size, s.size + 4, t.size), Name{verb, "student", i, s}, ", teacher ", t,
              "; they must have the same shape in every level");
      require_device({verb, "teacher", i, t}, student[0]);
      levels.push_back(level_of(s, rows));
      levels.back().student = view(s, s.tensor->const_data_ptr());
      levels.back().teacher = view(t, t.tensor->const_data_ptr());
      rows += (per_image ? s.size[0] : 1) * s.size[1];
    }
  }

  RowLoss loss;
  Levels student, teacher;
  DType dtype;
  const void* factor_data;
  DType factor_dtype;
  std::vector<Level> levels;
  int64_t rows = 0;
};

std::tuple<Tensor, Tensor, Tensor> moments_op(const Tensors& student, const Tensors& teacher, StringHandle loss,
                                              const std::vector<double>& scale, double weight,
                                              const std::optional<Tensor>& factor, double temperature, double eps) {
  const Aligned given("moments", student, teacher, text_of(loss), temperature, factor);
  const int64_t count = static_cast<int64_t>(given.levels.size()), none = 0;
  require(scale.size() == given.levels.size(), "moments: scale must have an element a level, as student has: ", count);
  require(std::isfinite(eps) && eps >= 0, "moments: eps must be zero or more and finite, got ", eps);
  const Given& like = given.student[0];
  const Queue queue(like);
  const ScalarType dtype = scalar_type(given.dtype);
  const int64_t shape[] = {given.rows, NUMBERS}, strides[] = {NUMBERS, 1};
  Tensor total = empty(0, &none, &none, dtype, like), values = vector_of(1 + count, dtype, like);
  Tensor rows = empty(2, shape, strides, dtype, like);
  const Moments call{given.levels.data(),
                     count,
                     given.loss,
                     scale.data(),
                     weight,
                     temperature,
                     eps,
                     given.factor_data,
                     given.factor_dtype,
                     given.dtype,
                     total.mutable_data_ptr(),
                     values.mutable_data_ptr(),
                     rows.mutable_data_ptr()};
  Tensor workspace = vector_of(moments_workspace(call), ScalarType::Byte, like);
  moments(call, workspace.mutable_data_ptr(), queue.stream);
  return {total, values, rows};
}

Tensors moments_backward_op(const Tensors& student, const Tensors& teacher, const Tensor& rows, StringHandle loss,
                            double weight, const std::optional<Tensor>& factor, double temperature) {
  Aligned given("moments_backward", student, teacher, text_of(loss), temperature, factor);
  const Given& like = given.student[0];
  require(rows.defined(), "moments_backward: rows is None");
  const Given numbers(rows);
  require(numbers.dim == 2 && numbers.size[0] == given.rows && numbers.size[1] == NUMBERS && rows.is_contiguous() &&
              numbers.type == scalar_type(given.dtype) && numbers.device == like.device,
          "moments_backward: rows ", numbers, " must be what moments returned for these tensors: (", given.rows, ", ",
          NUMBERS, ")");
  const Queue queue(like);
  Tensors grads;
  for (size_t i = 0; i < given.levels.size(); ++i) {
    grads.push_back(empty_like(given.student[i]));
    const Given grad(grads.back());
    given.levels[i].grad = view(grad, grads.back().mutable_data_ptr());
    prepare(given.levels[i].grad.data, grad.numel() * static_cast<int64_t>(grads.back().element_size()));
  }
  moments_backward({given.levels.data(), static_cast<int64_t>(given.levels.size()), given.loss, weight, temperature,
                    given.factor_data, given.factor_dtype, given.dtype, rows.const_data_ptr()},
                   queue.stream);
  return grads;
}

}  // namespace
}  // namespace frs

STABLE_TORCH_LIBRARY_IMPL(frs_kernels, FRS_KEY, library) {
  library.impl("moments", TORCH_BOX(&frs::moments_op));
  library.impl("moments_backward", TORCH_BOX(&frs::moments_backward_op));
}
