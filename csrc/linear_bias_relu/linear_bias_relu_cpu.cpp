// Three products of a small and a large matrix, all with the same register tile.
#include "../common/cpu_vector.h"
#include "linear_bias_relu.h"

namespace alexnet_ext {
namespace ALEXNET_ISA {
namespace {

// Steps of the sum in one block. Forward, 512 steps of 32 fp32 values are 64 KiB of L2, and the weights of an output
// are a run of 2 KiB, which the hardware prefetches. For the input gradient, 128 steps of 32 values are 16 KiB, half of
// L1.
constexpr int64_t kForwardDepth = 512, kInputDepth = 128;
// Columns of the weight gradient in one block.
constexpr int64_t kColumns = 512;
// The most vectors across a tile, and its accumulators: 16 (AVX-512: 32) registers hold them and the operands.
constexpr int kMostVectors = 4, kAccumulators = kVectorBytes == 64 ? 24 : 12;

// Terms that are added one by one. These sums are then added to one another, which loses less than one long chain.
constexpr int64_t kChain = 128;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// c[i][j] (+)= sum over p of a[i * a_row + p * a_step] * b[p * b_step + j], for R rows i and V vectors of columns j.
template <int R, int V, class A>
inline void tile(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, int64_t depth, A* c,
                 int64_t c_row, bool add) {
  do {
    Vec<A> sum[R][V] = {};
    for (int64_t p = 0; p < least(depth, kChain); ++p, a += a_step, b += b_step) {
      Vec<A> right[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        const Vec<A> left = broadcast(a[r * a_row]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] += left * right[v];
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        A* place = c + r * c_row + v * kLanes<A>;
        store(place, add ? load(place) + sum[r][v] : sum[r][v]);
      }
    add = true;
    depth -= kChain;
  } while (depth > 0);
}

// The next block of the large matrix, with rows `step` elements apart. A tile computes for a microsecond, while memory
// would idle, so each tile prefetches its share of the next block's cache lines.
template <class T>
struct Next {
  T* data;
  int64_t step, rows, columns;

  void fetch(int64_t part, int64_t parts) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t lines = ceil_div(columns, kLine), all = rows * lines;
    for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i)
      __builtin_prefetch(data + i / lines * step + i % lines * kLine, !std::is_const_v<T>);
  }
};

// The same for any number of rows and V vectors. These are chunk `chunk` of the `chunks` chunks across.
template <int V, class A, class N>
inline void tiles(int64_t rows, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, int64_t depth,
                  A* c, int64_t c_row, bool add, const N& next, int64_t chunk, int64_t chunks) {
  constexpr int R = kAccumulators / V;
  const int64_t groups = ceil_div(rows, R);
  int64_t i = 0;
  for (; i + R <= rows; i += R) {
    next.fetch(chunk * groups + i / R, chunks * groups);
    tile<R, V>(a + i * a_row, a_row, a_step, b, b_step, depth, c + i * c_row, c_row, add);
  }
  for (; i < rows; ++i) tile<1, V>(a + i * a_row, a_row, a_step, b, b_step, depth, c + i * c_row, c_row, add);
}

// The same for any number of vectors.
template <class A, class N>
inline void multiply(int64_t rows, int64_t vectors, const A* a, int64_t a_row, int64_t a_step, const A* b,
                     int64_t b_step, int64_t depth, A* c, int64_t c_row, bool add, const N& next) {
  const int64_t chunks = ceil_div(vectors, kMostVectors);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t v = chunk * kMostVectors, column = v * kLanes<A>;
    auto run = [&](auto width) {
      tiles<width.value>(rows, a, a_row, a_step, b + column, b_step, depth, c + column, c_row, add, next, chunk,
                         chunks);
    };
    if (vectors - v >= kMostVectors) {
      run(std::integral_constant<int, kMostVectors>{});
    } else if (vectors - v == 3) {
      run(std::integral_constant<int, 3>{});
    } else if (vectors - v == 2) {
      run(std::integral_constant<int, 2>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  }
}

// Loads and widens a rows x columns block of a matrix, with rows `step` apart. A step of 16 more than a power of two
// keeps rows out of one another's cache sets.
template <class T>
inline void load_block(Acc<T>* block, int64_t step, const T* source, int64_t source_step, int64_t rows,
                       int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) load_row(block + i * step, source + i * source_step, columns);
}

// Calls f(first, count) for each unit in [begin, end): runs of `run` out of n.
template <class F>
inline void for_runs(int64_t run, int64_t n, int64_t begin, int64_t end, F&& f) {
  for (int64_t unit = begin; unit < end; ++unit) f(unit * run, least(run, n - unit * run));
}

template <class A>
inline A dot(const A* a, const A* b, int64_t n) {
  constexpr int64_t kStep = 4 * kLanes<A>;
  Vec<A> sums[4] = {};
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep)
    for (int v = 0; v < 4; ++v) sums[v] += load(a + i + v * kLanes<A>) * load(b + i + v * kLanes<A>);
  const Vec<A> wide = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  A sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += wide[lane];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// sums[i][m] = x[m] . weight[first + i], for `count` outputs and few rows.
template <class T>
void dots(const LinearBiasRelu& p, const T* x, const T* weight, int64_t first, int64_t count, Acc<T>* sums,
          int64_t width) {
  using A = Acc<T>;
  Buffer<A> left(kForwardDepth), right(kForwardDepth);
  for (int64_t k = 0; k < p.inputs; k += kForwardDepth) {
    const int64_t depth = least(kForwardDepth, p.inputs - k);
    for (int64_t i = 0; i < count; ++i) {
      load_row<T>(right, weight + (first + i) * p.inputs + k, depth);
      for (int64_t m = 0; m < p.rows; ++m) {
        load_row<T>(left, x + m * p.inputs + k, depth);
        const A sum = dot<A>(left, right, depth);
        A& place = sums[i * width + m];
        place = k > 0 ? place + sum : sum;
      }
    }
  }
}

template <class T>
void forward(const LinearBiasRelu& p, const T* x, const Acc<T>* packed_x, const T* weight, const T* bias, T* y,
             int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t width = padded_rows(p), step = kForwardDepth + 16;
  Buffer<A> block(kForwardOutputs * step), sums(kForwardOutputs * width), row(kForwardOutputs);
  for_runs(kForwardOutputs, p.outputs, begin, end, [&](int64_t first, int64_t count) {
    if (p.rows < kFewRows) dots(p, x, weight, first, count, static_cast<A*>(sums), width);
    for (int64_t k = 0; p.rows >= kFewRows && k < p.inputs; k += kForwardDepth) {
      const int64_t depth = least(kForwardDepth, p.inputs - k);
      const T* source = weight + first * p.inputs + k;
      load_block(block, step, source, p.inputs, count, depth);
      const Next<const T> next{source + depth, p.inputs, count, least(kForwardDepth, p.inputs - k - depth)};
      multiply<A>(count, width / kLanes<A>, block, step, 1, packed_x + k * width, width, depth, sums, width, k > 0,
                  next);
    }
    for (int64_t m = 0; m < p.rows; ++m) {
      for (int64_t i = 0; i < count; ++i) {
        // The test is z <= 0 so that NaN passes.
        const A z = sums[i * width + m] + (bias == nullptr ? A(0) : widen(bias[first + i]));
        row[i] = z <= 0 ? A(0) : z;
      }
      store_row(y + m * p.outputs + first, static_cast<const A*>(row), count);
    }
  });
}

template <class T>
void input_gradient(const LinearBiasRelu& p, const Acc<T>* dz, const T* weight, T* dx, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t width = padded_rows(p), step = kInputs + 16;
  Buffer<A> block(kInputDepth * step), sums(kInputs * width), row(kInputs);
  for_runs(kInputs, p.inputs, begin, end, [&](int64_t first, int64_t count) {
    for (int64_t n = 0; n < p.outputs; n += kInputDepth) {
      const int64_t depth = least(kInputDepth, p.outputs - n);
      const T* source = weight + n * p.inputs + first;
      load_block(block, step, source, p.inputs, depth, count);
      const Next<const T> next{source + depth * p.inputs, p.inputs, least(kInputDepth, p.outputs - n - depth), count};
      multiply<A>(count, width / kLanes<A>, block, 1, step, dz + n * width, width, depth, sums, width, n > 0, next);
    }
    for (int64_t m = 0; m < p.rows; ++m) {
      for (int64_t i = 0; i < count; ++i) row[i] = sums[i * width + m];
      store_row(dx + m * p.inputs + first, static_cast<const A*>(row), count);
    }
  });
}

template <class T>
void weight_gradient(const LinearBiasRelu& p, const T* dz, const T* x, T* dweight, T* dbias, int64_t begin,
                     int64_t end) {
  using A = Acc<T>;
  const int64_t step = kColumns + 16;
  Buffer<A> left(p.rows * kWeightOutputs), right(p.rows * step), sums(kWeightOutputs * step);
  for_runs(kWeightOutputs, p.outputs, begin, end, [&](int64_t first, int64_t count) {
    load_block(left, kWeightOutputs, dz + first, p.outputs, p.rows, count);
    if (dbias != nullptr) {
      for (int64_t i = 0; i < count; ++i) {
        A sum = 0;
        for (int64_t m = 0; m < p.rows; ++m) sum += left[m * kWeightOutputs + i];
        dbias[first + i] = narrow<T>(sum);
      }
    }
    if (dweight == nullptr) return;
    for (int64_t k = 0; k < p.inputs; k += kColumns) {
      const int64_t columns = least(kColumns, p.inputs - k);
      load_block(right, step, x + k, p.inputs, p.rows, columns);
      const Next<T> next{dweight + first * p.inputs + k, p.inputs, count, columns};
      multiply<A>(count, ceil_div(columns, kLanes<A>), left, 1, kWeightOutputs, right, step, p.rows, sums, step, false,
                  next);
      for (int64_t i = 0; i < count; ++i)
        store_row(dweight + (first + i) * p.inputs + k, static_cast<const A*>(sums) + i * step, columns);
    }
  });
}

}  // namespace
}  // namespace ALEXNET_ISA

