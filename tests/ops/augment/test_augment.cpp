// Compares augmentation with the formula in double: crops in every corner, flips, images of any strides, subsampled
// chroma, space-to-depth.
#include "augment/augment.h"
#include "harness.h"

namespace alexnet_ext::test {
namespace {

// NHWC, NCHW, and an image that is a window of a larger one; I420, dense and with gaps.
enum class Layout { dense, planes, window, subsampled, sparse };

constexpr double kMean[] = {120, 110.5, 90}, kDeviation[] = {58, 133, 31};

// The byte of a colour of an image's pixel.
double byte_of(const Augment& p, const uint8_t* image, int64_t row, int64_t column, int c) {
  const auto at = [&](int64_t i, int64_t j) { return image[i * p.row_step + j * p.column_step]; };
  if (!p.subsampled) return (&image[c * p.colour_step])[row * p.row_step + column * p.column_step];
  // Of U and V in one array of W / 2 values a line; two lines are a row.
  const int64_t u = row / 2 * (p.width / 2) + column / 2, v = u + p.height / 2 * (p.width / 2);
  const double du = at(p.height + u / p.width, u % p.width) - 128, dv = at(p.height + v / p.width, v % p.width) - 128;
  const double add[] = {91881 * dv, -22554 * du - 46802 * dv, 116130 * du};
  return std::fmin(std::fmax(std::floor(at(row, column) + add[c] / 65536 + 0.5), 0), 255);
}

template <class T>
void check(Isa isa, int64_t batch, int64_t height, int64_t width, int64_t size, int64_t block, Layout layout) {
  report().where = std::string(isa_name(isa)) + " " + dtype_name<T>() + " " + std::to_string(batch) + " x " +
                   std::to_string(height) + " x " + std::to_string(width) + " to " + std::to_string(size) + " by " +
                   std::to_string(block) + " layout " + std::to_string(static_cast<int>(layout));
  const int64_t side = ceil_div(size, block), wide = layout == Layout::window ? width + 3 : width;
  Augment p{kDType<T>, height, width, size, false, height * wide * 3, wide * 3, 3, 1, {}, {}, {}};
  if (layout == Layout::planes) p.row_step = width, p.column_step = 1, p.colour_step = height * width;
  if (layout == Layout::subsampled || layout == Layout::sparse) {
    p.subsampled = true, p.colour_step = 0, p.column_step = layout == Layout::sparse ? 2 : 1;
    p.row_step = p.column_step * width, p.image_step = height / 2 * 3 * p.row_step;
  }
  p.out = {batch, 3 * block * block, side, side, true};
  for (int c = 0; c < 3; ++c) p.mean[c] = kMean[c], p.scale[c] = 1 / kDeviation[c];

  Random random(size + 100 * batch);
  // The array ends with the last byte of the last image, so that reading one more is out of bounds.
  Array<uint8_t> images(batch == 0 ? 0 : batch * p.image_step - (wide - width) * 3);
  for (int64_t i = 0; i < images.size(); ++i) images[i] = static_cast<uint8_t>(integer(random, 0, 255));
  Array<int64_t> offsets(batch * 2);
  Array<bool> flips(batch);
  Array<float> shifts(batch * 3);
  for (int64_t n = 0; n < batch; ++n) {
    offsets[n * 2] = n % 3 == 0 ? 0 : n % 3 == 1 ? height - size : integer(random, 0, height - size);
    offsets[n * 2 + 1] = n % 3 == 0 ? 0 : n % 3 == 1 ? width - size : integer(random, 0, width - size);
    flips[n] = n % 2 == 1;
    for (int c = 0; c < 3; ++c) shifts[n * 3 + c] = static_cast<float>(20 * normal(random));
  }
  const AugmentInputs in{images.data(), offsets.data(), flips.data(), shifts.data()};
  for (Split split : kSplits) {
    Array<T> y(batch * p.out.channels * side * side);
    with_isa(isa, [&](auto i) {
      run_units(split, augment_units(p),
                [&](int64_t begin, int64_t end) { augment_cpu<i.value>(p, in, y.data(), begin, end); });
    });
    for (int64_t e = 0; e < y.size(); ++e) {
      const int64_t channel = e % p.out.channels, pixel = e / p.out.channels, n = pixel / (side * side);
      const int64_t c = channel / (block * block), r = channel / block % block, s = channel % block;
      const int64_t row = pixel / side % side * block + r, column = pixel % side * block + s;
      if (row >= size || column >= size) {
        expect_equal("padding", e, y[e], 0);
        continue;
      }
      const int64_t across = offsets[n * 2 + 1] + (flips[n] ? size - 1 - column : column);
      const double byte = byte_of(p, images.data() + n * p.image_step, offsets[n * 2] + row, across, c);
      const double exact = (byte + static_cast<double>(shifts[n * 3 + c]) - kMean[c]) / kDeviation[c];
      expect_near("y", e, y[e], exact, 400 / kDeviation[c], 4);
    }
  }
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  for (Isa isa : isas())
    for_types([&](auto type) {
      using T = typename decltype(type)::type;
      for (int64_t block : {int64_t{1}, int64_t{kDepthBlock}})
        for (Layout layout : {Layout::dense, Layout::planes, Layout::window, Layout::subsampled, Layout::sparse}) {
          const int64_t by = layout < Layout::subsampled ? 1 : 2;  // divides the sides
          for (int64_t size : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 21, 33})
            check<T>(isa, 4, (size + 1 + by) / by * by, (size + 5) / by * by, size, block, layout);
          check<T>(isa, 1, 6, 6, 6, block, layout);
          check<T>(isa, 0, 6, 7 / by * by, 5, block, layout);
        }
    });
  return finish("augment");
}
