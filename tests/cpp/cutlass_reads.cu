// What the blocks of CUTLASS's products would read, by CUTLASS's own iterators and our arguments on the host:
// multiplied, it is the grouped convolution and its gradients. And which problems CUTLASS takes. No GPU is needed.
#include "conv2d_bias_relu/conv2d_cutlass.cuh"
#include "convolution.h"

namespace alexnet_ext::test {
namespace {

// A block's tile as it comes to shared memory, [along the channels or pixels that are summed over][results].
template <class Iterator, bool kSummedContiguous>
class Tile {
 public:
  Tile(int threads, int results, int depth, const typename Iterator::Params& params,
       const cutlass::conv::Conv2dProblemSize& problem, const typename Iterator::Element* data,
       const cutlass::MatrixCoord& offset)
      : results_(results), values_(depth * results) {
    for (int thread = 0; thread < threads; ++thread) iterators_.emplace_back(params, problem, data, thread, offset);
  }

  void load() {
    using Map = typename Iterator::ThreadMap;
    std::fill(values_.begin(), values_.end(), -1e9);
    for (size_t thread = 0; thread < iterators_.size(); ++thread) {
      Iterator& iterator = iterators_[thread];
      iterator.set_iteration_index(0);
      const auto first = Map::initial_offset(static_cast<int>(thread));
      for (int s = 0; s < Map::Iterations::kStrided; ++s)
        for (int c = 0; c < Map::Iterations::kContiguous; ++c, ++iterator)
          for (int i = 0; i < Map::kElementsPerAccess; ++i) {
            const int contiguous = first.contiguous() + c * Map::Delta::kContiguous + i;
            const int strided = first.strided() + s * Map::Delta::kStrided;
            double& value = kSummedContiguous ? values_.at(contiguous * results_ + strided)
                                              : values_.at(strided * results_ + contiguous);
            value = iterator.valid() ? static_cast<double>(static_cast<float>((*iterator.get())[i])) : 0;
          }
      iterator.advance();
    }
  }

  double at(int summed, int result) const { return values_[summed * results_ + result]; }

