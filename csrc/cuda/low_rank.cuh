// The bodies of the CUDA kernels for `lowrank` directions of matrices (vectors have exact normals,
// and the kernels of those).
//
// A block of threads takes tiles of a matrix (adamezo/low_rank.h). It makes the factors of a tile
// once, in shared memory, and then a direction of a weight costs a multiplication for each term. A
// thread takes sixteen elements at a time, chunks of 16 bytes that lie below each other: all have
// the same columns, so that it reads the factor of these once for all of them.
//
// What the threads of a block do between two barriers is one call of Team::each, so that the host
// can run a block too, one thread after the other.
#pragma once

#include "adamezo/low_rank.h"
#include "cuda/buffered.cuh"

namespace adamezo {
namespace cuda {

// Shared memory for factors, and for `kept` directions, where there are some: together they fit
// into the 48 KB that need no asking for.
template <int kKept>
constexpr int kFactorFloats = kKept == 2 ? 3584 : 7168;
constexpr int kMostTerms = kFactorFloats<0> / 256;  // no shape of a tile has more
static_assert(kMostTileHeight + 128 <= kFactorFloats<2>, "one term of any tile has to fit");

// Some of a segment's elements: those in a rectangle of its matrix.
struct Tile {
  Segment segment;
  Tiles tiles;
  int64_t row, column;  // of the first element, multiples of four
  int rows, columns;    // that are in the segment's range; the others are not touched

  ADAMEZO_HD int log_width() const { return tiles.log_width; }
  ADAMEZO_HD int width() const { return 1 << tiles.log_width; }
  ADAMEZO_HD int height() const { return tiles.height; }
  ADAMEZO_HD int stride() const {
    return width() + height();
  }  // from one term's factors to the next

  // Moves to a tile of the segments, the first time or from one before it.
  ADAMEZO_HD void move(const DeviceJob& job, int64_t number, bool is_first) {
    if (is_first || number - segment.first >= tiles.count) {
      segment = job.segments[segment_at(job.segments, job.segment_count, number)];
      tiles = tiles_of(segment, job.offset);
    }
    const int64_t down = quotient(number - segment.first, tiles.across);
    row = tiles.row + down * height();
    column = tiles.column + (number - segment.first - down * tiles.across) * width();
    rows = least(tiles.end_row - row, height()),
    columns = least(tiles.end_column - column, width());
  }

 private:
  static ADAMEZO_HD int least(int64_t a, int b) { return a < b ? int(a) : b; }
};

// What the threads of a block share. All of them have the tile from there, in registers that the
// loop over terms needs it would take too many.
struct TileSpace {
  Words words;
  Tile& tile;
  float* factors;       // [terms][width + height] of a tile: its columns, then its rows
  float* coefficients;  // [kMostTerms][2]: of the direction that each term belongs to
  float* kept;          // [kKept][kThreadElements][threads]: directions that are needed again
  int threads;

  ADAMEZO_HD float& of(int k, int i, int thread) const {
    return kept[(k * kThreadElements + i) * threads + thread];
  }
};

// Where the factor of four columns is in a term's. Threads side by side read sixteen bytes each:
// from one place to the next, whether a chunk has four elements or eight.
template <int kColumns>
ADAMEZO_HD int place_of_columns(int column, int width) {
  return kColumns == 4 ? column : column / 8 * 4 + column % 8 / 4 * (width / 2);
}

// A patch is what the threads of a block take of a tile at once: chunks of kColumns elements, row
// by row, the c-th of a thread `threads` chunks after its one before.
template <int kColumns>
struct Patch {
  static constexpr int kChunksOfThread = kThreadElements / kColumns;
  int first, threads, log_chunks;  // of a row

  ADAMEZO_HD Patch(const Tile& tile, int patch, int thread, int threads)
      : first(patch * kChunksOfThread * threads + thread),
        threads(threads),
        log_chunks(tile.log_width() - (kColumns == 8 ? 3 : 2)) {}
  // In the tile. The column is that of every chunk, as the threads make up whole rows.
  ADAMEZO_HD int row(int c) const { return (first + c * threads) >> log_chunks; }
  ADAMEZO_HD int column() const { return (first & ((1 << log_chunks) - 1)) * kColumns; }

