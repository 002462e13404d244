// LRN and a fused block (bias, ReLU, LRN, max pooling) of AlexNet's first layer in plain C++: on a stream of its own if
// there is a GPU, else on the CPU. Both results are compared with loops in double. If one is wrong the exit code is 1.
#include <alexnet_ext/common/isa.h>
#include <alexnet_ext/local_response_norm/local_response_norm.h>
#include <alexnet_ext/relu_lrn_max_pool2d/relu_lrn_max_pool2d.h>
#if defined(ALEXNET_CUDA)
#include <cuda_runtime_api.h>
#endif

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace ax = alexnet_ext;
using Floats = std::vector<float>;

namespace {

// A device that runs the kernels. Both functions return the seconds of one run.
struct Device {
  std::string name;
  double (*local_response_norm)(const ax::LocalResponseNorm& p, const Floats& x, Floats& y);
  double (*block)(const ax::LrnPoolBlock& p, const Floats& x, const Floats& bias, Floats& y);
};

// ---- on the CPU: work is counted in units, which any number of threads may share

template <class Run>
double seconds_on_cpu(int64_t units, const Run& run) {
  const int64_t threads = std::max(1u, std::thread::hardware_concurrency());
  const auto all = [&] {
    std::vector<std::thread> pool;
    for (int64_t t = 0; t < threads; ++t)
      pool.emplace_back([&, t] { run(units * t / threads, units * (t + 1) / threads); });
    for (std::thread& thread : pool) thread.join();
  };
  all();  // in the first run the pages of y are not mapped yet
  const auto began = std::chrono::steady_clock::now();
  all();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

double local_response_norm_on_cpu(const ax::LocalResponseNorm& p, const Floats& x, Floats& y) {
  return seconds_on_cpu(ax::local_response_norm_units(p), [&](int64_t begin, int64_t end) {
    ax::with_isa(ax::best_isa(),
                 [&](auto isa) { ax::local_response_norm_cpu<isa.value>(p, x.data(), y.data(), begin, end); });
  });
}

double block_on_cpu(const ax::LrnPoolBlock& p, const Floats& x, const Floats& bias, Floats& y) {
  std::vector<uint8_t> winners(y.size());
  return seconds_on_cpu(ax::band_count(p.out), [&](int64_t begin, int64_t end) {
    ax::with_isa(ax::best_isa(), [&](auto isa) {
      ax::relu_lrn_max_pool2d_cpu<isa.value>(p, x.data(), bias.data(), y.data(), winners.data(), begin, end);
    });
  });
}

Device cpu() {
  return {std::string("the CPU, ") + ax::isa_name(ax::best_isa()) + ", " +
              std::to_string(std::max(1u, std::thread::hardware_concurrency())) + " threads",
          local_response_norm_on_cpu, block_on_cpu};
}

// ---- on a GPU: launchers take a stream and do not wait

#if defined(ALEXNET_CUDA)
void must(int status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(static_cast<cudaError_t>(status)));
  std::exit(1);
}

template <class T>
class OnGpu {
 public:
  explicit OnGpu(size_t size) { must(cudaMalloc(&data_, size * sizeof(T)), "cudaMalloc"); }
  OnGpu(const std::vector<T>& host, cudaStream_t stream) : OnGpu(host.size()) {
    must(cudaMemcpyAsync(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice, stream), "copy");
  }
  OnGpu(const OnGpu&) = delete;
  ~OnGpu() { cudaFree(data_); }

  T* data() const { return static_cast<T*>(data_); }

  void read(std::vector<T>& host, cudaStream_t stream) const {
    must(cudaMemcpyAsync(host.data(), data_, host.size() * sizeof(T), cudaMemcpyDeviceToHost, stream), "copy");
    must(cudaStreamSynchronize(stream), "the stream");
  }

