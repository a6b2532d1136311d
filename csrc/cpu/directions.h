// A worker's share of the weights in groups of lanes, with their directions: the parts of every
// loop. Everything here and in loops.h has internal linkage: each instruction set compiles a copy
// of its own, which no other file can link to by accident.
#pragma once

#include "adamezo/normal.h"
#include "adamezo/philox.h"
#include "adamezo/rademacher.h"
#include "adamezo/rule.h"
#include "cpu/kernels.h"

namespace adamezo {
namespace {

template <class L>
constexpr int kGroup = 4 * L::kWidth;  // elements that a set of lanes works on at once

// Consecutive elements, all under the same high block words.
template <class T>
struct Span {
  const T* from;  // read from here; equal to `to` in place
  T* to;
  uint64_t index;
  int64_t count;
  const Segment* segment;
  int64_t position;  // of the first one, counted in the segment row by row
  uint32_t parameter;
  PhiloxStream rounding;
};

// The kGroup<L> elements of a group in memory order.
template <class T>
struct Group {
  const T* from;
  T* to;
  uint64_t block;  // the index of its first block, of four elements
  int64_t first;   // where the group begins, relative to the span's first element
};

// A span's elements as groups: calls visit(group). Groups are aligned in the parameter, not in
// memory, so that none straddles two high block words. A group that is only partly in the span is
// staged in a copy, so that its elements go through the same arithmetic as all others.
template <class L, class T, class Visit>
ADAMEZO_HD void for_each_group(Span<T> span, Visit visit) {
  constexpr int kSize = kGroup<L>;
  uint64_t block = span.index / kSize * L::kWidth;
  for (int64_t first = -int64_t(span.index % kSize); first < span.count; first += kSize) {
    const int64_t low = first < 0 ? 0 : first;
    const int64_t high = first + kSize < span.count ? first + kSize : span.count;
    if (high - low == kSize) {
      visit(Group<T>{span.from + first, span.to + first, block, first});
    } else {
      T staged[kSize] = {};
      std::memcpy(staged + (low - first), span.from + low, size_t(high - low) * sizeof(T));
      visit(Group<T>{staged, staged, block, first});
      std::memcpy(span.to + low, staged + (low - first), size_t(high - low) * sizeof(T));
    }
    block += L::kWidth;
  }
}

// The elements [begin, end) of the concatenated segments that are a worker's.
struct Share {
  int64_t begin, end;
};
ADAMEZO_HD Share share_of(const Job& job, int64_t worker, int64_t workers) {
  const int64_t share = job.elements / workers, rest = job.elements % workers;
  const int64_t begin = share * worker + (worker < rest ? worker : rest);
  return {begin, begin + share + (worker < rest ? 1 : 0)};
}

// Cuts runs into spans. The streams in `scratch` are those of the span's high block word; D is a
// kind of directions, see below.
template <class D, class T>
struct Spans {
  const Job& job;
  const Scratch& scratch;
  uint64_t high = ~uint64_t(0);
  PhiloxStream rounding{};

  // Calls visit(span) for the elements of a run.
  template <class Visit>
  ADAMEZO_HD void cut(const Run& run, Visit visit) {
    // The elements of 2^32 blocks of rounding words; a direction's high word changes no more often.
    constexpr uint64_t kElementsPerHigh = uint64_t(1) << 34;
    const Segment& segment = job.segments[run.segment];
    const T* from = reinterpret_cast<const T*>(segment.source) + run.source;
    T* to = reinterpret_cast<T*>(segment.address) + run.memory;
    uint64_t index = run.index + job.offset;
    int64_t position = run.position;
    for (int64_t left = run.count; left > 0;) {
      if (index / kElementsPerHigh != high) {
        high = index / kElementsPerHigh;
        for (int64_t k = 0; k <= job.horizon; ++k)
          scratch.streams[k] = philox_stream(job.key, job.directions[k % job.horizon],
                                             uint32_t(index >> (32 + D::kLogElements)));
        rounding = philox_stream(job.key, job.directions[0], uint32_t(high));
      }
      const uint64_t space = kElementsPerHigh - index % kElementsPerHigh;
      const int64_t count = uint64_t(left) < space ? left : int64_t(space);
      visit(Span<T>{from, to, index, count, &segment, position, uint32_t(segment.parameter),
                    rounding});
      from += count, to += count, index += uint64_t(count), position += count, left -= count;
    }
  }
};

// A worker's share as spans: calls visit(span).
template <class D, class T, class Visit>
ADAMEZO_HD void for_each_span(const Job& job, const Scratch& scratch, int64_t worker,
                              int64_t workers, Visit visit) {
  const Share share = share_of(job, worker, workers);
  Spans<D, T> spans{job, scratch};
  for_each_run(job.segments, job.segment_count, share.begin, share.end,
               [&](const Run& run) { spans.cut(run, visit); });
}

template <class L>
ADAMEZO_HD PhiloxGroup<L> group_for(Purpose purpose, const Job& job, uint64_t first_block,
                                    uint32_t parameter) {
  return philox_group<L>(job.key, L::group_blocks(uint32_t(first_block)),
                         parameter | uint32_t(purpose) << 24);
}

// The words of a call of every block, in the order of the blocks and of the words in a block.
template <class L>
ADAMEZO_HD void words_in_order(PhiloxCall<L> call, PhiloxKey key, typename L::I words[4]) {
  philox_finish<L>(call, key);
  call_words<L>(call, words);
  typename L::F carried[4];
  for (int t = 0; t < 4; ++t) carried[t] = L::from_bits(words[t]);
  L::natural(carried);
  for (int t = 0; t < 4; ++t) words[t] = L::bits(carried[t]);
}

// The normals of a call of every block, in the order in memory.
template <class L>
ADAMEZO_HD void normals_in_order(PhiloxCall<L> call, PhiloxKey key, typename L::F z[4]) {
  typename L::I x[4];
  philox_finish<L>(call, key);
  call_words<L>(call, x);
  normals<L>(x, z, [](int) {});
  L::natural(z);
}

template <class L, bool kStochastic, class T>
ADAMEZO_HD void store_group(const Job& job, const Span<T>& span, const Group<T>& group,
                            const typename L::F values[4]) {
  if constexpr (kStochastic) {
    typename L::I random[4];
    const auto blocks = group_for<L>(Purpose::kRounding, job, group.block, span.parameter);
    words_in_order<L>(philox_begin<L>(blocks, span.rounding), job.key, random);
    for (int t = 0; t < 4; ++t) L::store(values[t], random[t], group.to + t * L::kWidth);
  } else {
    for (int t = 0; t < 4; ++t) L::store(values[t], group.to + t * L::kWidth);
  }
}

// A kind of directions D has
//   kLogElements       2^kLogElements elements share a Philox call
//   along_each         walks a worker's share with the first kCount directions: calls
//                      use(span, group, z) with z[k] in memory order
//   along_directions   walks it with all directions, the newest first: for each group calls
//                      newest(group, z) with z_0 in memory order, then all(span, group, moments)
//   natural            reorders those moments to the order in memory

template <class L>
struct Exact {
  static constexpr int kLogElements = 2;

