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

// The normals of one group for one stream: output j of every block in z[j].
template <class L>
ADAMEZO_HD void group_normals(const PhiloxGroup<L>& group, const PhiloxStream& stream,
                              PhiloxKey key, typename L::F z[4]) {
  typename L::Words words[4];
  philox_finish<L>(group, stream, key, words);
  normal_pair<L>(L::integers(words[0]), L::integers(words[1]), z[0], z[1]);
  normal_pair<L>(L::integers(words[2]), L::integers(words[3]), z[2], z[3]);
}

// Walks a worker's share group by group and calls visit(elements, group), where `elements` are the
// kGroup<L> weights of the group in memory order. Groups are aligned in the parameter, not in
// memory, so that none straddles two high block words. A group that is only partly inside a run is
// staged: its elements go through the same arithmetic as all others.
template <class L, class T, class Visit>
ADAMEZO_HD void for_each_group(const Job& job, PhiloxStream* streams, int64_t worker,
                               int64_t workers, Visit visit) {
  constexpr int kSize = kGroup<L>;
  const int64_t share = job.elements / workers, rest = job.elements % workers;
  const int64_t begin = share * worker + (worker < rest ? worker : rest);
  const int64_t end = begin + share + (worker < rest ? 1 : 0);
  uint32_t block_hi = 0;
  bool ready = false;
  for_each_run(job.segments, job.segment_count, begin, end, [&](const Run& run) {
    const Segment& segment = job.segments[run.segment];
    T* data = reinterpret_cast<T*>(segment.address) + run.memory;
    const uint64_t index = run.index + job.offset;
    const uint32_t parameter =
        uint32_t(segment.parameter) | uint32_t(Purpose::kDirection) << 24;
    uint64_t block = index / kSize * L::kWidth;
    // `first` is where the group begins, counted from the run's first element.
    for (int64_t first = -int64_t(index % kSize); first < run.count; first += kSize) {
      if (!ready || uint32_t(block >> 32) != block_hi) {
        block_hi = uint32_t(block >> 32);
        ready = true;
        for (int64_t k = 0; k < job.horizon; ++k)
          streams[k] = philox_stream(job.key, job.directions[k], block_hi);
      }
      const auto group =
          philox_group<L>(job.key, L::group_blocks(uint32_t(block)), parameter);
      const int64_t low = first < 0 ? 0 : first;
      const int64_t high = first + kSize < run.count ? first + kSize : run.count;
      if (high - low == kSize) {
        visit(data + first, group);
      } else {
        T staged[kSize] = {};
        std::memcpy(staged + (low - first), data + low, size_t(high - low) * sizeof(T));
        visit(staged, group);
        std::memcpy(data + low, staged + (low - first), size_t(high - low) * sizeof(T));
      }
      block += L::kWidth;
    }
  });
}

// S1 and S2 over the directions from the `from`-th on, added to `moments`.
template <class L, bool kSecond>
ADAMEZO_HD void add_directions(const Job& job, const PhiloxStream* streams,
                               const PhiloxGroup<L>& group, int64_t from, Moments<L>& moments) {
  for (int64_t k = from; k < job.horizon; ++k) {
    typename L::F z[4];
    group_normals<L>(group, streams[k], job.key, z);
    accumulate<L, kSecond>(moments, z, job.first[k], kSecond ? job.second[k] : 0.0f);
  }
}

// out = z
template <class L>
struct Sample {
  template <class T>
  static void run(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
    for_each_group<L, T>(job, streams, worker, workers,
                         [&](T* out, const PhiloxGroup<L>& group) {
                           typename L::F z[4];
                           group_normals<L>(group, streams[0], job.key, z);
                           L::natural(z);
                           for (int t = 0; t < 4; ++t) L::store(z[t], out + t * L::kWidth);
                         });
  }
};

// theta = theta + scale z
template <class L>
struct Perturb {
  template <class T>
  static void run(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
    for_each_group<L, T>(job, streams, worker, workers,
                         [&](T* theta, const PhiloxGroup<L>& group) {
                           typename L::F z[4];
                           group_normals<L>(group, streams[0], job.key, z);
                           L::natural(z);
                           for (int t = 0; t < 4; ++t) {
                             T* at = theta + t * L::kWidth;
                             L::store(L::fma(L::f(job.scale), z[t], L::load(at)), at);
                           }
                         });
  }
};

// Restore, moments and update in one pass: each weight is read once and written once.
template <class L, bool kSecond>
struct Update {
  template <class T>
  static void run(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers) {
    for_each_group<L, T>(
        job, streams, worker, workers, [&](T* theta, const PhiloxGroup<L>& group) {
          // The newest direction is apart: it is also the one that theta is displaced along.
          typename L::F z[4];
          group_normals<L>(group, streams[0], job.key, z);
          auto moments = zero_moments<L>();
          accumulate<L, kSecond>(moments, z, job.first[0], kSecond ? job.second[0] : 0.0f);
          float restored[kGroup<L>];  // in memory: the loop below wants the registers
          L::natural(z);
          for (int t = 0; t < 4; ++t) {
            auto value = L::load(theta + t * L::kWidth);
            if (job.scale != 0.0f) value = L::fma(L::f(job.scale), z[t], value);
            L::store(value, restored + t * L::kWidth);
          }
          add_directions<L, kSecond>(job, streams, group, 1, moments);
          typename L::F step[4];
          for (int j = 0; j < 4; ++j)
            step[j] = preconditioned<L, kSecond>(moments.s1[j], moments.s2[j], job.eps);
          L::natural(step);
          for (int t = 0; t < 4; ++t) {
            const auto value = L::load(restored + t * L::kWidth);
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
    for_each_group<L, T>(job, streams, worker, workers,
                         [&](T* out, const PhiloxGroup<L>& group) {
                           auto moments = zero_moments<L>();
                           add_directions<L, kSecond>(job, streams, group, 0, moments);
                           auto& sum = kSecond ? moments.s2 : moments.s1;
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