  static ADAMEZO_HD int rows(const Tile& tile, int threads) {
    return threads * kThreadElements >> tile.log_width();
  }
};

// Makes one thread's part of the factors of the terms [begin, begin + count), for the tile's
// columns and its rows [first_row, end_row), which are multiples of four.
template <int kColumns>
ADAMEZO_HD void fill_factors(const DeviceJob& job, const TileSpace& space, int begin, int count,
                             int first_row, int end_row, int thread) {
  const Tile& tile = space.tile;
  const int columns = tile.width() / 4, calls = columns + (end_row - first_row) / 4;
  for (int i = thread; i < count * calls; i += space.threads) {
    const int term = i / calls, call = i - term * calls, k = (begin + term) / int(job.rank);
    const bool is_row = call >= columns;
    const int first = is_row ? first_row + 4 * (call - columns) : 4 * call;
    const Purpose purpose = is_row ? Purpose::kRow : Purpose::kColumn;
    const uint32_t q = uint32_t(begin + term - k * int(job.rank));
    float z[4];
    Exact::quad(
        job.round_keys, uint64_t((is_row ? tile.row : tile.column) + first),
        uint32_t(tile.segment.parameter) | uint32_t(purpose) << 24,
        {philox_stream(job.round_keys, space.words.directions[k], q), kFastOnes, 0.0f, 0.0f}, z);
    float* const to =
        space.factors + term * tile.stride() +
        (is_row ? tile.width() + first : place_of_columns<kColumns>(first, tile.width()));
    ADAMEZO_UNROLL
    for (int e = 0; e < 4; ++e)
      to[e] = is_row && job.rank > 1 ? ScalarLanes::mul(z[e], job.row_scale) : z[e];
  }
  for (int term = thread; term < count; term += space.threads) {
    const int k = (begin + term) / int(job.rank);
    space.coefficients[2 * term] = space.words.first[k];
    space.coefficients[2 * term + 1] = job.second ? space.words.second[k] : 0.0f;
  }
}

// Adds the terms [begin, begin + count) to a thread's direction in progress, and gives each
// direction that is complete to its state.
template <class State>
ADAMEZO_HD void add_terms(const DeviceJob& job, const TileSpace& space, int patch, int begin,
                          int count, int thread, State& state) {
  const Tile& tile = space.tile;
  constexpr int kColumns = State::kColumns;
  const Patch<kColumns> of(tile, patch, thread, space.threads);
  const float* columns = space.factors + place_of_columns<kColumns>(of.column(), tile.width());
  const int half = tile.width() / 2, last = tile.height() - 1;
  const float* rows[of.kChunksOfThread];
  ADAMEZO_UNROLL
  for (int c = 0; c < of.kChunksOfThread; ++c)
    rows[c] = space.factors + tile.width() + (of.row(c) < last ? of.row(c) : last);
  // Adds one term, the first or another one of its direction.
  const auto add_term = [&](int at, auto add) {
    float v[kColumns];
    std::memcpy(v, __builtin_assume_aligned(columns + at, 16), 16);
    if constexpr (kColumns == 8)
      std::memcpy(v + 4, __builtin_assume_aligned(columns + at + half, 16), 16);
    ADAMEZO_UNROLL
    for (int c = 0; c < of.kChunksOfThread; ++c) {
      const float u = rows[c][at];
      ADAMEZO_UNROLL
      for (int e = 0; e < kColumns; ++e) add(u, v[e], state.z[c * kColumns + e]);
    }
  };
  const auto first_term = [](float u, float v, float& z) { z = ScalarLanes::mul(u, v); };
  const auto next_term = [](float u, float v, float& z) { z = ScalarLanes::fma(u, v, z); };
  const auto complete = [&](int k, int term) {
    const float* const coefficients = space.coefficients + 2 * term;
    state.add(space, thread, k, coefficients[0], coefficients[1]);
  };
  if (job.rank == 1) {
    ADAMEZO_NO_UNROLL
    for (int term = 0, at = 0; term < count; ++term, at += tile.stride()) {
      add_term(at, first_term);
      complete(begin + term, term);
    }
    return;
  }
  int k = begin / int(job.rank), q = begin - k * int(job.rank);
  ADAMEZO_NO_UNROLL
  for (int term = 0, at = 0; term < count; ++term, at += tile.stride()) {
    q == 0 ? add_term(at, first_term) : add_term(at, next_term);
    if (++q < int(job.rank)) continue;
    complete(k, term);
    q = 0, ++k;
  }
}

// Walks a block's share of the tiles, of which job.elements and the segments' `first` are counts.
// The team calls each(f) as f(thread, state) for every thread of the block, and has a barrier.
template <class State, class Team>
ADAMEZO_HD void walk_tiles(const DeviceJob& job, const TileSpace& space, int64_t block,
                           int64_t blocks, Team team) {
  using Patch = Patch<State::kColumns>;
  const int64_t first = job.elements * block / blocks;
  const int tiles = int(job.elements * (block + 1) / blocks - first);
  const int terms = int(State::directions(job) * job.rank);
  for (int number = 0; number < tiles; ++number) {
    team.barrier();
    team.each([&](int thread, State&) {
      if (thread == 0) space.tile.move(job, first + number, number == 0);
    });
    team.barrier();
    const Tile& tile = space.tile;
    const int in_patch = Patch::rows(tile, space.threads);
    const int patches = (tile.rows + in_patch - 1) / in_patch,
              fit = kFactorFloats<State::kKept> / tile.stride();
    // All terms' factors are made once for the tile where they fit, and else for each patch.
    const bool all = terms <= fit;
    for (int patch = 0; patch < patches; ++patch) {
      for (int begin = 0; begin < terms; begin += fit) {
        const int count = terms - begin < fit ? terms - begin : fit;
        if (patch == 0 || !all) {
          const int row = all ? 0 : patch * in_patch, end = (all ? patches : patch + 1) * in_patch;
          team.barrier();
          team.each([&](int thread, State&) {
            fill_factors<State::kColumns>(job, space, begin, count, row,
                                          end < tile.height() ? end : tile.height(), thread);
          });
          team.barrier();
        }
        team.each([&](int thread, State& state) {
          if (begin == 0) state = State();
          add_terms(job, space, patch, begin, count, thread, state);
        });
      }
      team.each([&](int thread, State& state) {
        state.finish(job, space, Patch(tile, patch, thread, space.threads), thread);
      });
    }
  }
}

// The elements of chunk c of a patch that the tile and the segment hold: visit(index, row, column,
// low, high), where index is that of the chunk's first element, and the rest as in for_each_piece.
template <int kColumns, class Visit>
ADAMEZO_HD void for_each_piece_of(const DeviceJob& job, const Tile& tile,
                                  const Patch<kColumns>& patch, int c, Visit visit) {
  const int row = patch.row(c), left = tile.columns - patch.column();
  if (row >= tile.rows || left <= 0) return;
  const uint64_t index = uint64_t(tile.row + row) * uint64_t(tile.segment.columns) +
                         uint64_t(tile.column + patch.column());
  for_each_piece(tile.segment, int64_t(index - job.offset) - tile.segment.index_offset,
                 left < kColumns ? left : kColumns,
                 [&](int64_t of_row, int64_t column, int low, int high) {
                   visit(index, of_row, column, low, high);
                 });
}

// The words of stochastic rounding of four elements from `index` on, which need not be a multiple
// of four: where rows are no multiple of four long.
ADAMEZO_HD void random_words_at(const DeviceJob& job, const Words& words, uint64_t index,
                                uint32_t parameter, uint32_t x[4]) {
  const int skipped = int(index % 4);
  // The words of the block that holds an element, with those of its element `skipped` first.
  const auto block = [&](uint64_t of, uint32_t four[4]) {
    const uint32_t high = uint32_t(of >> kLogElementsPerHigh);
    uint32_t found[4];
    Exact::quad_words(job.round_keys, of, parameter,
                      philox_stream(job.round_keys, words.directions[0], high), found);
    ADAMEZO_UNROLL
    for (int i = 0; i < 4; ++i) four[i] = skipped & 1 ? found[(i + 1) % 4] : found[i];
    ADAMEZO_UNROLL
    for (int i = 0; i < 4; ++i) found[i] = skipped & 2 ? four[(i + 2) % 4] : four[i];
    ADAMEZO_UNROLL
    for (int i = 0; i < 4; ++i) four[i] = found[i];
  };
  block(index, x);
  if (skipped != 0) {
    uint32_t behind[4];
    block(index + 4, behind);
    ADAMEZO_UNROLL
    for (int i = 1; i < 4; ++i) x[i] = i + skipped < 4 ? x[i] : behind[i];
  }
}

// A thread's elements of a patch of a tile, of weights of type T.
template <class T, Rounding kRounding>
struct PatchOf {
  static constexpr int kColumns = kChunk<T>;
  const DeviceJob& job;
  const Words& words;
  const Tile& tile;
  const Patch<kColumns>& patch;

