// Rules: updates that are not sums of directions. Most have one or two buffers, each with one
// number for each weight. A rule R has
//   kName                   its name in adamezo_kernels/rules.py, which has the same rule in Python
//   kDirections, kBuffers   the numbers of its directions and buffers, at most kMaxBuffers
//   kHasDirection           whether the weights are perturbed along another direction than z
//   kUpdates                whether it has a step, besides a perturbation
//   direction(z, b, n)      the direction that they are perturbed along, from z and the buffers
//   step(z, b, n, eps)      the step of theta <- theta decay - lr step; writes new values of b
// where z[k] belongs to direction k, b[i] to buffer i, and n are the step's own numbers, which
// the host computes (rules.py names them). Operations are in the order of the formulas;
// fma(a, b, c) is a b + c, rounded once. The list of all rules is at the end of this file.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

constexpr int kMaxBuffers = 2;
constexpr int kRuleNumbers = 8;

// Adam on the estimate p z, with both moments stored (the table of MeZO's authors' code):
//   m <- beta1 m + (1 - beta1) p z        v <- beta2 v + (1 - beta2) p^2 z^2
//   step = c1 m / (sqrt(c2 v) + eps)      with c = 1 / (1 - beta^t)
struct Adam {
  static constexpr const char* kName = "adam";
  static constexpr int kDirections = 1, kBuffers = 2;
  static constexpr bool kHasDirection = false, kUpdates = true;

  template <class L>
  static ADAMEZO_HD typename L::F step(const typename L::F z[1], typename L::F b[2],
                                       const float n[kRuleNumbers], float eps) {
    b[0] = L::fma(L::f(n[1]), z[0], L::mul(L::f(n[0]), b[0]));
    b[1] = L::fma(L::f(n[3]), L::mul(z[0], z[0]), L::mul(L::f(n[2]), b[1]));
    return L::div(L::mul(L::f(n[4]), b[0]), L::add(L::sqrt(L::mul(L::f(n[5]), b[1])), L::f(eps)));
  }
};

// HiZOO (arXiv 2402.15173): D is a curvature, and perturbations are shorter where it is large.
//   d = z / sqrt(D)      D <- D + D (a c z^2 - a), within bounds      step = p z / sqrt(D)
// where c is the curvature along d. The bounds keep d finite, whatever c was; float16 holds both.
constexpr float kLeastCurvature = 1e-4f, kMostCurvature = 1e4f;

struct Hizoo {
  static constexpr const char* kName = "hizoo";
  static constexpr int kDirections = 1, kBuffers = 1;
  static constexpr bool kHasDirection = true, kUpdates = true;

  template <class L>
  static ADAMEZO_HD typename L::F direction(const typename L::F z[1], const typename L::F b[1],
                                            const float*) {
    return L::div(z[0], L::sqrt(b[0]));
  }
  template <class L>
  static ADAMEZO_HD typename L::F step(const typename L::F z[1], typename L::F b[1],
                                       const float n[kRuleNumbers], float) {
    const auto change = L::fma(L::f(n[1]), L::mul(z[0], z[0]), L::f(n[0]));
    const auto moved = L::fma(b[0], change, b[0]);
    b[0] = L::min(L::max(moved, L::f(kLeastCurvature)), L::f(kMostCurvature));
    return L::div(L::mul(L::f(n[2]), z[0]), L::sqrt(b[0]));
  }
};

// HELENE (arXiv 2411.10696): momentum over a clipped Gauss-Newton curvature.
//   m <- beta1 m + alpha p z      h <- beta2 h + (1 - beta2) B p_hat^2 z^2
//   step = m / (gamma max(h, lambda) + eps)
struct Helene {
  static constexpr const char* kName = "helene";
  static constexpr int kDirections = 1, kBuffers = 2;
  static constexpr bool kHasDirection = false, kUpdates = true;

