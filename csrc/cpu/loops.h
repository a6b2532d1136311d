// The CPU kernels, written once over lanes: each operation is a loop over groups of weights.
#pragma once

#include "cpu/low_rank.h"

namespace adamezo {
namespace {

// out = z
template <class L, class D>
struct Sample {
  template <class T>
  static void run(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
    D::template along_each<T, 1>(
        job, scratch, worker, workers,
        [&](const Span<T>& span, const Group<T>& out, const typename L::F z[1][4]) {
          store_group<L, false>(job, span, out, z[0]);
        });
  }
};

// theta = theta + scale z
template <class L, class D, bool kStochastic>
struct Perturb {
  template <class T>
  static void run(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
    D::template along_each<T, 1>(
        job, scratch, worker, workers,
        [&](const Span<T>& span, const Group<T>& theta, const typename L::F z[1][4]) {
          typename L::F moved[4];
          for (int t = 0; t < 4; ++t)
            moved[t] = L::fma(L::f(job.scale), z[0][t], L::load(theta.from + t * L::kWidth));
          store_group<L, kStochastic>(job, span, theta, moved);
        });
  }
};

// Restore, moments and update in one pass: each weight is read once and written once.
template <class L, class D, bool kSecond, bool kStochastic>
struct Update {
  template <class T>
  static void run(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
    using F = typename L::F;
    const float minus_lr = job.step[0], decay = job.step[1];
    float restored[kGroup<L>];  // in memory, to relieve register pressure in the loop
    D::template along_directions<T, kSecond>(
        job, scratch, worker, workers,
        [&](const Group<T>& theta, const F z[4]) {
          for (int t = 0; t < 4; ++t) {
            F value = L::load(theta.from + t * L::kWidth);
            if (job.scale != 0.0f) value = L::fma(L::f(job.scale), z[t], value);
            L::store(value, restored + t * L::kWidth);
          }
        },
        [&](const Span<T>& span, const Group<T>& theta, const Moments<L>& moments) {
          F step[4];
          for (int j = 0; j < 4; ++j)
            step[j] = preconditioned<L, kSecond>(moments.s1[j], moments.s2[j], job.eps);
          D::natural(step);
          for (int t = 0; t < 4; ++t) {
            const F value = L::load(restored + t * L::kWidth);
            step[t] = descend<L>(value, step[t], minus_lr, decay);
          }
          store_group<L, kStochastic>(job, span, theta, step);
        });
  }
};

// The same along one direction, as in most methods: the next group's words go through their rounds
// beside this one's normals, where the loop over directions would discard a call.
template <class L, class D, bool kSecond, bool kStochastic>
struct UpdateAlongOne {
  template <class T>
  static void run(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
    using F = typename L::F;
    const float minus_lr = job.step[0], decay = job.step[1];
    const float first = job.first[0], second = kSecond ? job.second[0] : 0.0f;
    const auto use = [&](const Span<T>& span, const Group<T>& theta, const F z[1][4]) {
      auto moments = zero_moments<L>();
      accumulate<L, kSecond>(moments, z[0], first, second);
      F step[4];
      for (int t = 0; t < 4; ++t) {
        F value = L::load(theta.from + t * L::kWidth);
        if (job.scale != 0.0f) value = L::fma(L::f(job.scale), z[0][t], value);
        step[t] = preconditioned<L, kSecond>(moments.s1[t], moments.s2[t], job.eps);
        step[t] = descend<L>(value, step[t], minus_lr, decay);
      }
      store_group<L, kStochastic>(job, span, theta, step);
    };
    D::template along_each<T, 1>(job, scratch, worker, workers, use);
  }
};

// out = S2 where the job has second coefficients, otherwise S1: the sums inside an update.
template <class L, class D, bool kSecond>
struct Moment {
  template <class T>
  static void run(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
    D::template along_directions<T, kSecond>(
        job, scratch, worker, workers, [](const Group<T>&, const typename L::F*) {},
        [&](const Span<T>& span, const Group<T>& out, const Moments<L>& moments) {
          typename L::F sum[4];
          for (int j = 0; j < 4; ++j) sum[j] = kSecond ? moments.s2[j] : moments.s1[j];
          D::natural(sum);
          store_group<L, false>(job, span, out, sum);
        });
  }
};

// A rule's buffers at the elements of a group. A span's buffers follow its elements row by row,
// without the gaps that rows of weights may have.
template <class L, class R, class T>
struct Buffers {
  const Job& job;
  const Span<T>& span;
  int64_t first, low, high;  // the span has the group's elements [low, high), from `first` on
  typename L::F values[kBufferCapacity<R>][4];

