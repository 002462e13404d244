// Checks, layout and allocation of augment for every device; `launch` runs the device's kernel.
#pragma once

#include "../common/tensor.h"
#include "augment.h"

namespace alexnet_ext {

inline void check_drawn(const Tensor& t, const char* name, ScalarType dtype, const char* dtype_name,
                        const std::vector<int64_t>& sizes, const Tensor& images) {
  check(t.scalar_type() == dtype, name, " must be ", dtype_name);
  check_shape(t, name, sizes);
  check_device(t, name, images, "images");
}

// Allocates y and has launch(augment, inputs, y) fill it.
template <class Launch>
inline Tensor on_crops(const Tensor& images, Tensor offsets, Tensor flips, Tensor shifts, int64_t size,
                       const std::vector<double>& mean, const std::vector<double>& std, ScalarType dtype,
                       int64_t space_to_depth, Launch&& launch) {
  check(images.scalar_type() == ScalarType::Byte, "images must be uint8");
  const bool subsampled = images.dim() == 3;
  check(
      subsampled ? images.size(1) % 3 == 0 && images.size(2) % 2 == 0 : images.dim() == 4 && images.size(3) == kColours,
      "images has shape ", shape_text(images), ", expected (N, H, W, 3), or (N, 3 H / 2, W) of even H and W");
  const int64_t batch = images.size(0), width = images.size(2);
  const int64_t height = subsampled ? images.size(1) / 3 * 2 : images.size(1);
  check(size >= 1 && size <= height && size <= width, "size must be from 1 to the sides of images, got ", size,
        " for images of shape ", shape_text(images));
  check(space_to_depth == 1 || space_to_depth == kDepthBlock, "space_to_depth must be 1 or ", kDepthBlock, ", got ",
        space_to_depth);
  check(mean.size() == kColours && std.size() == kColours, "mean and std must have ", kColours, " values each");
  check_drawn(offsets, "offsets", ScalarType::Long, "int64", {batch, 2}, images);
  check_drawn(flips, "flips", ScalarType::Bool, "bool", {batch}, images);
  check_drawn(shifts, "shifts", ScalarType::Float, "float32", {batch, kColours}, images);
  offsets = torch::stable::contiguous(offsets);
  flips = torch::stable::contiguous(flips);
  shifts = torch::stable::contiguous(shifts);

  const int64_t side = ceil_div(size, space_to_depth);
  const Images out{batch, kColours * space_to_depth * space_to_depth, side, side, true};
  Tensor y = empty_images(images, out, dtype);
  Augment p{dtype_of(y, "dtype"),
            height,
            width,
            size,
            subsampled,
            images.stride(0),
            images.stride(1),
            images.stride(2),
            subsampled ? 0 : images.stride(3),
            out,
            {},
            {}};
  for (int c = 0; c < kColours; ++c) {
    p.mean[c] = 255 * mean[c];
    p.scale[c] = 1 / (255 * std[c]);
  }
  launch(p,
         AugmentInputs{static_cast<const uint8_t*>(images.data_ptr()), static_cast<const int64_t*>(offsets.data_ptr()),
                       static_cast<const bool*>(flips.data_ptr()), static_cast<const float*>(shifts.data_ptr())},
         y.data_ptr());
  return y;
}

}  // namespace alexnet_ext
