// The kernels for heads of 16, 32 or 64 channels and at most 32 points, in float, bfloat16 and half.
//
// A block takes a tile of queries of one head. A group of lanes takes a query, a lane 16 bytes of its channels: first
// each lane prepares some of the points, in float, and leaves them in shared memory; then all lanes read the corners
// of every point. Blocks of one head follow each other, and a tile's queries lie side by side where queries are the
// pixels of the levels: so what neighbours read is still in a cache.
#pragma once

#include "generic.cuh"

namespace tenfold {
namespace {

constexpr int kTiledPoints = 32;   // L*P at most
// Threads of a block. How others did is in docs/results/cuda-notes.md.
template <class V>
constexpr int kForwardThreads = sizeof(V) == 2 ? 128 : 256;
constexpr int kBackwardThreads = 256;

// The queries of an image, cut in tiles: pixels of the levels, or one line.
struct Tiles {
  int maps, count;
  int width, height;  // of a tile
  Level map[kTiledPoints];
  int first[kTiledPoints];             // tile of each map
  unsigned char level[kTiledPoints];   // of each point: a division takes twenty instructions
};

// kMost: points of a query, at most. kOfBlock: threads. kTurn: see Stage.
template <class V, int kWidth, int kMost, int kOfBlock, bool kTurn>
struct Group {
  static constexpr int kThreads = kOfBlock;
  static constexpr bool kTurned = kTurn;
  static constexpr int kVector = 16 / sizeof(V);
  static constexpr int kBytes = sizeof(V);
  static constexpr int kLanes = kWidth / kVector;
  static constexpr int kQueries = kThreads / kLanes;            // of a block
  static constexpr int kOwn = kMost / kLanes;               // points of a lane, at most
};

template <class V, int kWidth, int kMost>
using ForwardGroup = Group<V, kWidth, kMost, kForwardThreads<V>, sizeof(V) == 2>;
template <class V, int kWidth, int kMost>
using BackwardGroup = Group<V, kWidth, kMost, kBackwardThreads, false>;

inline Tiles tiles_of(const Problem& p, int queries) {
  Tiles tiles{};
  const bool pixels = p.Q == p.S;
  tiles.width = pixels ? 8 : queries, tiles.height = pixels ? queries / 8 : 1;
  tiles.maps = pixels ? static_cast<int>(p.L) : 1;
  for (int i = 0; i < tiles.maps; ++i) {
    tiles.map[i] = pixels ? p.levels_L[i] : Level{1, static_cast<int>(p.Q), 0};
    tiles.first[i] = tiles.count;
    const int columns = (tiles.map[i].width + tiles.width - 1) / tiles.width;
    tiles.count += columns * ((tiles.map[i].height + tiles.height - 1) / tiles.height);
  }
  for (int64_t k = 0; k < p.L * p.P; ++k) tiles.level[k] = static_cast<unsigned char>(k / p.P);
  return tiles;
}

// A query of an image; -1 where the tile reaches over its map.
__device__ inline int query_of(const Tiles& tiles, int tile, int place) {
  int i = tiles.maps - 1;
  while (tiles.first[i] > tile) --i;
  const Level& map = tiles.map[i];
  const int columns = (map.width + tiles.width - 1) / tiles.width, at = tile - tiles.first[i];
  const int x = at % columns * tiles.width + place % tiles.width, y = at / columns * tiles.height + place / tiles.width;
  return x < map.width && y < map.height ? map.start + y * map.width + x : -1;
}

struct alignas(16) Four {
  float of[4];
};

// The four corners of a point, in bytes of value from where the image and head begin: the first, 1 added where the
// second lies beside it; from there to the third. 32 bits, so that adding them to an address takes one instruction.
struct alignas(8) Corners {
  unsigned first, down;
};

// Points of one query in shared memory, so that groups of a warp use other banks. All read their point k at a time: with a
// place more than there are points these lie apart. Turned, where point k is depends on the group, so that those whose
// lanes write together lie apart, too: for two instructions more a point, which pay where memory is what binds.
template <class G>
class Stage {
 public:
  static __host__ __device__ int places(int points) { return G::kTurned ? (points + 15) / 16 * 16 : points + 1; }
  static __host__ __device__ int bytes_of_query(int points) {
    return places(points) * static_cast<int>(sizeof(Four) + sizeof(Corners));
  }
  // group: of the block.
  __device__ Stage(char* shared, int points, int group) {
    const int first = group * places(points), of_warp = group % (32 / G::kLanes);
    weights_ = reinterpret_cast<Four*>(shared) + first;
    corners_ = reinterpret_cast<Corners*>(shared + sizeof(Four) * G::kQueries * places(points)) + first;
    turn_weights_ = turned(of_warp, 8), turn_corners_ = turned(of_warp, 16);
  }
  __device__ Four& weights(int k) const { return weights_[G::kTurned ? k ^ turn_weights_ : k]; }
  __device__ Corners& corners(int k) const { return corners_[G::kTurned ? k ^ turn_corners_ : k]; }

