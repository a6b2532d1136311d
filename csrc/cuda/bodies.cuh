// The bodies of the CUDA kernels: the work of one thread, as functions of (worker, workers) that
// the host can run too, one worker after the other. A worker is a thread of the whole launch; 32 in
// a row are a warp and take their windows together. They share nothing but calls for signs
// (directions.cuh).
//
// Every weight is read once and written once, and all arithmetic is that of csrc/adamezo, in the
// order of csrc/cpu/loops.h.
#pragma once

#include "adamezo/job.h"
#include "adamezo/rule.h"
#include "cuda/directions.cuh"
#include "cuda/stores.cuh"

namespace adamezo {
namespace cuda {

// A launch's job: the elements whose index has the high bits `high`, nearly always all of them.
// Where its words are may be an address of the host: bodies are told where to find them.
struct DeviceJob : Job {
  DeviceJob(const Job& job, uint32_t high) : Job(job), round_keys(job.key), high(high) {}
  PhiloxRoundKeys round_keys;
  uint32_t high;
};

// The table that the threads of a block share, and per-thread scratch with elements `stride` apart,
// to relieve register pressure in the loop over directions.
struct Workspace {
  Words words;                 // step, numbers, and of the directions the first
  const Direction* table;      // [horizon]
  float* newest;               // kThreadElements of them: z_0
  volatile uint32_t* scratch;  // kScratchWords; volatile, so that no register holds them
  int stride;
  Words16* calls;  // [kWarp], which the threads of a warp share; for sums of signs alone
};
constexpr int kScratchWords = 2;

// Fills one thread's part of a block's table.
template <class D>
ADAMEZO_HD void fill_table(const DeviceJob& job, const Words& words, Direction* table, int thread,
                           int threads) {
  const uint32_t block_hi = job.high >> (D::kLogElements - (kLogElementsPerHigh - 32));
  for (int64_t k = thread; k < job.horizon; k += threads)
    table[k] = {philox_stream(job.round_keys, words.directions[k], block_hi), kFastOnes,
                words.first[k], job.second ? words.second[k] : 0.0f};
}

// `named` selects the instruction by its name: the compiler does not see that the address of a
// thread's first chunk is aligned, and would store it in four pieces.
template <class T>
ADAMEZO_HD void store_words(const Words16& from, T* to, [[maybe_unused]] bool named) {
#if defined(__CUDA_ARCH__)
  if (named) {
    const uint32_t* w = from.words;
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(__cvta_generic_to_global(to)), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Words16*>(to) = from;
}

// Reads those elements of a chunk for which inside(i) holds: all in one access if it is `whole`.
template <class T, class Inside>
ADAMEZO_HD void load_chunk(const T* chunk, bool whole, Inside inside, T elements[kChunk<T>]) {
  if (whole) {
    const Words16 words = *reinterpret_cast<const Words16*>(chunk);
    std::memcpy(elements, &words, sizeof words);
  } else {
    ADAMEZO_UNROLL
    for (int i = 0; i < kChunk<T>; ++i)
      if (inside(i)) elements[i] = chunk[i];
  }
}

template <class T, class Inside>
ADAMEZO_HD void store_chunk(const T elements[kChunk<T>], T* chunk, bool whole, bool named,
                            Inside inside) {
  if (whole) {
    Words16 words;
    std::memcpy(&words, elements, sizeof words);
    store_words(words, chunk, named);
  } else {
    ADAMEZO_UNROLL
    for (int i = 0; i < kChunk<T>; ++i)
      if (inside(i)) chunk[i] = elements[i];
  }
}

// A thread's sixteen elements of a window, of which a run holds all or some. A member that a body
// does not use costs nothing.
template <class T>
struct Elements {
  T* window;           // where the window's first element is, or would be
  const T* source;     // the same where elements are read, which may be elsewhere
  uint64_t index;      // its index in the parameter
  uint32_t parameter;  // the index of the parameter
  int low, high;       // the run's elements in the window
  int lane;

  ADAMEZO_HD bool inside(int c, int i) const {
    const int at = chunk_in_window<T>(lane, c) + i;
    return at >= low && at < high;
  }
  // Whether a chunk of a window that begins at `from` can be one access.
  ADAMEZO_HD bool whole(const T* from, int c) const {
    return inside(c, 0) && inside(c, kChunk<T> - 1) &&
           reinterpret_cast<uint64_t>(from) % sizeof(Words16) == 0;
  }

  // From `window` or `source`; the elements outside the run become 0.
  ADAMEZO_HD void load(const T* from, float values[kThreadElements]) const {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(from));
#endif
    ADAMEZO_UNROLL
    for (int c = 0; c < kChunks<T>; ++c) {
      T elements[kChunk<T>] = {};
      load_chunk(
          from + chunk_in_window<T>(lane, c), whole(from, c), [&](int i) { return inside(c, i); },
          elements);
      ADAMEZO_UNROLL
      for (int i = 0; i < kChunk<T>; ++i) values[c * kChunk<T> + i] = to_float32(elements[i]);
    }
  }

  // round(i, elements) computes the chunk of the thread's elements from the i-th on.
  template <class Round>
  ADAMEZO_HD void store(const Round& round) const {
    ADAMEZO_UNROLL
    for (int c = 0; c < kChunks<T>; ++c) {
      T elements[kChunk<T>];
      round(c * kChunk<T>, elements);
      store_chunk(elements, window + chunk_in_window<T>(lane, c), whole(window, c), c == 0,
                  [&](int i) { return inside(c, i); });
    }
  }
};

template <class T>
ADAMEZO_HD void store_nearest(const Elements<T>& to, const float values[kThreadElements]) {
  to.store([&](int first, T elements[kChunk<T>]) {
    ADAMEZO_UNROLL
    for (int i = 0; i < kChunk<T>; ++i) from_float32(values[first + i], elements[i]);
  });
}

// Four elements share a call, as those of normals do, whatever the distribution. `window` and
// `parameter` are the members of `to`, from scratch memory after the loop over directions.
template <class T>
ADAMEZO_HD void store_stochastic(const DeviceJob& job, const Words& words, const Elements<T>& to,
                                 uint64_t window, uint32_t parameter,
                                 const float values[kThreadElements]) {
  const auto place = Exact::place<T>(job.round_keys, window, to.lane,
                                     parameter | uint32_t(Purpose::kRounding) << 24);
  const PhiloxStream stream = philox_stream(job.round_keys, words.directions[0], job.high);
  to.store([&](int first, T elements[kChunk<T>]) {
    ADAMEZO_UNROLL
    for (int i = 0; i < kChunk<T>; i += 4) {
      uint32_t random[4];
      Exact::words<T>(job.round_keys, place, (first + i) / 4, stream, random);
      round_stochastically(values + first + i, random, elements + i);
    }
  });
}

// A window, of which a row of a segment holds [low, high). The distances are those of its first
// element from the segment's: of weights, where they are read, and among the segment's elements row
// by row, which buffers follow without gaps between rows.
struct Window {
  const Segment& segment;
  int64_t memory, source, position;
  uint64_t index;  // of its first element in the parameter
  int low, high, lane;
};

// How many windows a row of a segment may need. They are aligned in the parameter, not in memory:
// none straddles two high block words, and all elements of a Philox call are in one window.
ADAMEZO_HD int64_t windows_of_row(const Segment& segment, uint64_t offset) {
  if (segment.row_length == 0) return 0;
  const bool alike = segment.rows == 1 || segment.index_stride % kWindow == 0;
  const int64_t before =
      alike ? int64_t((uint64_t(segment.index_offset) + offset) % kWindow) : kWindow - 1;
  return (before + segment.row_length + kWindow - 1) / kWindow;
}

// The windows of a worker's share, of which job.elements and the segments' `first` are counts:
// calls visit(window) for each. Shares differ by one window at most. The windows are those of rows,
// so that a tensor of odd size moves none of the next one's.
//
// Few values live from one window to the next, and the others are computed again: each takes a
// register from the loop over directions.
template <class Visit>
ADAMEZO_HD void walk_windows(const DeviceJob& job, int64_t worker, int64_t workers, Visit visit) {
  const int64_t warp = worker / kWarp, warps = workers / kWarp;
  int64_t next = job.elements * warp / warps;
  int left = int(job.elements * (warp + 1) / warps - next);
  if (left == 0) return;
  int s = int(segment_at(job.segments, job.segment_count, next));
  for (; left > 0; --left, ++next) {
    while (s + 1 < job.segment_count && job.segments[s + 1].first <= next) ++s;
    const Segment segment = job.segments[s];  // what is used of it is read once for a window
    int64_t window = next - segment.first, memory = 0, source = 0, position = 0;
    uint64_t index = uint64_t(segment.index_offset) + job.offset;
    if (segment.rows > 1) {
      const int64_t of_row = windows_of_row(segment, job.offset), row = window / of_row;
      window -= row * of_row;
      memory = row * segment.row_stride, source = row * segment.source_stride;
      position = row * segment.row_length;
      index += uint64_t(row) * uint64_t(segment.index_stride);
    }
    const int before = int(index % kWindow);
    const int64_t start = window * kWindow - before, end = segment.row_length - start;
    const int low = window == 0 ? before : 0, high = end < kWindow ? int(end) : kWindow;
    index += uint64_t(start);
    if (high <= low || uint32_t(index >> kLogElementsPerHigh) != job.high) continue;
    visit(Window{segment, memory + start, source + start, position + start, index, low, high,
                 int(worker % kWarp)});
  }
}

// The same for one type of weights and one distribution: calls visit(elements, place).
template <class D, class T, class Visit>
ADAMEZO_HD void for_each_window(const DeviceJob& job, int64_t worker, int64_t workers,
                                Visit visit) {
  walk_windows(job, worker, workers, [&](const Window& of) {
    const uint32_t parameter = uint32_t(of.segment.parameter);
    T* const first = reinterpret_cast<T*>(of.segment.address) + of.memory;
    const T* const source = reinterpret_cast<const T*>(of.segment.source) + of.source;
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(first));  // unknown of an address read from a table
#endif
    visit(Elements<T>{first, source, of.index, parameter, of.low, of.high, of.lane},
          D::template place<T>(job.round_keys, of.index, of.lane,
                               parameter | uint32_t(Purpose::kDirection) << 24));
  });
}

// out = z
template <class D>
struct Sample {
  using Directions = D;

