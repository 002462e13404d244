// PyTorch's tensors at the boundary: checks (RuntimeError with one sentence), layouts, allocation. Past the boundary
// kernels take raw pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "huge_pages.h"
#include "isa.h"
#include "types.h"

// Since 2.13 PyTorch passes on the message of an error across the C boundary. Earlier versions only report the place.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace alexnet_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = std::vector<int64_t>;

// Unless it holds, throws std::runtime_error (RuntimeError in Python) with the parts as one sentence.
template <class... Parts>
inline void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline std::string shape_text(const Tensor& x) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "") << x.size(i);
  text << ']';
  return text.str();
}

inline DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      check(false, name, " must be float64, float32, bfloat16 or float16");
      return DType::f32;
  }
}

inline void check_device(const Tensor& t, const char* name, const Tensor& x, const char* of = "x") {
  check(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name, " must be on the device of ",
        of);
}

// t must have x's dtype and device.
inline void check_like(const Tensor& t, const char* name, const Tensor& x) {
  check(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  check_device(t, name, x);
}

inline void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = t.size(i) == sizes[i];
  if (same) return;
  std::ostringstream expected;
  for (size_t i = 0; i < sizes.size(); ++i) expected << (i ? ", " : "") << sizes[i];
  check(false, name, " has shape ", shape_text(t), ", expected [", expected.str(), "]");
}

// The data of the bias, null if there is none. Its shape must be [channels], dtype and device those of x.
inline const void* bias_data(const std::optional<Tensor>& bias, const Tensor& x, int64_t channels) {
  if (!bias) return nullptr;
  check_like(*bias, "bias", x);
  check_shape(*bias, "bias", {channels});
  return bias->data_ptr();
}

// Whether the strides agree. Those of dimensions of size 1 do not count.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// t with the strides of `like`: t itself, or a copy.
inline Tensor with_strides_of(const Tensor& like, const Tensor& t) {
  if (same_strides(t, like)) return t;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, t);
  return copy;
}

// PyTorch's suggested memory format: channels-last when the strides of a 4-D tensor descend as N, H, W, C.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) == 0 || x.stride(d) < least) return false;
    if (d == 0 && least == x.stride(1)) return false;
    least = x.stride(d);
    if (x.size(d) > 1) least *= x.size(d);
  }
  return true;
}

inline Images images_of(const Tensor& x, const char* name) {
  check(x.dim() == 4, name, " has shape ", shape_text(x), ", expected 4D (N, C, H, W)");
  for (int64_t i = 1; i < 4; ++i)
    check(x.size(i) > 0, name, " has shape ", shape_text(x), ", expected non-empty C, H and W");
  return {x.size(0), x.size(1), x.size(2), x.size(3), is_channels_last(x)};
}

// Takes x newly allocated and not yet written. Advises huge pages if it is a large block of host memory.
inline Tensor fresh(Tensor x) {
  if (x.is_cpu()) advise_huge_pages(x.data_ptr(), x.numel() * x.element_size());
  return x;
}

inline Tensor fresh_like(const Tensor& x) { return fresh(torch::stable::empty_like(x)); }

// A new dense tensor for `images` on the device of `like`.
inline Tensor empty_images(const Tensor& like, const Images& images, ScalarType dtype) {
  using torch::headeronly::MemoryFormat;
  const int64_t sizes[] = {images.batch, images.channels, images.height, images.width};
  return fresh(torch::stable::empty({sizes, 4}, dtype, std::nullopt, like.device(), std::nullopt,
                                    images.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
}

// x, or a dense copy of it in the layout of `images`. Dense NCHW or NHWC is never copied.
inline Tensor dense(const Tensor& x, const Images& images) {
  const int64_t c = images.channels, h = images.height, w = images.width;
  const int64_t nchw[] = {c * h * w, h * w, w, 1}, nhwc[] = {c * h * w, 1, w * c, c};
  const int64_t* strides = images.channels_last ? nhwc : nchw;
  for (int64_t i = 0; i < 4; ++i) {
    if (x.size(i) <= 1 || x.stride(i) == strides[i]) continue;
    Tensor copy = empty_images(x, images, x.scalar_type());
    torch::stable::copy_(copy, x);
    return copy;
  }
  return x;
}

// Runs f(isa, begin, end) over all units: on PyTorch's thread pool, with this CPU's best instruction set as a constant.
template <class F>
inline void on_cpu(int64_t units, F&& f) {
  if (units == 0) return;
  torch::stable::parallel_for(
      0, units, 1, [&](int64_t begin, int64_t end) { with_isa(best_isa(), [&](auto isa) { f(isa, begin, end); }); });
}

}  // namespace alexnet_ext