  // Reads chunk c from where the source is; elements outside the segment become 0.
  ADAMEZO_HD void load(int c, float values[kColumns]) const {
    T elements[kColumns] = {};
    for_each_piece_of(job, tile, patch, c,
                      [&](uint64_t, int64_t row, int64_t column, int low, int high) {
                        const T* const from = reinterpret_cast<const T*>(tile.segment.source) +
                                              row * tile.segment.source_stride + column;
                        assume_global(from);
                        load_chunk(
                            from, is_whole(from, low, high),
                            [&](int i) { return i >= low && i < high; }, elements);
                      });
    ADAMEZO_UNROLL
    for (int i = 0; i < kColumns; ++i) values[i] = to_float32(elements[i]);
  }

  ADAMEZO_HD void store(int c, const float values[kColumns]) const {
    for_each_piece_of(
        job, tile, patch, c, [&](uint64_t index, int64_t row, int64_t column, int low, int high) {
          T elements[kColumns];
          round(index, values, elements);
          T* const to =
              reinterpret_cast<T*>(tile.segment.address) + row * tile.segment.row_stride + column;
          assume_global(to);
          store_chunk(elements, to, is_whole(to, low, high), true,
                      [&](int i) { return i >= low && i < high; });
        });
  }

 private:
  static ADAMEZO_HD void assume_global([[maybe_unused]] const T* address) {
#if defined(__CUDA_ARCH__)
    __builtin_assume(__isGlobal(address));
#endif
  }
  static ADAMEZO_HD bool is_whole(const T* chunk, int low, int high) {
    return high - low == kColumns && reinterpret_cast<uint64_t>(chunk) % sizeof(Words16) == 0;
  }
  ADAMEZO_HD void round(uint64_t index, const float values[kColumns], T elements[kColumns]) const {
    ADAMEZO_UNROLL
    for (int i = 0; i < kColumns; i += 4) {
      if constexpr (kRounding == Rounding::kStochastic) {
        uint32_t random[4];
        random_words_at(job, words, index + uint64_t(i),
                        uint32_t(tile.segment.parameter) | uint32_t(Purpose::kRounding) << 24,
                        random);
        round_stochastically(values + i, random, elements + i);
      } else {
        ADAMEZO_UNROLL
        for (int e = 0; e < 4; ++e) from_float32(values[i + e], elements[i + e]);
      }
    }
  }
};

// The operations, as states of a thread. A state has z, the direction in progress, and is told of
// each complete one.

struct Tiled {
  using Directions = Exact;  // of the factors
};

struct TileAlong {
  static constexpr int kKept = 0;
  float z[kThreadElements];

