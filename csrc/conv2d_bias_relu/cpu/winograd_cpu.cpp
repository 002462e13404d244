// The transforms of Winograd's convolution on the CPU, with vectors along the channels.
#include "../../common/cpu_vector.h"
#include "winograd.h"

namespace alexnet_ext {
namespace ALEXNET_ISA {
namespace {

using V = Vec<float>;
constexpr int64_t kStep = kLanes<float>;

// The six maps along one side of a tile. Their sizes differ: Output takes 4 values and gives 2, WeightMap takes 3 and
// gives 4.
struct Input {  // B'
  static void apply(const V (&d)[4], V (&v)[4]) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
  }
};
struct InputTransposed {  // B
  static void apply(const V (&v)[4], V (&d)[4]) {
    d[0] = v[0], d[1] = v[1] - v[2] + v[3], d[2] = v[1] + v[2] - v[0], d[3] = -v[3];
  }
};
struct Output {  // A'
  static void apply(const V (&m)[4], V (&y)[2]) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }
};
struct OutputTransposed {  // A
  static void apply(const V (&y)[2], V (&z)[4]) { z[0] = y[0], z[1] = y[0] + y[1], z[2] = y[0] - y[1], z[3] = -y[1]; }
};
struct WeightMap {  // G
  static void apply(const V (&g)[3], V (&u)[4]) {
    u[0] = g[0], u[1] = (g[0] + g[1] + g[2]) * 0.5f, u[2] = (g[0] - g[1] + g[2]) * 0.5f, u[3] = g[2];
  }
};
struct WeightTransposed {  // G'
  static void apply(const V (&u)[4], V (&g)[3]) {
    g[0] = u[0] + (u[1] + u[2]) * 0.5f, g[1] = (u[1] - u[2]) * 0.5f, g[2] = (u[1] + u[2]) * 0.5f + u[3];
  }
};

// Applies Map along the columns, then along the rows.
template <class Map, int kFrom, int kTo>
inline void both_ways(const V (&in)[kFrom * kFrom], V (&out)[kTo * kTo]) {
  V half[kTo][kFrom];
  for (int j = 0; j < kFrom; ++j) {
    V column[kFrom], made[kTo];
    for (int i = 0; i < kFrom; ++i) column[i] = in[i * kFrom + j];
    Map::apply(column, made);
    for (int i = 0; i < kTo; ++i) half[i][j] = made[i];
  }
  for (int i = 0; i < kTo; ++i) {
    V row[kTo];
    Map::apply(half[i], row);
    for (int j = 0; j < kTo; ++j) out[i * kTo + j] = row[j];
  }
}

// Whether all values were finite. 0 times any other value is NaN, and stays NaN in the sum.
class Finite {
 public:
  void look(const V& v) { zeros_ += v * 0.0f; }
  bool all() const {
    for (int64_t i = 0; i < kStep; ++i)
      if (zeros_[i] != 0) return false;
    return true;
  }

 private:
  V zeros_{};
};

// Matrices of [16][groups][rows][channels]: where row `row` of group g begins at place 0, and the distance between
// places.
struct Matrix {
  int64_t groups, rows, channels;
  int64_t at(int64_t g, int64_t row) const { return (g * rows + row) * channels; }
  int64_t apart() const { return groups * rows * channels; }
};

// Calls f(image, tile row, tile column, row of the matrix) for the tiles of the units [begin, end).
template <class F>
inline void for_tiles(const Winograd& p, int64_t first, int64_t begin, int64_t end, F&& f) {
  for (int64_t unit = begin; unit < end; ++unit)
    for (int64_t j = 0; j < p.tiles_w; ++j) f(first + unit / p.tiles_h, unit % p.tiles_h, j, unit * p.tiles_w + j);
}

inline int64_t pixel(const Images& s, int64_t n, int64_t h, int64_t w) {
  return ((n * s.height + h) * s.width + w) * s.channels;
}

}  // namespace
}  // namespace ALEXNET_ISA

using namespace ALEXNET_ISA;