 private:
  void* data_ = nullptr;
};

template <class Launch>
double seconds_on_gpu(cudaStream_t stream, const char* name, const Launch& launch) {
  constexpr int kRuns = 20;
  cudaEvent_t began, ended;
  must(cudaEventCreate(&began), "cudaEventCreate");
  must(cudaEventCreate(&ended), "cudaEventCreate");
  must(launch(), name);
  must(cudaEventRecord(began, stream), "cudaEventRecord");
  for (int i = 0; i < kRuns; ++i) must(launch(), name);
  must(cudaEventRecord(ended, stream), "cudaEventRecord");
  must(cudaEventSynchronize(ended), name);
  float milliseconds = 0;
  must(cudaEventElapsedTime(&milliseconds, began, ended), "cudaEventElapsedTime");
  cudaEventDestroy(began);
  cudaEventDestroy(ended);
  return milliseconds / 1e3 / kRuns;
}

cudaStream_t own_stream() {
  static const cudaStream_t stream = [] {
    cudaStream_t made;
    must(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
    return made;
  }();
  return stream;
}

double local_response_norm_on_gpu(const ax::LocalResponseNorm& p, const Floats& x, Floats& y) {
  const cudaStream_t stream = own_stream();
  OnGpu<float> in(x, stream), out(y.size());
  const double seconds = seconds_on_gpu(stream, "local_response_norm",
                                        [&] { return ax::local_response_norm_cuda(p, in.data(), out.data(), stream); });
  out.read(y, stream);
  return seconds;
}

double block_on_gpu(const ax::LrnPoolBlock& p, const Floats& x, const Floats& bias, Floats& y) {
  const cudaStream_t stream = own_stream();
  OnGpu<float> in(x, stream), b(bias, stream), out(y.size());
  OnGpu<uint8_t> winners(y.size());
  const double seconds = seconds_on_gpu(stream, "relu_lrn_max_pool2d", [&] {
    return ax::relu_lrn_max_pool2d_cuda(p, in.data(), b.data(), out.data(), winners.data(), stream);
  });
  out.read(y, stream);
  return seconds;
}

Device best_device() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return cpu();
  cudaDeviceProp properties;
  must(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  return {std::string("the GPU ") + properties.name, local_response_norm_on_gpu, block_on_gpu};
}
#else
Device best_device() { return cpu(); }
#endif

// ---- the same by loops in double

// LRN of pixels of `channels` values each.
std::vector<double> lrn_by_loops(const ax::Lrn& lrn, int64_t channels, const std::vector<double>& x) {
  std::vector<double> y(x.size());
  for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
    const int64_t c = i % channels, pixel = i - c;
    double sum = 0;
    for (int64_t j = std::max<int64_t>(0, c - lrn.size / 2); j <= std::min(channels - 1, c + (lrn.size - 1) / 2); ++j)
      sum += x[pixel + j] * x[pixel + j];
    y[i] = x[i] * std::pow(lrn.k + lrn.alpha / lrn.size * sum, -lrn.beta);
  }
  return y;
}

std::vector<double> block_by_loops(const ax::LrnPoolBlock& p, const Floats& x, const Floats& bias) {
  const int64_t channels = p.in.channels;
  std::vector<double> relu(x.size());
  for (size_t i = 0; i < x.size(); ++i) relu[i] = std::max(0.0, double{x[i]} + bias[i % channels]);
  const std::vector<double> normed = lrn_by_loops(p.lrn, channels, relu);
  std::vector<double> y;
  for (int64_t n = 0; n < p.out.batch; ++n)
    for (int64_t row = 0; row < p.out.height; ++row)
      for (int64_t column = 0; column < p.out.width; ++column)
        for (int64_t c = 0; c < channels; ++c) {
          double most = 0;
          for (int64_t i = 0; i < p.pool.kernel[0]; ++i)
            for (int64_t j = 0; j < p.pool.kernel[1]; ++j) {
              const int64_t h = row * p.pool.stride[0] + i, w = column * p.pool.stride[1] + j;
              most = std::max(most, normed[((n * p.in.height + h) * p.in.width + w) * channels + c]);
            }
          y.push_back(most);
        }
  return y;
}

// Prints the error of y and the speed. NaN is an error.
bool agrees(const char* name, const Floats& y, const std::vector<double>& expected, double bytes, double seconds) {
  double worst = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const double error = std::abs(y[i] - expected[i]) / (1 + std::abs(expected[i]));
    if (error > worst || error != error) worst = error;
    if (worst != worst) break;
  }
  const bool right = y.size() == expected.size() && worst < 1e-5;
  std::printf("%-20s error %.1e, %6.1f GB/s%s\n", name, worst, bytes / seconds / 1e9, right ? "" : ": WRONG");
  return right;
}

Floats random_values(int64_t n, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> normal;
  Floats values(n);
  for (float& value : values) value = normal(bits);
  return values;
}

}  // namespace

int main() {
  const Device device = best_device();
  std::printf("The kernels run on %s.\n", device.name.c_str());

  // 16 images of 55 x 55 pixels with 96 channels each, channels-last; window 3, stride 2.
  const ax::Images in{16, 96, 55, 55, true};
  const ax::Pooling pool{{3, 3}, {2, 2}, {0, 0}, {1, 1}};
  const ax::Lrn lrn{5, 1e-1, 0.75, 2.0};
  ax::Images out = in;
  out.height = ax::pooled_length(in.height, pool, 0, false);
  out.width = ax::pooled_length(in.width, pool, 1, false);

  const int64_t pixels = in.height * in.width, n = in.batch * pixels * in.channels;
  const Floats x = random_values(n, 1), bias = random_values(in.channels, 2);
  const std::vector<double> wide(x.begin(), x.end());

  const ax::LocalResponseNorm norm{ax::DType::f32,       lrn, in.batch,   in.channels, pixels,
                                   pixels * in.channels, 1,   in.channels};
  Floats y(n);
  double seconds = device.local_response_norm(norm, x, y);
  bool right = agrees("local_response_norm", y, lrn_by_loops(lrn, in.channels, wide), 2.0 * n * sizeof(float), seconds);

  const ax::LrnPoolBlock block{ax::DType::f32, in, out, pool, lrn};
  Floats pooled(out.batch * out.height * out.width * out.channels);
  seconds = device.block(block, x, bias, pooled);
  const double bytes = n * sizeof(float) + pooled.size() * (sizeof(float) + 1.0);  // a byte for the winner
  right &= agrees("relu_lrn_max_pool2d", pooled, block_by_loops(block, x, bias), bytes, seconds);
  return right ? 0 : 1;
}
