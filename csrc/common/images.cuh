// Images on the device: the place of an element in memory, and accesses to V neighbouring elements.
#pragma once

#include "launch.cuh"

namespace alexnet_ext {

inline int64_t elements(const Images& s) { return s.batch * s.channels * s.height * s.width; }

// Division by a number that the host knows: a multiplication by its 64-bit reciprocal instead of a subroutine. Exact
// for n * divisor < 2^64.
struct Divisor {
  int64_t value;
  uint64_t reciprocal;

  explicit Divisor(int64_t divisor)
      : value(divisor), reciprocal(~uint64_t{0} / static_cast<uint64_t>(divisor) + 1) {}  // 0 for divisor 1

  // n is at least 0. With 32 bits it takes two multiplications, with 64 bits some ten instructions.
  template <class Index>
  __device__ Index divide(Index n) const {
    if (value == 1) return n;
    if constexpr (sizeof(Index) == 8) return static_cast<Index>(__umul64hi(static_cast<uint64_t>(n), reciprocal));
    const uint32_t bits = static_cast<uint32_t>(n);
    const uint64_t low = __umulhi(bits, static_cast<uint32_t>(reciprocal));
    return static_cast<Index>((bits * (reciprocal >> 32) + low) >> 32);
  }
};

// The same for numbers below 2^31, in two instructions.
struct Divisor32 {
  uint32_t value, reciprocal = 0;
  int shift = 0;

  explicit Divisor32(int64_t divisor) : value(static_cast<uint32_t>(divisor)) {
    if (divisor == 1) return;
    while (int64_t{2} << shift < divisor) ++shift;
    reciprocal = static_cast<uint32_t>((uint64_t{1} << (32 + shift)) / value + 1);
  }

  __device__ uint32_t divide(uint32_t n) const { return value == 1 ? n : __umulhi(n, reciprocal) >> shift; }
};

// Whether the division is exact for all numbers up to n.
inline bool divides(int64_t n, int64_t divisor) { return divisor < 1 || n <= INT64_MAX / divisor; }

struct Position {
  int64_t image;
  int channel, row, column;
};

// Images as a kernel's argument. It is in the constant bank, so that sides and steps cost no registers.
struct DeviceImages {
  int channels, height, width;
  bool channels_last;
  int64_t image_step, channel_step, row_step, column_step;
  Divisor by_channels, by_height, by_width;

  explicit DeviceImages(const Images& s)
      : channels(static_cast<int>(s.channels)),
        height(static_cast<int>(s.height)),
        width(static_cast<int>(s.width)),
        channels_last(s.channels_last),
        image_step(s.channels * s.height * s.width),
        channel_step(s.channels_last ? 1 : s.height * s.width),
        row_step(s.channels_last ? s.width * s.channels : s.width),
        column_step(s.channels_last ? s.channels : 1),
        by_channels(s.channels),
        by_height(s.height),
        by_width(s.width) {}

  __device__ int64_t at(int64_t image, int channel, int row, int column) const {
    return image * image_step + channel * channel_step + row * row_step + column * column_step;
  }

  // The position of the element at offset i.
  __device__ Position position(int64_t i) const {
    Position at;
    if (channels_last) at.channel = take(i, by_channels);
    at.column = take(i, by_width);
    at.row = take(i, by_height);
    if (!channels_last) at.channel = take(i, by_channels);
    at.image = i;
    return at;
  }

  // The position of `channel` at pixel i, counted over all images.
  __device__ Position position(int64_t i, int channel) const {
    Position at;
    at.channel = channel;
    at.column = take(i, by_width);
    at.row = take(i, by_height);
    at.image = i;
    return at;
  }

 private:
  // Returns the remainder of i and sets i to the quotient.
  __device__ static int take(int64_t& i, const Divisor& by) {
    const int64_t quotient = by.divide(i);
    const int rest = static_cast<int>(i - quotient * by.value);
    i = quotient;
    return rest;
  }
};

// Whether kernels may count sides in 32 bits and divide by Divisor. 2^37 elements with sides up to 2^26 are allowed.
constexpr int64_t kMaxSide = 1 << 26;

inline bool fits(const Images& s) {
  return s.channels <= kMaxSide && s.height <= kMaxSide && s.width <= kMaxSide && elements(s) <= int64_t{1} << 37;
}

// ---- V neighbouring elements: one, or enough for accesses of 16 bytes at an aligned address

template <class T>
constexpr int kVector = 16 / sizeof(T);

template <int V, class T>
__device__ inline void load(Acc<T> (&values)[V], const T* from) {
  if constexpr (V == 1) {
    values[0] = widen(*from);
  } else {
    static_assert(V % kVector<T> == 0);
#pragma unroll
    for (int i = 0; i < V; i += kVector<T>) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
      if constexpr (__is_same(T, bf16)) {  // by words: the upper element needs one instruction instead of two
        const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int j = 0; j < 8; ++j)
          values[i + j] = __uint_as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000);
      } else {
        T elements[kVector<T>];
        memcpy(elements, &bits, sizeof bits);
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) values[i + j] = widen(elements[j]);
      }
    }
  }
}

template <int V, class T>
__device__ inline void store(T* to, const Acc<T> (&values)[V]) {
  if constexpr (V == 1) {
    *to = narrow<T>(values[0]);
  } else {
    static_assert(V % kVector<T> == 0);
#pragma unroll
    for (int i = 0; i < V; i += kVector<T>) {
      T elements[kVector<T>];
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) elements[j] = narrow<T>(values[i + j]);
      uint4 bits;
      memcpy(&bits, elements, sizeof bits);
      *reinterpret_cast<uint4*>(to + i) = bits;
    }
  }
}

// V bytes as one number, the first byte lowest.
template <int V>
struct BytesOf;
template <>
struct BytesOf<1> {
  using type = uint8_t;
};
template <>
struct BytesOf<2> {
  using type = uint16_t;
};
template <>
struct BytesOf<4> {
  using type = uint32_t;
};
template <>
struct BytesOf<8> {
  using type = uint64_t;
};
template <int V>
using Bytes = typename BytesOf<V>::type;

template <int V>
__device__ inline int byte_of(Bytes<V> bytes, int i) {
  return static_cast<int>(bytes >> (8 * i) & 255);
}

template <int V>
__device__ inline Bytes<V> load_bytes(const uint8_t* from) {
  return *reinterpret_cast<const Bytes<V>*>(from);
}

template <int V>
__device__ inline void store_bytes(uint8_t* to, const int (&values)[V]) {
  Bytes<V> bytes = 0;
#pragma unroll
  for (int i = 0; i < V; ++i) bytes |= static_cast<Bytes<V>>(static_cast<Bytes<V>>(values[i]) << (8 * i));
  *reinterpret_cast<Bytes<V>*>(to) = bytes;
}

// Whether every pointer allows accesses of 16 bytes. Null does. (Winners need V bytes, which is fewer.)
template <class... Pointers>
inline bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace alexnet_ext
