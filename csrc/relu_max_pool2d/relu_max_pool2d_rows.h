// Max pooling of rows in scratch memory, forward and backward: the CPU core of every op that pools.
//
// A row is [channels][width] or, channels-last, [width][channels]. Vectors run along the channels in the second layout.
// In the first they run along the output's width, so each input row is first split by column modulo the stride: then a
// tap reads neighbouring values for neighbouring outputs.
#pragma once

#include "../common/cpu_vector.h"
#include "relu_max_pool2d.h"

namespace alexnet_ext::ALEXNET_ISA {

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// The columns of a window. Tap s of output `o` reads input column o * stride + shift(s), which is element
// o + offset[s] of the input's phase[s]. Only the phases that some tap reads are kept.
struct Columns {
  int64_t taps, stride, first, dilation, count = 0, lowest = 0, highest = 0;
  int64_t residue[kMaxTaps], slot[kMaxTaps], offset[kMaxTaps];

  explicit Columns(const Pooling& pool)
      : taps(pool.kernel[1]), stride(pool.stride[1]), first(-pool.padding[1]), dilation(pool.dilation[1]) {
    for (int64_t s = 0; s < taps; ++s) {
      offset[s] = floor_div(shift(s), stride);
      if (s == 0 || offset[s] < lowest) lowest = offset[s];
      if (s == 0 || offset[s] > highest) highest = offset[s];
      int64_t phase = shift(s) - offset[s] * stride;
      slot[s] = 0;
      while (slot[s] < count && residue[slot[s]] != phase) ++slot[s];
      if (slot[s] == count) residue[count++] = phase;
    }
  }

  int64_t shift(int64_t s) const { return first + s * dilation; }
};

// Rows kept by their number, at most as many as the window has: each is made once and found again by the next output.
class RowCache {
 public:
  explicit RowCache(int64_t slots) : slots_(slots) { clear(); }

  void clear() {
    for (int64_t i = 0; i < slots_; ++i) kept_[i] = -1;
  }

  // The slot of each wanted row (-1: none wanted); make(row, slot) fills those that are not there yet.
  template <class Make>
  void want(const int64_t* rows, int64_t* found, Make&& make) {
    bool taken[kMaxTaps] = {};
    for (int64_t r = 0; r < slots_; ++r) {
      found[r] = -1;
      for (int64_t i = 0; rows[r] >= 0 && i < slots_; ++i)
        if (kept_[i] == rows[r]) found[r] = i, taken[i] = true;
    }
    for (int64_t r = 0, free = 0; r < slots_; ++r) {
      if (rows[r] < 0 || found[r] >= 0) continue;
      while (taken[free]) ++free;
      taken[free] = true;
      found[r] = free;
      kept_[free] = rows[r];
      make(rows[r], free);
    }
  }

 private:
  int64_t slots_;
  int64_t kept_[kMaxTaps];
};

// Pools one output row after the other. With `floor` the maximum starts at 0 (ReLU) and a window with nothing above it
// has no winner; without, at its first value, and the windows must lie inside the image.
template <class A, bool floor>
class PoolRows {
 public:
  PoolRows(const Pooling& pool, const Images& in, int64_t out_width, int64_t channels)
      : pool_(pool),
        columns_(pool),
        channels_last_(in.channels_last),
        height_(in.height),
        width_(in.width),
        out_width_(out_width),
        channels_(channels),
        length_(out_width + columns_.highest - columns_.lowest),
        // A vector of slack behind each row: what fills it may write whole vectors.
        row_size_((channels_last_ ? width_ * channels : channels * columns_.count * length_) + kLanes<A>),
        cache_(pool.kernel[0]),
        rows_(pool.kernel[0] * row_size_),
        flat_(channels_last_ ? 0 : width_ * channels),
        y_(out_width * channels),
        winners_(out_width * channels) {}

  // For each output row in [begin, end): make(row, A* in) fills the input rows it needs, emit(row, y, winners) takes
  // it.
  template <class Make, class Emit>
  void run(int64_t begin, int64_t end, Make&& make, Emit&& emit) {
    cache_.clear();
    for (int64_t oh = begin; oh < end; ++oh) {
      int64_t wanted[kMaxTaps], found[kMaxTaps];
      for (int64_t r = 0; r < pool_.kernel[0]; ++r) {
        int64_t ih = oh * pool_.stride[0] - pool_.padding[0] + r * pool_.dilation[0];
        wanted[r] = ih >= 0 && ih < height_ ? ih : -1;
      }
      cache_.want(wanted, found, [&](int64_t row, int64_t slot) {
        A* kept = rows_ + slot * row_size_;
        make(row, channels_last_ ? kept : flat_);
        if (!channels_last_) split(kept);
      });
      channels_last_ ? pool_channels_last(found) : pool_contiguous(found);
      emit(oh, static_cast<const A*>(y_), static_cast<const uint8_t*>(winners_));
    }
  }

 private:
  struct Best {
    Vec<A> value{};
    Vec<Int<A>> tap = broadcast<Int<A>>(kNoWinner);
    bool empty = true;

