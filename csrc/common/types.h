// Element types and images: the terms of every kernel, on any device, free of PyTorch.
#pragma once

#include <cstdint>

namespace alexnet_ext {

enum class DType { f64, f32, bf16, f16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The arithmetic type: bf16 and fp16 are computed in fp32.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class T>
struct Type {
  using type = T;
};

// A number that the compiler knows.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls f(Type<T>{}) with the C++ type of dtype.
template <class F>
inline void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f(Type<double>{});
    case DType::f32:
      return f(Type<float>{});
    case DType::bf16:
      return f(Type<bf16>{});
    case DType::f16:
      return f(Type<f16>{});
  }
}

// A dense batch of images: NCHW, or NHWC where channels_last.
struct Images {
  int64_t batch, channels, height, width;
  bool channels_last;
};

// The multiprocessors of an H100. Launches that split a sum are sized for them, on every GPU, so that a result depends
// on the shape alone.
constexpr int64_t kHopperMultiprocessors = 132;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace alexnet_ext
