// `exact` normals: two words in, two normals out, the same bits on every device.
//
// Box-Muller in a frame turned by 45 degrees, so that its sqrt(2) cancels and an angle in
// [-pi/4, pi/4) with two spare sign bits covers the circle: no range reduction, no select.
// Only fma, multiply, add, correctly rounded sqrt and integer operations, in this order. The
// polynomials are minimax fits: -ln u within 9.0e-8 (relative), sin and cos within 8.3e-8.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

// -ln u for u in [2^-31, 1].
template <class L>
ADAMEZO_HD typename L::F minus_log(typename L::F u) {
  const auto bits = L::bits(u);
  // u = 2^(e / 2^23) (1 + g) with g in [-1/3, 1/3): 0x3f2aaaab is the float next to 2/3.
  const auto e = L::bit_and(L::subtract(bits, 0x3f2aaaabu), 0xff800000u);
  const auto g = L::add(L::from_bits(L::subtract(bits, e)), L::f(-1.0f));
  const auto s = L::mul(g, g);
  auto p = L::fma(g, L::f(-0.14020569622516632f), L::f(0.15383614599704742f));
  p = L::fma(p, g, L::f(-0.13997136056423187f));
  p = L::fma(p, g, L::f(0.1641702800989151f));
  p = L::fma(p, g, L::f(-0.20011073350906372f));
  p = L::fma(p, g, L::f(0.250077486038208f));
  p = L::fma(p, g, L::f(-0.33333200216293335f));
  p = L::fma(p, g, L::f(0.49999937415122986f));
  // -8.262958405176314e-08 is -ln 2 / 2^23: e is a multiple of 2^23.
  return L::fma(L::to_float(e), L::f(-8.262958405176314e-08f), L::fms(p, s, g));
}

// sin and cos of pi/4 f for f in [-1, 1).
template <class L>
ADAMEZO_HD void sin_cos_quarter_pi(typename L::F f, typename L::F& sine, typename L::F& cosine) {
  const auto s = L::mul(f, f);
  auto t = L::fma(s, L::f(-3.5579418181441724e-05f), L::f(0.002489370759576559f));
  t = L::fma(t, s, L::f(-0.08074513077735901f));
  t = L::fma(t, s, L::f(0.7853981256484985f));
  sine = L::mul(t, f);
  auto c = L::fma(s, L::f(-0.00031918685999698937f), L::f(0.015850437805056572f));
  c = L::fma(c, s, L::f(-0.3084245026111603f));
  cosine = L::fma(c, s, L::f(1.0f));
}

template <class L>
ADAMEZO_HD void normal_pair(typename L::I x0, typename L::I x1, typename L::F& z0,
                            typename L::F& z1) {
  // Bit 31 of x0 is a sign, bit 0 is set so that u is never 0.
  const auto u = L::mul(L::to_float(L::and_or(x0, 0x7ffffffeu, 1u)), L::f(0x1p-31f));
  const auto r = L::sqrt(minus_log<L>(u));
  const auto f = L::add(L::from_bits(L::and_or(x1, 0x007fffffu, 0x40000000u)), L::f(-3.0f));
  typename L::F sine, cosine;
  sin_cos_quarter_pi<L>(f, sine, cosine);
  const auto rc = L::mul(r, cosine);
  z0 = L::flip_sign(L::fma(r, sine, rc), x0);
  z1 = L::flip_sign(L::fnma(r, sine, rc), x1);
}

}  // namespace adamezo
