// The bodies of the CUDA kernels: what one thread does, as functions of (worker, workers) that the
// host can run too, one worker after the other. A worker is a thread of the whole launch; 32 of
// them in a row are a warp and take their windows together, without ever talking to each other.
//
// Every weight is read once and written once, and all arithmetic is that of csrc/adamezo, in the
// order in which csrc/cpu/loops.h does it.
#pragma once

#include "adamezo/job.h"
#include "adamezo/rule.h"
#include "cuda/directions.cuh"

namespace adamezo {
namespace cuda {

// A launch's job: the elements whose high block word is `high`, which are nearly always all.
struct DeviceJob : Job {
  DeviceJob(const Job& job, uint32_t high) : Job(job), round_keys(job.key), high(high) {}
  PhiloxRoundKeys round_keys;
  uint32_t high;
};

// What the threads of a block share, and room of a thread's own.
struct Workspace {
  const Direction* table;  // [horizon]
  float* newest;           // kThreadElements floats, `stride` apart: z_0
  int stride;
};

// The part of filling a block's table that falls to one of its threads.
ADAMEZO_HD void fill_table(const DeviceJob& job, Direction* table, int thread, int threads) {
  for (int64_t k = thread; k < job.horizon; k += threads)
    table[k] = {philox_stream(job.round_keys, job.directions[k], job.high), kFastOnes, job.first[k],
                job.second ? job.second[k] : 0.0f};
}

// Sixteen bytes of memory as one access.
struct alignas(16) Words16 {
  uint32_t words[4];
};

// A thread's sixteen elements of a window, of which a run holds all or some.
template <class T>
struct Elements {
  T* window;      // where the window's first element is, or would be
  int low, high;  // the run's elements in the window
  int lane;

  ADAMEZO_HD T* chunk(int c) const { return window + chunk_in_window<T>(lane, c); }
  ADAMEZO_HD bool inside(int c, int i) const {
    const int at = chunk_in_window<T>(lane, c) + i;
    return at >= low && at < high;
  }
  ADAMEZO_HD bool whole(int c) const {
    return inside(c, 0) && inside(c, kChunk<T> - 1) &&
           reinterpret_cast<uint64_t>(window) % sizeof(Words16) == 0;
  }

  // The elements outside the run become 0.
  ADAMEZO_HD void load(float values[kThreadElements]) const {
    ADAMEZO_UNROLL
    for (int c = 0; c < kChunks<T>; ++c) {
      T elements[kChunk<T>] = {};
      if (whole(c)) {
        const Words16 words = *reinterpret_cast<const Words16*>(chunk(c));
        std::memcpy(elements, &words, sizeof words);
      } else {
        ADAMEZO_UNROLL
        for (int i = 0; i < kChunk<T>; ++i)
          if (inside(c, i)) elements[i] = chunk(c)[i];
      }
      ADAMEZO_UNROLL
      for (int i = 0; i < kChunk<T>; ++i) values[c * kChunk<T> + i] = to_float32(elements[i]);
    }
  }

  ADAMEZO_HD void store(const float values[kThreadElements]) const {
    ADAMEZO_UNROLL
    for (int c = 0; c < kChunks<T>; ++c) {
      T elements[kChunk<T>];
      ADAMEZO_UNROLL
      for (int i = 0; i < kChunk<T>; ++i) from_float32(values[c * kChunk<T> + i], elements[i]);
      if (whole(c)) {
        Words16 words;
        std::memcpy(&words, elements, sizeof words);
        *reinterpret_cast<Words16*>(chunk(c)) = words;
      } else {
        ADAMEZO_UNROLL
        for (int i = 0; i < kChunk<T>; ++i)
          if (inside(c, i)) chunk(c)[i] = elements[i];
      }
    }
  }
};

// The windows of a worker's share: calls visit(elements, place) for each. Shares are whole windows
// of the concatenated segments, so that a large tensor is cut where its windows begin. Windows are
// aligned in the parameter, not in memory: none straddles two high block words, and all elements of
// a Philox call are in one window. A share is below 2^31 elements.
//
// Little is kept from one window to the next, and the rest worked out again: what is kept takes
// registers from the loop over directions.
template <class D, class T, class Visit>
ADAMEZO_HD void for_each_window(const DeviceJob& job, int64_t worker, int64_t workers,
                                Visit visit) {
  const int64_t windows = (job.elements + kWindow - 1) / kWindow, warps = workers / kWarp;
  const int64_t share = (windows + warps - 1) / warps * kWindow;
  int64_t position = worker / kWarp * share;
  if (position >= job.elements) return;
  int left = int(job.elements - position < share ? job.elements - position : share);
  int s = int(segment_at(job.segments, job.segment_count, position));
  while (left > 0) {
    const Segment& segment = job.segments[s];
    const int64_t start = position - segment.first, size = segment.rows * segment.row_length;
    if (start >= size) {
      ++s;
      continue;
    }
    const Run run = run_at(job.segments, s, start, start + left < size ? start + left : size);
    const uint64_t index = run.index + job.offset;
    const int low = int(index % kWindow);
    const int high = run.count < kWindow - low ? low + int(run.count) : kWindow;
    const uint32_t parameter = uint32_t(segment.parameter) | uint32_t(Purpose::kDirection) << 24;
    const int lane = int(worker % kWarp);
    position += high - low;
    left -= high - low;
    if (uint32_t(index >> (32 + D::kLogElements)) != job.high) continue;
    T* const first = reinterpret_cast<T*>(segment.address) + run.memory - low;
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(first));  // an address out of a table could be anywhere
#endif
    visit(Elements<T>{first, low, high, lane},
          D::template place<T>(job.round_keys, index - low, lane, parameter));
  }
}

// out = z
template <class D>
struct Sample {
  template <class T>
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    for_each_window<D, T>(job, worker, workers,
                          [&](const Elements<T>& out, const typename D::template Place<T>& place) {
                            float z[kThreadElements];
                            D::template z<T>(job.round_keys, place, space.table[0], z);
                            out.store(z);
                          });
  }
};