  static ADAMEZO_HD void natural(typename L::F values[4]) { L::natural(values); }

  // Turns the words of a finished call into normals, output j of every block in z[j], while `call`
  // (the next one) goes through its rounds: the two are independent, and either alone is a chain of
  // dependent operations that keeps few units busy.
  static ADAMEZO_HD void normals_beside(PhiloxCall<L>& call, PhiloxKey key,
                                        const typename L::I x[4], typename L::F z[4]) {
    static_assert(kNormalStages == kPhiloxRounds - kPhiloxFirstRound, "a round for each stage");
    normals<L>(x, z, [&](int stage) ADAMEZO_INLINE_LAMBDA {
      philox_round<L>(call, key, kPhiloxFirstRound + stage);
    });
  }

  template <class T, int kCount, class Use>
  static ADAMEZO_HD void along_each(const Job& job, const Scratch& scratch, int64_t worker,
                                    int64_t workers, Use use) {
    for_each_span<Exact, T>(job, scratch, worker, workers, [&](const Span<T>& span) {
      along_each_of<T, kCount>(job, scratch, span, use);
    });
  }

  // The words of the next direction, or of the next group's first one, go through their rounds
  // beside each direction's normals.
  template <class T, int kCount, class Use>
  static ADAMEZO_HD void along_each_of(const Job& job, const Scratch& scratch, const Span<T>& span,
                                       Use use) {
    PhiloxStream streams[kCount];
    for (int k = 0; k < kCount; ++k) streams[k] = scratch.streams[k];
    const uint32_t parameter = span.parameter;
    const auto begin = [&](uint64_t block, int k) ADAMEZO_INLINE_LAMBDA {
      return philox_begin<L>(group_for<L>(Purpose::kDirection, job, block, parameter), streams[k]);
    };
    auto call = begin(span.index / kGroup<L> * L::kWidth, 0);
    philox_finish<L>(call, job.key);
    for_each_group<L, T>(span, [&](const Group<T>& group) {
      typename L::F z[kCount][4];
      for (int k = 0; k < kCount; ++k) {
        typename L::I x[4];
        call_words<L>(call, x);
        const bool last = k + 1 == kCount;
        call = begin(last ? group.block + L::kWidth : group.block, last ? 0 : k + 1);
        normals_beside(call, job.key, x, z[k]);
        L::natural(z[k]);
      }
      use(span, group, z);
    });
  }

  template <class T, bool kSecond, class Newest, class All>
  static ADAMEZO_HD void along_directions(const Job& job, const Scratch& scratch, int64_t worker,
                                          int64_t workers, Newest newest, All all) {
    for_each_span<Exact, T>(job, scratch, worker, workers, [&](const Span<T>& span) {
      along_directions_of<T, kSecond>(job, scratch, span, newest, all);
    });
  }

