// `lowrank` and `flipout` directions of matrices on the CPU: their factors are made once for a
// block of rows and a window of columns, and then a direction of a weight costs a load and a
// multiplication for each term; one of `flipout` another multiplication, with a normal that
// consecutive directions share. One kernel has both, and both layouts of a matrix: the
// branches of a group of weights cost less than could be measured, and instances of every operation
// minutes of compilation. What a group calls rarely is out of line for the same reason.
#pragma once

#include "adamezo/flipout.h"
#include "adamezo/low_rank.h"
#include "cpu/directions.h"

#define ADAMEZO_OUT_OF_LINE __attribute__((noinline))

namespace adamezo {
namespace {

// A narrow matrix is walked over the ends of its rows, in pieces of at most so many elements:
// groups that end with each row would be mostly empty.
constexpr int64_t kPiece = 256;
template <class L>
ADAMEZO_HD bool is_narrow(int64_t columns) {
  return columns < 2 * kGroup<L> && columns % kGroup<L> != 0;
}

// The factors of a block of rows and a window of columns of one parameter, in a worker's scratch:
// of each of the terms u_q v_q^T of each direction; of `flipout`, the signs of the one term that a
// direction then has.
template <class L>
struct Factors {
  const Job& job;
  float* memory;
  const bool signs;
  const int64_t rank;   // terms of a direction
  const int64_t terms;  // of all directions
  const Segment& segment;
  int64_t width = factor_columns(terms);
  int64_t row = -1;   // the first one of the block
  int64_t first = 0;  // the first column of the window

  // Those of the first `count` directions.
  Factors(const Job& job, float* memory, int64_t count, const Segment& segment)
      : job(job),
        memory(memory),
        signs(job.distribution == Distribution::kFlipout),
        rank(signs ? 1 : job.rank),
        terms(count * rank),
        segment(segment) {}

  static constexpr int64_t kPadding = kFactorRows;
  static_assert(kGroup<L> <= kPadding && kGroup<L> <= kFactorRows, "");

  ADAMEZO_HD float* u() const { return memory; }
  ADAMEZO_HD float* v() const { return memory + terms * kFactorRows + kPadding; }
  ADAMEZO_HD int64_t v_stride() const { return width + 2 * kPadding; }  // from one v to the next
  ADAMEZO_HD float* spread() const {
    return memory + terms * (kFactorRows + v_stride()) + kPadding;
  }

  // Makes the rows of the block that begins at `begin`, unless they are there.
  ADAMEZO_OUT_OF_LINE void make_rows(int64_t begin) {
    if (begin == row) return;
    row = begin;
    for (int64_t i = 0; i < terms; ++i) {
      float* const to = u() + i * kFactorRows;
      make(signs ? Purpose::kRowSign : Purpose::kRow, i, row, kFactorRows, to);
      for (int64_t e = 0; rank > 1 && e < kFactorRows; e += L::kWidth)
        L::store(L::mul(L::load(to + e), L::f(job.row_scale)), to + e);
    }
  }

  // Makes the columns [begin, end), of which `begin` is a multiple of kFactorRows.
  ADAMEZO_OUT_OF_LINE void make_columns(int64_t begin, int64_t end) {
    first = begin;
    const int64_t count = (end - begin + kFactorRows - 1) / kFactorRows * kFactorRows;
    for (int64_t i = 0; i < terms; ++i) {
      float* const to = v() + i * v_stride();
      std::memset(to - kPadding, 0, kPadding * sizeof(float));
      make(signs ? Purpose::kColumnSign : Purpose::kColumn, i, begin, count, to);
      std::memset(to + count, 0, kPadding * sizeof(float));
    }
  }

  // Of a narrow matrix: makes all columns, and repeats them, so that a group may begin at any.
  ADAMEZO_OUT_OF_LINE void make_cycle() {
    const int64_t columns = segment.columns;
    make_columns(0, columns);
    for (int64_t i = 0; i < terms; ++i) {
      float* const to = v() + i * v_stride();
      for (int64_t j = columns; j < columns + kPadding; ++j) to[j] = to[j - columns];
    }
  }

