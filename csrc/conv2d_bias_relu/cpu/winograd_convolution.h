// Winograd's convolution of tensors: where it is used, its scratch, and its products by PyTorch's bmm.
#pragma once

#include <array>
#include <atomic>

#include "../aten_convolution.h"
#include "winograd.h"

namespace alexnet_ext {

// With fewer tiles the transforms of the weight, with fewer channels those of the tiles, cost more than the products
// save.
constexpr int64_t kFewestTiles = 384, kFewestChannels = 96;
// Tiles taken together: enough for the products to run at full speed, few enough for the matrices to stay in the cache
// and in blocks that malloc reuses.
constexpr int64_t kTilesTogether = 448;
constexpr int64_t kLargestMatrix = int64_t{32} << 20;

class WinogradConvolution {
 public:
  // Nothing where another way is as good, or where only stock PyTorch has the right words for what is wrong. With
  // AVX-512 oneDNN's convolution is: on a Zen 5 it did 524 GFLOP/s, and bmm, which is MKL's, 213, as with AVX2.
  static std::optional<WinogradConvolution> of(const Tensor& x, const Tensor& weight, const Convolution& p) {
    if (best_isa() == Isa::avx512) return std::nullopt;
    if (x.dim() != 4 || weight.dim() != 4 || p.groups < 1 || p.padding[0] < 0 || p.padding[1] < 0) return std::nullopt;
    if (x.scalar_type() != ScalarType::Float || weight.scalar_type() != ScalarType::Float) return std::nullopt;
    const int64_t inputs = weight.size(1), outputs = weight.size(0) / p.groups;
    const IntList ones = {1, 1};
    const bool fits = weight.size(2) == 3 && weight.size(3) == 3 && p.stride == ones && p.dilation == ones &&
                      inputs * p.groups == x.size(1) && outputs * p.groups == weight.size(0) &&
                      inputs % kWholeVector == 0 && outputs % kWholeVector == 0 && inputs >= kFewestChannels &&
                      outputs >= kFewestChannels;
    if (!fits) return std::nullopt;
    const int64_t height = x.size(2) + 2 * p.padding[0] - 2, width = x.size(3) + 2 * p.padding[1] - 2;
    if (height < 1 || width < 1 || x.size(2) < 1 || x.size(3) < 1) return std::nullopt;
    WinogradConvolution made;
    Winograd& w = made.p_;
    w = {{x.size(0), x.size(1), x.size(2), x.size(3), true},
         {x.size(0), weight.size(0), height, width, true},
         p.groups,
         {p.padding[0], p.padding[1]},
         ceil_div(height, 2),
         ceil_div(width, 2),
         0};
    const int64_t tiles = w.tiles_h * w.tiles_w, parts = ceil_div(w.in.batch * tiles, kTilesTogether);
    if (w.in.batch * tiles < kFewestTiles) return std::nullopt;
    made.together_ = ceil_div(w.in.batch, parts);
    w.capacity = made.together_ * tiles;
    const int64_t wider = x.size(1) > weight.size(0) ? x.size(1) : weight.size(0);
    if (kPlaces * w.capacity * wider * static_cast<int64_t>(sizeof(float)) > kLargestMatrix) return std::nullopt;
    made.channels_last_ = is_channels_last(x) || is_channels_last(weight);
    return made;
  }

  // conv2d(x, weight) + bias, with relu max(0, .) of it; nothing where a value is not finite.
  std::optional<Tensor> forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                bool relu) const {
    const Tensor in = dense(x, p_.in);
    const Tensor u = transformed(weight);
    Tensor y = empty_images(x, p_.out, ScalarType::Float), v = matrix(x, p_.inputs()), m = matrix(x, p_.outputs());
    const std::optional<Tensor> b = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    const float* bias_values = b ? floats(*b) : nullptr;
    std::atomic<bool> finite{true};
    for_parts([&](int64_t first, int64_t images, int64_t) {
      rows_of_tiles(images, [&](auto isa, int64_t begin, int64_t end) {
        winograd_input_cpu<isa.value>(p_, floats(in), floats(v), first, begin, end);
      });
      multiply(used(v, images), torch::stable::transpose(u, 1, 2), used(m, images));
      rows_of_tiles(images, [&](auto isa, int64_t begin, int64_t end) {
        if (!winograd_output_cpu<isa.value>(p_, floats(m), bias_values, least_of(relu), floats(y), first, begin, end))
          finite = false;
      });
    });
    if (!finite) return std::nullopt;
    return in_format(y, p_.out);
  }