  static ADAMEZO_HD int64_t directions(const DeviceJob&) { return 1; }
  ADAMEZO_HD void add(const TileSpace&, int, int, float, float) {}
};

struct TileSample : Tiled {
  template <class T>
  struct State : TileAlong {
    static constexpr int kColumns = kChunk<T>;

    ADAMEZO_HD void finish(const DeviceJob& job, const TileSpace& space,
                           const Patch<kColumns>& patch, int) const {
      const PatchOf<T, Rounding::kNearest> out{job, space.words, space.tile, patch};
      ADAMEZO_UNROLL
      for (int c = 0; c < kChunks<T>; ++c) out.store(c, z + c * kColumns);
    }
  };
};

template <Rounding kRounding>
struct TilePerturb : Tiled {
  template <class T>
  struct State : TileAlong {
    static constexpr int kColumns = kChunk<T>;

    ADAMEZO_HD void finish(const DeviceJob& job, const TileSpace& space,
                           const Patch<kColumns>& patch, int) const {
      const PatchOf<T, kRounding> theta{job, space.words, space.tile, patch};
      float values[kThreadElements];  // of all chunks, so that they are read at the same time
      ADAMEZO_UNROLL
      for (int c = 0; c < kChunks<T>; ++c) theta.load(c, values + c * kColumns);
      ADAMEZO_UNROLL
      for (int i = 0; i < kThreadElements; ++i)
        values[i] = ScalarLanes::fma(job.scale, z[i], values[i]);
      ADAMEZO_UNROLL
      for (int c = 0; c < kChunks<T>; ++c) theta.store(c, values + c * kColumns);
    }
  };
};

template <bool kSecond>
struct TileSums {
  static constexpr int kKept = 1;
  float z[kThreadElements];
  ThreadMoments moments = {};

