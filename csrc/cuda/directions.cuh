// A thread's share of a direction: its sixteen elements of a window, for each distribution.
//
// A distribution D has
//   kSigns         whether all values are +1 or -1
//   kLogElements   2^kLogElements elements share a Philox call
//   Place<T>       the values that all directions share at one thread's place in a window
//   z(...)         the sixteen elements of one direction, in the order of the thread's elements
//   quad(...)      four elements of one direction from element `index` on, which is a multiple of
//   four
#pragma once

#include "adamezo/fast_normal.h"
#include "adamezo/lanes_scalar.h"
#include "adamezo/normal.h"
#include "adamezo/philox.h"
#include "adamezo/rademacher.h"
#include "cuda/quotients.cuh"

namespace adamezo {
namespace cuda {

// A warp takes windows of 512 elements that are consecutive in the parameter. Each of its 32 lanes
// takes chunks of 16 bytes, one lane's next to the other's, so that a warp's access is one stretch
// of 512 bytes; and as many chunks, 512 bytes apart, as make up sixteen elements.
constexpr int kWarp = 32;
constexpr int kThreadElements = 16;
constexpr int kWindow = kWarp * kThreadElements;

template <class T>
constexpr int kChunk = 16 / int(sizeof(T));  // elements
template <class T>
constexpr int kChunks = kThreadElements / kChunk<T>;

// The bits of an element's index above these are constant in a launch: four elements share a call
// in the distribution with the most calls.
constexpr int kLogElementsPerHigh = 34;

// Where a lane's chunk begins in a window.
template <class T>
ADAMEZO_HD int chunk_in_window(int lane, int chunk) {
  return (chunk * kWarp + lane) * kChunk<T>;
}

// Sixteen bytes of memory as one access.
struct alignas(16) Words16 {
  uint32_t words[4];
};

// An entry of the table of directions that the threads of a block share.
struct alignas(16) Direction {
  PhiloxStream stream;
  uint32_t fast_ones;  // kFastOnes, in memory to hide its value from the compiler
  float first, second;
};

template <void (*kNormals)(const uint32_t x[4], uint32_t ones, float z[4])>
struct Normals {
  static constexpr bool kSigns = false;
  static constexpr int kLogElements = 2;
  static constexpr int kCalls = kThreadElements >> kLogElements;

  template <class T>
  struct Place {
    PhiloxGroup<ScalarLanes> group[kCalls];
  };

  // The offset of a call's block from the thread's first one.
  template <class T>
  static constexpr ADAMEZO_HD int block(int call) {
    constexpr int kCallsPerChunk = kChunk<T> >> kLogElements;
    return call / kCallsPerChunk * kWarp * kCallsPerChunk + call % kCallsPerChunk;
  }

  // `window` is the index of the window's first element in the parameter, a multiple of kWindow.
  template <class T>
  static ADAMEZO_HD Place<T> place(const PhiloxRoundKeys& key, uint64_t window, int lane,
                                   uint32_t parameter) {
    const uint32_t first = uint32_t((window + chunk_in_window<T>(lane, 0)) >> kLogElements);
    Place<T> place;
    ADAMEZO_UNROLL
    for (int i = 0; i < kCalls; ++i) {
      place.group[i] = philox_group<ScalarLanes>(key, first + block<T>(i), parameter);
      // The same value, as an addition to a register that exists anyway.
      place.group[i].y2 = place.group[0].y2 + kPhiloxM0 * uint32_t(block<T>(i));
    }
    return place;
  }

  // The words of one call, for the thread's elements 4 i to 4 i + 3.
  template <class T>
  static ADAMEZO_HD void words(const PhiloxRoundKeys& key, const Place<T>& place, int i,
                               const PhiloxStream& stream, uint32_t x[4]) {
    auto call = philox_begin<ScalarLanes>(place.group[i], stream);
    philox_finish<ScalarLanes>(call, key);
    call_words<ScalarLanes>(call, x);
  }

  template <class T>
  static ADAMEZO_HD void z(const PhiloxRoundKeys& key, const Place<T>& place,
                           const Direction& direction, float z[kThreadElements]) {
    ADAMEZO_UNROLL
    for (int i = 0; i < kCalls; ++i) {
      uint32_t x[4];
      words<T>(key, place, i, direction.stream, x);
      kNormals(x, direction.fast_ones, z + 4 * i);
    }
  }

  // The words of the call for elements `index` to index + 3.
  static ADAMEZO_HD void quad_words(const PhiloxRoundKeys& key, uint64_t index, uint32_t parameter,
                                    const PhiloxStream& stream, uint32_t x[4]) {
    const auto group = philox_group<ScalarLanes>(key, uint32_t(index >> kLogElements), parameter);
    auto call = philox_begin<ScalarLanes>(group, stream);
    philox_finish<ScalarLanes>(call, key);
    call_words<ScalarLanes>(call, x);
  }

  static ADAMEZO_HD void quad(const PhiloxRoundKeys& key, uint64_t index, uint32_t parameter,
                              const Direction& direction, float z[4]) {
    uint32_t x[4];
    quad_words(key, index, parameter, direction.stream, x);
    kNormals(x, direction.fast_ones, z);
  }
};

// The root of exact normals: that of -ln u, which is 0 or lies in [2^-25, 22]. The rounding is that
// of __fsqrt_rn; its test for other arguments is left out, with the branch that would keep a
// thread's normals from overlapping. At 0 the reciprocal is held finite instead: 0 times infinity
// is a NaN.
struct ThreadLanes : ScalarLanes {
#if defined(__CUDA_ARCH__)
  static ADAMEZO_HD float sqrt(float a) {
    return usual_sqrt(a, fminf(approximate_rsqrt(a), 0x1p126f));
  }
#endif
};

ADAMEZO_HD void exact_normals(const uint32_t x[4], uint32_t, float z[4]) {
  normals<ThreadLanes>(x, z, [](int) {});
}

using Exact = Normals<exact_normals>;
using Fast = Normals<fast_normals>;

struct Rademacher {
  static constexpr bool kSigns = true;
  static constexpr int kLogElements = 7;
  static_assert(1 << kLogElements == kSignsPerCall, "");

