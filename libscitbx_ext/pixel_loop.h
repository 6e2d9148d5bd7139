/* From raw counts to sums per voxel, in one pass over the pixels of an image.
 *
 * For every pixel with direction e (unit vector from the sample, laboratory frame):
 *
 *     rlp = e / lambda - s0
 *     h   = W rlp,   W = diag(ndiv) (S R F A)^-1
 *     voxel = floor(h + 1/2)
 *
 * Pixels that are masked, untrusted, outside the resolution limits, outside the grid or
 * within the exclusion ellipsoid of a Bragg position add nothing to any sum. The others
 * add their value, their weight, 1 to `n_pixels`, and their position.
 *
 * Values, weights and coordinates are integers or half-integers, so their sums are
 * exact in any order and the result does not depend on the number of threads. Only
 * images of floating-point values are summed with rounding.
 *
 * Free of Python; threads are std::thread. OpenMP must not be used: the stubs in cctbx'
 * libomptbx make every thread run the whole loop. */
#ifndef DIALS_DIFFUSE_PIXEL_LOOP_H
#define DIALS_DIFFUSE_PIXEL_LOOP_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstddef>
#include <exception>
#include <stdexcept>
#include <thread>
#include <vector>

/* One object file for every x86 processor, the best instructions for the one at hand.
 * Contraction to fused multiply-add is off (SConscript), so all give the same bits. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) \
  && !defined(__clang__)
#define DIALS_DIFFUSE_CLONES \
  __attribute__((target_clones("avx512f", "avx2", "sse4.1", "default")))
#define DIALS_DIFFUSE_INLINE inline __attribute__((always_inline))
#else
#define DIALS_DIFFUSE_CLONES
#define DIALS_DIFFUSE_INLINE inline
#endif

namespace dials_diffuse {

/* What is fixed for a panel and a beam: arrays of nslow x nfast elements, slow axis
 * first. A weight of zero marks a masked pixel. */
struct PanelView {
  const float *ex, *ey, *ez;  // pixel directions, unit vectors
  const int *weight;          // normalisation, in any unit; zero marks a masked pixel
  int nfast, nslow;
  double trusted_min, trusted_max;  // inclusive
};

/* The grid's bounding box: voxel indices from -half to half on each axis.
 *
 * Voxels are numbered brick by brick (4 x 4 x 4 voxels), so that voxels that are near
 * each other in space, as those of neighbouring pixels are, have near numbers:
 *
 * A grid with more than 2^31 - 1 places is too large.
 *
 *     place = brick << 6 | (h & 3) << 4 | (k & 3) << 2 | (l & 3)
 *     brick = ((h >> 2) n_k + (k >> 2)) n_l + (l >> 2),   h, k, l counted from -half */
struct Box {
  int half[3];
  int bricks[3];  // number of bricks along each axis

  explicit Box(const int *half_size) {
    for (int i = 0; i < 3; ++i) {
      half[i] = half_size[i];
      bricks[i] = (2 * half[i] + 4) / 4;
    }
  }
  int64_t n_bricks() const {
    return int64_t(bricks[0]) * bricks[1] * bricks[2];
  }
  int64_t n_places() const {
    return 64 * n_bricks();
  }
  /* Number of a voxel in the C-ordered box, h slowest */
  int64_t c_order(int64_t place) const {
    const int64_t brick = place >> 6;
    const int64_t h = (brick / bricks[2] / bricks[1]) * 4 + (place >> 4 & 3);
    const int64_t k = (brick / bricks[2] % bricks[1]) * 4 + (place >> 2 & 3);
    const int64_t l = (brick % bricks[2]) * 4 + (place & 3);
    return (h * (2 * half[1] + 1) + k) * (2 * half[2] + 1) + l;
  }
};

/* What changes from frame to frame. */
struct Frame {
  float w[9];            // diag(ndiv) (S R F A)^-1, row by row, Angstrom
  float s0[3];           // incident beam, 1/Angstrom
  float inv_wavelength;  // 1/Angstrom
  float s2_min, s2_max;  // limits of |rlp|^2, 1/Angstrom^2
  float inv_ndiv[3];
  bool exclude;  // leave out pixels near Bragg positions
  /* Exclusion ellipsoid g(dh, dh) < 1 with dh = h/ndiv - nearest integer; symmetric
   * matrix as g11, g22, g33, g12, g13, g23. */
  float g[6];
  double z;  // frame number of the centre of the image
};

/* The sums of one voxel. */
struct Sums {
  int64_t voxel;  // its place; in results, its number in the C-ordered box
  double value, weight, x, y, z;
  int64_t n_pixels;
};