  static ADAMEZO_HD int64_t directions(const DeviceJob& job) { return job.horizon; }
  // The newest is kept for an update, which needs it again.
  ADAMEZO_HD void add(const TileSpace& space, int thread, int k, float first, float second) {
    if (k == 0) {
      ADAMEZO_UNROLL
      for (int i = 0; i < kThreadElements; ++i) space.of(0, i, thread) = z[i];
    }
    ADAMEZO_UNROLL
    for (int i = 0; i < kThreadElements / 4; ++i)
      accumulate<ScalarLanes, kSecond>(moments[i], z + 4 * i, first, second);
  }
  ADAMEZO_HD float s1(int i) const { return moments[i / 4].s1[i % 4]; }
  ADAMEZO_HD float s2(int i) const { return moments[i / 4].s2[i % 4]; }
};

template <bool kSecond, Rounding kRounding>
struct TileUpdate : Tiled {
  template <class T>
  struct State : TileSums<kSecond> {
    static constexpr int kColumns = kChunk<T>;

    ADAMEZO_HD void finish(const DeviceJob& job, const TileSpace& space,
                           const Patch<kColumns>& patch, int thread) const {
      const PatchOf<T, kRounding> theta{job, space.words, space.tile, patch};
      float steps[kThreadElements];  // half as many registers as the sums, while memory is awaited
      ADAMEZO_UNROLL
      for (int i = 0; i < kThreadElements; ++i)
        steps[i] = preconditioned<ScalarLanes, kSecond>(this->s1(i), this->s2(i), job.eps);
      ADAMEZO_UNROLL
      for (int c = 0; c < kChunks<T>; ++c) {
        float values[kColumns];
        theta.load(c, values);
        ADAMEZO_UNROLL
        for (int i = 0; i < kColumns; ++i) {
          const int at = c * kColumns + i;
          values[i] = updated(job, space.words, values[i], space.of(0, at, thread), steps[at]);
        }
        theta.store(c, values);
      }
    }
  };
};

template <bool kSecond>
struct TileMoment : Tiled {
  template <class T>
  struct State : TileSums<kSecond> {
    static constexpr int kColumns = kChunk<T>;