 private:
  // So many lanes write at a time: groups among them get places G::kLanes apart.
  static __device__ int turned(int group, int lanes) {
    const int together = lanes > G::kLanes ? lanes / G::kLanes : 1;
    return (group % together * G::kLanes + group / together) % lanes;
  }
  Four* weights_;
  Corners* corners_;
  int turn_weights_, turn_corners_;
};

template <class V>
struct alignas(16) Pack {
  V of[16 / sizeof(V)];
};

// The channel that a lane's n-th addition goes to. Lanes beside each other add beside each other, kRun channels at a time:
// memory adds by 32 bytes, and would take twice as long if each came in two halves.
template <class G, int kRun>
__device__ int added_channel(int lane, int n) {
  return n / kRun * (kRun * G::kLanes) + lane * kRun + n % kRun;
}

template <class V>
__device__ Pack<V> load_pack(const char* from) {
  return *reinterpret_cast<const Pack<V>*>(from);
}

template <class V>
__device__ void to_floats(const Pack<V>& pack, float (&numbers)[16 / sizeof(V)]) {
#pragma unroll
  for (int e = 0; e < static_cast<int>(16 / sizeof(V)); ++e) numbers[e] = to_sum<float>(pack.of[e]);
}
#ifndef TENFOLD_EMULATED
// A bfloat16 is the upper half of a float: one instruction for each, where those of a pair one by one take three.
template <>
__device__ inline void to_floats(const Pack<__nv_bfloat16>& pack, float (&numbers)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(&pack);
  const unsigned pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    numbers[2 * i] = __uint_as_float(pairs[i] << 16), numbers[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}
#endif

// From every lane of a group, in every lane.
template <int kLanes, class Combine>
__device__ float of_group(float number, const Combine& combine) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    number = combine(number, __shfl_xor_sync(0xffffffffu, number, distance));
  }
  return number;
}
struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Largest {
  __device__ float operator()(float a, float b) const { return b > a ? b : a; }
};

// A lane's points are lane, lane + kLanes, ...: their attention weights, 0 after the last.
template <class G>
__device__ void attention_of(const Problem& p, int64_t row, int lane, float (&weights)[G::kOwn]) {
  const int points = static_cast<int>(p.L * p.P);
  const float* given = static_cast<const float*>(p.weights_BQMLP) + row * points;
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) {
    const int k = lane + i * G::kLanes;
    weights[i] = k < points ? given[k] : p.mode == Mode::kLocations ? 0.0f : -INFINITY;
  }
  if (p.mode == Mode::kLocations) return;
  float largest = weights[0];
#pragma unroll
  for (int i = 1; i < G::kOwn; ++i) largest = Largest{}(largest, weights[i]);
  largest = of_group<G::kLanes>(largest, Largest{});
  float total = 0;
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) {
    const int k = lane + i * G::kLanes;
    weights[i] = k < points ? expf(weights[i] - largest) : 0.0f;
    total += weights[i];
  }
  const float scale = 1 / of_group<G::kLanes>(total, Sum{});
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) weights[i] *= scale;
}

