// What translated kernels (translate.py) are made of: threads, memory that is checked at every
// access, and a function for each instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
using f32 = float;
using pred = bool;
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

// ---- threads ----------------------------------------------------------------------------------

struct Thread {
  u32 thread, threads, block, blocks;
};

// A kernel as translate.py registers it.
struct Entry {
  const char* name;
  void (*run)(Thread&);
  const u32* parameters;  // where each begins, and where the last one ends
  int parameter_count;
  u32 static_shared;
  u32 most_threads;
  unsigned char* covered;
  u32 pieces;
};
struct Registration {
  explicit Registration(const Entry* entries);  // up to one without a name
};

constexpr u32 kWarp = 32;  // threads of a block whose numbers follow each other

void barrier(Thread& self);
void warp_barrier(Thread& self);
[[noreturn]] void fault(const Thread& self, const char* what, u64 address, u32 size);

// ---- memory -----------------------------------------------------------------------------------

enum Access { kLd, kSt, kAtomic };

// Memory that the launch may use.
struct Range {
  u64 begin, end, writable;
};
extern Range allowed;  // the one that was used last
void find_range(const Thread& self, u64 address, u32 size, bool writes);

// Who used four bytes of shared memory since the last barrier of the block: nobody, a thread (its
// number + 1), or the threads of one warp, by that warp's number. Those used it before their last
// barrier, which keeps them in order with each other alone; or not all before it (kMixed). Kernels
// whose threads share four bytes would be accused falsely; there are none.
constexpr u16 kNobody = 0, kOfWarp = 0x2000, kMixed = 0x4000, kMany = 0xffff;
struct Cell {
  u16 writer, reader;
  bool written;  // since the block began
};
inline u16 warp_of(u16 user) { return u16(user >= kOfWarp ? user % kOfWarp : (user - 1) / kWarp); }

// Of the block that runs.
extern const unsigned char* parameters;
extern u32 parameter_bytes;
extern unsigned char* shared_memory;
extern Cell* cells;
extern u32 shared_bytes;

template <int kSize, Access kAccess>
inline unsigned char* global(const Thread& self, u64 address) {
  if (address % kSize != 0) fault(self, "misaligned access of global memory", address, kSize);
  if (address < allowed.begin || address > allowed.end - kSize ||
      (kAccess != kLd && !allowed.writable))
    find_range(self, address, kSize, kAccess != kLd);
  return reinterpret_cast<unsigned char*>(address);
}

template <int kSize, Access kAccess>
inline unsigned char* shared(const Thread& self, u32 address) {
  if (address % kSize != 0) fault(self, "misaligned access of shared memory", address, kSize);
  if (u64(address) + kSize > shared_bytes)
    fault(self, "access behind the end of shared memory", address, kSize);
  const u16 me = u16(self.thread + 1), my_warp = warp_of(me);
  const auto in_order = [&](u16 user) {
    return user == kNobody || user == me || user == kOfWarp + my_warp;
  };
  for (u32 i = address / 4; 4 * i < address + kSize; ++i) {
    Cell& cell = cells[i];
    if (!in_order(cell.writer))
      fault(self, "race: no barrier since another thread wrote this shared memory", address, kSize);
    if (kAccess == kSt) {
      if (!in_order(cell.reader))
        fault(self, "race: no barrier since another thread read this shared memory", address,
              kSize);
      cell.writer = me;
      cell.written = true;
    } else {
      if (!cell.written) fault(self, "read of shared memory that nobody wrote", address, kSize);
      if (in_order(cell.reader))
        cell.reader = me;
      else
        cell.reader =
            cell.reader != kMany && warp_of(cell.reader) == my_warp ? u16(kMixed + my_warp) : kMany;
    }
  }
  return shared_memory + address;
}

template <int kSize, Access kAccess>
inline const unsigned char* param(const Thread& self, u64 address) {
  if (address % kSize != 0) fault(self, "misaligned access of parameters", address, kSize);
  if (address > parameter_bytes || parameter_bytes - address < kSize)
    fault(self, "access behind the end of the parameters", address, kSize);
  return parameters + address;
}

// By an address that may be one of global memory or, after cvta.param, among the parameters.
template <int kSize, Access kAccess>
inline const unsigned char* generic(const Thread& self, u64 address) {
  const u64 offset = address - u64(parameters);
  return offset < parameter_bytes ? param<kSize, kAccess>(self, offset)
                                  : global<kSize, kAccess>(self, address);
}

template <class T>
inline T read(const unsigned char* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
inline void write(unsigned char* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// ---- registers --------------------------------------------------------------------------------

// A register or a number as an operand: the same bits, or the lower ones.
template <class To, class From>
inline To as(From value) {
  if constexpr (sizeof(To) == sizeof(From)) {
    To to;
    std::memcpy(&to, &value, sizeof to);
    return to;
  } else {
    static_assert(std::is_integral_v<To> && std::is_integral_v<From> && sizeof(To) < sizeof(From));
    return To(value);
  }
}

// A wider register is filled with zeros, or with the sign of a signed value.
template <class Register, class T>
inline void set(Register& to, T value) {
  if constexpr (sizeof(Register) == sizeof(T)) {
    std::memcpy(&to, &value, sizeof to);
  } else {
    static_assert(std::is_integral_v<T> && sizeof(T) < sizeof(Register));
    to = Register(value);
  }
}

// What a register holds that was never set.
template <class T>
constexpr T garbage = T(0xa5a5a5a5a5a5a5a5u);
template <>
constexpr f32 garbage<f32> = -0x1.a5a5a4p100f;

}  // namespace ptx