  template <class T, bool kSecond, class Newest, class All>
  static ADAMEZO_HD void along_directions_of(const Job& job, const Scratch& scratch,
                                             const Span<T>& span, Newest newest, All all) {
    for_each_group<L, T>(span, [&](const Group<T>& group) {
      const auto blocks = group_for<L>(Purpose::kDirection, job, group.block, span.parameter);
      auto moments = zero_moments<L>();
      auto call = philox_begin<L>(blocks, scratch.streams[0]);
      philox_finish<L>(call, job.key);
      typename L::F z[4];
      const auto add_direction = [&](int64_t k) ADAMEZO_INLINE_LAMBDA {
        typename L::I x[4];
        call_words<L>(call, x);
        call = philox_begin<L>(blocks, scratch.streams[k + 1]);  // after the last: unused
        normals_beside(call, job.key, x, z);
        accumulate<L, kSecond>(moments, z, job.first[k], kSecond ? job.second[k] : 0.0f);
      };
      add_direction(0);
      L::natural(z);
      newest(group, z);
      for (int64_t k = 1; k < job.horizon; ++k) add_direction(k);
      all(span, group, moments);
    });
  }
};

// A set of lanes makes kWidth calls at once, which give the signs of a page of 32 groups.
template <class L>
struct Rademacher {
  static constexpr int kLogElements = 7;
  static_assert(1 << kLogElements == kSignsPerCall, "");
  static constexpr uint64_t kPageBlocks = kSignsPerCall / 4 * L::kWidth;
  static constexpr int kPageWords = 4 * L::kWidth;
  static_assert(kPageWords <= kSignWords, "the scratch that run() allocates");

  static ADAMEZO_HD void natural(typename L::F[4]) {}

  // Writes the words of a page, in the order of its elements, for `count` directions.
  static ADAMEZO_HD void fill(const Job& job, const Scratch& scratch, uint64_t page,
                              uint32_t parameter, int64_t count) {
    const auto blocks = group_for<L>(Purpose::kDirection, job, page * L::kWidth, parameter);
    for (int64_t k = 0; k < count; ++k) {
      typename L::I words[4];
      words_in_order<L>(philox_begin<L>(blocks, scratch.streams[k]), job.key, words);
      for (int t = 0; t < 4; ++t)
        L::store_words(words[t], scratch.signs + k * kPageWords + t * L::kWidth);
    }
  }

  // The signs of the group whose first block is `block`, in memory order.
  static ADAMEZO_HD void signs(const uint32_t* page, uint64_t block, typename L::F z[4]) {
    for (int t = 0; t < 4; ++t) {
      const uint32_t at = uint32_t(block % kPageBlocks) * 4 + uint32_t(t * L::kWidth);
      z[t] = L::flip_signs(L::f(1.0f), page[at / 32] >> (at % 32));
    }
  }

  // Calls visit(span, group) for the groups of a worker's share, with the words of the first
  // `count` directions in scratch.signs.
  template <class T, class Visit>
  static ADAMEZO_HD void for_each_signed_group(const Job& job, const Scratch& scratch,
                                               int64_t worker, int64_t workers, int64_t count,
                                               Visit visit) {
    for_each_span<Rademacher, T>(job, scratch, worker, workers, [&](const Span<T>& span) {
      uint64_t filled = ~uint64_t(0);
      for_each_group<L, T>(span, [&](const Group<T>& group) {
        const uint64_t page = group.block / kPageBlocks;
        if (page != filled) {
          fill(job, scratch, page, span.parameter, count);
          filled = page;
        }
        visit(span, group);
      });
    });
  }

  template <class T, int kCount, class Use>
  static ADAMEZO_HD void along_each(const Job& job, const Scratch& scratch, int64_t worker,
                                    int64_t workers, Use use) {
    for_each_signed_group<T>(job, scratch, worker, workers, kCount,
                             [&](const Span<T>& span, const Group<T>& group) {
                               typename L::F z[kCount][4];
                               for (int k = 0; k < kCount; ++k)
                                 signs(scratch.signs + k * kPageWords, group.block, z[k]);
                               use(span, group, z);
                             });
  }

  template <class T, bool kSecond, class Newest, class All>
  static ADAMEZO_HD void along_directions(const Job& job, const Scratch& scratch, int64_t worker,
                                          int64_t workers, Newest newest, All all) {
    // All z^2 are 1, so that S2 is the same for every element.
    float s2 = 0.0f;
    for (int64_t k = 0; kSecond && k < job.horizon; ++k) s2 += job.second[k];
    for_each_signed_group<T>(job, scratch, worker, workers, job.horizon,
                             [&](const Span<T>& span, const Group<T>& group) {
                               auto moments = zero_moments<L>();
                               typename L::F z[4];
                               const auto add_direction = [&](int64_t k) ADAMEZO_INLINE_LAMBDA {
                                 signs(scratch.signs + k * kPageWords, group.block, z);
                                 accumulate<L, false>(moments, z, job.first[k], 0.0f);
                               };
                               add_direction(0);
                               newest(group, z);
                               for (int64_t k = 1; k < job.horizon; ++k) add_direction(k);
                               for (int j = 0; j < 4; ++j) moments.s2[j] = L::f(s2);
                               all(span, group, moments);
                             });
  }
};

}  // namespace
}  // namespace adamezo
