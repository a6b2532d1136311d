// A segment is one tensor (or one shard of it) as rows of consecutive elements. A kernel gets a
// table of segments in one call, so that hundreds of small tensors cost one launch.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

// Thirteen 64-bit fields: the Python side writes the table as an int64 matrix with these columns.
struct Segment {
  uint64_t address;       // of the first element
  uint64_t source;        // of the first element that is read: equal to `address` in place
  int64_t rows;           // number of rows
  int64_t row_length;     // elements of a row, consecutive in memory
  int64_t row_stride;     // elements in memory from one row to the next
  int64_t source_stride;  // the same where they are read
  int64_t index_offset;   // index of the first element in the whole (unsharded) parameter
  int64_t index_stride;   // index distance from one row to the next
  int64_t parameter;      // 24-bit index of the parameter
  uint64_t buffers[2];    // of the first element of each buffer, in row-major order (buffered.h)
  int64_t first;          // elements of all segments before this one
  int64_t columns;        // of the whole parameter as a matrix; 0 where it has one dimension
};
static_assert(sizeof(Segment) == 104, "the Python side writes thirteen int64 columns");

// Consecutive elements of one segment: consecutive in memory and in the parameter.
struct Run {
  int64_t segment;   // its index in the table
  int64_t position;  // of the first element, counted in the segment row by row
  int64_t memory;    // its distance from the segment's address, in elements
  int64_t source;    // its distance from the segment's source
  uint64_t index;    // its index in the whole parameter
  int64_t count;
};

// The last segment that begins at or before `position` of the concatenated segments.
ADAMEZO_HD int64_t segment_at(const Segment* segments, int64_t count, int64_t position) {
  int64_t low = 0;
  for (int64_t high = count; high - low > 1;) {
    const int64_t middle = low + (high - low) / 2;
    (segments[middle].first <= position ? low : high) = middle;
  }
  return low;
}

// The elements of segment `s` from `position` to the end of their row, or to `stop` before it.
ADAMEZO_HD Run run_at(const Segment* segments, int64_t s, int64_t position, int64_t stop) {
  const Segment& segment = segments[s];
  const int64_t row = segment.rows == 1 ? 0 : position / segment.row_length;
  const int64_t column = position - row * segment.row_length;
  const int64_t in_row = segment.row_length - column, left = stop - position;
  return {s,
          position,
          row * segment.row_stride + column,
          row * segment.source_stride + column,
          uint64_t(segment.index_offset) + uint64_t(row) * uint64_t(segment.index_stride) +
              uint64_t(column),
          in_row < left ? in_row : left};
}

// Calls visit(s, position, stop) for the part of each segment that is in the elements [begin, end)
// of the concatenated segments: its elements from `position` to `stop`, counted row by row.
template <class Visit>
ADAMEZO_HD void for_each_part(const Segment* segments, int64_t count, int64_t begin, int64_t end,
                              Visit&& visit) {
  for (int64_t s = segment_at(segments, count, begin); s < count && segments[s].first < end; ++s) {
    const Segment& segment = segments[s];
    const int64_t size = segment.rows * segment.row_length;
    const int64_t position = begin > segment.first ? begin - segment.first : 0;
    const int64_t stop = end - segment.first < size ? end - segment.first : size;
    visit(s, position, stop);
  }
}

// Calls visit(run) for the elements of segment `s` from `position` to `stop`.
template <class Visit>
ADAMEZO_HD void for_each_run_of(const Segment* segments, int64_t s, int64_t position, int64_t stop,
                                Visit&& visit) {
  while (position < stop) {
    const Run run = run_at(segments, s, position, stop);
    visit(run);
    position += run.count;
  }
}

// Calls visit(run) for the elements [begin, end) of the concatenated segments.
template <class Visit>
ADAMEZO_HD void for_each_run(const Segment* segments, int64_t count, int64_t begin, int64_t end,
                             Visit&& visit) {
  for_each_part(segments, count, begin, end, [&](int64_t s, int64_t position, int64_t stop) {
    for_each_run_of(segments, s, position, stop, visit);
  });
}

}  // namespace adamezo