__device__ inline Sample<float> sample_at(const Problem& p, const Levels& levels, const Tiles& tiles, int64_t query,
                                          int64_t row, int k) {
  const int l = tiles.level[k];
  return sample_of<float>(p, levels.level[l], query, row * static_cast<int>(p.L * p.P), l, k);
}

// query: of B*Q; row: of B*Q*M.
template <class G>
__device__ void stage_points(const Problem& p, const Levels& levels, const Tiles& tiles, int64_t query, int64_t row,
                             int lane, const float (&attention)[G::kOwn], const Stage<G>& stage) {
  const int points = static_cast<int>(p.L * p.P);
  const unsigned pixel = static_cast<unsigned>(p.M * p.E) * G::kBytes;
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) {
    const int k = lane + i * G::kLanes;
    if (k >= points) break;
    const Sample<float> at = sample_at(p, levels, tiles, query, row, k);
    const float near = attention[i] * at.y.near_weight, far = attention[i] * at.y.far_weight;
    stage.weights(k) = {{near * at.x.near_weight, near * at.x.far_weight, far * at.x.near_weight,
                         far * at.x.far_weight}};
    const unsigned beside = static_cast<unsigned>(at.x.far - at.x.near);
    stage.corners(k) = {static_cast<unsigned>(at.pixel[0]) * pixel + beside,
                        static_cast<unsigned>(at.pixel[2] - at.pixel[0]) * pixel};
  }
}

// pixel: bytes of one. They are even, which leaves the lowest bit.
__device__ inline void bytes_of(const Corners& at, unsigned pixel, unsigned (&bytes)[4]) {
  const unsigned first = at.first & ~1u, beside = at.first & 1 ? pixel : 0;
  bytes[0] = first, bytes[1] = first + beside;
  bytes[2] = first + at.down, bytes[3] = bytes[1] + at.down;
}

// What a block works on: a tile of its x, of a head of an image that its y counts.
template <class G>
struct Place {
  int image, head;
  int64_t query, row;  // query: of B*Q; row: of B*Q*M
  bool inside;

  __device__ Place(const Problem& p, const Tiles& tiles, int owner) {
    const int heads = static_cast<int>(p.M);
    image = owner / heads, head = owner % heads;
    const int found = query_of(tiles, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x) / G::kLanes);
    inside = found >= 0;
    query = image * p.Q + (inside ? found : 0), row = query * p.M + head;
  }
  // Where the image and head begin in value, in elements.
  __device__ int64_t first_element(const Problem& p) const { return (image * p.S * p.M + head) * p.E; }
};

template <class V, int kWidth, int kMost>
__global__ void __launch_bounds__(kForwardThreads<V>, 1024 / kForwardThreads<V>)
tiled_forward(const Problem p, const Levels levels, const Tiles tiles) {
  using G = ForwardGroup<V, kWidth, kMost>;
  const int points = static_cast<int>(p.L * p.P);
  const unsigned pixel = static_cast<unsigned>(p.M) * kWidth * G::kBytes;
  const int lane = threadIdx.x % G::kLanes, first_channel = lane * G::kVector;
  const Stage<G> stage(shared_memory(), points, threadIdx.x / G::kLanes);
  for (int owner = static_cast<int>(blockIdx.y); owner < static_cast<int>(p.B * p.M); owner += gridDim.y) {
    const Place<G> at(p, tiles, owner);
    if (!__any_sync(0xffffffffu, at.inside)) continue;
    float attention[G::kOwn];
    attention_of<G>(p, at.row, lane, attention);
    stage_points<G>(p, levels, tiles, at.query, at.row, lane, attention, stage);
    __syncwarp();
    const char* value = static_cast<const char*>(p.value_BSME) + at.first_element(p) * G::kBytes;
    float sum[G::kVector] = {};
#pragma unroll 2
    for (int k = 0; k < points; ++k) {
      const Four weights = stage.weights(k);
      unsigned bytes[4];
      bytes_of(stage.corners(k), pixel, bytes);
      Pack<V> rows[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) rows[c] = load_pack<V>(value + (bytes[c] + lane * 16u));
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float row[G::kVector];
        to_floats(rows[c], row);
#pragma unroll
        for (int e = 0; e < G::kVector; ++e) sum[e] += weights.of[c] * row[e];
      }
    }
    if (at.inside) {
      Pack<V> out;
#pragma unroll
      for (int e = 0; e < G::kVector; ++e) out.of[e] = to_value<V>(sum[e]);
      *reinterpret_cast<Pack<V>*>(static_cast<V*>(p.out_BQME) + at.row * kWidth + first_channel) = out;
    }
    __syncwarp();  // before the next tile's points take the place of these
  }
}

