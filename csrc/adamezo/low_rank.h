// `lowrank` directions: of a parameter seen as a matrix with `columns` columns,
//
//   z[i, j] = sum of u_q[i] v_q[j] over q < rank
//
// The first term is a product, the others are added by fma in the order of q. v_q[j] is the exact
// normal of element j under Purpose::kColumn, where q takes the place of the high block word.
// u_q[i] is that of element i under Purpose::kRow, times 1 / sqrt(rank) in float32 where rank is
// not 1. So there are at most 2^34 rows and columns. A parameter of one dimension has exact
// normals.
#pragma once

#include "adamezo/segment.h"

namespace adamezo {

constexpr int64_t kLargestRank = 64;

// On a GPU a block of threads takes tiles of a matrix, whose factors it makes once. A tile is as
// wide as the matrix, within these limits, and as high as its elements and factors allow.
constexpr int kLeastLogTileWidth = 3, kMostLogTileWidth = 7;
constexpr int kMostTileHeight = 512, kLogTileElements = 14;

// a / b of numbers that are not negative, where nearly always both fit into 32 bits: a GPU has no
// division, and takes four times as many instructions for one of 64 bits.
ADAMEZO_HD int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// The tiles that hold a segment's elements: `across` side by side, from the first row and column
// on, which are multiples of four as a Philox call makes four normals.
struct Tiles {
  int64_t row, column;          // of the whole parameter, the first ones
  int64_t end_row, end_column;  // behind the last ones that the segment has elements in
  int log_width, height;
  int64_t across, count;
};

ADAMEZO_HD Tiles tiles_of(const Segment& segment, uint64_t offset) {
  Tiles tiles{};
  if (segment.rows * segment.row_length == 0) return tiles;
  const int64_t columns = segment.columns, first = segment.index_offset + int64_t(offset);
  const int64_t last = first + (segment.rows - 1) * segment.index_stride + segment.row_length - 1;
  tiles.row = quotient(first, columns), tiles.end_row = quotient(last, columns) + 1;
  tiles.column = first - tiles.row * columns, tiles.end_column = columns;
  if (tiles.end_row - tiles.row == 1) {
    tiles.end_column = last - tiles.row * columns + 1;
  } else if (segment.index_stride == columns && tiles.column + segment.row_length <= columns) {
    tiles.end_column = tiles.column + segment.row_length;  // a window of columns
  } else {
    tiles.column = 0;
  }
  tiles.row -= tiles.row % 4, tiles.column -= tiles.column % 4;
  const int64_t wanted = tiles.end_column - tiles.column;
  tiles.log_width = kLeastLogTileWidth;
  while (tiles.log_width < kMostLogTileWidth && wanted > 1 << tiles.log_width) ++tiles.log_width;
  tiles.height = 1 << (kLogTileElements - tiles.log_width);
  if (tiles.height > kMostTileHeight) tiles.height = kMostTileHeight;
  tiles.across = (wanted + (1 << tiles.log_width) - 1) >> tiles.log_width;
  tiles.count = quotient(tiles.end_row - tiles.row + tiles.height - 1, tiles.height) * tiles.across;
  return tiles;
}

// Calls visit(row, column, low, high) for the pieces of `count` consecutive elements of a parameter
// that a segment holds: those from the low-th to before the high-th are in its row `row`, where the
// 0-th would be at `column`. `relative` is the index of the 0-th less that of the segment's first.
template <class Visit>
ADAMEZO_HD void for_each_piece(const Segment& segment, int64_t relative, int count, Visit visit) {
  int low = relative >= 0 ? 0 : relative <= -count ? count : int(-relative);
  int64_t row = 0, column = relative;
  if (segment.rows > 1 && low < count) {
    row = quotient(relative + low, segment.index_stride);
    column -= row * segment.index_stride;
  }
  for (; low < count && row < segment.rows; ++row, column -= segment.index_stride) {
    const int64_t end = segment.row_length - column;
    if (end > low) visit(row, column, low, end < count ? int(end) : count);
    if (segment.rows == 1) return;
    const int64_t next = segment.index_stride - column;
    low = next < count ? int(next) : count;
  }
}

}  // namespace adamezo
