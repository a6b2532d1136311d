// What each instruction of translate.py computes, by the manual of PTX. The approximate ones give
// the nearest float32, or where libm is a hair off its result, which the manual's bounds allow too.
#pragma once

#include "machine.h"

namespace ptx {

// ---- integers ---------------------------------------------------------------------------------
// Modulo a power of two, so they are computed in u64, where nothing overflows.

template <class T>
inline T add(T a, T b) {
  return T(u64(a) + u64(b));
}
template <class T>
inline T sub(T a, T b) {
  return T(u64(a) - u64(b));
}
template <class T>
inline T mul_lo(T a, T b) {
  return T(u64(a) * u64(b));
}
template <class T>
inline auto mul_wide(T a, T b) {
  static_assert(sizeof(T) == 4);
  using Wide = std::conditional_t<std::is_signed_v<T>, s64, u64>;
  return Wide(a) * Wide(b);
}
template <class T>
inline T mad_lo(T a, T b, T c) {
  return add(mul_lo(a, b), c);
}
// The manual leaves a division by 0 open; GPUs give all ones.
template <class T>
inline T div(T a, T b) {
  return b == 0 ? T(-1) : b == T(-1) && T(-1) < 0 ? sub(T(0), a) : T(a / b);
}
template <class T>
inline T rem(T a, T b) {
  return b == 0 ? a : b == T(-1) && T(-1) < 0 ? T(0) : T(a % b);
}

template <class T>
inline T and_(T a, T b) {
  return T(a & b);
}
template <class T>
inline T or_(T a, T b) {
  return T(a | b);
}
template <class T>
inline T xor_(T a, T b) {
  return T(a ^ b);
}
template <class T>
inline T not_(T a) {
  return T(~a);
}
template <>
inline pred not_(pred a) {
  return !a;
}
template <class T>
inline T shl(T a, u32 n) {
  return n < 8 * sizeof(T) ? T(a << n) : T(0);
}
template <class T>
inline T shr(T a, u32 n) {
  constexpr u32 kMost = 8 * sizeof(T) - 1;
  return n <= kMost ? T(a >> n) : T(-1) < 0 ? T(a >> kMost) : T(0);
}
template <class T>
inline T bfi(T field, T into, u32 position, u32 length) {
  position &= 0xff, length &= 0xff;
  const T ones = length < 8 * sizeof(T) ? T((T(1) << length) - 1) : T(-1);
  const T mask = shl(ones, position);
  return T((shl(field, position) & mask) | (into & ~mask));
}
template <class T>
inline T lop3(T a, T b, T c, u32 table) {
  // Not a loop, so that the compiler computes no term that the table leaves out.
  const auto term = [&](u32 i) {
    return table >> i & 1 ? (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c) : T(0);
  };
  return term(0) | term(1) | term(2) | term(3) | term(4) | term(5) | term(6) | term(7);
}

// ---- float32 ----------------------------------------------------------------------------------

// A GPU has one NaN.
inline f32 canonical(f32 a) { return a != a ? as<f32>(b32(0x7fffffff)) : a; }

template <class T>
inline f32 add_rn(T a, T b) {
  return canonical(a + b);
}
template <class T>
inline f32 mul_rn(T a, T b) {
  return canonical(a * b);
}
template <class T>
inline f32 div_rn(T a, T b) {
  return canonical(a / b);
}
template <class T>
inline f32 fma_rn(T a, T b, T c) {
  return canonical(std::fma(a, b, c));
}
template <class T>
inline f32 sqrt_rn(T a) {
  return canonical(std::sqrt(a));
}
template <class T>
inline T neg(T a) {
  return sub(T(0), a);
}
template <>
inline f32 neg(f32 a) {
  return -a;
}
template <class T>
inline f32 abs(T a) {
  return std::fabs(a);
}
// Of a number and a NaN the number; -0 is below 0.
template <class T>
inline T min(T a, T b) {
  if constexpr (std::is_same_v<T, f32>) {
    if (a != a || b != b) return canonical(a != a ? b : a);
    if (a == b) return std::signbit(a) ? a : b;
  }
  return a < b ? a : b;
}
template <class T>
inline T max(T a, T b) {
  if constexpr (std::is_same_v<T, f32>) {
    if (a != a || b != b) return canonical(a != a ? b : a);
    if (a == b) return std::signbit(a) ? b : a;
  }
  return a > b ? a : b;
}

inline f32 flushed(f32 a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }
template <class T>
inline f32 rsqrt_approx_ftz(T a) {
  return canonical(flushed(f32(1 / std::sqrt(double(flushed(a))))));
}
template <class T>
inline f32 rcp_approx_ftz(T a) {
  return canonical(flushed(1 / flushed(a)));
}
template <class T>
inline f32 sqrt_approx_ftz(T a) {
  return canonical(std::sqrt(flushed(a)));
}
template <class T>
inline f32 lg2_approx_ftz(T a) {
  return canonical(std::log2(flushed(a)));
}
template <class T>
inline f32 sin_approx_ftz(T a) {
  return canonical(std::sin(flushed(a)));
}
template <class T>
inline f32 cos_approx_ftz(T a) {
  return canonical(std::cos(flushed(a)));
}

// ---- moves, choices, comparisons --------------------------------------------------------------

template <class T>
inline T mov(T a) {
  return a;
}
template <class T>
inline T cvta_to_global(T a) {
  return a;
}
template <class T>
inline T cvta_param(T a) {
  return T(u64(parameters) + a);
}
template <class T>
inline T selp(T a, T b, pred first) {
  return first ? a : b;
}

// With a NaN all are false but neu and nan.
template <class T>
inline pred setp_eq(T a, T b) {
  return a == b;
}
template <class T>
inline pred setp_ne(T a, T b) {
  return a < b || a > b;
}
template <class T>
inline pred setp_lt(T a, T b) {
  return a < b;
}
template <class T>
inline pred setp_le(T a, T b) {
  return a <= b;
}
template <class T>
inline pred setp_gt(T a, T b) {
  return a > b;
}
template <class T>
inline pred setp_ge(T a, T b) {
  return a >= b;
}
template <class T>
inline pred setp_neu(T a, T b) {
  return !(a == b);
}
template <class T>
inline pred setp_nan(T a, T b) {
  return a != a || b != b;
}

// ---- conversions ------------------------------------------------------------------------------

template <class To, class From>
inline To cvt(From a) {
  if constexpr (std::is_same_v<From, f16>)
    return canonical(f32(as<_Float16>(a.bits)));
  else
    return To(a);
}
template <class To, class From>
inline To cvt_rn(From a) {
  if constexpr (std::is_same_v<To, f16>) {
    return {a != a ? u16(0x7fff) : as<u16>(_Float16(a))};
  } else if constexpr (std::is_same_v<To, bf16>) {
    const u32 bits = as<u32>(a), low = bits & 0xffff, high = bits >> 16;
    return {a != a ? u16(0x7fff) : u16(high + (low > 0x8000 || (low == 0x8000 && high % 2 == 1)))};
  } else {
    return To(a);
  }
}

}  // namespace ptx
