// Max pooling of rows in scratch memory, forward and backward: the CPU core of every op that pools.
//
// A row is [channels][width] or, channels-last, [width][channels]. Channels-last, vectors run along the channels.
// Otherwise they run along the width of the output. Each input row is then first split by column modulo the stride, so
// that a tap reads adjacent values for adjacent outputs.
#pragma once

#include "../common/cpu_vector.h"
#include "relu_max_pool2d.h"

namespace alexnet_ext::ALEXNET_ISA {

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// The columns of a window. A phase is the columns with one residue modulo the stride. Tap s of output `o` reads input
// column o * stride + shift(s), which is element o + offset[s] of the phase in slot[s]. Only the phases that some tap
// reads have a slot.
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

// A cache of rows by row number, with as many slots as the window has rows. Each row is computed once, and the next
// output finds it again.
class RowCache {
 public:
  explicit RowCache(int64_t slots) : slots_(slots) { clear(); }

  void clear() {
    for (int64_t i = 0; i < slots_; ++i) kept_[i] = -1;
  }

  // Sets found[i] to the slot of rows[i], or to -1 if rows[i] is -1. make(row, slot) fills a slot whose row is missing.
  template <class Make>
  void want(const int64_t* rows, int64_t* found, Make&& make) {
    bool taken[kMaxTaps];
    for (int64_t i = 0; i < slots_; ++i) taken[i] = false;  // all 225 would cost time in a row of 13 pixels
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

// The taps of one vector of results: where each reads, and its number.
template <class A, class Place>
struct Taps {
  int64_t count = 0;
  Place place[kMaxTaps];
  Int<A> number[kMaxTaps];

  void add(Place at, int64_t tap) {
    place[count] = at;
    number[count++] = static_cast<Int<A>>(tap);
  }
};

// Calls f(count). The counts of a 2 x 2 window and of a 3 x 3 window at stride 2 (9 forward; 1, 2 or 4 backward) are
// passed as constants, which unrolls the loop over taps.
template <class F>
inline void with_count(int64_t count, F&& f) {
  switch (count) {
    case 1:
      return f(std::integral_constant<int64_t, 1>{});
    case 2:
      return f(std::integral_constant<int64_t, 2>{});
    case 4:
      return f(std::integral_constant<int64_t, 4>{});
    case 9:
      return f(std::integral_constant<int64_t, 9>{});
    default:
      return f(count);
  }
}

// Pools one output row after the other. With `floor` the maximum starts at 0 (ReLU), and a window without a greater
// value has no winner. Without, it starts at the first value, and every window must be inside the image.
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
        // A vector of slack after each row, as rows are written in whole vectors.
        row_size_((channels_last_ ? width_ * channels : channels * columns_.count * length_) + kLanes<A>),
        cache_(pool.kernel[0]),
        rows_(pool.kernel[0] * row_size_),
        flat_(channels_last_ ? 0 : width_ * channels),
        y_(out_width * channels),
        taps_(out_width * channels),
        winners_(out_width * channels) {}

  // For each output row in [begin, end), make(row, scratch) provides the input rows that it needs, and emit(row, y,
  // winners) takes the result. make returns scratch, which it has filled. Channels-last it may instead return any place
  // where whole vectors can be read.
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
        const A* made = make(row, channels_last_ ? kept : flat_);
        starts_[slot] = channels_last_ ? made : split(made, kept);
      });
      channels_last_ ? pool_channels_last(found) : pool_contiguous(found);
      // A whole row at a time, as the compiler turns a single vector into bytes with twenty scalar instructions.
      for (int64_t i = 0; i < out_width_ * channels_; ++i) winners_[i] = static_cast<uint8_t>(taps_[i]);
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
        // Under ReLU a window without a positive value is 0. If its first value is a zero, its sign is kept.
        value = floor ? (v == 0 ? v : Vec<A>{}) : v;
        if (!floor) {
          tap = broadcast(candidate);
          return;
        }
      }
      // A NaN replaces any value, and only another NaN replaces it: the last NaN wins, as in PyTorch.
      Vec<Int<A>> better = (v > value) | (v != v);
      value = better ? v : value;
      tap = better ? broadcast(candidate) : tap;
    }
  };

  void keep(const Best& best, int64_t at) {
    store(y_ + at, best.value);
    store(taps_ + at, best.tap);
  }

  // Rearranges a row [channels][width] as [channels][phases][length], with -inf for the padding.
  const A* split(const A* row, A* kept) {
    const int64_t stride = columns_.stride;
    for (int64_t c = 0; c < channels_; ++c) {
      const A* from = row + c * width_;
      for (int64_t q = 0; q < columns_.count; ++q) {
        A* to = kept + (c * columns_.count + q) * length_;
        int64_t shift = columns_.lowest * stride + columns_.residue[q];
        int64_t first = shift < 0 ? ceil_div(-shift, stride) : 0;
        int64_t last = shift >= width_ ? 0 : (width_ - 1 - shift) / stride + 1;
        if (last > length_) last = length_;
        if (first > last) first = last;
        for (int64_t i = 0; i < first; ++i) to[i] = left_of(from, i * stride + shift);
        if (stride == 2) {
          for (int64_t i = first; i < last; ++i) to[i] = from[i * 2 + shift];
        } else {
          for (int64_t i = first; i < last; ++i) to[i] = from[i * stride + shift];
        }
        for (int64_t i = last; i < length_; ++i) to[i] = -INFINITY;
      }
    }
    return kept;
  }

  // The padding to the left of a row. Under ReLU the first value of a window may give its sign to the result. So if the
  // first column that the window reaches is a zero, it is repeated here. A zero never exceeds the maximum.
  A left_of(const A* row, int64_t column) const {
    int64_t reached = column - floor_div(column, columns_.dilation) * columns_.dilation;
    return floor && reached < width_ && row[reached] == 0 ? row[reached] : -INFINITY;
  }

  // Pools `length` results, stored from `at` on, in whole vectors. Every tap is moved by `shift`.
  void pool_run(const Taps<A, const A*>& taps, int64_t shift, int64_t length, int64_t at) {
    with_count(taps.count, [&](auto count) {
      for (int64_t i = 0; i < length; i += kLanes<A>) {
        Best best;
        for (int64_t t = 0; t < count; ++t) best.take(taps.place[t] + shift + i, taps.number[t]);
        keep(best, at + i);
      }
    });
  }

  // A vector may write past the end of its channel; the next channel overwrites that part.
  void pool_contiguous(const int64_t* found) {
    Taps<A, const A*> taps;
    for (int64_t r = 0; r < pool_.kernel[0]; ++r)
      for (int64_t s = 0; found[r] >= 0 && s < columns_.taps; ++s)
        taps.add(starts_[found[r]] + columns_.slot[s] * length_ + columns_.offset[s] - columns_.lowest,
                 r * columns_.taps + s);
    for (int64_t c = 0; c < channels_; ++c) pool_run(taps, c * columns_.count * length_, out_width_, c * out_width_);
  }

  void pool_channels_last(const int64_t* found) {
    for (int64_t ow = 0; ow < out_width_; ++ow) {
      Taps<A, const A*> taps;
      for (int64_t r = 0; r < pool_.kernel[0]; ++r)
        for (int64_t s = 0; found[r] >= 0 && s < columns_.taps; ++s) {
          int64_t iw = ow * columns_.stride + columns_.shift(s);
          if (iw >= 0 && iw < width_) taps.add(starts_[found[r]] + iw * channels_, r * columns_.taps + s);
        }
      pool_run(taps, 0, channels_, ow * channels_);
    }
  }

  Pooling pool_;
  Columns columns_;
  bool channels_last_;
  int64_t height_, width_, out_width_, channels_, length_, row_size_;
  RowCache cache_;
  const A* starts_[kMaxTaps];  // the row in each slot
  Buffer<A> rows_, flat_, y_;
  Buffer<Int<A>> taps_;
  Buffer<uint8_t> winners_;
};

