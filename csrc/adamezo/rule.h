// The update from truncated moments, for AdaMeZO and every method without buffers (AdaMeZO,
// arXiv 2605.00650; the coefficients include the betas and the normalization).
//
//   S1 = sum_k first_k z_k        S2 = sum_k second_k z_k^2        k = 0 is the newest direction
//   theta <- theta decay - lr S1 / (sqrt(S2) + eps)                or - lr S1 where v = 1
#pragma once

#include "adamezo/config.h"

namespace adamezo {

template <class L>
struct Moments {
  typename L::F s1[4], s2[4];  // four vectors: output j of every block of a group
};

template <class L>
ADAMEZO_HD Moments<L> zero_moments() {
  Moments<L> moments;
  for (int j = 0; j < 4; ++j) moments.s1[j] = moments.s2[j] = L::f(0.0f);
  return moments;
}

template <class L, bool kSecond>
ADAMEZO_HD void accumulate(Moments<L>& moments, const typename L::F z[4], float first,
                           float second) {
  for (int j = 0; j < 4; ++j) {
    moments.s1[j] = L::fma(L::f(first), z[j], moments.s1[j]);
    if (kSecond) moments.s2[j] = L::fma(L::f(second), L::mul(z[j], z[j]), moments.s2[j]);
  }
}

template <class L, bool kSecond>
ADAMEZO_HD typename L::F preconditioned(typename L::F s1, typename L::F s2, float eps) {
  return kSecond ? L::div(s1, L::add(L::sqrt(s2), L::f(eps))) : s1;
}

template <class L>
ADAMEZO_HD typename L::F descend(typename L::F theta, typename L::F step, float minus_lr,
                                 float decay) {
  return L::fma(L::f(minus_lr), step, L::mul(theta, L::f(decay)));
}

}  // namespace adamezo