// Sums of four numbers over a group: lane i has that of corner kCorner(i), where it counts.
template <int kLanes>
struct Dots {
  // With 2 lanes each keeps two corners; with more, one, and lanes that differ in low bits alone keep the same.
  static constexpr int kKept = kLanes == 2 ? 2 : 1;
  static constexpr int kSame = kLanes >= 4 ? kLanes / 4 : 1;
  float of[kKept];

  static __device__ int corner(int lane) { return kLanes == 2 ? 2 * lane : lane / kSame; }

  __device__ Dots(const float (&dots)[4], int lane) {
    const bool upper = lane & (kLanes / 2);
    float first = upper ? dots[2] : dots[0], second = upper ? dots[3] : dots[1];
    first += __shfl_xor_sync(0xffffffffu, upper ? dots[0] : dots[2], kLanes / 2);
    second += __shfl_xor_sync(0xffffffffu, upper ? dots[1] : dots[3], kLanes / 2);
    if constexpr (kLanes == 2) {
      of[0] = first, of[1] = second;
    } else {
      const bool odd = lane & (kLanes / 4);
      of[0] = odd ? second : first;
      of[0] += __shfl_xor_sync(0xffffffffu, odd ? first : second, kLanes / 4);
#pragma unroll
      for (int distance = kLanes / 8; distance > 0; distance /= 2) {
        of[0] += __shfl_xor_sync(0xffffffffu, of[0], distance);
      }
    }
  }
};

// grad_value gets weight * grad at 4 channels: one instruction from compute capability 9.0 on.
__device__ inline void add_four(float* to, const float* grad, float weight) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(weight * grad[0]), "f"(weight * grad[1]), "f"(weight * grad[2]), "f"(weight * grad[3])
               : "memory");
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) atomicAdd(to + e, weight * grad[e]);
#endif
}

// How gradients of value go to memory: corner by corner; as integers (see fixed_scale); or, where many queries of a block
// share their corners, once for each pixel that any of them touches.
enum class Adds { kCorners, kFixed, kPixels };

// Blocks of a multiprocessor, which bound the registers: as many as find shared memory, or spill nothing.
template <int kMost, Adds kAdds>
constexpr int kBackwardBlocks = kMost > 16 ? kAdds == Adds::kFixed ? 1 : 2 : 3;

// Contributions (query, point, corner) of a block, brought together by pixel, some points at a time. The table of pixels
// is open addressing; all atomics are on integers in shared memory, where those on floats are loops.
template <class G>
struct Bins {
  static constexpr int kEntries = 1024, kSlots = 2 * kEntries, kNone = 0xffff;
  static constexpr int kPoints = kEntries / (4 * G::kQueries);  // of each query at a time

  static constexpr int kRow = G::kLanes * G::kVector;       // numbers of a query's gradient

  // What a pixel gets: this much of the row of grads that begins there.
  struct alignas(8) Part {
    float weight;
    int row;
  };

  struct Shared {
    float grads[G::kQueries * kRow];  // of the output: a row for each query
    Part parts[kEntries];             // those of a pixel follow each other
    int keys[kSlots], counts[kSlots];  // the corner's bytes, or -1; entries, then where the next goes
    unsigned short slot_of[kEntries];
    unsigned short used[kEntries], begin[kEntries], length[kEntries];  // of each pixel
    int pixels, filled;
  };

  Shared& in;
  const char* stages;  // where the Stage of the first query begins
  int points;          // of a query

