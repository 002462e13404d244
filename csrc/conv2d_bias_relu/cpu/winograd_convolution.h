// Winograd's convolution of PyTorch's tensors: when it is used, its scratch memory, and its products by PyTorch's bmm.
#pragma once

#include <array>
#include <atomic>

#include "../aten_convolution.h"
#include "winograd.h"

namespace alexnet_ext {

// Below kFewestTiles the transforms of the weight cost more than the products save, and below kFewestChannels those of
// the tiles do.
constexpr int64_t kFewestTiles = 384, kFewestChannels = 96;
// Tiles in one pass: enough for products at full speed, few enough for matrices that stay in the cache.
constexpr int64_t kTilesTogether = 448;
// Bytes of a matrix. malloc reuses blocks up to this size, so their pages are already mapped.
constexpr int64_t kLargestMatrix = int64_t{32} << 20;

class WinogradConvolution {
 public:
  // Nothing where oneDNN's convolution is as fast, or where only stock PyTorch words the error. With AVX-512 oneDNN
  // wins: on a Zen 5 it did 524 GFLOP/s, and bmm, which is MKL's, 213, as with AVX2.
  static std::optional<WinogradConvolution> of(const Tensor& x, const Tensor& weight, const Convolution& p) {
    if (best_isa() == Isa::avx512 || !is_fp32_3x3(x, weight, p) || !has_enough_channels(weight, p)) return std::nullopt;
    const WinogradConvolution made(x, weight, p);
    return made.has_enough_tiles() && made.has_small_matrices() ? std::optional(made) : std::nullopt;
  }

  // conv2d(x, weight) + bias, with relu max(0, .) of it. Nothing if a value is not finite.
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

  // The gradients of x, weight and bias that `mask` selects; the others are empty. Nothing if a value is not finite.
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
        on_cpu(images * p_.groups * channel_blocks(p_), [&](auto isa, int64_t begin, int64_t end) {
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
      on_cpu(p_.out.channels, [&](auto isa, int64_t begin, int64_t end) {
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
  // A valid 3 x 3 convolution of fp32 at stride 1, without dilation, with at least one result an image.
  static bool is_fp32_3x3(const Tensor& x, const Tensor& weight, const Convolution& p) {
    if (x.dim() != 4 || weight.dim() != 4 || p.groups < 1) return false;
    if (x.scalar_type() != ScalarType::Float || weight.scalar_type() != ScalarType::Float) return false;
    if (weight.size(1) * p.groups != x.size(1) || weight.size(0) % p.groups != 0) return false;
    const IntList ones = {1, 1};
    if (p.stride != ones || p.dilation != ones) return false;
    for (int i = 0; i < 2; ++i) {
      const int64_t side = x.size(2 + i), padding = p.padding[i];
      if (weight.size(2 + i) != 3 || side < 1 || padding < 0 || side + 2 * padding < 3) return false;
    }
    return true;
  }

  // In whole vectors, and enough for the products to save more than the tiles' transforms cost.
  static bool has_enough_channels(const Tensor& weight, const Convolution& p) {
    const int64_t inputs = weight.size(1), outputs = weight.size(0) / p.groups;
    return inputs % kWholeVector == 0 && outputs % kWholeVector == 0 && inputs >= kFewestChannels &&
           outputs >= kFewestChannels;
  }

  WinogradConvolution(const Tensor& x, const Tensor& weight, const Convolution& p)
      : channels_last_(is_channels_last(x) || is_channels_last(weight)) {
    const int64_t height = x.size(2) + 2 * p.padding[0] - 2, width = x.size(3) + 2 * p.padding[1] - 2;
    p_ = {{x.size(0), x.size(1), x.size(2), x.size(3), true},
          {x.size(0), weight.size(0), height, width, true},
          p.groups,
          {p.padding[0], p.padding[1]},
          ceil_div(height, 2),
          ceil_div(width, 2),
          0};
    const int64_t parts = ceil_div(p_.in.batch * tiles(), kTilesTogether);
    together_ = parts > 0 ? ceil_div(p_.in.batch, parts) : 0;
    p_.capacity = together_ * tiles();
  }

  int64_t tiles() const { return p_.tiles_h * p_.tiles_w; }  // of an image

  bool has_enough_tiles() const { return p_.in.batch * tiles() >= kFewestTiles; }

  bool has_small_matrices() const {
    const int64_t wider = p_.in.channels > p_.out.channels ? p_.in.channels : p_.out.channels;
    return kPlaces * p_.capacity * wider * static_cast<int64_t>(sizeof(float)) <= kLargestMatrix;
  }

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
    torch::stable::detail::to<Tensor>(stack[0]);  // releases the result, a second reference to `product`
  }

  template <class F>
  void rows_of_tiles(int64_t images, F&& f) const {
    on_cpu(images * p_.tiles_h, f);
  }

  // Calls f(first image, number of images, number of the part) for each part of the batch.
  template <class F>
  void for_parts(F&& f) const {
    for (int64_t first = 0, part = 0; first < p_.in.batch; first += together_, ++part)
      f(first, first + together_ < p_.in.batch ? together_ : p_.in.batch - first, part);
  }

  Tensor matrix(const Tensor& like, int64_t channels) const {
    return scratch(like, {kPlaces * p_.groups, p_.capacity, channels});
  }

  // The rows of m that `images` images fill.
  Tensor used(Tensor m, int64_t images) const { return torch::stable::narrow(m, 1, 0, images * tiles()); }

  Tensor transformed(const Tensor& weight) const {
    Tensor u = scratch(weight, {kPlaces * p_.groups, p_.outputs(), p_.inputs()});
    on_cpu(p_.out.channels, [&](auto isa, int64_t begin, int64_t end) {
      winograd_weight_cpu<isa.value>(p_, weight_of(weight), floats(u), begin, end);
    });
    return u;
  }

  // t, which is NHWC, in the memory format of the convolution's results.
  Tensor in_format(const Tensor& t, Images images) const {
    images.channels_last = channels_last_;
    return dense(t, images);
  }

  Winograd p_;
  int64_t together_;  // images
  bool channels_last_;
};

}  // namespace alexnet_ext