inline void add(Sums &to, const Sums &from) {
  to.value += from.value;
  to.weight += from.weight;
  to.x += from.x;
  to.y += from.y;
  to.z += from.z;
  to.n_pixels += from.n_pixels;
}

/* The sums of the voxels seen, in the order in which they were first seen. A brick that
 * is seen gets a page of 64 slots, so memory goes with the bricks seen, but for 4 bytes
 * for each brick of the box. */
class VoxelTable {
public:
  explicit VoxelTable(const Box &box) : page_of_brick_(box.n_bricks(), -1) {}

  Sums &find(int place) {
    int page = page_of_brick_[place >> 6];
    if (page < 0) page = new_page(place >> 6);
    int &slot = slots_[std::size_t(page) * 64 + (place & 63)];
    if (slot < 0) {
      slot = int(sums_.size());
      Sums empty = {place, 0, 0, 0, 0, 0, 0};
      sums_.push_back(empty);
    }
    return sums_[slot];
  }

  const std::vector<Sums> &sums() const {
    return sums_;
  }

  void clear() {
    for (std::size_t i = 0; i < bricks_.size(); ++i)
      page_of_brick_[bricks_[i]] = -1;
    bricks_.clear();
    slots_.clear();
    sums_.clear();
  }

private:
  int new_page(int brick) {
    const int page = int(bricks_.size());
    bricks_.push_back(brick);
    slots_.resize(slots_.size() + 64, -1);
    page_of_brick_[brick] = page;
    return page;
  }

  std::vector<int> page_of_brick_;  // or -1
  std::vector<int> bricks_;         // brick of each page
  std::vector<int> slots_;          // 64 for each page: number of the sums, or -1
  std::vector<Sums> sums_;
};

/* floor(x), written so that it becomes vector code for every processor */
DIALS_DIFFUSE_INLINE int floor_to_int(float x) {
  int i = int(x);
  return i - (x < float(i));
}

/* Square of the distance to the nearest Bragg position, in units of the ellipsoid */
DIALS_DIFFUSE_INLINE float bragg_distance(const Frame &f, float h, float k, float l) {
  float a = h * f.inv_ndiv[0], b = k * f.inv_ndiv[1], c = l * f.inv_ndiv[2];
  a -= float(floor_to_int(a + 0.5f));
  b -= float(floor_to_int(b + 0.5f));
  c -= float(floor_to_int(c + 0.5f));
  return f.g[0] * a * a + f.g[1] * b * b + f.g[2] * c * c
         + 2.0f * (f.g[3] * a * b + f.g[4] * a * c + f.g[5] * b * c);
}

template <bool Exclude>
DIALS_DIFFUSE_INLINE void voxels_of_pixels(const Frame &frame,
                                           const Box &box,
                                           const float *ex,
                                           const float *ey,
                                           const float *ez,
                                           int n,
                                           int *out) {
  const Frame f = frame;
  const int nh = box.half[0], nk = box.half[1], nl = box.half[2];
  const int bricks_k = box.bricks[1], bricks_l = box.bricks[2];
  for (int i = 0; i < n; ++i) {
    float rx = ex[i] * f.inv_wavelength - f.s0[0];
    float ry = ey[i] * f.inv_wavelength - f.s0[1];
    float rz = ez[i] * f.inv_wavelength - f.s0[2];
    float s2 = rx * rx + ry * ry + rz * rz;
    float h = f.w[0] * rx + f.w[1] * ry + f.w[2] * rz;
    float k = f.w[3] * rx + f.w[4] * ry + f.w[5] * rz;
    float l = f.w[6] * rx + f.w[7] * ry + f.w[8] * rz;
    int ih = floor_to_int(h + 0.5f) + nh;
    int ik = floor_to_int(k + 0.5f) + nk;
    int il = floor_to_int(l + 0.5f) + nl;
    bool inside = (s2 >= f.s2_min) & (s2 <= f.s2_max) & (ih >= 0) & (ih <= 2 * nh)
                  & (ik >= 0) & (ik <= 2 * nk) & (il >= 0) & (il <= 2 * nl);
    if (Exclude) inside = inside & (bragg_distance(f, h, k, l) >= 1.0f);
    int brick = ((ih >> 2) * bricks_k + (ik >> 2)) * bricks_l + (il >> 2);
    int place = brick << 6 | (ih & 3) << 4 | (ik & 3) << 2 | (il & 3);
    out[i] = inside ? place : -1;
  }
}

/* Place of the voxel of each of n pixels in the box, or -1 */
DIALS_DIFFUSE_CLONES inline void voxel_places(const Frame &frame,
                                              const Box &box,
                                              const float *ex,
                                              const float *ey,
                                              const float *ez,
                                              int n,
                                              int *out) {
  if (frame.exclude)
    voxels_of_pixels<true>(frame, box, ex, ey, ez, n, out);
  else
    voxels_of_pixels<false>(frame, box, ex, ey, ez, n, out);
}

