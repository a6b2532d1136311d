// `exact` normals: two words in, two normals out, the same bits on every device.
//
// Box-Muller in a frame turned by 45 degrees, so that its sqrt(2) cancels and an angle in
// [-pi/4, pi/4) with two spare sign bits covers the circle: no range reduction, no select.
// Only fma, multiply, add, correctly rounded sqrt and integer operations, in this order. The
// polynomials are minimax fits: -ln u within 9.0e-8 (relative), sin and cos within 8.3e-8.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

// Turns a call's four words into four normals, as two pairs (x[0], x[1]) and (x[2], x[3]) in step.
//
// With u in (0, 1] from the first word of a pair and f in [-1, 1) from the second,
//   r = sqrt(-ln u),  z0 = r (sin(pi/4 f) + cos(pi/4 f)),  z1 = r (cos(pi/4 f) - sin(pi/4 f)).
//
// Each pair is one long chain of dependent operations. `between` is called kNormalStages times on
// the way, in order, so that the caller can interleave independent work: an out-of-order core sees
// too few instructions ahead to find that work on its own.
constexpr int kNormalStages = 7;

template <class L, class Between>
ADAMEZO_HD void normals(const typename L::I x[4], typename L::F z[4], Between&& between) {
  using F = typename L::F;
  F u[2], f[2], g[2], exponent[2];  // u is 2^31 times that of the formula, which costs nothing
  // Bit 31 of a word is a sign; bit 0 of the first is set so that u is never 0.
  for (int i = 0; i < 2; ++i) u[i] = L::to_float(L::and_or(x[2 * i], 0x7ffffffeu, 1u));
  between(0);
  // u = 2^(31 + e / 2^23) (1 + g) with g in [-1/3, 1/3): 0x4eaaaaab is the float next to 2^31 2/3.
  // The product in the fma is exact.
  for (int i = 0; i < 2; ++i) {
    const auto bits = L::bits(u[i]);
    const auto e = L::bit_and(L::subtract(bits, 0x4eaaaaabu), 0xff800000u);
    g[i] = L::fma(L::from_bits(L::subtract(bits, e)), L::f(0x1p-31f), L::f(-1.0f));
    exponent[i] = L::to_float(e);
  }
  between(1);
  F p[2], gg[2], ff[2];
  for (int i = 0; i < 2; ++i) {
    gg[i] = L::mul(g[i], g[i]);
    p[i] = L::fma(g[i], L::f(-0.14020569622516632f), L::f(0.15383614599704742f));
    p[i] = L::fma(p[i], g[i], L::f(-0.13997136056423187f));
    f[i] = L::add(L::from_bits(L::and_or(x[2 * i + 1], 0x007fffffu, 0x40000000u)), L::f(-3.0f));
  }
  between(2);
  for (int i = 0; i < 2; ++i) {
    p[i] = L::fma(p[i], g[i], L::f(0.1641702800989151f));
    p[i] = L::fma(p[i], g[i], L::f(-0.20011073350906372f));
    ff[i] = L::mul(f[i], f[i]);
  }
  between(3);
  F sine[2], cosine[2];
  for (int i = 0; i < 2; ++i) {
    p[i] = L::fma(p[i], g[i], L::f(0.250077486038208f));
    p[i] = L::fma(p[i], g[i], L::f(-0.33333200216293335f));
    sine[i] = L::fma(ff[i], L::f(-3.5579418181441724e-05f), L::f(0.002489370759576559f));
    cosine[i] = L::fma(ff[i], L::f(-0.00031918685999698937f), L::f(0.015850437805056572f));
  }
  between(4);
  F r[2];
  for (int i = 0; i < 2; ++i) {
    p[i] = L::fma(p[i], g[i], L::f(0.49999937415122986f));
    // -8.262958405176314e-08 is -ln 2 / 2^23: the exponent is still in its bit position.
    r[i] = L::sqrt(L::fma(exponent[i], L::f(-8.262958405176314e-08f), L::fms(p[i], gg[i], g[i])));
    sine[i] = L::fma(sine[i], ff[i], L::f(-0.08074513077735901f));
    cosine[i] = L::fma(cosine[i], ff[i], L::f(-0.3084245026111603f));
  }
  between(5);
  for (int i = 0; i < 2; ++i) {
    sine[i] = L::mul(L::fma(sine[i], ff[i], L::f(0.7853981256484985f)), f[i]);
    cosine[i] = L::fma(cosine[i], ff[i], L::f(1.0f));
  }
  between(6);
  for (int i = 0; i < 2; ++i) {
    const F r_cosine = L::mul(r[i], cosine[i]);
    z[2 * i] = L::flip_sign(L::fma(r[i], sine[i], r_cosine), x[2 * i]);
    z[2 * i + 1] = L::flip_sign(L::fnma(r[i], sine[i], r_cosine), x[2 * i + 1]);
  }
}

}  // namespace adamezo