 private:
  int results_;
  std::vector<double> values_;
  std::vector<Iterator> iterators_;
};

// The product of all blocks, [rows][columns]. kA, kB: channels that are summed over lie side by side in memory.
template <class Kernel, bool kA, bool kB>
std::vector<double> product(const typename Kernel::Arguments& arguments) {
  using Mma = typename Kernel::Mma;
  constexpr int kM = Mma::Shape::kM, kN = Mma::Shape::kN, kK = Mma::Shape::kK;
  const typename Kernel::Params p(arguments);
  const int rows = p.implicit_gemm_problem_size.m(), columns = p.implicit_gemm_problem_size.n();
  std::vector<double> result(rows * columns, 0);
  expect(cutlass::conv::device::ImplicitGemmConvolution<Kernel>::can_implement(arguments) == cutlass::Status::kSuccess,
         "CUTLASS takes the problem");
  for (int m = 0; m < p.grid_tiled_shape.m(); ++m)
    for (int n = 0; n < p.grid_tiled_shape.n(); ++n)
      for (int split = 0; split < p.grid_tiled_shape.k(); ++split) {
        Tile<typename Mma::IteratorA, kA> a(Kernel::kThreadCount, kM, kK, p.iterator_A, p.problem_size, p.ptr_A,
                                            {m * kM, split * kK});
        Tile<typename Mma::IteratorB, kB> b(Kernel::kThreadCount, kN, kK, p.iterator_B, p.problem_size, p.ptr_B,
                                            {split * kK, n * kN});
        for (int iteration = 0; iteration < p.gemm_k_iterations; ++iteration) {
          a.load();
          b.load();
          for (int k = 0; k < kK; ++k)
            for (int i = 0; i < kM && m * kM + i < rows; ++i)
              for (int j = 0; j < kN && n * kN + j < columns; ++j)
                result[(m * kM + i) * columns + n * kN + j] += a.at(k, i) * b.at(k, j);
        }
      }
  return result;
}

template <class T>
std::vector<typename TensorCore<T>::Element> elements_of(const Values& values) {
  std::vector<typename TensorCore<T>::Element> elements;
  for (int64_t value : values) elements.emplace_back(static_cast<float>(value));
  return elements;
}

template <class T>
void check(const Conv2d& p) {
  report().where = std::string(dtype_name<T>()) + " " + std::to_string(p.channels) + " channels, " +
                   std::to_string(p.groups) + " groups, stride " + std::to_string(p.stride[0]);
  Random random(p.channels);
  const int64_t taps = p.taps_h * p.taps_w, inputs = p.group_channels(), outputs = p.group_filters();
  const Values x = random_values(random, p.batch * p.height * p.width * p.channels);
  const Values weight = random_values(random, p.filters * p.taps());
  const Values dz = random_values(random, p.pixels() * p.filters);
  Values y(dz.size(), 0), dx(x.size(), 0), dweight(weight.size(), 0);
  for_meetings(p, [&](int64_t pixel, int64_t place, int64_t tap) {
    for (int64_t k = 0; k < p.filters; ++k)
      for (int64_t c = k / outputs * inputs, i = 0; i < inputs; ++c, ++i) {
        const int64_t w = (k * taps + tap) * inputs + i;
        y[pixel * p.filters + k] += x[place * p.channels + c] * weight[w];
        dx[place * p.channels + c] += dz[pixel * p.filters + k] * weight[w];
        dweight[w] += dz[pixel * p.filters + k] * x[place * p.channels + c];
      }
  });
  auto given_x = elements_of<T>(x), given_weight = elements_of<T>(weight), given_dz = elements_of<T>(dz);
  auto expect_rows = [](const char* name, const std::vector<double>& got, const Values& exact, int64_t first,
                        int64_t columns, int64_t stride) {
    for (size_t i = 0; i < got.size(); ++i)
      expect_equal(name, static_cast<int64_t>(i), got[i],
                   static_cast<double>(exact[first + i / columns * stride + i % columns]));
  };
  for (int64_t group = 0; group < p.groups; ++group) {
    const Conv2dSlice first = slice_of(p, group);
    // Results are as wide as their tensors: what lies where is checked by the layouts alone.
    const bool relu = group == 0;
    const auto forward =
        forward_arguments<T>(p, first, given_x.data(), given_weight.data(), given_dz.data(), relu, given_dz.data());
    expect_rows("y", product<ForwardKernel<T>, true, true>(forward), y, first.y, outputs, forward.ref_D.stride(0));
    expect(forward.ref_D.data() == given_dz.data() + first.y, "y begins at its group");
    expect(forward.ref_C.data() == given_dz.data() + first.y && forward.ref_C.stride() == cutlass::make_Coord(0, 0, 0),
           "the bias begins at its group and is the same for all pixels");
    const typename ForwardKernel<T>::EpilogueOutputOp stored(forward.output_op);
    const auto below = stored(typename decltype(stored)::FragmentAccumulator{-1, NAN, 2});
    expect(float(below[0]) == (relu ? 0 : -1) && std::isnan(float(below[1])) && float(below[2]) == 2, "ReLU");
    if (p.stride[0] == 1) {
      const auto for_x = input_gradient_arguments<T>(p, first, given_dz.data(), given_weight.data(), given_x.data());
      expect_rows("dx", product<InputGradientKernel<T>, true, false>(for_x), dx, first.x, inputs,
                  for_x.ref_D.stride(0));
      expect(for_x.ref_D.data() == given_x.data() + first.x, "dx begins at its group");
    }
    float partial;
    const auto for_weight = weight_gradient_arguments<T>(p, first, given_dz.data(), given_x.data(), &partial);
    expect(for_weight.problem_size.split_k_slices == weight_gradient_splits(p), "the weight gradient's splits");
    expect(implicit_gemm_tensor_c_size(WeightGradientKernel<T>::kConvolutionalOperator, for_weight.problem_size) ==
               outputs * p.taps(),
           "a split's sums lie behind those of the one before");
    expect_rows("dweight", product<WeightGradientKernel<T>, false, false>(for_weight), dweight, first.weight, p.taps(),
                for_weight.ref_D.stride(2));
  }
}

template <class T>
bool taken(const Conv2d& p, bool forward) {
  using Forward = cutlass::conv::device::ImplicitGemmConvolution<ForwardKernel<T>>;
  using Gradient = cutlass::conv::device::ImplicitGemmConvolution<InputGradientKernel<T>>;
  const auto yes = cutlass::Status::kSuccess;
  return forward ? Forward::can_implement(forward_arguments<T>(p, {}, nullptr, nullptr, nullptr, true, nullptr)) == yes
                 : Gradient::can_implement(input_gradient_arguments<T>(p, {}, nullptr, nullptr, nullptr)) == yes;
}

template <class T>
void check_taken() {
  report().where = std::string(dtype_name<T>()) + " at batch 128";
  for (const Conv2d& p : alexnet_layers())
    expect(taken<T>(p, true) && taken<T>(p, false), "AlexNet's layers are taken");
  const int64_t odd = 16 / sizeof(T) / 2;
  expect(!taken<T>(problem(1, odd, 9, 32, 3, 1, 1, 1, 1), true), "channels of 8 bytes are taken");
  expect(!taken<T>(problem(1, 32, 9, odd, 3, 1, 1, 1, 1), true), "filters of 8 bytes are taken");
  expect(!taken<T>(problem(1, 32, 9, 32, 3, 2, 1, 1, 1), false), "the gradient of x is taken with a stride");
  expect(!taken<T>(problem(1, 32, 70, 32, 33, 1, 1, 1, 1), true), "33 taps are taken");
}

}  // namespace
}  // namespace alexnet_ext::test

int main() {
  using namespace alexnet_ext;
  using namespace alexnet_ext::test;
  auto all = [](auto type) {
    using T = typename decltype(type)::type;
    check<T>(problem(3, 48, 11, 144, 3, 1, 1, 1, 2));  // blocks in part beyond pixels, filters, channels
    check<T>(problem(2, 24, 9, 48, 5, 2, 2, 1, 3));
    check<T>(problem(1, 16, 12, 16, 3, 1, 2, 2, 1));
    check<T>(problem(20, 8, 8, 8, 2, 1, 0, 1, 1));
    check<T>(problem(10, 8, 16, 8, 3, 1, 1, 1, 1));  // the weight gradient in three splits
    check_taken<T>();
  };
  all(Type<bf16>{});
  all(Type<float>{});
  return finish("cutlass_reads");
}