  template <class L>
  static ADAMEZO_HD typename L::F step(const typename L::F z[1], typename L::F b[2],
                                       const float n[kRuleNumbers], float eps) {
    b[0] = L::fma(L::f(n[1]), z[0], L::mul(L::f(n[0]), b[0]));
    b[1] = L::fma(L::f(n[3]), L::mul(z[0], z[0]), L::mul(L::f(n[2]), b[1]));
    const auto clipped = L::mul(L::f(n[4]), L::max(b[1], L::f(n[5])));
    return L::div(b[0], L::add(clipped, L::f(eps)));
  }
};

// ZO-AdaMU (arXiv 2312.15184): the direction itself has momentum; m is the last one.
//   z' = sqrt(alpha) u_0      z'' = m + sqrt(1 - alpha) u_1      d = beta1 z' + (1 - beta1) z''
//   step = p d / sqrt(beta2 z'^2 + (1 - beta2) z''^2 + eps)      m <- d
struct Adamu {
  static constexpr const char* kName = "adamu";
  static constexpr int kDirections = 2, kBuffers = 1;
  static constexpr bool kHasDirection = true, kUpdates = true;

  template <class L>
  struct Parts {
    typename L::F fresh, moving, both;  // z', z'' and d
  };
  template <class L>
  static ADAMEZO_HD Parts<L> parts(const typename L::F z[2], const typename L::F b[1],
                                   const float n[kRuleNumbers]) {
    const auto fresh = L::mul(L::f(n[0]), z[0]);
    const auto moving = L::fma(L::f(n[1]), z[1], b[0]);
    return {fresh, moving, L::fma(L::f(n[2]), fresh, L::mul(L::f(n[3]), moving))};
  }
  template <class L>
  static ADAMEZO_HD typename L::F direction(const typename L::F z[2], const typename L::F b[1],
                                            const float n[kRuleNumbers]) {
    return parts<L>(z, b, n).both;
  }
  template <class L>
  static ADAMEZO_HD typename L::F step(const typename L::F z[2], typename L::F b[1],
                                       const float n[kRuleNumbers], float eps) {
    const auto of = parts<L>(z, b, n);
    const auto v = L::fma(L::f(n[4]), L::mul(of.fresh, of.fresh),
                          L::mul(L::f(n[5]), L::mul(of.moving, of.moving)));
    b[0] = of.both;
    return L::div(L::mul(L::f(n[6]), of.both), L::sqrt(L::add(v, L::f(eps))));
  }
};

// Blend: perturbs from one direction to the next in one pass; it has no update.
//   d = n_0 z_0 + n_1 z_1
struct Blend {
  static constexpr const char* kName = "blend";
  static constexpr int kDirections = 2, kBuffers = 0;
  static constexpr bool kHasDirection = true, kUpdates = false;

  template <class L>
  static ADAMEZO_HD typename L::F direction(const typename L::F z[2], const typename L::F*,
                                            const float n[kRuleNumbers]) {
    return L::fma(L::f(n[1]), z[1], L::mul(L::f(n[0]), z[0]));
  }
};

// All rules, in the order of RULES in rules.py. A job's rule is its index here, counted from 1.
template <class... R>
struct RuleList {};
using Rules = RuleList<Adam, Hizoo, Helene, Adamu, Blend>;

constexpr int kMoments = 0;  // sums of directions (rule.h) instead of one of these rules

// Calls use(R()) with the rule of that index. Returns whether there is one.
template <class Use, class... R>
bool with_rule(int rule, Use use, RuleList<R...>) {
  int place = kMoments;
  return ((++place == rule ? (use(R()), true) : false) || ...);
}
template <class Use>
bool with_rule(int rule, Use use) {
  return with_rule(rule, use, Rules());
}

// The capacity of an array with an element for each buffer, as no array may be empty.
template <class R>
constexpr int kBufferCapacity = R::kBuffers > 0 ? R::kBuffers : 1;

// The direction that the weights are perturbed along.
template <class R, class L>
ADAMEZO_HD typename L::F rule_direction(const typename L::F* z, const typename L::F* b,
                                        const float* n) {
  if constexpr (R::kHasDirection)
    return R::template direction<L>(z, b, n);
  else
    return z[0];
}

}  // namespace adamezo