    ADAMEZO_HD void finish(const DeviceJob& job, const TileSpace& space,
                           const Patch<kColumns>& patch, int) const {
      const PatchOf<T, Rounding::kNearest> out{job, space.words, space.tile, patch};
      ADAMEZO_UNROLL
      for (int c = 0; c < kChunks<T>; ++c) {
        float values[kColumns];
        ADAMEZO_UNROLL
        for (int i = 0; i < kColumns; ++i)
          values[i] = kSecond ? this->s2(c * kColumns + i) : this->s1(c * kColumns + i);
        out.store(c, values);
      }
    }
  };
};

// Where four elements of a tile are, of which a segment's row holds some.
struct QuadInTile {
  const Tile& tile;
  uint64_t first_index;
  int64_t row, column;  // of the segment
  int first, end;

  ADAMEZO_HD const Segment& segment() const { return tile.segment; }
  ADAMEZO_HD uint64_t index() const { return first_index; }
  ADAMEZO_HD int low() const { return first; }
  ADAMEZO_HD int high() const { return end; }
  ADAMEZO_HD int64_t memory() const { return row * segment().row_stride + column; }
  ADAMEZO_HD int64_t source() const { return row * segment().source_stride + column; }
  ADAMEZO_HD int64_t position() const { return row * segment().row_length + column; }
  ADAMEZO_HD void random_words(const DeviceJob& job, const Words& words, uint32_t parameter,
                               uint32_t x[kQuad]) const {
    random_words_at(job, words, first_index, parameter, x);
  }
};

template <class R, bool kUpdate>
struct TileByRule : Tiled {
  template <class T>
  struct State {
    static constexpr int kColumns = kQuad, kKept = R::kDirections;
    float z[kThreadElements];

    static ADAMEZO_HD int64_t directions(const DeviceJob&) { return R::kDirections; }
    ADAMEZO_HD void add(const TileSpace& space, int thread, int k, float, float) {
      ADAMEZO_UNROLL
      for (int i = 0; i < kThreadElements; ++i) space.of(k, i, thread) = z[i];
    }
    ADAMEZO_HD void finish(const DeviceJob& job, const TileSpace& space,
                           const Patch<kColumns>& patch, int thread) const {
      ADAMEZO_NO_UNROLL
      for (int c = 0; c < kThreadElements / kQuad; ++c) {
        for_each_piece_of(job, space.tile, patch, c,
                          [&](uint64_t index, int64_t row, int64_t column, int low, int high) {
                            quad_by_rule<R, kUpdate>(
                                job, space.words,
                                QuadInTile{space.tile, index, row, column, low, high},
                                [&](int k, float of[kQuad]) {
                                  ADAMEZO_UNROLL
                                  for (int i = 0; i < kQuad; ++i)
                                    of[i] = space.of(k, c * kQuad + i, thread);
                                });
                          });
      }
    }
  };
};

// Calls use(instance) with the body that runs the job on matrices, of low-rank directions.
template <class Use>
void select_tiles(const Job& job, Use use) {
  bool found = false;
  with_rule(job.rule, [&](auto rule) {
    using R = decltype(rule);
    if constexpr (R::kUpdates)
      if (job.operation == Operation::kUpdate)
        found = true, use(Instance<TileByRule<R, true>, float>());
    if constexpr (R::kHasDirection)
      if (job.operation == Operation::kPerturb)
        found = true, use(Instance<TileByRule<R, false>, float>());
  });
  if (found) return;
  constexpr auto kNearest = Rounding::kNearest, kStochastic = Rounding::kStochastic;
  switch (job.operation) {
    case Operation::kSample:
      return by_type<TileSample>(job.type, use);
    case Operation::kPerturb:
      return by_rounding<TilePerturb<kNearest>, TilePerturb<kStochastic>>(job, use);
    case Operation::kUpdate:
      return job.second
                 ? by_rounding<TileUpdate<true, kNearest>, TileUpdate<true, kStochastic>>(job, use)
                 : by_rounding<TileUpdate<false, kNearest>, TileUpdate<false, kStochastic>>(job,
                                                                                            use);
    case Operation::kMoment:  // always float32
      return job.second ? use(Instance<TileMoment<true>, float>())
                        : use(Instance<TileMoment<false>, float>());
  }
}

}  // namespace cuda
}  // namespace adamezo
