// What TMA would read and write for CUTLASS's products of compute capability 9.0, by their own coordinates and
// descriptors on the host: multiplied, it is the grouped convolution and its gradient of x. And which problems are
// taken. The driver's two functions that encode descriptors are those of this file; no GPU is needed.
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL
#include "conv2d_bias_relu/conv2d_sm90.cuh"
#include "convolution.h"

namespace alexnet_ext::test {
namespace {

// What a descriptor of four dimensions says, in place of what the driver makes of it.
struct Map {
  void* data;
  uint64_t size[4];
  int64_t stride[4];  // in elements; neighbours along the first
  int lower[2], upper[2];
  unsigned box_channels, box_pixels;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

CUresult encode(CUtensorMap* to, CUtensorMapDataType type, unsigned rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, Map map) {
  expect(rank == 4, "four dimensions");
  expect(reinterpret_cast<uintptr_t>(data) % 16 == 0, "a tensor begins on 16 bytes");
  expect(type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ||
             type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
         "elements of 16 bits");
  map.data = data;
  map.stride[0] = 1;
  for (int i = 0; i < 4; ++i) {
    map.size[i] = sizes[i];
    if (i == 0) continue;
    expect(strides[i - 1] % 16 == 0, "strides of 16 bytes");
    map.stride[i] = static_cast<int64_t>(strides[i - 1]) / 2;
  }
  memcpy(to, &map, sizeof(map));
  return CUDA_SUCCESS;
}

// `where` in the tensor; null where that is outside, for which TMA reads 0 and writes nothing.
template <class E>
E* element(const Map& map, const int64_t (&where)[4]) {
  E* found = static_cast<E*>(map.data);
  for (int i = 0; i < 4; ++i) {
    if (where[i] < 0 || where[i] >= static_cast<int64_t>(map.size[i])) return nullptr;
    found += where[i] * map.stride[i];
  }
  return found;
}

template <class Copy>
Map map_of(const Copy& copy) {
  Map map;
  memcpy(&map, copy.get_tma_descriptor(), sizeof(map));
  return map;
}

// Numbers of a coordinate, whose parts are tuples.
template <class Coordinate>
std::vector<int64_t> numbers(const Coordinate& coordinate) {
  std::vector<int64_t> found;
  cute::for_each(cute::flatten(coordinate), [&](auto v) { found.push_back(static_cast<int64_t>(v)); });
  return found;
}

// Calls f(row, column, element or null) for a tile of pixels x channels that boxes of TMA's im2col mode fill. A box
// begins at its coordinate (channel, column, row, image, and how far the tap lies from there) and goes on pixel by
// pixel within the corners.
template <class E, class Tile, class F>
void for_im2col(const Map& map, const Tile& tile, F&& f) {
  const int rows = cute::size<0>(tile), columns = cute::size<1>(tile);
  expect(rows % map.box_pixels == 0 && columns % map.box_channels == 0, "boxes fill a tile");
  for (int row = 0; row < rows; row += map.box_pixels)
    for (int column = 0; column < columns; column += map.box_channels) {
      auto at = numbers(tile(row, column));
      at.resize(6);  // a store has no taps
      const int64_t ends[] = {static_cast<int64_t>(map.size[1]) + map.upper[0],
                              static_cast<int64_t>(map.size[2]) + map.upper[1]};
      for (unsigned pixel = 0; pixel < map.box_pixels; ++pixel) {
        expect(at[1] >= map.lower[0] && at[1] < ends[0] && at[2] >= map.lower[1] && at[2] < ends[1], "within corners");
        for (unsigned channel = 0; channel < map.box_channels; ++channel)
          f(row + pixel, column + channel, element<E>(map, {at[0] + channel, at[1] + at[4], at[2] + at[5], at[3]}));
        if (++at[1] < ends[0]) continue;
        at[1] = map.lower[0];
        if (++at[2] < ends[1]) continue;
        at[2] = map.lower[1];
        ++at[3];
      }
    }
}

// All blocks' products, stored as the kernel would.
template <class Kernel>
void compute(const typename Kernel::Arguments& arguments) {
  using E = typename Kernel::ElementD;
  using Tile = typename Kernel::TileShape;
  constexpr int kM = cute::size<0>(Tile{}), kN = cute::size<1>(Tile{}), kK = cute::size<2>(Tile{});
  expect(sm90_takes<Kernel>(arguments), "CUTLASS takes the problem");
  const auto params = Kernel::to_underlying_arguments(arguments, nullptr);
  const auto [m, n, k, l] = params.problem_shape;
  const auto& [load_a, load_b, store] =
      std::tie(params.mainloop.tma_load_a, params.mainloop.tma_load_b, params.epilogue.tma_store_d);
  const Map map_a = map_of(load_a), map_b = map_of(load_b), map_d = map_of(store);
  const auto tiles_a =
      cute::local_tile(load_a.get_tma_tensor(cute::make_shape(m, k)), Tile{},
                       cute::make_coord(cute::_, cute::_, cute::_), cute::Step<cute::_1, cute::Underscore, cute::_1>{});
  const auto tiles_b =
      cute::local_tile(load_b.get_tma_tensor(cute::make_shape(n, k)), Tile{},
                       cute::make_coord(cute::_, cute::_, cute::_), cute::Step<cute::Underscore, cute::_1, cute::_1>{});
  const auto whole_d = cute::coalesce(store.get_tma_tensor(cute::make_shape(m, n, l)), cute::take<0, 2>(Tile{}));
  const dim3 grid = Kernel::get_grid_shape(params);
  expect(grid.x % cute::size<0>(typename Kernel::ClusterShape{}) == 0 && grid.z == 1, "whole clusters");
  std::vector<double> a(kM * kK), b(kN * kK), sums(kM * kN);
  for (unsigned block_m = 0; block_m < grid.x; ++block_m)
    for (unsigned block_n = 0; block_n < grid.y; ++block_n) {
      std::fill(sums.begin(), sums.end(), 0);
      for (int step = 0; step < cute::size<3>(tiles_a); ++step) {
        auto value = [](const E* found) { return found == nullptr ? 0.0 : static_cast<double>(float(*found)); };
        for_im2col<E>(map_a, tiles_a(cute::_, cute::_, block_m, step),
                      [&](int row, int column, const E* found) { a[row * kK + column] = value(found); });
        const auto tile_b = tiles_b(cute::_, cute::_, block_n, step);
        for (int row = 0; row < kN; ++row)
          for (int column = 0; column < kK; ++column) {
            const auto at = numbers(tile_b(row, column));
            b[row * kK + column] = value(element<E>(map_b, {at.at(0), at.at(1), at.at(2), at.at(3)}));
          }
        for (int i = 0; i < kM; ++i)
          for (int j = 0; j < kN; ++j)
            for (int c = 0; c < kK; ++c) sums[i * kN + j] += a[i * kK + c] * b[j * kK + c];
      }
      for_im2col<E>(map_d, cute::local_tile(whole_d, cute::take<0, 2>(Tile{}), cute::make_coord(block_m, block_n)),
                    [&](int row, int column, E* found) {
                      if (found != nullptr) *found = E(static_cast<float>(sums[row * kN + column]));
                    });
    }
}

template <class E>
std::vector<E> elements_of(const Values& values) {
  std::vector<E> elements;
  for (int64_t value : values) elements.emplace_back(static_cast<float>(value));
  return elements;
}

template <class E>
void expect_values(const char* name, const std::vector<E>& got, const Values& exact) {
  for (size_t i = 0; i < got.size(); ++i)
    expect_equal(name, static_cast<int64_t>(i), static_cast<double>(static_cast<float>(got[i])),
                 static_cast<double>(static_cast<float>(E(static_cast<float>(exact[i])))));
}

template <class T>
void check(const Conv2d& p) {
  using E = typename WarpGroup<T>::Element;
  report().where = std::string(dtype_name<T>()) + " " + std::to_string(p.channels) + " channels, " +
                   std::to_string(p.groups) + " groups, taps " + std::to_string(p.taps_h);
  Random random(p.channels);
  const int64_t taps = p.taps_h * p.taps_w, inputs = p.group_channels(), outputs = p.group_filters();
  const Values x = random_values(random, p.batch * p.height * p.width * p.channels);
  const Values weight = random_values(random, p.filters * p.taps());
  const Values dz = random_values(random, p.pixels() * p.filters);
  Values y(dz.size(), 0), dx(x.size(), 0);
  for_meetings(p, [&](int64_t pixel, int64_t place, int64_t tap) {
    for (int64_t k = 0; k < p.filters; ++k)
      for (int64_t c = k / outputs * inputs, i = 0; i < inputs; ++c, ++i) {
        const int64_t w = (k * taps + tap) * inputs + i;
        y[pixel * p.filters + k] += x[place * p.channels + c] * weight[w];
        dx[place * p.channels + c] += dz[pixel * p.filters + k] * weight[w];
      }
  });
  const auto given_x = elements_of<E>(x), given_weight = elements_of<E>(weight), given_dz = elements_of<E>(dz);
  const std::vector<E> bias(p.filters);
  std::vector<E> ours_y(y.size(), E(-1e9f)), ours_dx(dx.size(), E(-1e9f));
  for (int64_t group = 0; group < p.groups; ++group) {
    const Conv2dSlice first = slice_of(p, group);
    const bool relu = group == 0;
    const auto forward =
        sm90_forward_arguments<T>(p, first, given_x.data(), given_weight.data(), bias.data(), relu, ours_y.data());
    expect(forward.epilogue.thread.op_0.op_0.ptr_row == bias.data() + first.y, "the bias begins at its group");
    expect(forward.epilogue.thread.op_1.lower_bound == (relu ? 0 : -INFINITY), "without a ReLU nothing is raised");
    compute<Sm90Forward<T>>(forward);
    compute<Sm90InputGradient<T>>(
        sm90_input_gradient_arguments<T>(p, first, given_dz.data(), given_weight.data(), ours_dx.data()));
  }
  expect_values("y", ours_y, y);
  expect_values("dx", ours_dx, dx);
}

void check_relu() {
  report().where = "ReLU";
  using Values = cutlass::Array<float, 4>;
  using AtLeast = cutlass::epilogue::thread::LowerBound<Values>;
  const Values given{NAN, -1, -0.0f, 2}, raised = AtLeast()(given, {least_of(true)});
  expect(std::isnan(raised[0]) && raised[1] == 0 && raised[2] == 0 && raised[3] == 2, "NaN stays, and what is above 0");
  const Values kept = AtLeast()(given, {least_of(false)});
  expect(std::isnan(kept[0]) && kept[1] == -1 && kept[2] == 0 && kept[3] == 2, "everything stays");
}

template <class T>
bool taken(const Conv2d& p, bool forward, int64_t misplaced = 0) {
  alignas(16) static char memory[32];
  const char* at = memory + misplaced;
  void* to = memory;
  return forward ? sm90_takes<Sm90Forward<T>>(sm90_forward_arguments<T>(p, {}, at, at, nullptr, true, to))
                 : sm90_takes<Sm90InputGradient<T>>(sm90_input_gradient_arguments<T>(p, {}, at, at, to));
}

template <class T>
void check_taken() {
  report().where = std::string(dtype_name<T>()) + " at batch 128";
  for (const Conv2d& p : alexnet_layers())
    expect(taken<T>(p, true) && taken<T>(p, false), "AlexNet's layers are taken");
  for (bool forward : {true, false}) {
    const Conv2d plain = problem(1, 32, 9, 32, 3, 1, 1, 1, 1);
    expect(taken<T>(plain, forward) && !taken<T>(plain, forward, 8), "a tensor off 16 bytes is taken");
    expect(!taken<T>(problem(1, 4, 9, 32, 3, 1, 1, 1, 1), forward), "channels of 8 bytes are taken");
    expect(!taken<T>(problem(1, 32, 9, 4, 3, 1, 1, 1, 1), forward), "filters of 8 bytes are taken");
    expect(!taken<T>(problem(1, 32, 9, 32, 3, 2, 1, 1, 1), forward), "a stride is taken");
    // The last that alexnet_ext/ops/conv2d_bias_relu/cutlass.py lets through, and one beyond.
    expect(taken<T>(problem(1, 32, 256, 32, 128, 1, 0, 1, 1), forward), "127 pixels of reach are not taken");
    expect(taken<T>(problem(1, 32, 9, 32, 1, 1, 127, 1, 1), forward), "127 pixels of padding are not taken");
    expect(!taken<T>(problem(1, 32, 256, 32, 130, 1, 0, 1, 1), forward), "129 pixels of reach are taken");
    expect(!taken<T>(problem(1, 32, 9, 32, 1, 1, 129, 1, 1), forward), "129 pixels of padding are taken");
  }
}

}  // namespace
}  // namespace alexnet_ext::test

CUresult cuTensorMapEncodeTiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  return alexnet_ext::test::encode(to, type, rank, data, sizes, strides, {});
}