  // Of a narrow matrix: repeats the elements of u for `count` weights from (row, column) on.
  ADAMEZO_OUT_OF_LINE void spread_rows(int64_t of_row, int64_t column, int64_t count) {
    const int64_t columns = segment.columns;
    for (int64_t i = 0; i < terms; ++i) {
      const float* from = u() + i * kFactorRows + (of_row - row);
      float* const to = spread() + i * kSpread;
      std::memset(to - kPadding, 0, kPadding * sizeof(float));
      for (int64_t begin = -column; begin < count; begin += columns, ++from)
        for (int64_t e = begin < 0 ? 0 : begin; e < begin + columns; e += L::kWidth)
          L::store(L::f(*from), to + e);
      std::memset(to + count, 0, kPadding * sizeof(float));
    }
  }

 private:
  // The elements [begin, begin + count) of one term's factor.
  ADAMEZO_OUT_OF_LINE void make(Purpose purpose, int64_t i, int64_t begin, int64_t count,
                                float* to) const {
    const auto stream = philox_stream(job.key, job.directions[i / rank], uint32_t(i % rank));
    for (int64_t e = 0; e < count; e += kGroup<L>) {
      const auto blocks =
          group_for<L>(purpose, job, uint64_t(begin + e) / 4, uint32_t(segment.parameter));
      typename L::F z[4];
      normals_in_order<L>(philox_begin<L>(blocks, stream), job.key, z);
      for (int t = 0; t < 4; ++t) {
        if (signs) z[t] = L::flip_sign(L::f(1.0f), L::bits(z[t]));
        L::store(z[t], to + e + t * L::kWidth);
      }
    }
  }
};
static_assert(kPiece + 2 * 64 + 2 * kFactorRows <= kSpread, "the last row of a piece, and padding");

// The factors of a group: those of one row, or in a narrow matrix of several.
template <class L>
struct Place {
  bool narrow;
  const float *u, *v;
  int64_t rank, u_stride, v_stride;

  // Direction k at the elements of the group, in memory order.
  ADAMEZO_HD void direction(int64_t k, typename L::F z[4]) const {
    const float* of_u = u + k * rank * u_stride;
    const float* of_v = v + k * rank * v_stride;
    if (narrow)
      sum(of_u, of_v, [](const float* u, int t) { return L::load(u + t * L::kWidth); }, z);
    else
      sum(of_u, of_v, [](const float* u, int) { return L::f(*u); }, z);
  }

 private:
  template <class Row>
  ADAMEZO_HD void sum(const float* of_u, const float* of_v, Row row, typename L::F z[4]) const {
    for (int t = 0; t < 4; ++t) z[t] = L::mul(row(of_u, t), L::load(of_v + t * L::kWidth));
    for (int64_t q = 1; q < rank; ++q) {
      of_u += u_stride, of_v += v_stride;
      for (int t = 0; t < 4; ++t) z[t] = L::fma(row(of_u, t), L::load(of_v + t * L::kWidth), z[t]);
    }
  }
};

// Consecutive elements of a matrix with their factors: of one row, or in a narrow matrix of
// several.
template <class L>
struct Piece {
  const Factors<L>& factors;
  bool narrow;
  int64_t row, column;

  // Of the group that begins `first` elements after the one at (row, column).
  ADAMEZO_HD Place<L> place(int64_t first) const {
    const float *u = factors.u() + (row - factors.row),
                *v = factors.v() + column - factors.first + first;
    if (narrow) {
      const int64_t columns = factors.segment.columns, at = (column + first) % columns;
      u = factors.spread() + first, v = factors.v() + (at < 0 ? at + columns : at);
    }
    return {narrow, u, v, factors.rank, narrow ? kSpread : kFactorRows, factors.v_stride()};
  }
};

// The normals that the `flipout` directions of a group of weights have in common.
template <class L>
class Shared {
 public:
  ADAMEZO_HD Shared(const Job& job, uint32_t parameter) : job(job), parameter(parameter) {}

