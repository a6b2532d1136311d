// The CPU kernels, written once over lanes. Everything here has internal linkage: each instruction
// set compiles a copy of its own, which no other file can be linked to by accident.
#pragma once

#include "adamezo/normal.h"
#include "adamezo/philox.h"
#include "adamezo/rule.h"
#include "cpu/kernels.h"

namespace adamezo {
namespace {

template <class L>
constexpr int kGroup = 4 * L::kWidth;  // elements that a set of lanes works on at once

// From the words of a finished call to its normals, output j of every block in z[j], while `call`
// (the next one) goes through its rounds: the two are independent, and either alone is a chain of
// dependent operations that keeps few units busy.
template <class L>
ADAMEZO_HD void normals_beside(PhiloxCall<L>& call, PhiloxKey key, const typename L::I x[4],
                               typename L::F z[4]) {
  static_assert(kNormalStages == kPhiloxRounds - kPhiloxFirstRound, "a round for each stage");
  normals<L>(x, z, [&](int stage) ADAMEZO_INLINE_LAMBDA {
    philox_round<L>(call, key, kPhiloxFirstRound + stage);
  });
}

// A run's consecutive elements as groups: calls visit(elements, block), where `elements` are the
// kGroup<L> weights of the group in memory order and `block` is its first block. Groups are
// aligned in the parameter, not in memory, so that none straddles two high block words. A group
// that is only partly in the run is staged: its elements see the same arithmetic as all others.
template <class L, class T, class Visit>
ADAMEZO_HD void for_each_group(T* data, uint64_t index, int64_t count, Visit visit) {
  constexpr int kSize = kGroup<L>;
  uint64_t block = index / kSize * L::kWidth;
  // `first` is where the group begins, counted from the run's first element.
  for (int64_t first = -int64_t(index % kSize); first < count; first += kSize) {
    const int64_t low = first < 0 ? 0 : first;
    const int64_t high = first + kSize < count ? first + kSize : count;
    if (high - low == kSize) {
      visit(data + first, block);
    } else {
      T staged[kSize] = {};
      std::memcpy(staged + (low - first), data + low, size_t(high - low) * sizeof(T));
      visit(staged, block);
      std::memcpy(data + low, staged + (low - first), size_t(high - low) * sizeof(T));
    }
    block += L::kWidth;
  }
}

// The runs of a worker's share. Calls visit(data, index, count, parameter) for each, where
// `parameter` is the last counter word; `streams` are then right for the run's high block word.
template <class L, class T, class Visit>
ADAMEZO_HD void for_each_share(const Job& job, PhiloxStream* streams, int64_t worker,
                               int64_t workers, Visit visit) {
  const int64_t share = job.elements / workers, rest = job.elements % workers;
  const int64_t begin = share * worker + (worker < rest ? worker : rest);
  const int64_t end = begin + share + (worker < rest ? 1 : 0);
  constexpr uint64_t kElementsPerHigh = uint64_t(1) << 34;  // 2^32 blocks
  uint64_t high = ~uint64_t(0);
  for_each_run(job.segments, job.segment_count, begin, end, [&](const Run& run) {
    const Segment& segment = job.segments[run.segment];
    T* data = reinterpret_cast<T*>(segment.address) + run.memory;
    const uint32_t parameter = uint32_t(segment.parameter) | uint32_t(Purpose::kDirection) << 24;
    uint64_t index = run.index + job.offset;
    for (int64_t left = run.count; left > 0;) {
      if (index / kElementsPerHigh != high) {
        high = index / kElementsPerHigh;
        for (int64_t k = 0; k <= job.horizon; ++k)
          streams[k] = philox_stream(job.key, job.directions[k % job.horizon], uint32_t(high));
      }
      const uint64_t room = kElementsPerHigh - index % kElementsPerHigh;
      const int64_t count = uint64_t(left) < room ? left : int64_t(room);
      visit(data, index, count, parameter);
      data += count, index += uint64_t(count), left -= count;
    }
  });
}

// One direction over a worker's share: calls use(elements, z) with z in memory order. The next
// group's words go through their rounds beside each group's normals.
template <class L, class T, class Use>
ADAMEZO_HD void along_direction(const Job& job, PhiloxStream* streams, int64_t worker,
                                int64_t workers, Use use) {
  for_each_share<L, T>(
      job, streams, worker, workers,
      [&](T* data, uint64_t index, int64_t count, uint32_t parameter) {
        const PhiloxStream stream = streams[0];
        const auto begin = [&](uint64_t block) ADAMEZO_INLINE_LAMBDA {
          return philox_begin<L>(
              philox_group<L>(job.key, L::group_blocks(uint32_t(block)), parameter), stream);
        };
        auto call = begin(index / kGroup<L> * L::kWidth);
        philox_finish<L>(call, job.key);
        for_each_group<L, T>(data, index, count, [&](T* elements, uint64_t block) {
          typename L::I x[4];
          typename L::F z[4];
          call_words<L>(call, x);
          call = begin(block + L::kWidth);
          normals_beside<L>(call, job.key, x, z);
          L::natural(z);
          use(elements, z);
        });
      });
}

// out = z
template <class L>
struct Sample {
  template <class T>
  static void run(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
    along_direction<L, T>(job, streams, worker, workers, [&](T* out, const typename L::F z[4]) {
      for (int t = 0; t < 4; ++t) L::store(z[t], out + t * L::kWidth);
    });
  }
};

// theta = theta + scale z
template <class L>
struct Perturb {
  template <class T>
  static void run(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
    along_direction<L, T>(job, streams, worker, workers, [&](T* theta, const typename L::F z[4]) {
      for (int t = 0; t < 4; ++t) {
        T* at = theta + t * L::kWidth;
        L::store(L::fma(L::f(job.scale), z[t], L::load(at)), at);
      }
    });
  }
};

// All directions over a worker's share, the newest first: for each group calls
// newest(elements, z) with z_0 in memory order, then all(elements, moments).
template <class L, class T, bool kSecond, class Newest, class All>
ADAMEZO_HD void along_directions(const Job& job, PhiloxStream* streams, int64_t worker,
                                 int64_t workers, Newest newest, All all) {
  for_each_share<L, T>(
      job, streams, worker, workers,
      [&](T* data, uint64_t index, int64_t count, uint32_t parameter) {
        for_each_group<L, T>(data, index, count, [&](T* elements, uint64_t block) {
          const auto group = philox_group<L>(job.key, L::group_blocks(uint32_t(block)), parameter);
          auto moments = zero_moments<L>();
          auto call = philox_begin<L>(group, streams[0]);
          philox_finish<L>(call, job.key);
          typename L::F z[4];
          const auto add_direction = [&](int64_t k) ADAMEZO_INLINE_LAMBDA {
            typename L::I x[4];
            call_words<L>(call, x);
            call = philox_begin<L>(group, streams[k + 1]);  // after the last: unused
            normals_beside<L>(call, job.key, x, z);
            accumulate<L, kSecond>(moments, z, job.first[k], kSecond ? job.second[k] : 0.0f);
          };
          add_direction(0);
          L::natural(z);
          newest(elements, z);
          for (int64_t k = 1; k < job.horizon; ++k) add_direction(k);
          all(elements, moments);
        });
      });
}

// Restore, moments and update in one pass: each weight is read once and written once.
template <class L, bool kSecond>
struct Update {
  template <class T>
  static void run(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
    using F = typename L::F;
    float restored[kGroup<L>];  // in memory: the loop over directions wants the registers
    along_directions<L, T, kSecond>(
        job, streams, worker, workers,
        [&](const T* theta, const F z[4]) {
          for (int t = 0; t < 4; ++t) {
            F value = L::load(theta + t * L::kWidth);
            if (job.scale != 0.0f) value = L::fma(L::f(job.scale), z[t], value);
            L::store(value, restored + t * L::kWidth);
          }
        },
        [&](T* theta, const Moments<L>& moments) {
          F step[4];
          for (int j = 0; j < 4; ++j)
            step[j] = preconditioned<L, kSecond>(moments.s1[j], moments.s2[j], job.eps);
          L::natural(step);
          for (int t = 0; t < 4; ++t) {
            const F value = L::load(restored + t * L::kWidth);
            L::store(descend<L>(value, step[t], job.minus_lr, job.decay), theta + t * L::kWidth);
          }
        });
  }
};

// out = S2 where the job has second coefficients, else S1: a look inside an update.
template <class L, bool kSecond>
struct Moment {
  template <class T>
  static void run(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
    along_directions<L, T, kSecond>(
        job, streams, worker, workers, [](const T*, const typename L::F*) {},
        [&](T* out, const Moments<L>& moments) {
          typename L::F sum[4];
          for (int j = 0; j < 4; ++j) sum[j] = kSecond ? moments.s2[j] : moments.s1[j];
          L::natural(sum);
          for (int t = 0; t < 4; ++t) L::store(sum[t], out + t * L::kWidth);
        });
  }
};

template <class Operation>
void by_type(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
  switch (job.type) {
    case ElementType::kFloat32:
      return Operation::template run<float>(job, streams, worker, workers);
    case ElementType::kBFloat16:
      return Operation::template run<bfloat16>(job, streams, worker, workers);
    case ElementType::kFloat16:
      return Operation::template run<float16>(job, streams, worker, workers);
  }
}

template <template <class, bool> class Operation, class L>
void by_second(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
  const auto kernel = job.second ? by_type<Operation<L, true>> : by_type<Operation<L, false>>;
  kernel(job, streams, worker, workers);
}

template <class L>
Kernels kernels_over(const char* instruction_set) {
  return {instruction_set, by_type<Sample<L>>, by_type<Perturb<L>>, by_second<Update, L>,
          by_second<Moment, L>};
}

}  // namespace
}  // namespace adamezo