  __device__ const Stage<G> stage_of(int entry) const {
    return Stage<G>(const_cast<char*>(stages), points, entry / (4 * kPoints));
  }
  static __device__ int point_of(int entry) { return entry / 4 % kPoints; }

  __device__ void clear() const {
    for (int i = threadIdx.x; i < kSlots; i += G::kThreads) in.keys[i] = -1, in.counts[i] = 0;
    if (threadIdx.x == 0) in.pixels = in.filled = 0;
  }

  // Entries of the points from `first` on that have a weight get a slot, the one of their pixel.
  __device__ void find_slots(int first, unsigned pixel) const {
    for (int entry = threadIdx.x; entry < kEntries; entry += G::kThreads) {
      const int k = first + point_of(entry);
      in.slot_of[entry] = kNone;
      if (k >= points) continue;
      const Stage<G> stage = stage_of(entry);
      if (stage.weights(k).of[entry % 4] == 0) continue;
      const Corners at = stage.corners(k);
      const unsigned beside = at.first & 1 ? pixel : 0;
      const unsigned bytes = (at.first & ~1u) + (entry % 2 ? beside : 0) + (entry % 4 < 2 ? 0 : at.down);
      const int key = static_cast<int>(bytes);  // -1 is odd
      unsigned slot = bytes * 2654435761u / (0x100000000u / kSlots);  // the highest bits of the product
      for (;; slot = (slot + 1) % kSlots) {
        const int found = atomicCAS(&in.keys[slot], -1, key);
        if (found == -1) in.used[atomicAdd(&in.pixels, 1)] = static_cast<unsigned short>(slot);
        if (found == -1 || found == key) break;
      }
      atomicAdd(&in.counts[slot], 1);
      in.slot_of[entry] = static_cast<unsigned short>(slot);
    }
  }

  // Each pixel's entries get a place of their own, in no particular order.
  __device__ void share_out() const {
    for (int i = threadIdx.x; i < in.pixels; i += G::kThreads) {
      int& count = in.counts[in.used[i]];
      in.length[i] = static_cast<unsigned short>(count);
      count = atomicAdd(&in.filled, count);
      in.begin[i] = static_cast<unsigned short>(count);
    }
  }

  __device__ void fill(int first) const {
    for (int entry = threadIdx.x; entry < kEntries; entry += G::kThreads) {
      const int slot = in.slot_of[entry];
      if (slot == kNone) continue;
      const float weight = stage_of(entry).weights(first + point_of(entry)).of[entry % 4];
      in.parts[atomicAdd(&in.counts[slot], 1)] = {weight, entry / (4 * kPoints) * kRow};
    }
  }

  // A group sums the parts of a pixel, a lane its channels of them, and adds the sum to grad_value.
  __device__ void add(int lane, char* grad_value) const {
    // Two groups that read half a row each at a time read different halves: other banks.
    const int group = threadIdx.x / G::kLanes, other = G::kVector > 4 ? group % 2 * 4 : 0;
    int channels[G::kVector / 4];
#pragma unroll
    for (int e = 0; e < G::kVector; e += 4) channels[e / 4] = added_channel<G, 4>(lane, e ^ other);
    for (int i = group; i < in.pixels; i += G::kQueries) {
      float sum[G::kVector] = {};
      const int begin = in.begin[i], end = begin + in.length[i];
#pragma unroll 2
      for (int j = begin; j < end; ++j) {
        const Part part = in.parts[j];
#pragma unroll
        for (int e = 0; e < G::kVector; e += 4) {
          const Four grad = *reinterpret_cast<const Four*>(in.grads + part.row + channels[e / 4]);
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[e + i] += part.weight * grad.of[i];
        }
      }
      float* to = reinterpret_cast<float*>(grad_value + 4 / G::kBytes * static_cast<unsigned>(in.keys[in.used[i]]));
#pragma unroll
      for (int e = 0; e < G::kVector; e += 4) add_four(to + channels[e / 4], sum + e, 1.0f);
    }
  }
};