/* Marks with -1 the pixels that are masked or whose value is not to be trusted.
 * Written to reject NaN. */
template <typename T>
DIALS_DIFFUSE_INLINE void reject_pixels(const T *data,
                                        const int *weight,
                                        T lowest,
                                        T highest,
                                        int n,
                                        int *places) {
  for (int i = 0; i < n; ++i) {
    bool good = (data[i] >= lowest) & (data[i] <= highest) & (weight[i] > 0);
    places[i] = good ? places[i] : -1;
  }
}
DIALS_DIFFUSE_CLONES inline void reject(const int *data,
                                        const int *weight,
                                        int lowest,
                                        int highest,
                                        int n,
                                        int *places) {
  reject_pixels(data, weight, lowest, highest, n, places);
}
DIALS_DIFFUSE_CLONES inline void reject(const double *data,
                                        const int *weight,
                                        double lowest,
                                        double highest,
                                        int n,
                                        int *places) {
  reject_pixels(data, weight, lowest, highest, n, places);
}

/* The trusted limits as values of the image's type */
inline void trusted_limits(const PanelView &p, int &lowest, int &highest) {
  const double lo = -2147483648.0, hi = 2147483647.0;
  lowest = int(std::min(std::max(std::ceil(p.trusted_min), lo), hi));
  highest = int(std::min(std::max(std::floor(p.trusted_max), lo), hi));
}
inline void trusted_limits(const PanelView &p, double &lowest, double &highest) {
  lowest = p.trusted_min;
  highest = p.trusted_max;
}

/* Sum of the values before each pixel; a type in which integers stay exact. Rejected
 * floating-point values may be NaN or infinite and must not enter. */
inline void add_up(const int *data, const int *, int n, std::vector<int64_t> &sums) {
  int64_t sum = 0;
  for (int i = 0; i < n; ++i) {
    sums[i] = sum;
    sum += data[i];
  }
  sums[n] = sum;
}
inline void add_up(const double *data,
                   const int *places,
                   int n,
                   std::vector<double> &sums) {
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    sums[i] = sum;
    sum += places[i] < 0 ? 0.0 : data[i];
  }
  sums[n] = sum;
}

template <typename T>
struct sum_of;
template <>
struct sum_of<int> {
  typedef int64_t type;
};
template <>
struct sum_of<double> {
  typedef double type;
};

/* Scratch space for one row of n pixels */
template <typename T>
struct Row {
  std::vector<int> places;      // voxel of each pixel, or -1
  std::vector<int> begin, end;  // runs of neighbouring pixels in one voxel
  std::vector<typename sum_of<T>::type> values;  // sum before each pixel
  std::vector<int64_t> weights;                  // likewise

  explicit Row(int n)
      : places(n), begin(n + 1), end(n + 1), values(n + 1), weights(n + 1) {}

  /* Finds the runs and returns their number; without branches, as a run ends every
   * few pixels and no processor could predict where. */
  int find_runs() {
    const int n = int(places.size());
    int n_begin = 0, n_end = 0, previous = -1;
    for (int i = 0; i < n; ++i) {
      const int place = places[i];
      const bool differs = place != previous;
      begin[n_begin] = i;
      n_begin += differs & (place >= 0);
      end[n_end] = i;
      n_end += differs & (previous >= 0);
      previous = place;
    }
    end[n_end] = n;
    return n_begin;
  }
};

/* Adds the runs of one row to their voxels: neighbouring pixels mostly share one. */
template <typename T>
void add_runs(Row<T> &row, double y, double z, VoxelTable &table) {
  const int n_runs = row.find_runs();
  for (int r = 0; r < n_runs; ++r) {
    const int begin = row.begin[r], end = row.end[r];
    const double n = end - begin;
    Sums &sums = table.find(row.places[begin]);
    sums.value += double(row.values[end] - row.values[begin]);
    sums.weight += double(row.weights[end] - row.weights[begin]);
    sums.x += 0.5 * n * (begin + end);  // pixel centres are at i + 1/2
    sums.y += n * y;
    sums.z += n * z;
    sums.n_pixels += end - begin;
  }
}

/* An image of a panel and its frame */
template <typename T>
struct Image {
  Frame frame;
  const T *data;
};

/* Adds the rows first..last-1 of a panel. Each row is done for all images before the
 * next: what neighbouring frames share, geometry and voxels, is then still at hand. */