  template <class T>
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    for_each_window<D, T>(job, worker, workers,
                          [&](const Elements<T>& out, const typename D::template Place<T>& place) {
                            float z[kThreadElements];
                            D::template z<T>(job.round_keys, place, space.table[0], z);
                            store_nearest(out, z);
                          });
  }
};

// theta = theta + scale z, read where the source is
template <class D, Rounding kRounding>
struct Perturb {
  using Directions = D;

  template <class T>
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    for_each_window<D, T>(
        job, worker, workers,
        [&](const Elements<T>& theta, const typename D::template Place<T>& place) {
          float values[kThreadElements], z[kThreadElements];
          theta.load(theta.source, values);
          D::template z<T>(job.round_keys, place, space.table[0], z);
          ADAMEZO_UNROLL
          for (int i = 0; i < kThreadElements; ++i)
            values[i] = ScalarLanes::fma(job.scale, z[i], values[i]);
          if constexpr (kRounding == Rounding::kStochastic)
            store_stochastic(job, space.words, theta, theta.index, theta.parameter, values);
          else
            store_nearest(theta, values);
        });
  }
};

using ThreadMoments = Moments<ScalarLanes>[kThreadElements / 4];

// Adds up all directions at one place, the newest first. The newest is stored in space.newest, in
// shared memory, as an update needs it again after a loop that takes all registers; or of signs in
// `newest`, those of a chunk in the low bits of a word.
template <class D, class T, bool kSecond>
ADAMEZO_HD void sum_directions(const DeviceJob& job, const Workspace& space,
                               const typename D::template Place<T>& place, ThreadMoments& moments,
                               [[maybe_unused]] uint32_t newest[kChunks<T>]) {
  ADAMEZO_UNROLL
  for (auto& four : moments) four = zero_moments<ScalarLanes>();

  if constexpr (D::kSigns) {
    float squares = 0.0f;  // S2, one number for all elements since z^2 is 1
    ADAMEZO_NO_UNROLL
    for (int from = 0; from < int(job.horizon); from += D::kTogether) {
      const Direction* next = space.table + from;
      const int left = int(job.horizon) - from, count = left < D::kTogether ? left : D::kTogether;
      D::template make_calls<T>(job.round_keys, place, next, count, space.calls);
      if (from == 0) D::template signs_of<T>(place, space.calls, newest);
      const Words16* calls = space.calls;
      ADAMEZO_NO_UNROLL
      for (int k = count; k > 0; --k, ++next, calls += D::kCalls) {
        uint32_t signs[kChunks<T>];
        D::template signs_of<T>(place, calls, signs);
        ADAMEZO_UNROLL
        for (int i = 0; i < kThreadElements; ++i) {
          // fma(first, z, S1), as the product is exact
          float& s1 = moments[i / 4].s1[i % 4];
          s1 = ScalarLanes::add(s1, with_sign(next->first, signs[i / kChunk<T>], i % kChunk<T>));
        }
        squares = ScalarLanes::add(squares, next->second);
      }
    }
    if constexpr (kSecond) {
      ADAMEZO_UNROLL
      for (int i = 0; i < kThreadElements; ++i) moments[i / 4].s2[i % 4] = squares;
    }
  } else {
    const Direction* next = space.table;
    ADAMEZO_NO_UNROLL
    for (int left = int(job.horizon); left > 0; --left) {
      const Direction& direction = *next++;
      float z[kThreadElements];
      D::template z<T>(job.round_keys, place, direction, z);
      if (left == int(job.horizon)) {
        ADAMEZO_UNROLL
        for (int i = 0; i < kThreadElements; ++i) space.newest[i * space.stride] = z[i];
      }
      ADAMEZO_UNROLL
      for (int i = 0; i < kThreadElements / 4; ++i)
        accumulate<ScalarLanes, kSecond>(moments[i], z + 4 * i, direction.first, direction.second);
    }
  }
}

