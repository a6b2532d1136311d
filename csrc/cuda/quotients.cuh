// The steps of weights, s1 / (sqrt(s2) + eps), each operation correctly rounded: the bits of
// `preconditioned` in adamezo/rule.h.
//
// nvcc tests the argument of every correctly rounded root and quotient, and branches where the
// usual steps would not do. Here the usual steps are made for all elements of a thread, and tested
// by what came out, all at once.
#pragma once

#include "adamezo/lanes_scalar.h"
#include "adamezo/rule.h"

namespace adamezo {
namespace cuda {

// A GPU's approximations, of which subnormal arguments and results are 0.
ADAMEZO_HD float approximate_rsqrt(float a) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return 1.0f / std::sqrt(a);
#endif
}
ADAMEZO_HD float approximate_reciprocal(float a) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
#else
  return 1.0f / a;
#endif
}

// nvcc's steps for __fsqrt_rn of arguments in [2^-101, 2^128), where `y` is the approximate_rsqrt.
// Of 0, infinity and numbers below 0 that is infinite, 0 or a NaN, and the root a NaN.
ADAMEZO_HD float usual_sqrt(float a, float y) {
  using L = ScalarLanes;
  const float root = L::mul(a, y);
  return L::fma(L::fnma(root, root, a), L::mul(y, 0.5f), root);
}

// nvcc's steps for __fdiv_rn, where `y` is the approximate_reciprocal of b. Powers of two change
// nothing in them where no reciprocal and no quotient is out of range, and where the remainder is
// exact, which is a multiple of the product of the last places of b and the quotient.
ADAMEZO_HD float usual_quotient(float a, float b, float y) {
  using L = ScalarLanes;
  y = L::fma(y, L::fnma(b, y, 1.0f), y);
  const float quotient = L::mul(a, y);
  return L::fma(y, L::fnma(b, quotient, a), quotient);
}

// A usual step is at least 2^-40, of an s2 of at least 2^-101 and an eps of at most 2^60. Then the
// denominator is in [2^-51, 2^65], and the remainder is a multiple of 2^(-51 - 23 - 40 - 24), and
// so exact. Where the first quotient is infinite the second one is a NaN, as that of any NaN is;
// and a NaN is not at least anything. Steps of 0 take the other way too.
constexpr float kLeastS2 = 0x1p-101f, kLeastStep = 0x1p-40f, kMostEps = 0x1p60f;

template <int kCount, bool kSecond>
ADAMEZO_HD void make_steps(const Moments<ScalarLanes> moments[kCount / 4], float eps,
                           float steps[kCount]) {
  bool usual = eps >= 0.0f && eps <= kMostEps;
  ADAMEZO_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const float s1 = moments[i / 4].s1[i % 4], s2 = moments[i / 4].s2[i % 4];
    if constexpr (kSecond) {
      const float b = ScalarLanes::add(usual_sqrt(s2, approximate_rsqrt(s2)), eps);
      steps[i] = usual_quotient(s1, b, approximate_reciprocal(b));
      usual = usual & (s2 >= kLeastS2) & (std::fabs(steps[i]) >= kLeastStep);
    } else {
      steps[i] = s1;
    }
  }
  if (kSecond && !usual) {
    ADAMEZO_UNROLL
    for (int i = 0; i < kCount; ++i)
      steps[i] = preconditioned<ScalarLanes, true>(moments[i / 4].s1[i % 4],
                                                   moments[i / 4].s2[i % 4], eps);
  }
}

}  // namespace cuda
}  // namespace adamezo