  // Multiplies the signs of direction k, of the group whose first block is `block`, by them.
  ADAMEZO_HD void multiply(int64_t k, uint64_t block, typename L::F z[4]) {
    const uint32_t base = job.directions[k] / uint32_t(job.rank);
    if (block != of_block || base != of_direction) make(block, base);
    for (int t = 0; t < 4; ++t) z[t] = L::mul(u[t], z[t]);
  }

 private:
  const Job& job;
  const uint32_t parameter;
  uint64_t of_block = ~uint64_t(0);  // no group begins at so high a one
  uint32_t of_direction = 0;
  typename L::F u[4];

  ADAMEZO_OUT_OF_LINE void make(uint64_t block, uint32_t base) {
    const auto blocks = group_for<L>(Purpose::kDirection, job, block, parameter);
    const auto stream = philox_stream(job.key, base, uint32_t(block >> 32));
    normals_in_order<L>(philox_begin<L>(blocks, stream), job.key, u);
    of_block = block, of_direction = base;
  }
};

template <class L>
struct Factored {
  static ADAMEZO_HD void natural(typename L::F[4]) {}

  template <class T, int kCount, class Use>
  static ADAMEZO_HD void along_each(const Job& job, const Scratch& scratch, int64_t worker,
                                    int64_t workers, Use use) {
    walk<T>(job, scratch, worker, workers, kCount,
            [&](const Span<T>& span, const Piece<L>& piece) ADAMEZO_OUT_OF_LINE {
              Shared<L> shared(job, span.parameter);
              for_each_group<L, T>(span, [&](const Group<T>& group) {
                const auto direction = directions_of(piece, group, shared);
                typename L::F z[kCount][4];
                for (int k = 0; k < kCount; ++k) direction(k, z[k]);
                use(span, group, z);
              });
            });
  }

  template <class T, bool kSecond, class Newest, class All>
  static ADAMEZO_HD void along_directions(const Job& job, const Scratch& scratch, int64_t worker,
                                          int64_t workers, Newest newest, All all) {
    walk<T>(job, scratch, worker, workers, job.horizon,
            [&](const Span<T>& span, const Piece<L>& piece) ADAMEZO_OUT_OF_LINE {
              Shared<L> shared(job, span.parameter);
              for_each_group<L, T>(span, [&](const Group<T>& group) {
                const auto direction = directions_of(piece, group, shared);
                auto moments = zero_moments<L>();
                typename L::F z[4];
                const auto add_direction = [&](int64_t k) ADAMEZO_INLINE_LAMBDA {
                  direction(k, z);
                  accumulate<L, kSecond>(moments, z, job.first[k], kSecond ? job.second[k] : 0.0f);
                };
                add_direction(0);
                newest(group, z);
                for (int64_t k = 1; k < job.horizon; ++k) add_direction(k);
                all(span, group, moments);
              });
            });
  }

 private:
  // A function of k and z that gives direction k at the elements of a group.
  template <class T>
  static ADAMEZO_HD auto directions_of(const Piece<L>& piece, const Group<T>& group,
                                       Shared<L>& shared) {
    return [place = piece.place(group.first), signs = piece.factors.signs, block = group.block,
            &shared](int64_t k, typename L::F z[4]) ADAMEZO_INLINE_LAMBDA {
      place.direction(k, z);
      if (signs) shared.multiply(k, block, z);
    };
  }

  // Walks a worker's share with the first `count` directions: calls matrix(span, piece), where the
  // piece begins at the first element of the span.
  template <class T, class Matrix>
  static ADAMEZO_HD void walk(const Job& job, const Scratch& scratch, int64_t worker,
                              int64_t workers, int64_t count, Matrix matrix) {
    const Share share = share_of(job, worker, workers);
    Spans<Exact<L>, T> spans{job, scratch};
    for_each_part(job.segments, job.segment_count, share.begin, share.end,
                  [&](int64_t s, int64_t position, int64_t stop) {
                    const Segment& segment = job.segments[s];
                    Factors<L> factors(job, scratch.factors, count, segment);
                    if (is_narrow<L>(segment.columns))
                      over_rows(spans, factors, s, position, stop, matrix);
                    else
                      in_rows(spans, factors, s, position, stop, matrix);
                  });
  }