// A weight after a step, with its value of the newest direction, along which it is restored.
ADAMEZO_HD float updated(const DeviceJob& job, const Words& words, float theta, float newest,
                         float step) {
  if (job.scale != 0.0f) theta = ScalarLanes::fma(job.scale, newest, theta);
  return descend<ScalarLanes>(theta, step, words.step[0], words.step[1]);
}

// Restore, moments and update in one pass.
template <class D, bool kSecond, Rounding kRounding>
struct Update {
  using Directions = D;

  template <class T>
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    const Words& words = space.words;
    for_each_window<D, T>(
        job, worker, workers,
        [&](const Elements<T>& theta, const typename D::template Place<T>& place) {
          if constexpr (kRounding == Rounding::kStochastic) {
            space.scratch[0] = uint32_t(theta.index / kWindow);
            space.scratch[space.stride] = theta.parameter;
          }
          ThreadMoments moments;
          uint32_t signs[kChunks<T>];
          sum_directions<D, T, kSecond>(job, space, place, moments, signs);
          float step[kThreadElements];
          make_steps<kThreadElements, kSecond>(moments, job.eps, step);
          float values[kThreadElements];
          theta.load(theta.window, values);
          ADAMEZO_UNROLL
          for (int i = 0; i < kThreadElements; ++i) {
            if constexpr (!D::kSigns) {
              values[i] = updated(job, words, values[i], space.newest[i * space.stride], step[i]);
            } else {
              if (job.scale != 0.0f)
                values[i] = ScalarLanes::add(
                    values[i], with_sign(job.scale, signs[i / kChunk<T>], i % kChunk<T>));
              values[i] = descend<ScalarLanes>(values[i], step[i], words.step[0], words.step[1]);
            }
          }
          if constexpr (kRounding == Rounding::kStochastic)
            store_stochastic(job, words, theta, uint64_t(space.scratch[0]) * kWindow,
                             space.scratch[space.stride], values);
          else
            store_nearest(theta, values);
        });
  }
};

