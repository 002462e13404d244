// The host's arithmetic for the convolution by CUTLASS: a convolution of each group's slices is the grouped one, and
// the weight gradient's splits fill a GPU.
#include "convolution.h"

namespace alexnet_ext::test {
namespace {

void check_slices(const Conv2d& p) {
  report().where = std::to_string(p.channels) + " channels, " + std::to_string(p.filters) + " filters, " +
                   std::to_string(p.groups) + " groups";
  Random random(p.channels);
  const int64_t taps = p.taps_h * p.taps_w, inputs = p.group_channels(), outputs = p.group_filters();
  const Values x = random_values(random, p.batch * p.height * p.width * p.channels);
  const Values weight = random_values(random, p.filters * p.taps());
  // By channels of the whole tensors.
  Values exact(p.pixels() * p.filters, 0);
  for_meetings(p, [&](int64_t pixel, int64_t place, int64_t tap) {
    for (int64_t k = 0; k < p.filters; ++k)
      for (int64_t c = k / outputs * inputs, i = 0; i < inputs; ++c, ++i)
        exact[pixel * p.filters + k] += x[place * p.channels + c] * weight[(k * taps + tap) * inputs + i];
  });
  // By slices, each as a tensor of its own with the strides of the whole one.
  Values y(exact.size(), 0);
  for (int64_t group = 0; group < p.groups; ++group) {
    const Conv2dSlice first = slice_of(p, group);
    const int64_t *a = x.data() + first.x, *b = weight.data() + first.weight;
    int64_t* to = y.data() + first.y;
    for_meetings(p, [&](int64_t pixel, int64_t place, int64_t tap) {
      for (int64_t k = 0; k < outputs; ++k)
        for (int64_t c = 0; c < inputs; ++c)
          to[pixel * p.filters + k] += a[place * p.channels + c] * b[k * p.taps() + tap * inputs + c];
    });
  }
  for (size_t i = 0; i < y.size(); ++i)
    expect_equal("y", static_cast<int64_t>(i), static_cast<double>(y[i]), static_cast<double>(exact[i]));
}

void check_splits(const Conv2d& p, int64_t splits) {
  report().where = "splits of " + std::to_string(p.filters) + " filters, batch " + std::to_string(p.batch);
  const int64_t blocks = ceil_div(p.group_filters(), kWeightBlock) * ceil_div(p.taps(), kWeightBlock);
  expect_value(weight_gradient_splits(p) == splits, "splits", 0, static_cast<double>(weight_gradient_splits(p)),
               static_cast<double>(splits), 0);
  expect(splits == 1 || blocks * splits <= kMostBlocks, "more blocks than are wanted");
  expect(splits == 1 || p.pixels() > (splits - 1) * kFewestPixels, "splits are of too few pixels");
  expect(weight_gradient_workspace(p) == p.groups * splits * p.group_filters() * p.taps(), "the workspace's size");
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext::test;
  check_slices(problem(2, 24, 7, 16, 3, 1, 1, 1, 2));
  check_slices(problem(1, 8, 9, 24, 5, 2, 2, 1, 1));
  check_slices(problem(1, 48, 8, 32, 3, 1, 2, 2, 4));
  check_splits(problem(128, 48, 57, 96, 3, 1, 0, 1, 1), 66);  // AlexNet's first layer after its rewrite: 4 blocks
  check_splits(problem(128, 96, 27, 256, 5, 1, 2, 1, 2), 26);
  check_splits(problem(128, 256, 13, 384, 3, 1, 1, 1, 1), 4);
  check_splits(problem(128, 384, 13, 384, 3, 1, 1, 1, 2), 9);
  check_splits(problem(128, 384, 13, 256, 3, 1, 1, 1, 2), 18);
  check_splits(problem(1, 384, 13, 256, 3, 1, 1, 1, 2), 1);    // of 169 pixels
  check_splits(problem(8, 2048, 28, 2048, 3, 1, 1, 1, 1), 1);  // 2,304 blocks
  return alexnet_ext::test::finish("conv2d_cutlass");
}