CUresult cuTensorMapEncodeIm2col(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                 const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* steps, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  using namespace alexnet_ext::test;
  for (int i : {0, 1})
    expect(lower[i] >= -128 && lower[i] < 128 && upper[i] >= -128 && upper[i] < 128, "corners of 8 bits");
  expect(steps[1] == 1 && steps[2] == 1 && channels <= 256 && pixels <= 1024, "what a box may be");
  Map map{};
  for (int i : {0, 1}) {
    map.lower[i] = lower[i];
    map.upper[i] = upper[i];
  }
  map.box_channels = channels;
  map.box_pixels = pixels;
  return encode(to, type, rank, data, sizes, strides, map);
}

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  check<bf16>(problem(3, 48, 11, 144, 3, 1, 1, 1, 2));  // blocks in part beyond pixels, filters, channels
  check<bf16>(problem(2, 24, 9, 48, 5, 1, 2, 1, 3));
  check<bf16>(problem(1, 16, 12, 16, 3, 1, 2, 2, 1));
  check<bf16>(problem(2, 144, 5, 272, 2, 1, 0, 1, 1));                    // two steps and two blocks of channels
  check<f16>({2, 16, 9, 6, 16, 4, 2, 6, 10, {1, 1}, {0, 3}, {1, 2}, 2});  // high and wide differ in all
  check_taken<bf16>();
  check_relu();
  return finish("sm90_reads");
}
