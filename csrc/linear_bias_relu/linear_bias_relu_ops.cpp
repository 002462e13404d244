// linear_bias_relu as PyTorch operators on the CPU.
#include <torch/csrc/stable/library.h>

#include "../common/relu_mask.h"
#include "linear_bias_relu_plan.h"

namespace alexnet_ext {
namespace {

// source packed for the kernels: transposed, widened, with padded rows.
Tensor packed(const LinearBiasRelu& p, const Tensor& source) {
  const int64_t columns = source.size(1), sizes[] = {columns, padded_rows(p)};
  const auto wide = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor result = torch::stable::new_empty(source, {sizes, 2}, wide);
  on_cpu(ceil_div(columns, kPackRun), [&](auto isa, int64_t begin, int64_t end) {
    pack_rows_cpu<isa.value>(p, columns, source.data_ptr(), result.data_ptr(), begin, end);
  });
  return result;
}

Tensor forward(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias) {
  const LinearBiasRelu p = plan(x, weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  const void* b = bias_data(bias, x, p.outputs);
  const Tensor in = rows_of(x), w = rows_of(weight), in_packed = p.rows < kFewRows ? in : packed(p, in);
  Tensor y = empty(x, {p.rows, p.outputs});
  on_cpu(p.rows == 0 ? 0 : ceil_div(p.outputs, kForwardOutputs), [&](auto isa, int64_t begin, int64_t end) {
    linear_bias_relu_cpu<isa.value>(p, in.data_ptr(), in_packed.data_ptr(), w.data_ptr(), b, y.data_ptr(), begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& y,
                                            std::vector<bool> output_mask) {
  const LinearBiasRelu p = plan_backward(dy, x, weight, y);
  const Tensor in = rows_of(x), w = rows_of(weight), gradient = rows_of(dy), result = rows_of(y);
  Tensor dz = empty(x, {p.rows, p.outputs});
  on_cpu(relu_units(dz.numel()), [&](auto isa, int64_t begin, int64_t end) {
    relu_mask_cpu<isa.value>(p.dtype, gradient.data_ptr(), result.data_ptr(), dz.data_ptr(), dz.numel(), begin, end);
  });
  Tensor dx = empty(x, {0}), dweight = empty(x, {0}), dbias = empty(x, {0});
  if (output_mask.at(0)) {
    dx = empty(x, {p.rows, p.inputs});
    const Tensor dz_packed = packed(p, dz);
    on_cpu(p.rows == 0 ? 0 : ceil_div(p.inputs, kInputs), [&](auto isa, int64_t begin, int64_t end) {
      linear_input_gradient_cpu<isa.value>(p, dz_packed.data_ptr(), w.data_ptr(), dx.data_ptr(), begin, end);
    });
  }
  if (output_mask.at(1)) dweight = empty(x, {p.outputs, p.inputs});
  if (output_mask.at(2)) dbias = empty(x, {p.outputs});
  if (output_mask.at(1) || output_mask.at(2)) {
    void* for_weight = output_mask.at(1) ? dweight.data_ptr() : nullptr;
    void* for_bias = output_mask.at(2) ? dbias.data_ptr() : nullptr;
    on_cpu(ceil_div(p.outputs, kWeightOutputs), [&](auto isa, int64_t begin, int64_t end) {
      linear_weight_gradient_cpu<isa.value>(p, dz.data_ptr(), in.data_ptr(), for_weight, for_bias, begin, end);
    });
  }
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace alexnet_ext

STABLE_TORCH_LIBRARY_IMPL(alexnet_ext, CPU, m) {
  m.impl("linear_bias_relu", TORCH_BOX(&alexnet_ext::forward));
  m.impl("linear_bias_relu_backward", TORCH_BOX(&alexnet_ext::backward));
}