// out = S2 where the job has second coefficients, otherwise S1: the sums inside an update.
template <class D, bool kSecond>
struct Moment {
  using Directions = D;

  template <class T>
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    for_each_window<D, T>(job, worker, workers,
                          [&](const Elements<T>& out, const typename D::template Place<T>& place) {
                            ThreadMoments moments;
                            uint32_t signs[kChunks<T>];
                            sum_directions<D, T, kSecond>(job, space, place, moments, signs);
                            float values[kThreadElements];
                            ADAMEZO_UNROLL
                            for (int i = 0; i < kThreadElements; ++i)
                              values[i] =
                                  kSecond ? moments[i / 4].s2[i % 4] : moments[i / 4].s1[i % 4];
                            store_nearest(out, values);
                          });
  }
};

// A body for one type of weights.
template <class Of, class T>
struct Instance {
  using Body = Of;
  using Element = T;
  using Directions = typename Body::Directions;

  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    Body::template run<T>(job, space, worker, workers);
  }
};

template <class Body, class Use>
void by_type(ElementType type, Use use) {
  switch (type) {
    case ElementType::kFloat32:
      return use(Instance<Body, float>());
    case ElementType::kBFloat16:
      return use(Instance<Body, bfloat16>());
    case ElementType::kFloat16:
      return use(Instance<Body, float16>());
  }
}

// float32 is never rounded.
template <class Nearest, class Stochastic, class Use>
void by_rounding(const Job& job, Use use) {
  if (job.rounding == Rounding::kNearest || job.type == ElementType::kFloat32)
    return by_type<Nearest>(job.type, use);
  if (job.type == ElementType::kBFloat16) return use(Instance<Stochastic, bfloat16>());
  return use(Instance<Stochastic, float16>());
}

// Calls use(instance) with the body that runs the job.
template <class D, class Use>
void select(const Job& job, Use use) {
  constexpr auto kNearest = Rounding::kNearest, kStochastic = Rounding::kStochastic;
  switch (job.operation) {
    case Operation::kSample:
      return by_type<Sample<D>>(job.type, use);
    case Operation::kPerturb:
      return by_rounding<Perturb<D, kNearest>, Perturb<D, kStochastic>>(job, use);
    case Operation::kUpdate:
      return job.second
                 ? by_rounding<Update<D, true, kNearest>, Update<D, true, kStochastic>>(job, use)
                 : by_rounding<Update<D, false, kNearest>, Update<D, false, kStochastic>>(job, use);
    case Operation::kMoment:  // always float32
      return job.second ? use(Instance<Moment<D, true>, float>())
                        : use(Instance<Moment<D, false>, float>());
  }
}

}  // namespace cuda
}  // namespace adamezo