// From the products of the corners with the output's gradient to the gradients of this lane's points.
template <class G>
__device__ void differentiate(const Problem& p, const Levels& levels, const Tiles& tiles, const Place<G>& at, int lane,
                              const float (&attention)[G::kOwn], const Stage<G>& stage) {
  const int points = static_cast<int>(p.L * p.P);
  float samples[G::kOwn], common = 0;
  const float half_over_points = 0.5f / static_cast<float>(p.P);
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) {
    const int k = lane + i * G::kLanes;
    samples[i] = 0;
    if (k >= points) continue;
    const Sample<float> sample = sample_at(p, levels, tiles, at.query, at.row, k);
    const Four dots = stage.weights(k);
    const PointGrad<float> grad = point_grad(sample.x, sample.y, dots.of[0], dots.of[1], dots.of[2], dots.of[3]);
    const float x = chain(grad.x, attention[i]), y = chain(grad.y, attention[i]);
    samples[i] = grad.sample, common += attention[i] * grad.sample;
    if (at.inside) {
      float* offset = static_cast<float*>(p.grad_offsets_BQMLP2) + 2 * (at.row * points + k);
      offset[0] = chain(x, sample.frame_x.scale), offset[1] = chain(y, sample.frame_y.scale);
    }
    const Level& level = levels.level[tiles.level[k]];
    const float center_x = x * static_cast<float>(level.width), center_y = y * static_cast<float>(level.height);
    stage.weights(k) = {{center_x, center_y, chain(center_x, sample.offset_x * half_over_points),
                         chain(center_y, sample.offset_y * half_over_points)}};
  }
  common = p.mode == Mode::kLocations ? 0.0f : of_group<G::kLanes>(common, Sum{});
  float* grad_weights = static_cast<float*>(p.grad_weights_BQMLP) + at.row * points;
#pragma unroll
  for (int i = 0; i < G::kOwn; ++i) {
    const int k = lane + i * G::kLanes;
    if (k < points && at.inside) {
      grad_weights[k] = p.mode == Mode::kLocations ? samples[i] : attention[i] * (samples[i] - common);
    }
  }
}

// Of each level the sum over its points, as differentiate() left them.
template <class G>
__device__ void write_references(const Problem& p, const Place<G>& at, int lane, const Stage<G>& stage) {
  const int numbers = static_cast<int>(p.N), P = static_cast<int>(p.P);
  float* to = static_cast<float*>(p.grad_references_BMQLN) +
              ((at.image * p.M + at.head) * p.Q + at.query - at.image * p.Q) * p.L * p.N;
  for (int i = lane; i < static_cast<int>(p.L) * numbers; i += G::kLanes) {
    float sum = 0;
    for (int k = i / numbers * P; k < (i / numbers + 1) * P; ++k) sum += stage.weights(k).of[i % numbers];
    if (at.inside) to[i] = sum;
  }
}