  ADAMEZO_HD Buffers(const Job& job, const Span<T>& span, const Group<T>& group)
      : job(job),
        span(span),
        first(group.first),
        low(group.first < 0 ? -group.first : 0),
        high(span.count - group.first < kGroup<L> ? span.count - group.first : kGroup<L>) {
    for (int i = 0; i < R::kBuffers; ++i)
      by_buffer_type([&](auto of_type) ADAMEZO_INLINE_LAMBDA {
        using B = decltype(of_type);
        const B* from = at<B>(i);
        B staged[kGroup<L>] = {};
        if (high - low < kGroup<L>) {
          std::memcpy(staged + low, from + low, size_t(high - low) * sizeof(B));
          from = staged;
        }
        for (int t = 0; t < 4; ++t) values[i][t] = L::load(from + t * L::kWidth);
      });
  }

  ADAMEZO_HD void store(const Group<T>& group) const {
    for (int i = 0; i < R::kBuffers; ++i)
      by_buffer_type([&](auto of_type) ADAMEZO_INLINE_LAMBDA {
        using B = decltype(of_type);
        B staged[kGroup<L>];
        const bool whole = high - low == kGroup<L>;
        B* const to = whole ? at<B>(i) : staged;
        if (sizeof(B) == 2 && job.rounding == Rounding::kStochastic) {
          typename L::I random[4];
          const auto purpose = Purpose(uint32_t(Purpose::kBuffer) + uint32_t(i));
          const auto blocks = group_for<L>(purpose, job, group.block, span.parameter);
          words_in_order<L>(philox_begin<L>(blocks, span.rounding), job.key, random);
          for (int t = 0; t < 4; ++t) L::store(values[i][t], random[t], to + t * L::kWidth);
        } else {
          for (int t = 0; t < 4; ++t) L::store(values[i][t], to + t * L::kWidth);
        }
        if (!whole) std::memcpy(at<B>(i) + low, staged + low, size_t(high - low) * sizeof(B));
      });
  }

  // All buffers of one of the four vectors.
  ADAMEZO_HD void get(int t, typename L::F b[R::kBuffers]) const {
    for (int i = 0; i < R::kBuffers; ++i) b[i] = values[i][t];
  }
  ADAMEZO_HD void set(int t, const typename L::F b[R::kBuffers]) {
    for (int i = 0; i < R::kBuffers; ++i) values[i][t] = b[i];
  }

