// What a kernel is told: sizes and addresses. Checked in bindings.cpp; a kernel relies on it.
#pragma once

#include <cstdint>

namespace tenfold {

// B image, S pixel of all levels, M head, E channel of a head, Q query, L level, P point,
// N = 2 or 4 numbers of a reference (0: none)

constexpr int kMaxPoints = 512;      // L*P: the kernels keep a query's points in fixed arrays
constexpr int kMaxSide = 1 << 24;    // H, W: up to here float holds every pixel index

enum class Dtype { kFloat, kBfloat16, kHalf, kDouble };

// What is in offsets_BQMLP2 and weights_BQMLP: locations in [0, 1] and weights, or offsets around reference points
// or boxes and logits.
enum class Mode { kLocations, kPoints, kBoxes };

struct Level {
  int height, width, start;  // start: pixels of the levels before
};

struct Problem {
  Mode mode;
  Dtype dtype;  // of value, out and their gradients; the rest is double where this is, else float
  int64_t B, S, M, E, Q, L, P, N;
  const Level* levels_L;

  const void* value_BSME;
  const void* references_BQLN;  // null in mode kLocations
  const void* offsets_BQMLP2;
  const void* weights_BQMLP;
  void* out_BQME;

  // Backward only.
  const void* grad_out_BQME;
  void* grad_value_BSME;
  void* grad_offsets_BQMLP2;
  void* grad_weights_BQMLP;
  void* grad_references_BMQLN;  // per head; null: not asked for

  // CUDA backward only. Two numbers, of the type of sums: the largest of grad_out and of the weights. Where it is not
  // null, grad_value_BSME holds 64-bit integers, whose sums do not depend on their order.
  void* largest;
  bool sum_pixels;  // may sum inside a block what goes to one pixel

  // How the work is cut. No number in the result depends on it.
  int64_t head_groups, query_chunks, level_slices;
  bool repack;  // copy a head's maps together before they are read: every head is a group, and in the backward of
                // bfloat16 there is no other way
};

// Targets to be assigned to queries, in K layers and B images, on a GPU.
struct Assignment {
  int64_t K, B, N, Q;       // N target of all images
  const float* cost_KNQ;    // of the queries of the target's own image
  const int64_t* image_N;   // ascending
  int64_t* query_KN;        // the result; -1 for all targets of an image that has costs that are not finite
  // To work with: prices of columns and rows, lengths of paths, the row before, the row of a column, the last search
  // that reached it.
  double *price_KBQ, *price_KN, *distance_KBQ;
  int *before_KBQ, *row_KBQ, *done_KBQ;
};

}  // namespace tenfold
