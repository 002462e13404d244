// The host's arithmetic for the convolution on tensor cores: the splits of the weight gradient fill a GPU, and the
// workspace has room for them.
#include "conv2d_bias_relu/cutlass/conv2d_cutlass.h"
#include "conv2d_bias_relu/sm90/conv2d_sm90.h"
#include "harness.h"

namespace alexnet_ext::test {
namespace {

// Square, at stride 1 and without dilation.
Conv2d problem(int64_t batch, int64_t channels, int64_t side, int64_t filters, int64_t taps, int64_t padding,
               int64_t groups) {
  const int64_t out = side + 2 * padding - taps + 1;
  return {batch, channels, side, side, filters, taps, taps, out, out, {1, 1}, {padding, padding}, {1, 1}, groups};
}

// `splits` for mma.sync, `sm90_splits` for compute capability 9.0.
void check_splits(const Conv2d& p, int64_t splits, int64_t sm90_splits) {
  report().where = "splits of " + std::to_string(p.filters) + " filters, batch " + std::to_string(p.batch);
  const int64_t blocks = ceil_div(p.group_filters(), kWeightBlock) * ceil_div(p.taps(), kWeightBlock);
  expect_value(weight_gradient_splits(p) == splits, "splits", 0, static_cast<double>(weight_gradient_splits(p)),
               static_cast<double>(splits), 0);
  expect(splits == 1 || blocks * splits <= kMostBlocks, "more blocks than a GPU runs at once");
  expect(splits == 1 || p.pixels() > (splits - 1) * kFewestPixels, "splits have too few pixels");
  expect(weight_gradient_workspace(p) == p.groups * splits * p.group_filters() * p.taps(), "the workspace's size");

  const Sm90WeightPlan plan(p);
  expect_value(plan.splits == sm90_splits, "splits for 9.0", 0, static_cast<double>(plan.splits),
               static_cast<double>(sm90_splits), 0);
  const int64_t sm90_blocks = plan.column_blocks * plan.filter_blocks * p.groups;
  expect(plan.splits == 1 || sm90_blocks * plan.splits <= kHopperMultiprocessors,
         "more blocks than a GPU of 9.0 runs at once");
  expect((plan.splits - 1) * plan.steps_of_split < plan.steps && plan.splits * plan.steps_of_split >= plan.steps,
         "each split has pixels, and each pixel a split");
  expect(plan.column_blocks * kSm90WeightColumns * kSm90WeightChannels >= p.taps() &&
             plan.filter_blocks * kSm90WeightFilters >= p.group_filters(),
         "each weight has a block");
  expect(sm90_weight_gradient_workspace(p) == sm90_splits * p.filters * p.taps(), "the workspace's size for 9.0");
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext::test;
  check_splits(problem(128, 48, 57, 96, 3, 0, 1), 66, 44);  // AlexNet's first layer after its rewrite: 4 blocks, or 3
  check_splits(problem(128, 96, 27, 256, 5, 2, 2), 26, 9);
  check_splits(problem(128, 256, 13, 384, 3, 1, 1), 4, 4);
  check_splits(problem(128, 384, 13, 384, 3, 1, 2), 9, 4);
  check_splits(problem(128, 384, 13, 256, 3, 1, 2), 18, 9);
  check_splits(problem(1, 384, 13, 256, 3, 1, 2), 1, 1);    // of 169 pixels
  check_splits(problem(8, 2048, 28, 2048, 3, 1, 1), 1, 1);  // 2,304 blocks, or 1,152
  return alexnet_ext::test::finish("conv2d_cutlass");
}