template <>
void winograd_input_cpu<Isa::ALEXNET_ISA>(const Winograd& p, const float* x, float* v, int64_t first, int64_t begin,
                                          int64_t end) {
  const Matrix matrix{p.groups, p.capacity, p.inputs()};
  Buffer<float> padding(p.in.channels);
  for_tiles(p, first, begin, end, [&](int64_t n, int64_t i, int64_t j, int64_t row) {
    const float* from[kPlaces];
    for (int64_t q = 0; q < kPlaces; ++q) {
      const int64_t h = i * 2 - p.padding[0] + q / 4, w = j * 2 - p.padding[1] + q % 4;
      const bool inside = h >= 0 && h < p.in.height && w >= 0 && w < p.in.width;
      from[q] = inside ? x + pixel(p.in, n, h, w) : padding;
    }
    for (int64_t g = 0; g < p.groups; ++g)
      for (int64_t c = 0; c < matrix.channels; c += kStep) {
        V d[kPlaces], tile[kPlaces];
        for (int64_t q = 0; q < kPlaces; ++q) d[q] = load(from[q] + g * matrix.channels + c);
        both_ways<Input, 4, 4>(d, tile);
        for (int64_t q = 0; q < kPlaces; ++q) store(v + q * matrix.apart() + matrix.at(g, row) + c, tile[q]);
      }
  });
}

template <>
bool winograd_output_cpu<Isa::ALEXNET_ISA>(const Winograd& p, const float* m, const float* bias, float least, float* y,
                                           int64_t first, int64_t begin, int64_t end) {
  const Matrix matrix{p.groups, p.capacity, p.outputs()};
  Finite finite;
  for_tiles(p, first, begin, end, [&](int64_t n, int64_t i, int64_t j, int64_t row) {
    for (int64_t g = 0; g < p.groups; ++g)
      for (int64_t c = 0; c < matrix.channels; c += kStep) {
        V sums[kPlaces], tile[4];
        for (int64_t q = 0; q < kPlaces; ++q) sums[q] = load(m + q * matrix.apart() + matrix.at(g, row) + c);
        both_ways<Output, 4, 2>(sums, tile);
        const int64_t channel = g * matrix.channels + c;
        for (int64_t q = 0; q < 4; ++q) {
          const int64_t h = i * 2 + q / 2, w = j * 2 + q % 2;
          if (h >= p.out.height || w >= p.out.width) continue;
          const V z = bias == nullptr ? tile[q] : tile[q] + load(bias + channel);
          finite.look(z);
          store(y + pixel(p.out, n, h, w) + channel, z < least ? V{} + least : z);
        }
      }
  });
  return finite.all();
}

template <>
void winograd_output_transposed_cpu<Isa::ALEXNET_ISA>(const Winograd& p, const float* dy, float* z, int64_t first,
                                                      int64_t begin, int64_t end) {
  const Matrix matrix{p.groups, p.capacity, p.outputs()};
  Buffer<float> outside(p.out.channels);
  for_tiles(p, first, begin, end, [&](int64_t n, int64_t i, int64_t j, int64_t row) {
    const float* from[4];
    for (int64_t q = 0; q < 4; ++q) {
      const int64_t h = i * 2 + q / 2, w = j * 2 + q % 2;
      from[q] = h < p.out.height && w < p.out.width ? dy + pixel(p.out, n, h, w) : outside;
    }
    for (int64_t g = 0; g < p.groups; ++g)
      for (int64_t c = 0; c < matrix.channels; c += kStep) {
        V gradients[4], tile[kPlaces];
        for (int64_t q = 0; q < 4; ++q) gradients[q] = load(from[q] + g * matrix.channels + c);
        both_ways<OutputTransposed, 2, 4>(gradients, tile);
        for (int64_t q = 0; q < kPlaces; ++q) store(z + q * matrix.apart() + matrix.at(g, row) + c, tile[q]);
      }
  });
}