  // A chunk lies within one word, as its elements are aligned to their number.
  template <class T>
  struct Place {
    PhiloxGroup<ScalarLanes> group[kChunks<T>];
    int first;  // the place of the first chunk's first element among the 128 of its call
    uint32_t block, parameter;  // of the window's first call
    int lane;
  };

  template <class T>
  static ADAMEZO_HD Place<T> place(const PhiloxRoundKeys& key, uint64_t window, int lane,
                                   uint32_t parameter) {
    Place<T> place;
    ADAMEZO_UNROLL
    for (int c = 0; c < kChunks<T>; ++c)
      place.group[c] = philox_group<ScalarLanes>(
          key, uint32_t((window + chunk_in_window<T>(lane, c)) >> kLogElements), parameter);
    // It is the same for every chunk, as chunks are a multiple of 128 elements apart.
    static_assert(kWarp * kChunk<T> % kSignsPerCall == 0, "");
    place.first = chunk_in_window<T>(lane, 0) % kSignsPerCall;
    place.block = uint32_t(window >> kLogElements);
    place.parameter = parameter;
    place.lane = lane;
    return place;
  }

  template <class T>
  static ADAMEZO_HD void z(const PhiloxRoundKeys& key, const Place<T>& place,
                           const Direction& direction, float z[kThreadElements]) {
    ADAMEZO_UNROLL
    for (int c = 0; c < kChunks<T>; ++c) {
      auto call = philox_begin<ScalarLanes>(place.group[c], direction.stream);
      philox_finish<ScalarLanes>(call, key);
      const uint32_t signs = signs_from(call, place.first);
      ADAMEZO_UNROLL
      for (int i = 0; i < kChunk<T>; ++i) z[c * kChunk<T> + i] = with_sign(1.0f, signs, i);
    }
  }

  // Along many directions each thread would make a call for each of its chunks, sixteen or more
  // threads the same one. The lanes of a warp make those of a window together instead, once each,
  // along as many directions at a time as there are lanes for.
  static constexpr int kCalls = kWindow / kSignsPerCall, kTogether = kWarp / kCalls;

  // Fills the warp's `calls`, one for each lane, along directions[0] to directions[count - 1],
  // which are no more than kTogether. On the host a thread does so for all lanes.
  template <class T>
  static ADAMEZO_HD void make_calls(const PhiloxRoundKeys& key, const Place<T>& place,
                                    const Direction* directions, int count, Words16* calls) {
#if defined(__CUDA_ARCH__)
    __syncwarp();  // until no lane reads the calls before
    make_call(key, place.block, place.parameter, place.lane, directions, count, calls);
    __syncwarp();
#else
    for (int lane = 0; lane < kWarp; ++lane)
      make_call(key, place.block, place.parameter, lane, directions, count, calls);
#endif
  }

  // The thread's signs along the direction whose calls are there, those of a chunk in the low bits.
  template <class T>
  static ADAMEZO_HD void signs_of(const Place<T>& place, const Words16* calls,
                                  uint32_t signs[kChunks<T>]) {
    const uint32_t* const words = calls->words;  // of 32 elements each
    const int first = chunk_in_window<T>(place.lane, 0);
    static_assert(kWarp * kChunk<T> % 32 == 0, "");  // from one chunk to the next
    ADAMEZO_UNROLL
    for (int c = 0; c < kChunks<T>; ++c)
      signs[c] = words[c * kChunk<T> + first / 32] >> (first % 32);
  }

  static ADAMEZO_HD void quad(const PhiloxRoundKeys& key, uint64_t index, uint32_t parameter,
                              const Direction& direction, float z[4]) {
    const auto group = philox_group<ScalarLanes>(key, uint32_t(index >> kLogElements), parameter);
    auto call = philox_begin<ScalarLanes>(group, direction.stream);
    philox_finish<ScalarLanes>(call, key);
    const uint32_t signs = signs_from(call, int(index % kSignsPerCall));
    ADAMEZO_UNROLL
    for (int i = 0; i < 4; ++i) z[i] = with_sign(1.0f, signs, i);
  }

 private:
  static ADAMEZO_HD void make_call(const PhiloxRoundKeys& key, uint32_t block, uint32_t parameter,
                                   int lane, const Direction* directions, int count,
                                   Words16* calls) {
    const int k = lane / kCalls;
    const auto group = philox_group<ScalarLanes>(key, block + uint32_t(lane % kCalls), parameter);
    auto call = philox_begin<ScalarLanes>(group, directions[k < count ? k : 0].stream);
    philox_finish<ScalarLanes>(call, key);
    calls[lane] = {{call.c0, call.c1, call.c2, call.c3}};
  }

  // The signs of a word from element `first` of its call on.
  static ADAMEZO_HD uint32_t signs_from(const PhiloxCall<ScalarLanes>& call, int first) {
    const int word = first / 32;
    const uint32_t low = word & 1 ? call.c1 : call.c0, high = word & 1 ? call.c3 : call.c2;
    return (word & 2 ? high : low) >> (first % 32);
  }
};

}  // namespace cuda
}  // namespace adamezo