  // The gradients of x, weight and bias that `mask` asks for, the others empty; nothing where a value is not finite.
  std::optional<std::array<Tensor, 3>> backward(const Tensor& dz, const Tensor& x, const Tensor& weight,
                                                const std::array<bool, 3>& mask) const {
    const Tensor in = dense(x, p_.in), gradient = dense(dz, p_.out);
    Tensor z = matrix(x, p_.outputs());
    const int64_t none[] = {0}, pixels[] = {0, 2, 3};
    std::array<Tensor, 3> results;
    for (Tensor& result : results) result = torch::stable::new_empty(x, {none, 1});
    std::optional<Tensor> u, m, v, du;
    if (mask[0]) {
      results[0] = empty_images(x, p_.in, ScalarType::Float);
      u = transformed(weight);
      m = matrix(x, p_.inputs());
    }
    if (mask[1]) {
      v = matrix(x, p_.inputs());
      du = scratch(x, {ceil_div(p_.in.batch, together_) * kPlaces * p_.groups, p_.outputs(), p_.inputs()});
    }
    std::atomic<bool> finite{true};
    for_parts([&](int64_t first, int64_t images, int64_t part) {
      rows_of_tiles(images, [&](auto isa, int64_t begin, int64_t end) {
        winograd_output_transposed_cpu<isa.value>(p_, floats(gradient), floats(z), first, begin, end);
        if (v) winograd_input_cpu<isa.value>(p_, floats(in), floats(*v), first, begin, end);
      });
      if (mask[0]) {
        multiply(used(z, images), *u, used(*m, images));
        with_threads(images * p_.groups * channel_blocks(p_), [&](auto isa, int64_t begin, int64_t end) {
          if (!winograd_input_transposed_cpu<isa.value>(p_, floats(*m), floats(results[0]), first, begin, end))
            finite = false;
        });
      }
      if (mask[1]) {
        const int64_t places = kPlaces * p_.groups;
        multiply(torch::stable::transpose(used(z, images), 1, 2), used(*v, images),
                 torch::stable::narrow(*du, 0, part * places, places));
      }
    });
    if (mask[0]) results[0] = in_format(results[0], p_.in);
    if (mask[1]) {
      results[1] = empty_images(x, {weight.size(0), weight.size(1), 3, 3, channels_last_}, ScalarType::Float);
      with_threads(p_.out.channels, [&](auto isa, int64_t begin, int64_t end) {
        if (!winograd_weight_transposed_cpu<isa.value>(p_, floats(*du), ceil_div(p_.in.batch, together_),
                                                       weight_of(results[1]), begin, end))
          finite = false;
      });
    }
    if (!finite) return std::nullopt;
    if (mask[2]) results[2] = torch::stable::sum(gradient, torch::headeronly::IntHeaderOnlyArrayRef(pixels, 3));
    return results;
  }

 private:
  static float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

  static Tensor scratch(const Tensor& like, const std::array<int64_t, 3>& sizes) {
    return torch::stable::empty({sizes.data(), 3}, ScalarType::Float, std::nullopt, like.device());
  }

  static Weight3x3 weight_of(const Tensor& w) {
    return {floats(w), {w.stride(0), w.stride(1), w.stride(2), w.stride(3)}};
  }

  static void multiply(const Tensor& a, const Tensor& b, const Tensor& product) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a), from(b), from(product)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // the result is a reference of its own to `product`: given back here
  }

  // f(instruction set, begin, end) over the units.
  template <class F>
  static void with_threads(int64_t units, F&& f) {
    parallel(units, [&](int64_t begin, int64_t end) { with_isa(best_isa(), [&](auto isa) { f(isa, begin, end); }); });
  }

  template <class F>
  void rows_of_tiles(int64_t images, F&& f) const {
    with_threads(images * p_.tiles_h, f);
  }

  // f(first image, images, number of the part).
  template <class F>
  void for_parts(F&& f) const {
    for (int64_t first = 0, part = 0; first < p_.in.batch; first += together_, ++part)
      f(first, first + together_ < p_.in.batch ? together_ : p_.in.batch - first, part);
  }

  Tensor matrix(const Tensor& like, int64_t channels) const {
    return scratch(like, {kPlaces * p_.groups, p_.capacity, channels});
  }

  // The rows of a matrix that so many images fill.
  Tensor used(Tensor m, int64_t images) const {
    return torch::stable::narrow(m, 1, 0, images * p_.tiles_h * p_.tiles_w);
  }

  Tensor transformed(const Tensor& weight) const {
    Tensor u = scratch(weight, {kPlaces * p_.groups, p_.outputs(), p_.inputs()});
    with_threads(p_.out.channels, [&](auto isa, int64_t begin, int64_t end) {
      winograd_weight_cpu<isa.value>(p_, weight_of(weight), floats(u), begin, end);
    });
    return u;
  }

  // An NHWC result in the memory format of the convolution.
  Tensor in_format(const Tensor& t, Images images) const {
    images.channels_last = channels_last_;
    return dense(t, images);
  }

  Winograd p_;
  int64_t together_;  // images
  bool channels_last_;
};

}  // namespace alexnet_ext