// theta = theta + scale z
template <class D>
struct Perturb {
  template <class T>
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    for_each_window<D, T>(
        job, worker, workers,
        [&](const Elements<T>& theta, const typename D::template Place<T>& place) {
          float values[kThreadElements], z[kThreadElements];
          theta.load(values);
          D::template z<T>(job.round_keys, place, space.table[0], z);
          ADAMEZO_UNROLL
          for (int i = 0; i < kThreadElements; ++i)
            values[i] = ScalarLanes::fma(job.scale, z[i], values[i]);
          theta.store(values);
        });
  }
};

using ThreadMoments = Moments<ScalarLanes>[kThreadElements / 4];

// Adds up all directions at one place, the newest first. That one is left in space.newest, in
// shared memory, as an update wants it again after a loop that needs all registers.
template <class D, class T, bool kSecond>
ADAMEZO_HD void sum_directions(const DeviceJob& job, const Workspace& space,
                               const typename D::template Place<T>& place, ThreadMoments& moments) {
  ADAMEZO_UNROLL
  for (auto& four : moments) four = zero_moments<ScalarLanes>();

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

// Restore, moments and update in one pass.
template <class D, bool kSecond>
struct Update {
  template <class T>
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    for_each_window<D, T>(
        job, worker, workers,
        [&](const Elements<T>& theta, const typename D::template Place<T>& place) {
          ThreadMoments moments;
          sum_directions<D, T, kSecond>(job, space, place, moments);
          float values[kThreadElements];
          theta.load(values);
          ADAMEZO_UNROLL
          for (int i = 0; i < kThreadElements; ++i) {
            const auto& four = moments[i / 4];
            const float newest = space.newest[i * space.stride];
            if (job.scale != 0.0f) values[i] = ScalarLanes::fma(job.scale, newest, values[i]);
            const float step =
                preconditioned<ScalarLanes, kSecond>(four.s1[i % 4], four.s2[i % 4], job.eps);
            values[i] = descend<ScalarLanes>(values[i], step, job.minus_lr, job.decay);
          }
          theta.store(values);
        });
  }
};

// out = S2 where the job has second coefficients, else S1: a look inside an update.
template <class D, bool kSecond>
struct Moment {
  template <class T>
  static ADAMEZO_HD void run(const DeviceJob& job, const Workspace& space, int64_t worker,
                             int64_t workers) {
    for_each_window<D, T>(job, worker, workers,
                          [&](const Elements<T>& out, const typename D::template Place<T>& place) {
                            ThreadMoments moments;
                            sum_directions<D, T, kSecond>(job, space, place, moments);
                            float values[kThreadElements];
                            ADAMEZO_UNROLL
                            for (int i = 0; i < kThreadElements; ++i)
                              values[i] =
                                  kSecond ? moments[i / 4].s2[i % 4] : moments[i / 4].s1[i % 4];
                            out.store(values);
                          });
  }
};

// A body for one type of weights.
template <class Body, class T>
struct Instance {
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

// Calls use(instance) with the body that does `operation` on the job.
template <class D, class Use>
void select(Operation operation, const Job& job, Use use) {
  switch (operation) {
    case Operation::kSample:
      return by_type<Sample<D>>(job.type, use);
    case Operation::kPerturb:
      return by_type<Perturb<D>>(job.type, use);
    case Operation::kUpdate:
      return job.second ? by_type<Update<D, true>>(job.type, use)
                        : by_type<Update<D, false>>(job.type, use);
    case Operation::kMoment:  // always float32
      return job.second ? use(Instance<Moment<D, true>, float>())
                        : use(Instance<Moment<D, false>, float>());
  }
}

}  // namespace cuda
}  // namespace adamezo
