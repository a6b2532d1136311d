// The trial's normals as a GPU's thread makes them, for the instruction counts of stream_2.py.
#pragma once

#include "cuda/directions.cuh"
#include "stream_2.h"

namespace adamezo {
namespace cuda {

// What an update of 16-bit weights needs of a distribution (directions.cuh): a thread has eight
// elements of the first half of a window and the same eight of the second.
template <class V>
struct TrialNormals {
  static constexpr bool kSigns = false;
  static constexpr int kLogElements = V::kQuads == 1 ? 2 : 3;
  static constexpr int kCalls = kThreadElements >> kLogElements;
  static_assert(kWindow == trial::kWindowOfCalls, "a call's fours are half a window apart");

  template <class T>
  struct Place {
    PhiloxGroup<ScalarLanes> group[kCalls];
  };

  // The offset of a call's block from the thread's first one.
  static constexpr ADAMEZO_HD int block(int call) { return call / 2 * (2 * kWarp) + call % 2; }

  template <class T>
  static ADAMEZO_HD Place<T> place(const PhiloxRoundKeys& key, uint64_t window, int lane,
                                   uint32_t parameter) {
    static_assert(kChunks<T> == 2, "counted for 16-bit weights");
    const uint32_t first = uint32_t(window >> kLogElements) + uint32_t(2 * lane);
    Place<T> place;
    ADAMEZO_UNROLL
    for (int i = 0; i < kCalls; ++i) {
      place.group[i] = philox_group<ScalarLanes>(key, first + uint32_t(block(i)), parameter);
      place.group[i].y2 = place.group[0].y2 + kPhiloxM0 * uint32_t(block(i));
    }
    return place;
  }

  template <class T>
  static ADAMEZO_HD void z(const PhiloxRoundKeys& key, const Place<T>& place,
                           const Direction& direction, float z[kThreadElements]) {
    ADAMEZO_UNROLL
    for (int i = 0; i < kCalls; ++i) {
      auto call = philox_begin<ScalarLanes>(place.group[i], direction.stream);
      trial::finish<ScalarLanes, V>(call, key);
      uint32_t x[4];
      call_words<ScalarLanes>(call, x);
      if constexpr (V::kQuads == 1) {
        normals<ThreadLanes>(x, z + 4 * i, [](int) {});
      } else {
        ADAMEZO_UNROLL
        for (int quad = 0; quad < 2; ++quad)
          trial::normals_of_words<ThreadLanes, V>(
              x + 2 * quad, z + kThreadElements / 2 * quad + 4 * i, [](int) {});
      }
    }
  }
};

}  // namespace cuda
}  // namespace adamezo