// The gradient, one input row after the other, gathered from the windows that reach the row.
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
        // A vector of slack after each row, as rows are written in whole vectors.
        row_size_((channels_last_ ? out.width * channels : channels * length_) + kLanes<A>),
        cache_(pool.kernel[0]),
        gradients_(pool.kernel[0] * row_size_),
        taps_(pool.kernel[0] * row_size_),
        flat_(channels_last_ ? 0 : out.width * channels),
        winners_(out.width * channels),
        sums_(channels_last_ ? 0 : columns_.count * channels * phase_length_),
        dx_(in.width * channels),
        windows_(channels_last_ ? in.width * columns_.taps : 0) {
    for (int64_t iw = 0; channels_last_ && iw < width_; ++iw)
      for (int64_t s = 0; s < columns_.taps; ++s) {
        int64_t from = iw - columns_.shift(s), ow = floor_div(from, columns_.stride);
        bool reaches = ow >= 0 && ow < out_width_ && ow * columns_.stride == from;
        windows_[iw * columns_.taps + s] = reaches ? ow : -1;
      }
  }

  // For each input row in [begin, end), make(row, dy, winners) fills the output rows that reach it, and emit(row,
  // scratch, gather) calls gather(to), which writes the gradient. `to` is scratch or, channels-last, any place where
  // whole vectors can be written.
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
        A* gradients = gradients_ + slot * row_size_;
        make(row, channels_last_ ? gradients : flat_, static_cast<uint8_t*>(winners_));
        lay_out(gradients, taps_ + slot * row_size_);
      });
      emit(ih, static_cast<A*>(dx_),
           [&](A* dx) { channels_last_ ? gather_channels_last(found, dx) : gather_contiguous(found, dx); });
    }
  }

 private:
  static int64_t longest(int64_t a, int64_t b) { return a > b ? a : b; }

  // Widens winners to the size of A. NCHW rows are put between zeros, in place of the windows outside.
  void lay_out(A* gradients, Int<A>* taps) {
    if (channels_last_) return widened(winners_, taps, out_width_ * channels_);
    for (int64_t c = 0; c < channels_; ++c) {
      std::memcpy(gradients + c * length_ + before_, flat_ + c * out_width_, out_width_ * sizeof(A));
      widened(winners_ + c * out_width_, taps + c * length_ + before_, out_width_);
    }
  }

  static void widened(const uint8_t* __restrict winners, Int<A>* __restrict taps, int64_t n) {
    for (int64_t i = 0; i < n; ++i) taps[i] = winners[i];
  }

  // Sums, for `length` results, the gradients of the windows that they won, in whole vectors. Every tap is moved by
  // `shift`.
  void sum_run(const Taps<A, int64_t>& taps, int64_t shift, int64_t length, A* to) {
    with_count(taps.count, [&](auto count) {
      for (int64_t i = 0; i < length; i += kLanes<A>) {
        Vec<A> sum{};
        for (int64_t t = 0; t < count; ++t) {
          const int64_t at = taps.place[t] + shift + i;
          sum += load(taps_ + at) == broadcast(taps.number[t]) ? load(gradients_ + at) : Vec<A>{};
        }
        store(to + i, sum);
      }
    });
  }

  // Adds windows in ascending order, as PyTorch does, so that fp32 sums are equal to the bit.
  void gather_contiguous(const int64_t* found, A* dx) {
    if (columns_.count < columns_.stride) std::memset(dx, 0, width_ * channels_ * sizeof(A));
    for (int64_t q = 0; q < columns_.count; ++q) {
      Taps<A, int64_t> taps;
      for (int64_t r = pool_.kernel[0] - 1; r >= 0; --r)
        for (int64_t s = columns_.taps - 1; found[r] >= 0 && s >= 0; --s)
          if (columns_.slot[s] == q)
            taps.add(found[r] * row_size_ + before_ - columns_.offset[s], r * columns_.taps + s);
      for (int64_t c = 0; c < channels_; ++c)
        sum_run(taps, c * length_, phase_length_, sums_ + (q * channels_ + c) * phase_length_);
    }
    for (int64_t c = 0; c < channels_; ++c) interleave(dx + c * width_, sums_ + c * phase_length_);
  }

  // Merges the sums of the phases into one row. Even and odd columns are stored together, in whole vectors.
  void interleave(A* __restrict dx, const A* __restrict sums) {
    const int64_t stride = columns_.stride, apart = channels_ * phase_length_;
    if (stride == 2 && columns_.count == 2) {
      const A *even = sums + columns_.residue[0] * apart, *odd = sums + columns_.residue[1] * apart;
      for (int64_t j = 0; j < width_ / 2; ++j) dx[j * 2] = even[j], dx[j * 2 + 1] = odd[j];
      if (width_ % 2) dx[width_ - 1] = even[width_ / 2];
      return;
    }
    for (int64_t q = 0; q < columns_.count; ++q)
      for (int64_t j = 0; j * stride + columns_.residue[q] < width_; ++j)
        dx[j * stride + columns_.residue[q]] = sums[q * apart + j];
  }

  void gather_channels_last(const int64_t* found, A* dx) {
    for (int64_t iw = 0; iw < width_; ++iw) {
      Taps<A, int64_t> taps;
      for (int64_t r = pool_.kernel[0] - 1; r >= 0; --r)
        for (int64_t s = columns_.taps - 1; found[r] >= 0 && s >= 0; --s) {
          int64_t ow = windows_[iw * columns_.taps + s];
          if (ow >= 0) taps.add(found[r] * row_size_ + ow * channels_, r * columns_.taps + s);
        }
      sum_run(taps, 0, channels_, dx + iw * channels_);
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
  Buffer<uint8_t> winners_;
  Buffer<A> sums_, dx_;
  Buffer<int64_t> windows_;  // [column][tap]: the window that has this column at this tap, or -1; saves divisions
};

}  // namespace alexnet_ext::ALEXNET_ISA
