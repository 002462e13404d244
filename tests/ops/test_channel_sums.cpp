// The grid of the kernels that sum each channel: it fills a GPU, has no block too many, and keeps a thread's channels.
#include "common/channel_sums.h"
#include "harness.h"

namespace alexnet_ext::test {
namespace {

void check(const Images& s, int64_t slots) {
  report().where = std::to_string(s.channels) + " channels, batch " + std::to_string(s.batch) + ", " +
                   std::to_string(slots) + " slots";
  const int64_t rows = sum_rows_of(s, slots), pixels = s.batch * s.height * s.width;
  expect(rows <= slots, "more blocks than run at once");
  expect(rows > 0 || pixels == 0, "no block");
  if (s.channels % 8 != 0 || s.channels > kMaxLaneSums) {
    expect(pixels * s.channels < slots * 2048 || pixels < slots * 32 || rows == slots, "slots are left free");
    return;
  }
  const int64_t lanes = s.channels / 8;
  for (int64_t vectors : {240, 256}) expect(rows * vectors % lanes == 0, "a thread's channels change");
  expect(pixels * s.channels < slots * 2048 || pixels < slots * 32 || rows > slots - lanes, "slots are left free");
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  for (int64_t slots : {264, 396, 528, 1056})
    for (int64_t batch : {0, 1, 3, 128})
      for (int64_t side : {1, 5, 27, 55})
        for (int64_t channels = 1; channels <= kMaxLaneSums + 8; ++channels)
          check({batch, channels, side, side, true}, slots);
  // AlexNet's second block: 256 channels. Rounded up to a multiple of 32 lanes they would be 544.
  expect_value(sum_rows_of({128, 256, 27, 27, true}) == 528, "rows", 0,
               static_cast<double>(sum_rows_of({128, 256, 27, 27, true})), 528, 0);
  return finish("channel_sums");
}