 private:
  template <class B>
  ADAMEZO_HD B* at(int i) const {
    return reinterpret_cast<B*>(span.segment->buffers[i]) + span.position + first;
  }
  // A branch in each group instead of a kernel for each type, as these loops are bound by memory.
  template <class Use>
  ADAMEZO_HD void by_buffer_type(Use use) const {
    switch (job.buffer_type) {
      case ElementType::kFloat32:
        return use(float());
      case ElementType::kBFloat16:
        return use(bfloat16());
      case ElementType::kFloat16:
        return use(float16());
    }
  }
};

// By rule R: theta = theta + scale d, where d is the rule's direction; and in an update, where that
// restores if scale is not 0, its step in the same pass, so that weights and buffers are read once
// and written once.
template <class L, class D, class R, bool kUpdate>
struct ByRule {
  template <class T>
  static void run(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
    using F = typename L::F;
    constexpr int kCount = R::kDirections;
    const float minus_lr = job.step[0], decay = job.step[1];
    float n[kRuleNumbers];
    std::memcpy(n, job.numbers, sizeof n);
    D::template along_each<T, kCount>(
        job, scratch, worker, workers,
        [&](const Span<T>& span, const Group<T>& theta, const F z[kCount][4]) {
          Buffers<L, R, T> buffers(job, span, theta);
          F moved[4];
          for (int t = 0; t < 4; ++t) {
            F at[kCount], b[kBufferCapacity<R>];
            for (int k = 0; k < kCount; ++k) at[k] = z[k][t];
            buffers.get(t, b);
            moved[t] = L::load(theta.from + t * L::kWidth);
            if (!kUpdate || job.scale != 0.0f)
              moved[t] = L::fma(L::f(job.scale), rule_direction<R, L>(at, b, n), moved[t]);
            if constexpr (kUpdate) {
              const F step = R::template step<L>(at, b, n, job.eps);
              buffers.set(t, b);
              moved[t] = descend<L>(moved[t], step, minus_lr, decay);
            }
          }
          if constexpr (kUpdate) buffers.store(theta);
          if (job.rounding == Rounding::kStochastic)
            store_group<L, true>(job, span, theta, moved);
          else
            store_group<L, false>(job, span, theta, moved);
        });
  }
};

template <class Operation>
void by_type(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
  switch (job.type) {
    case ElementType::kFloat32:
      return Operation::template run<float>(job, scratch, worker, workers);
    case ElementType::kBFloat16:
      return Operation::template run<bfloat16>(job, scratch, worker, workers);
    case ElementType::kFloat16:
      return Operation::template run<float16>(job, scratch, worker, workers);
  }
}

template <class L, class D>
void perturb(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
  const bool stochastic = job.rounding == Rounding::kStochastic;
  auto kernel = stochastic ? by_type<Perturb<L, D, true>> : by_type<Perturb<L, D, false>>;
  with_rule(job.rule, [&](auto rule) {
    using R = decltype(rule);
    if constexpr (R::kHasDirection) kernel = by_type<ByRule<L, D, R, false>>;
  });
  kernel(job, scratch, worker, workers);
}

template <class L, class D, bool kStochastic>
void update(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
  const bool one = job.horizon == 1;
  const auto kernel = job.second ? one ? by_type<UpdateAlongOne<L, D, true, kStochastic>>
                                       : by_type<Update<L, D, true, kStochastic>>
                      : one      ? by_type<UpdateAlongOne<L, D, false, kStochastic>>
                                 : by_type<Update<L, D, false, kStochastic>>;
  kernel(job, scratch, worker, workers);
}

template <class L, class D>
void update(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
  const bool stochastic = job.rounding == Rounding::kStochastic;
  if (job.rule == kMoments)
    (stochastic ? update<L, D, true> : update<L, D, false>)(job, scratch, worker, workers);
  with_rule(job.rule, [&](auto rule) {
    using R = decltype(rule);
    if constexpr (R::kUpdates) by_type<ByRule<L, D, R, true>>(job, scratch, worker, workers);
  });
}

template <class L, class D>
void moment(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
  const auto kernel = job.second ? by_type<Moment<L, D, true>> : by_type<Moment<L, D, false>>;
  kernel(job, scratch, worker, workers);
}

template <class L, class D>
void by_operation(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers) {
  switch (job.operation) {
    case Operation::kSample:
      return by_type<Sample<L, D>>(job, scratch, worker, workers);
    case Operation::kPerturb:
      return perturb<L, D>(job, scratch, worker, workers);
    case Operation::kUpdate:
      return update<L, D>(job, scratch, worker, workers);
    case Operation::kMoment:
      return moment<L, D>(job, scratch, worker, workers);
  }
}

template <class L>
InstructionSet instruction_set_over(const char* name) {
  return {name, by_operation<L, Exact<L>>, by_operation<L, Rademacher<L>>,
          by_operation<L, Factored<L>>};
}

}  // namespace
}  // namespace adamezo