template <class V, int kWidth, int kMost, Adds kAdds>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<kMost, kAdds>)
tiled_backward(const Problem p, const Levels levels, const Tiles tiles) {
  using G = BackwardGroup<V, kWidth, kMost>;
  const int points = static_cast<int>(p.L * p.P);
  const unsigned pixel = static_cast<unsigned>(p.M) * kWidth * G::kBytes;
  const int lane = threadIdx.x % G::kLanes, first_channel = lane * G::kVector;
  const Stage<G> stage(shared_memory(), points, threadIdx.x / G::kLanes);
  [[maybe_unused]] const Bins<G> bins{
      *reinterpret_cast<typename Bins<G>::Shared*>(shared_memory() + Stage<G>::bytes_of_query(points) * G::kQueries),
      shared_memory(), points};
  [[maybe_unused]] const float scale = kAdds == Adds::kFixed ? fixed_scale<float>(p) : 1.0f;
  for (int owner = static_cast<int>(blockIdx.y); owner < static_cast<int>(p.B * p.M); owner += gridDim.y) {
    const Place<G> at(p, tiles, owner);
    const bool any = __any_sync(0xffffffffu, at.inside);  // of this warp's queries
    if (kAdds != Adds::kPixels && !any) continue;
    float attention[G::kOwn];
    attention_of<G>(p, at.row, lane, attention);
#pragma unroll
    for (int i = 0; i < G::kOwn; ++i) {
      attention[i] = at.inside ? attention[i] : 0.0f;
      if constexpr (kAdds == Adds::kFixed) mark_unknown(p, attention[i]);
    }
    stage_points<G>(p, levels, tiles, at.query, at.row, lane, attention, stage);
    __syncwarp();
    const char* value = static_cast<const char*>(p.value_BSME) + at.first_element(p) * G::kBytes;
    char* grad_value = static_cast<char*>(p.grad_value_BSME) + at.first_element(p) * (kAdds == Adds::kFixed ? 8 : 4);
    const V* grad_out = static_cast<const V*>(p.grad_out_BQME) + at.row * kWidth;
    float grad[G::kVector];  // of the channels that this lane reads
    to_floats(load_pack<V>(reinterpret_cast<const char*>(grad_out + first_channel)), grad);
    [[maybe_unused]] float added[G::kVector];  // of those that it adds to
    constexpr int kRun = kAdds == Adds::kFixed ? 1 : 4;
    if constexpr (kAdds != Adds::kPixels) {
#pragma unroll
      for (int n = 0; n < G::kVector; ++n) added[n] = to_sum<float>(grad_out[added_channel<G, kRun>(lane, n)]);
    }
    if constexpr (kAdds == Adds::kPixels) {
#pragma unroll
      for (int e = 0; e < G::kVector; ++e) bins.in.grads[threadIdx.x * G::kVector + e] = grad[e];
    }
#pragma unroll 1
    for (int k = 0; k < points; ++k) {
      if constexpr (kAdds == Adds::kPixels) {
        if (k % Bins<G>::kPoints == 0) {  // before the dots take the place of these points' weights
          bins.clear();
          __syncthreads();
          bins.find_slots(k, pixel);
          __syncthreads();
          bins.share_out();
          __syncthreads();
          bins.fill(k);
          __syncthreads();
          bins.add(lane, grad_value);
          __syncthreads();
        }
        if (!any) continue;
      }
      const Four weights = stage.weights(k);
      unsigned bytes[4];
      bytes_of(stage.corners(k), pixel, bytes);
      Pack<V> rows[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) rows[c] = load_pack<V>(value + (bytes[c] + lane * 16u));
      float products[4] = {};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float row[G::kVector];
        to_floats(rows[c], row);
#pragma unroll
        for (int e = 0; e < G::kVector; ++e) products[c] += grad[e] * row[e];
        if (kAdds == Adds::kPixels || weights.of[c] == 0) continue;
        if constexpr (kAdds == Adds::kFixed) {
          char* to = grad_value + int64_t{8 / G::kBytes} * bytes[c];
#pragma unroll
          for (int n = 0; n < G::kVector; ++n) {
            add_fixed(to, added_channel<G, kRun>(lane, n), weights.of[c] * added[n] * scale);
          }
        } else {
          float* to = reinterpret_cast<float*>(grad_value + 4 / G::kBytes * bytes[c]);
#pragma unroll
          for (int n = 0; n < G::kVector; n += 4) {
            add_four(to + added_channel<G, kRun>(lane, n), added + n, weights.of[c]);
          }
        }
      }
      const Dots<G::kLanes> dots(products, lane);
      __syncwarp();  // all have read the weights, whose place the dots take
      using Kept = Dots<G::kLanes>;
      if (lane % Kept::kSame == 0) {
#pragma unroll
        for (int i = 0; i < Kept::kKept; ++i) stage.weights(k).of[Kept::corner(lane) + i] = dots.of[i];
      }
    }
    if (any) {
      __syncwarp();
      differentiate<G>(p, levels, tiles, at, lane, attention, stage);
      if (p.grad_references_BMQLN) {
        __syncwarp();
        write_references<G>(p, at, lane, stage);
      }
    }
    kAdds == Adds::kPixels ? __syncthreads() : __syncwarp();  // before the next tile's points take the place of these
  }
}

}  // namespace
}  // namespace tenfold