  // Window by window, and in each row by row.
  template <class T, class Matrix>
  static ADAMEZO_HD void in_rows(Spans<Exact<L>, T>& spans, Factors<L>& factors, int64_t s,
                                 int64_t position, int64_t stop, Matrix matrix) {
    const Job& job = spans.job;
    const int64_t columns = factors.segment.columns;
    int64_t begin, end;
    columns_of(job, s, position, stop, begin, end);
    for (int64_t first = begin / kFactorRows * kFactorRows; first < end; first += factors.width) {
      const int64_t last = first + factors.width < end ? first + factors.width : end;
      bool made = false;
      for_each_run_of(job.segments, s, position, stop, [&](const Run& run) {
        const uint64_t index = run.index + job.offset;
        int64_t row = int64_t(index / uint64_t(columns)), column = int64_t(index % columns);
        for (int64_t done = 0; done < run.count; ++row, column = 0) {
          const int64_t left = run.count - done, in_row = columns - column;
          const int64_t count = left < in_row ? left : in_row;
          const int64_t low = column > first ? column : first;
          const int64_t high = column + count < last ? column + count : last;
          if (low < high) {
            if (!made) factors.make_columns(first, last);
            made = true;
            factors.make_rows(row / kFactorRows * kFactorRows);
            visit(spans, run, done + low - column, high - low, {factors, false, row, low}, matrix);
          }
          done += count;
        }
      });
    }
  }

  // Piece by piece of consecutive elements, each within a block of rows.
  template <class T, class Matrix>
  static ADAMEZO_HD void over_rows(Spans<Exact<L>, T>& spans, Factors<L>& factors, int64_t s,
                                   int64_t position, int64_t stop, Matrix matrix) {
    const Job& job = spans.job;
    const int64_t columns = factors.segment.columns;
    factors.make_cycle();
    for_each_run_of(job.segments, s, position, stop, [&](const Run& run) {
      for (int64_t done = 0; done < run.count;) {
        const uint64_t index = run.index + job.offset + uint64_t(done);
        const int64_t row = int64_t(index / uint64_t(columns)), column = int64_t(index % columns);
        const int64_t block = row / kFactorRows * kFactorRows;
        const int64_t in_block = (block + kFactorRows - row) * columns - column;
        const int64_t in_piece = kPiece - int64_t(index % kPiece);
        int64_t count = in_block < in_piece ? in_block : in_piece;
        if (run.count - done < count) count = run.count - done;
        factors.make_rows(block);
        factors.spread_rows(row, column, count);
        visit(spans, run, done, count, {factors, true, row, column}, matrix);
        done += count;
      }
    });
  }

  // Calls matrix() for the `count` elements of a piece, the first of which is element `done` of the
  // run.
  template <class T, class Matrix>
  static ADAMEZO_HD void visit(Spans<Exact<L>, T>& spans, const Run& run, int64_t done,
                               int64_t count, const Piece<L>& piece, Matrix matrix) {
    const Run part{run.segment,       run.position + done,        run.memory + done,
                   run.source + done, run.index + uint64_t(done), count};
    spans.cut(part, [&](const Span<T>& span) {
      Piece<L> rest = piece;
      rest.column += int64_t(span.index - (part.index + spans.job.offset));
      matrix(span, rest);
    });
  }

  // The columns [begin, end) that hold the elements of a segment from `position` to `stop`: all, if
  // it cannot be said more exactly.
  static ADAMEZO_HD void columns_of(const Job& job, int64_t s, int64_t position, int64_t stop,
                                    int64_t& begin, int64_t& end) {
    const Segment& segment = job.segments[s];
    const bool one = segment.rows == 1;
    const uint64_t index =
        job.offset + uint64_t(segment.index_offset) + uint64_t(one ? position : 0);
    const int64_t length = one ? stop - position : segment.row_length;
    begin = int64_t(index % uint64_t(segment.columns)), end = begin + length;
    if (end > segment.columns || (!one && segment.index_stride % segment.columns != 0))
      begin = 0, end = segment.columns;
  }
};

}  // namespace
}  // namespace adamezo