template <typename T>
void add_rows(const PanelView &p,
              const std::vector<Image<T> > &images,
              const Box &box,
              int first,
              int last,
              VoxelTable &table) {
  Row<T> r(p.nfast);
  int *places = &r.places[0];
  T lowest, highest;
  trusted_limits(p, lowest, highest);
  for (int row = first; row < last; ++row) {
    const std::size_t at = std::size_t(row) * p.nfast;
    add_up(p.weight + at, places, p.nfast, r.weights);
    for (std::size_t i = 0; i < images.size(); ++i) {
      const Frame &f = images[i].frame;
      const T *data = images[i].data + at;
      voxel_places(f, box, p.ex + at, p.ey + at, p.ez + at, p.nfast, places);
      reject(data, p.weight + at, lowest, highest, p.nfast, places);
      add_up(data, places, p.nfast, r.values);
      add_runs(r, row + 0.5, f.z, table);
    }
  }
}

/* The order that sorts sums by voxel (below 2^33), stable: radix sort, 11 bits at a
 * time. */
inline std::vector<uint32_t> order_by_voxel(const std::vector<Sums> &sums) {
  const std::size_t n = sums.size(), size = 1 << 11;
  std::vector<uint32_t> order(n), next(n);
  for (std::size_t i = 0; i < n; ++i)
    order[i] = uint32_t(i);
  for (int shift = 0; shift < 33; shift += 11) {
    std::vector<std::size_t> start(size + 1, 0);
    for (std::size_t i = 0; i < n; ++i)
      ++start[(sums[i].voxel >> shift & (size - 1)) + 1];
    for (std::size_t i = 0; i < size; ++i)
      start[i + 1] += start[i];
    for (std::size_t i = 0; i < n; ++i)
      next[start[sums[order[i]].voxel >> shift & (size - 1)]++] = order[i];
    order.swap(next);
  }
  return order;
}

/* Threads that are joined when it goes out of scope, also if one could not start. */
class Team {
public:
  explicit Team(std::size_t size) {
    threads_.reserve(size);
  }
  template <typename Work>
  void start(const Work &work, std::size_t t) {
    threads_.push_back(std::thread(work, t));
  }
  ~Team() {
    for (std::size_t t = 0; t < threads_.size(); ++t)
      threads_[t].join();
  }

private:
  std::vector<std::thread> threads_;
};

/* Collects what one panel saw of the images of one block: all the frames that make one
 * observation per voxel. */
class Accumulator {
public:
  Accumulator(const Box &box, int n_threads) : box_(box) {
    if (n_threads < 1) throw std::invalid_argument("n_threads must be positive");
    tables_.assign(n_threads, VoxelTable(box));
  }

  /* Adds images of the panel; the rows are dealt out to the threads in bands. What one
   * of them throws is thrown here once all have ended. */
  template <typename T>
  void add(const PanelView &p, const std::vector<Image<T> > &images) {
    std::vector<std::exception_ptr> errors(tables_.size());
    auto work = [&](std::size_t t) {
      try {
        band(t, p, images);
      } catch (...) {
        errors[t] = std::current_exception();
      }
    };
    {
      Team team(tables_.size() - 1);
      for (std::size_t t = 1; t < tables_.size(); ++t)
        team.start(work, t);
      work(0);
    }
    for (std::size_t t = 0; t < errors.size(); ++t)
      if (errors[t]) std::rethrow_exception(errors[t]);
  }

  /* The sums of all voxels seen, in C order; empties the tables. */
  std::vector<Sums> finish() {
    std::vector<Sums> all;
    for (std::size_t t = 0; t < tables_.size(); ++t) {
      all.insert(all.end(), tables_[t].sums().begin(), tables_[t].sums().end());
      tables_[t].clear();
    }
    for (std::size_t i = 0; i < all.size(); ++i)
      all[i].voxel = box_.c_order(all[i].voxel);
    const std::vector<uint32_t> order = order_by_voxel(all);
    std::vector<Sums> result;
    result.reserve(all.size());
    for (std::size_t i = 0; i < order.size(); ++i) {
      const Sums &sums = all[order[i]];
      if (!result.empty() && result.back().voxel == sums.voxel)
        dials_diffuse::add(result.back(), sums);
      else
        result.push_back(sums);
    }
    return result;
  }

  const Box &box() const {
    return box_;
  }

private:
  template <typename T>
  void band(std::size_t t, const PanelView &p, const std::vector<Image<T> > &images) {
    const int64_t n = tables_.size();
    const int first = int(p.nslow * t / n), last = int(p.nslow * (t + 1) / n);
    add_rows(p, images, box_, first, last, tables_[t]);
  }

  Box box_;
  std::vector<VoxelTable> tables_;
};

}  // namespace dials_diffuse

#endif