    void take(const A* p, Int<A> candidate) {
      Vec<A> v = load(p);
      if (empty) {
        empty = false;
        // Under ReLU a window with nothing above zero returns its first value's zero, with that one's sign.
        value = floor ? (v == 0 ? v : Vec<A>{}) : v;
        if (!floor) {
          tap = broadcast(candidate);
          return;
        }
      }
      // A NaN takes this branch from any value and no value takes it from a NaN: the last NaN wins, as in PyTorch.
      Vec<Int<A>> better = (v > value) | (v != v);
      value = better ? v : value;
      tap = better ? broadcast(candidate) : tap;
    }
  };

  void keep(const Best& best, int64_t at) {
    store(y_ + at, best.value);
    typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
    Bytes bytes = __builtin_convertvector(best.tap, Bytes);
    std::memcpy(winners_ + at, &bytes, sizeof bytes);
  }

  // Lays flat_ [channels][width] out as [channels][phases][length], -inf where the padding is.
  void split(A* kept) {
    const int64_t stride = columns_.stride;
    for (int64_t c = 0; c < channels_; ++c) {
      const A* from = flat_ + c * width_;
      for (int64_t q = 0; q < columns_.count; ++q) {
        A* to = kept + (c * columns_.count + q) * length_;
        int64_t shift = columns_.lowest * stride + columns_.residue[q];
        int64_t first = shift < 0 ? ceil_div(-shift, stride) : 0;
        int64_t last = shift >= width_ ? 0 : (width_ - 1 - shift) / stride + 1;
        if (last > length_) last = length_;
        if (first > last) first = last;
        for (int64_t i = 0; i < first; ++i) to[i] = -INFINITY;
        if (stride == 2) {
          for (int64_t i = first; i < last; ++i) to[i] = from[i * 2 + shift];
        } else {
          for (int64_t i = first; i < last; ++i) to[i] = from[i * stride + shift];
        }
        for (int64_t i = last; i < length_; ++i) to[i] = -INFINITY;
      }
    }
  }

  // Whole vectors throughout: what a vector writes beyond its channel, the next channel overwrites.
  void pool_contiguous(const int64_t* found) {
    for (int64_t c = 0; c < channels_; ++c) {
      for (int64_t ow = 0; ow < out_width_; ow += kLanes<A>) {
        Best best;
        for (int64_t r = 0; r < pool_.kernel[0]; ++r) {
          if (found[r] < 0) continue;
          const A* row = rows_ + found[r] * row_size_ + c * columns_.count * length_ + ow - columns_.lowest;
          for (int64_t s = 0; s < columns_.taps; ++s)
            best.take(row + columns_.slot[s] * length_ + columns_.offset[s], r * columns_.taps + s);
        }
        keep(best, c * out_width_ + ow);
      }
    }
  }

  void pool_channels_last(const int64_t* found) {
    for (int64_t ow = 0; ow < out_width_; ++ow) {
      for (int64_t c = 0; c < channels_; c += kLanes<A>) {
        Best best;
        for (int64_t r = 0; r < pool_.kernel[0]; ++r) {
          if (found[r] < 0) continue;
          for (int64_t s = 0; s < columns_.taps; ++s) {
            int64_t iw = ow * columns_.stride + columns_.shift(s);
            if (iw < 0 || iw >= width_) continue;
            best.take(rows_ + found[r] * row_size_ + iw * channels_ + c, r * columns_.taps + s);
          }
        }
        keep(best, ow * channels_ + c);
      }
    }
  }

  Pooling pool_;
  Columns columns_;
  bool channels_last_;
  int64_t height_, width_, out_width_, channels_, length_, row_size_;
  RowCache cache_;
  Buffer<A> rows_, flat_, y_;
  Buffer<uint8_t> winners_;
};

// The gradient of one input row after the other, gathered from the windows that reach it.
template <class A>
class UnpoolRows {
 public:
  UnpoolRows(const Pooling& pool, const Images& in, const Images& out, int64_t channels)
      : pool_(pool),
        columns_(pool),
        channels_last_(in.channels_last),
        width_(in.width),
        out_height_(out.height),
        out_width_(out.width),
        channels_(channels),
        phase_length_(ceil_div(in.width, columns_.stride)),
        before_(columns_.highest > 0 ? columns_.highest : 0),
        length_(before_ + longest(out.width, phase_length_ - columns_.lowest)),
        row_size_(channels_last_ ? out.width * channels : channels * length_),
        cache_(pool.kernel[0]),
        gradients_(pool.kernel[0] * row_size_),
        taps_(pool.kernel[0] * row_size_),
        flat_(out.width * channels),
        flat_winners_(out.width * channels),
        sums_(columns_.count * phase_length_),
        dx_(in.width * channels) {}