using namespace ALEXNET_ISA;

template <>
void pack_rows_cpu<Isa::ALEXNET_ISA>(const LinearBiasRelu& p, int64_t columns, const void* source, void* packed,
                                     int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t width = padded_rows(p);
    const T* in = static_cast<const T*>(source);
    Acc<T>* out = static_cast<Acc<T>*>(packed);
    for_runs(kPackRun, columns, begin, end, [&](int64_t first, int64_t count) {
      for (int64_t k = first; k < first + count; ++k)
        for (int64_t m = 0; m < width; ++m) out[k * width + m] = m < p.rows ? widen(in[m * columns + k]) : Acc<T>(0);
    });
  });
}

template <>
void linear_bias_relu_cpu<Isa::ALEXNET_ISA>(const LinearBiasRelu& p, const void* x, const void* packed_x,
                                            const void* weight, const void* bias, void* y, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    forward(p, static_cast<const T*>(x), static_cast<const Acc<T>*>(packed_x), static_cast<const T*>(weight),
            static_cast<const T*>(bias), static_cast<T*>(y), begin, end);
  });
}

template <>
void linear_input_gradient_cpu<Isa::ALEXNET_ISA>(const LinearBiasRelu& p, const void* packed_dz, const void* weight,
                                                 void* dx, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    input_gradient(p, static_cast<const Acc<T>*>(packed_dz), static_cast<const T*>(weight), static_cast<T*>(dx), begin,
                   end);
  });
}

template <>
void linear_weight_gradient_cpu<Isa::ALEXNET_ISA>(const LinearBiasRelu& p, const void* dz, const void* x, void* dweight,
                                                  void* dbias, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    weight_gradient(p, static_cast<const T*>(dz), static_cast<const T*>(x), static_cast<T*>(dweight),
                    static_cast<T*>(dbias), begin, end);
  });
}

}  // namespace alexnet_ext
