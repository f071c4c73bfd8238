// AMX's tiles in plain C++, included in front of a kernel, so that what it does with them is tested where there are none.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace emulated {

inline thread_local uint8_t tiles[8][16][64];

inline void zero(int t) { std::memset(tiles[t], 0, sizeof tiles[t]); }
inline void load(int t, const void* from, long step) {
  for (int i = 0; i < 16; ++i) std::memcpy(tiles[t][i], static_cast<const char*>(from) + i * step, 64);
}
inline void keep(int t, void* to, long step) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(to) + i * step, tiles[t][i], 64);
}
// c += a * b: rows of a are of four bytes for each row of b
template <class A, class B> void products(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      std::memcpy(&sum, &tiles[c][m][4 * n], 4);
      for (int k = 0; k < 64; ++k) sum += static_cast<A>(tiles[a][m][k]) * static_cast<B>(tiles[b][k / 4][4 * n + k % 4]);
      std::memcpy(&tiles[c][m][4 * n], &sum, 4);
    }
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbsud
#undef _tile_loadconfig
#undef _tile_release
#undef __AMX_INT8__
#define __AMX_INT8__ 1
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, from, step) emulated::load(t, from, step)
#define _tile_stored(t, to, step) emulated::keep(t, to, step)
#define _tile_dpbusd(c, a, b) emulated::products<uint8_t, int8_t>(c, a, b)
#define _tile_dpbsud(c, a, b) emulated::products<int8_t, uint8_t>(c, a, b)
#define _tile_loadconfig(p) static_cast<void>(p)
#define _tile_release() static_cast<void>(0)
#define syscall(...) 0  // the kernel allows it