template <>
bool winograd_input_transposed_cpu<Isa::ALEXNET_ISA>(const Winograd& p, const float* m, float* dx, int64_t first,
                                                     int64_t begin, int64_t end) {
  const Matrix matrix{p.groups, p.capacity, p.inputs()};
  const int64_t blocks = channel_blocks(p), tiles = p.tiles_h * p.tiles_w;
  const int64_t width = p.tiles_w * 2 + 2, size = (p.tiles_h * 2 + 2) * width * kSummedChannels;
  Buffer<float> sums(size);
  Finite finite;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / (p.groups * blocks), g = unit / blocks % p.groups;
    const int64_t c = unit % blocks * kSummedChannels, left = matrix.channels - c;
    const int64_t channels = left < kSummedChannels ? left : kSummedChannels;
    std::memset(sums, 0, size * sizeof(float));
    for (int64_t t = 0; t < tiles; ++t) {
      float* corner = sums + (t / p.tiles_w * 2 * width + t % p.tiles_w * 2) * kSummedChannels;
      const float* from = m + matrix.at(g, image * tiles + t) + c;
      for (int64_t k = 0; k < channels; k += kStep) {
        V in[kPlaces], tile[kPlaces];
        for (int64_t q = 0; q < kPlaces; ++q) in[q] = load(from + q * matrix.apart() + k);
        both_ways<InputTransposed, 4, 4>(in, tile);
        for (int64_t q = 0; q < kPlaces; ++q) {
          float* to = corner + (q / 4 * width + q % 4) * kSummedChannels + k;
          store(to, load(to) + tile[q]);
        }
      }
    }
    for (int64_t h = 0; h < p.in.height; ++h)
      for (int64_t w = 0; w < p.in.width; ++w) {
        const float* from = sums + ((h + p.padding[0]) * width + w + p.padding[1]) * kSummedChannels;
        float* to = dx + pixel(p.in, first + image, h, w) + g * matrix.channels + c;
        for (int64_t k = 0; k < channels; k += kStep) {
          finite.look(load(from + k));
          store(to + k, load(from + k));
        }
      }
  }
  return finite.all();
}

template <>
void winograd_weight_cpu<Isa::ALEXNET_ISA>(const Winograd& p, const Weight3x3& weight, float* u, int64_t begin,
                                           int64_t end) {
  const int64_t inputs = p.inputs(), apart = p.out.channels * inputs;
  Buffer<float> taps(9 * inputs);
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const float* from =
          weight.data + k * weight.strides[0] + tap / 3 * weight.strides[2] + tap % 3 * weight.strides[3];
      for (int64_t c = 0; c < inputs; ++c) taps[tap * inputs + c] = from[c * weight.strides[1]];
    }
    for (int64_t c = 0; c < inputs; c += kStep) {
      V in[9], tile[kPlaces];
      for (int64_t tap = 0; tap < 9; ++tap) in[tap] = load(taps + tap * inputs + c);
      both_ways<WeightMap, 3, 4>(in, tile);
      for (int64_t q = 0; q < kPlaces; ++q) store(u + q * apart + k * inputs + c, tile[q]);
    }
  }
}

template <>
bool winograd_weight_transposed_cpu<Isa::ALEXNET_ISA>(const Winograd& p, const float* du, int64_t parts,
                                                      const Weight3x3& dweight, int64_t begin, int64_t end) {
  const int64_t inputs = p.inputs(), apart = p.out.channels * inputs;
  Buffer<float> taps(9 * inputs);
  Finite finite;
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t c = 0; c < inputs; c += kStep) {
      V in[kPlaces], gradient[9];
      for (int64_t q = 0; q < kPlaces; ++q) {
        in[q] = load(du + q * apart + k * inputs + c);
        for (int64_t part = 1; part < parts; ++part) in[q] += load(du + (part * kPlaces + q) * apart + k * inputs + c);
      }
      both_ways<WeightTransposed, 4, 3>(in, gradient);
      for (int64_t tap = 0; tap < 9; ++tap) {
        finite.look(gradient[tap]);
        store(taps + tap * inputs + c, gradient[tap]);
      }
    }
    for (int64_t tap = 0; tap < 9; ++tap) {
      float* to = dweight.data + k * dweight.strides[0] + tap / 3 * dweight.strides[2] + tap % 3 * dweight.strides[3];
      for (int64_t c = 0; c < inputs; ++c) to[c * dweight.strides[1]] = taps[tap * inputs + c];
    }
  }
  return finite.all();
}

}  // namespace alexnet_ext