  // For each input row in [begin, end): make(row, A* dy, uint8_t* winners) fills the output rows that reach it,
  // emit(row, dx) takes the gradient.
  template <class Make, class Emit>
  void run(int64_t begin, int64_t end, Make&& make, Emit&& emit) {
    cache_.clear();
    for (int64_t ih = begin; ih < end; ++ih) {
      int64_t wanted[kMaxTaps], found[kMaxTaps];
      for (int64_t r = 0; r < pool_.kernel[0]; ++r) {
        int64_t from = ih + pool_.padding[0] - r * pool_.dilation[0], oh = floor_div(from, pool_.stride[0]);
        bool reaches = oh >= 0 && oh < out_height_ && oh * pool_.stride[0] == from;
        wanted[r] = reaches ? oh : -1;
      }
      cache_.want(wanted, found, [&](int64_t row, int64_t slot) {
        make(row, static_cast<A*>(flat_), static_cast<uint8_t*>(flat_winners_));
        lay_out(gradients_ + slot * row_size_, taps_ + slot * row_size_);
      });
      channels_last_ ? gather_channels_last(found) : gather_contiguous(found);
      emit(ih, static_cast<const A*>(dx_));
    }
  }

 private:
  static int64_t longest(int64_t a, int64_t b) { return a > b ? a : b; }

  // Gradients, and winners widened to A's size; NCHW rows stand between zeros, where the outside windows would be.
  void lay_out(A* gradients, Int<A>* taps) {
    const int64_t pieces = channels_last_ ? 1 : channels_;
    const int64_t n = channels_last_ ? row_size_ : out_width_, step = channels_last_ ? 0 : length_;
    for (int64_t i = 0; i < pieces; ++i) {
      A* to = gradients + i * step + (channels_last_ ? 0 : before_);
      Int<A>* tap = taps + i * step + (channels_last_ ? 0 : before_);
      std::memcpy(to, flat_ + i * n, n * sizeof(A));
      const uint8_t* winners = flat_winners_ + i * n;
      for (int64_t j = 0; j < n; ++j) tap[j] = winners[j];
    }
  }

  static void add(Vec<A>& sum, const A* gradients, const Int<A>* taps, Int<A> tap) {
    sum += load(taps) == broadcast(tap) ? load(gradients) : Vec<A>{};
  }

  // Windows in ascending order, as PyTorch adds them: fp32 sums come out equal to the bit.
  void gather_contiguous(const int64_t* found) {
    const int64_t stride = columns_.stride;
    if (columns_.count < stride) std::memset(dx_, 0, width_ * channels_ * sizeof(A));
    for (int64_t c = 0; c < channels_; ++c) {
      A* dx = dx_ + c * width_;
      for (int64_t q = 0; q < columns_.count; ++q) {
        A* sums = sums_ + q * phase_length_;
        for (int64_t j = 0; j < phase_length_; j += kLanes<A>) {
          Vec<A> sum{};
          for (int64_t r = pool_.kernel[0] - 1; r >= 0; --r) {
            if (found[r] < 0) continue;
            int64_t at = found[r] * row_size_ + c * length_ + before_ + j;
            for (int64_t s = columns_.taps - 1; s >= 0; --s)
              if (columns_.slot[s] == q)
                add(sum, gradients_ + at - columns_.offset[s], taps_ + at - columns_.offset[s], r * columns_.taps + s);
          }
          store(sums + j, sum);
        }
        interleave(dx, sums, columns_.residue[q], stride);
      }
    }
  }

  void interleave(A* __restrict dx, const A* __restrict sums, int64_t residue, int64_t stride) {
    if (stride == 2) {
      for (int64_t j = 0; j * 2 + residue < width_; ++j) dx[j * 2 + residue] = sums[j];
    } else {
      for (int64_t j = 0; j * stride + residue < width_; ++j) dx[j * stride + residue] = sums[j];
    }
  }

  void gather_channels_last(const int64_t* found) {
    for (int64_t iw = 0; iw < width_; ++iw) {
      int64_t start[kMaxTaps];
      for (int64_t s = 0; s < columns_.taps; ++s) {
        int64_t from = iw - columns_.shift(s), ow = floor_div(from, columns_.stride);
        bool reaches = ow >= 0 && ow < out_width_ && ow * columns_.stride == from;
        start[s] = reaches ? ow * channels_ : -1;
      }
      for (int64_t c = 0; c < channels_; c += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t r = pool_.kernel[0] - 1; r >= 0; --r) {
          if (found[r] < 0) continue;
          for (int64_t s = columns_.taps - 1; s >= 0; --s) {
            if (start[s] < 0) continue;
            int64_t at = found[r] * row_size_ + start[s] + c;
            add(sum, gradients_ + at, taps_ + at, r * columns_.taps + s);
          }
        }
        store(dx_ + iw * channels_ + c, sum);
      }
    }
  }

  Pooling pool_;
  Columns columns_;
  bool channels_last_;
  int64_t width_, out_height_, out_width_, channels_, phase_length_, before_, length_, row_size_;
  RowCache cache_;
  Buffer<A> gradients_;
  Buffer<Int<A>> taps_;
  Buffer<A> flat_;
  Buffer<uint8_t> flat_winners_;
  Buffer<A> sums_, dx_;
};

}  // namespace alexnet_ext::ALEXNET_ISA
