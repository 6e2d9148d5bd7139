/* From raw counts to sums per voxel, in one pass over the pixels of an image.
 *
 * For every pixel with direction e (unit vector from the sample, laboratory frame):
 *
 *     rlp = e / lambda - s0
 *     h   = W rlp,   W = diag(ndiv) (S R F A)^-1
 *     voxel = floor(h + 1/2)
 *
 * Pixels that are masked, untrusted, outside the resolution limits or outside the grid
 * add nothing to any sum. Pixels near a Bragg position are added up by themselves,
 * under the reciprocal lattice point, or dropped. The others add their value, their
 * weight, 1 to `n_pixels`, their position and their background to their voxel.
 *
 * Values, weights and coordinates are integers or half-integers, so their sums are
 * exact in any order and the result does not depend on the number of threads. Only
 * images of floating-point values, the background and the positions within a wide image
 * are summed with rounding.
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

#if defined(__GNUC__)
#define DIALS_DIFFUSE_PREFETCH(address) __builtin_prefetch(address, 1)
#define DIALS_DIFFUSE_RESTRICT __restrict__
#else
#define DIALS_DIFFUSE_PREFETCH(address)
#define DIALS_DIFFUSE_RESTRICT
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
  int64_t n_voxels() const {
    return (2 * int64_t(half[0]) + 1) * (2 * int64_t(half[1]) + 1)
           * (2 * int64_t(half[2]) + 1);
  }
  /* Place of a voxel, or -1 outside the box */
  int place(int h, int k, int l) const {
    h += half[0], k += half[1], l += half[2];
    if (h < 0 || k < 0 || l < 0 || h > 2 * half[0] || k > 2 * half[1]
        || l > 2 * half[2])
      return -1;
    const int brick = ((h >> 2) * bricks[1] + (k >> 2)) * bricks[2] + (l >> 2);
    return brick << 6 | (h & 3) << 4 | (k & 3) << 2 | (l & 3);
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
  float sweep[9];        // change of w over the width of the image
  float t_min, t_max;    // the image's range of rotation about w, in its widths
  bool sweeps;           // whether the rotation within the image matters to exclusion
  bool wide;             // whether it may lead from one lattice point to another
  bool spread;           // whether the rows are spread over the width of the image
  float s0[3];           // incident beam, 1/Angstrom
  float inv_wavelength;  // 1/Angstrom
  float s2_min, s2_max;  // limits of |rlp|^2, 1/Angstrom^2
  float inv_ndiv[3];
  bool exclude;  // leave out pixels near Bragg positions
  /* Exclusion region with dh = h/ndiv - nearest integer anywhere within the width of
   * the image, s = |rlp|:
   *
   *     g(dh, dh) + radial g(dh, h)^2 / (1 + growth_radial s^2) < 1 + growth s^2
   *
   * an ellipsoid that grows with s, less along the scattering vector than across if
   * `radial` is not 0. Kept as the upper triangle u of g = u^T u, as u11, u22, u33,
   * u12, u13, u23: |u dh|^2 is g(dh, dh). */
  float u[6];
  float u_sweep[9];                     // u diag(1/ndiv) sweep
  float growth, growth_radial, radial;  // Angstrom^2
  double z;                             // frame number of the centre of the image
};

/* The frame at which a row of a wide image is indexed. Each row takes a place of its
 * own within the width of the image, in a sequence that fills it evenly with any number
 * of neighbouring rows (multiples of the golden ratio): every pixel counts once, at one
 * angle, and the voxels between the middles of two images are seen too. */
inline Frame frame_of_row(const Frame &f, int row) {
  if (!f.spread) return f;
  const double turn = (row + 0.5) * 0.6180339887498949;
  const double t = turn - std::floor(turn) - 0.5;
  Frame result = f;
  for (int i = 0; i < 9; ++i)
    result.w[i] += float(t) * f.sweep[i];
  result.t_min -= float(t);
  result.t_max -= float(t);
  result.z += t;
  return result;
}

/* The sums of one voxel. */
struct Sums {
  int64_t voxel;  // its place; in results, its number in the C-ordered box
  double value, weight, x, y, z;
  double background, variance;  // photons, and photons^2
  int64_t n_pixels;
};

inline void add(Sums &to, const Sums &from) {
  to.value += from.value;
  to.weight += from.weight;
  to.x += from.x;
  to.y += from.y;
  to.z += from.z;
  to.background += from.background;
  to.variance += from.variance;
  to.n_pixels += from.n_pixels;
}

/* Where sums are kept: the voxels, and after them the reciprocal lattice points whose
 * pixels are added up by themselves. A point may be marked as absent: there is no peak,
 * and its pixels count as any others. */
struct Places {
  Box voxels;
  Box points;
  bool keep_peaks;                    // else pixels near lattice points are dropped
  std::vector<unsigned char> absent;  // by place of the point; empty if none is

  explicit Places(const Box &box) : voxels(box), points(box), keep_peaks(false) {}
  Places(const Box &box, const Box &lattice)
      : voxels(box), points(lattice), keep_peaks(true) {}

  int64_t n_bricks() const {
    return voxels.n_bricks() + (keep_peaks ? points.n_bricks() : 0);
  }
  /* Number of a place in the C-ordered box of the voxels, continued by that of the
   * points. */
  int64_t c_order(int64_t place) const {
    const int64_t n = voxels.n_places();
    if (place < n) return voxels.c_order(place);
    return voxels.n_voxels() + points.c_order(place - n);
  }
};

/* The sums of the voxels seen, in the order in which they were first seen. A brick that
 * is seen gets a page of 64 slots, so memory goes with the bricks seen, but for 4 bytes
 * for each brick of the box. */
class VoxelTable {
public:
  explicit VoxelTable(const Places &places) : page_of_brick_(places.n_bricks(), -1) {}

  /* Number of the sums of a voxel, which are made if there are none */
  int find(int place) {
    int page = page_of_brick_[place >> 6];
    if (page < 0) page = new_page(place >> 6);
    int &slot = slots_[std::size_t(page) * 64 + (place & 63)];
    if (slot < 0) {
      slot = int(sums_.size());
      Sums empty = {place, 0, 0, 0, 0, 0, 0, 0, 0};
      sums_.push_back(empty);
    }
    return slot;
  }

  Sums &operator[](int number) {
    return sums_[number];
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

/* Where a pixel belongs that adds nothing to any sum */
const int NOWHERE = -1;

/* floor(x), written so that it becomes vector code for every processor */
DIALS_DIFFUSE_INLINE int floor_to_int(float x) {
  int i = int(x);
  return i - (x < float(i));
}

/* Whether a reciprocal lattice point is near anywhere within the width of the image.
 * With d(t) = d + t v the distance from it at t image widths from w,
 *
 *     g(d(t), d(t)) = g(d, d) + 2 t g(d, v) + t^2 g(v, v)
 *
 * is least at t = -g(d, v) / g(v, v), or at an end of the image. The point is that
 * nearest to the pixel `at` so many image widths from w. */
template <bool Sweeps, bool Radial, bool Moved>
DIALS_DIFFUSE_INLINE bool near_point(const Frame &f,
                                     float h,
                                     float k,
                                     float l,
                                     float rx,
                                     float ry,
                                     float rz,
                                     float s2,
                                     float at) {
  float a = h, b = k, c = l;
  if (Moved) {
    a += at * (f.sweep[0] * rx + f.sweep[1] * ry + f.sweep[2] * rz);
    b += at * (f.sweep[3] * rx + f.sweep[4] * ry + f.sweep[5] * rz);
    c += at * (f.sweep[6] * rx + f.sweep[7] * ry + f.sweep[8] * rz);
  }
  a *= f.inv_ndiv[0], b *= f.inv_ndiv[1], c *= f.inv_ndiv[2];
  a -= float(floor_to_int(a + 0.5f));
  b -= float(floor_to_int(b + 0.5f));
  c -= float(floor_to_int(c + 0.5f));
  // in the coordinates in which the ellipsoid is the unit sphere
  float x = f.u[0] * a + f.u[3] * b + f.u[4] * c;
  float y = f.u[1] * b + f.u[5] * c;
  float z = f.u[2] * c;
  if (Sweeps) {
    float vx = f.u_sweep[0] * rx + f.u_sweep[1] * ry + f.u_sweep[2] * rz;
    float vy = f.u_sweep[3] * rx + f.u_sweep[4] * ry + f.u_sweep[5] * rz;
    float vz = f.u_sweep[6] * rx + f.u_sweep[7] * ry + f.u_sweep[8] * rz;
    float dv = x * vx + y * vy + z * vz;
    float vv = vx * vx + vy * vy + vz * vz + 1e-20f;
    float t = -dv / vv;
    t = t > f.t_min - at ? t : f.t_min - at;
    t = t < f.t_max - at ? t : f.t_max - at;
    x += t * vx;
    y += t * vy;
    z += t * vz;
  }
  float distance = x * x + y * y + z * z;
  if (Radial) {
    a = h * f.inv_ndiv[0], b = k * f.inv_ndiv[1], c = l * f.inv_ndiv[2];
    float along = x * (f.u[0] * a + f.u[3] * b + f.u[4] * c)
                  + y * (f.u[1] * b + f.u[5] * c) + z * (f.u[2] * c);
    distance += f.radial * along * along / (1.0f + f.growth_radial * s2);
  }
  return distance < 1.0f + f.growth * s2;
}

/* The same for the points nearest at w and, in a wide image, at its ends. */
template <bool Sweeps, bool Wide, bool Radial>
DIALS_DIFFUSE_INLINE bool near_any_point(const Frame &f,
                                         float h,
                                         float k,
                                         float l,
                                         float rx,
                                         float ry,
                                         float rz,
                                         float s2) {
  bool near = near_point<Sweeps, Radial, false>(f, h, k, l, rx, ry, rz, s2, 0.0f);
  if (Wide) {
    bool first = near_point<Sweeps, Radial, true>(f, h, k, l, rx, ry, rz, s2, f.t_min);
    bool last = near_point<Sweeps, Radial, true>(f, h, k, l, rx, ry, rz, s2, f.t_max);
    near = near | first | last;
  }
  return near;
}

template <bool Exclude, bool Sweeps, bool Wide, bool Radial>
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
    int brick = ((ih >> 2) * bricks_k + (ik >> 2)) * bricks_l + (il >> 2);
    int place = brick << 6 | (ih & 3) << 4 | (ik & 3) << 2 | (il & 3);
    if (Exclude) {
      bool near = near_any_point<Sweeps, Wide, Radial>(f, h, k, l, rx, ry, rz, s2);
      place = near ? -2 - place : place;
    }
    out[i] = inside ? place : NOWHERE;
  }
}

/* Where each of n pixels belongs: the place of its voxel in the box, -2 - place if a
 * lattice point is near, or NOWHERE. */
DIALS_DIFFUSE_CLONES inline void voxel_places(const Frame &frame,
                                              const Box &box,
                                              const float *ex,
                                              const float *ey,
                                              const float *ez,
                                              int n,
                                              int *out) {
  const bool radial = frame.radial != 0;
  if (!frame.exclude)
    voxels_of_pixels<false, false, false, false>(frame, box, ex, ey, ez, n, out);
  else if (!frame.sweeps && !radial)
    voxels_of_pixels<true, false, false, false>(frame, box, ex, ey, ez, n, out);
  else if (!frame.sweeps)
    voxels_of_pixels<true, false, false, true>(frame, box, ex, ey, ez, n, out);
  else if (!frame.wide && !radial)
    voxels_of_pixels<true, true, false, false>(frame, box, ex, ey, ez, n, out);
  else if (!frame.wide)
    voxels_of_pixels<true, true, false, true>(frame, box, ex, ey, ez, n, out);
  else
    voxels_of_pixels<true, true, true, true>(frame, box, ex, ey, ez, n, out);
}

/* Where a run of pixels near a lattice point belongs: to the point, or nowhere if peaks
 * are dropped, or to their voxel if the point is absent.
 *
 * All the pixels of a run are in one voxel and next to each other, so they are near the
 * same point as the first of them, unless the exclusion regions of two points touch. */
inline int place_of_peak(const Frame &f,
                         const Places &all,
                         float ex,
                         float ey,
                         float ez,
                         int voxel) {
  const float r[3] = {ex * f.inv_wavelength - f.s0[0],
                      ey * f.inv_wavelength - f.s0[1],
                      ez * f.inv_wavelength - f.s0[2]};
  const float s2 = r[0] * r[0] + r[1] * r[1] + r[2] * r[2];
  float h[3];
  for (int i = 0; i < 3; ++i) {
    const float *w = f.w + 3 * i;
    h[i] = w[0] * r[0] + w[1] * r[1] + w[2] * r[2];
  }
  float at = 0.0f;
  if (f.wide) {
    const float places[3] = {0.0f, f.t_min, f.t_max};
    for (int i = 2; i >= 0; --i)
      if (near_point<true, true, true>(
            f, h[0], h[1], h[2], r[0], r[1], r[2], s2, places[i]))
        at = places[i];
  }
  int hkl[3];
  for (int i = 0; i < 3; ++i) {
    const float *w = f.sweep + 3 * i;
    const float moved = h[i] + at * (w[0] * r[0] + w[1] * r[1] + w[2] * r[2]);
    hkl[i] = floor_to_int(moved * f.inv_ndiv[i] + 0.5f);
  }
  if (!all.keep_peaks) return NOWHERE;
  const int point = all.points.place(hkl[0], hkl[1], hkl[2]);
  if (point < 0) return NOWHERE;
  if (!all.absent.empty() && all.absent[point]) return voxel;
  return int(all.voxels.n_places()) + point;
}

/* Marks with NOWHERE the pixels that are masked or whose value is not to be trusted.
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
    places[i] = good ? places[i] : NOWHERE;
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
inline void add_up(const int *data, const int *, int n, int64_t *sums) {
  int64_t sum = 0;
  for (int i = 0; i < n; ++i) {
    sums[i] = sum;
    sum += data[i];
  }
  sums[n] = sum;
}
inline void add_up(const double *data, const int *places, int n, double *sums) {
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    sums[i] = sum;
    sum += places[i] == NOWHERE ? 0.0 : data[i];
  }
  sums[n] = sum;
}

/* The same of single-precision values. In double precision their sums are exact, unless
 * some are 10^5 times as large as others. Four at a time, as each sum waits for the one
 * before. */
inline void add_up(const float *data, const int *places, int n, double *sums) {
  double sum = 0;
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    const double a = places[i] == NOWHERE ? 0.0f : data[i];
    const double b = places[i + 1] == NOWHERE ? 0.0f : data[i + 1];
    const double c = places[i + 2] == NOWHERE ? 0.0f : data[i + 2];
    const double d = places[i + 3] == NOWHERE ? 0.0f : data[i + 3];
    sums[i] = sum;
    sums[i + 1] = sum + a;
    sums[i + 2] = sum + (a + b);
    sums[i + 3] = sum + (a + b + c);
    sum += (a + b) + (c + d);
  }
  for (; i < n; ++i) {
    sums[i] = sum;
    sum += places[i] == NOWHERE ? 0.0f : data[i];
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

/* Pixels of an image that belong to a Bragg peak, x0 <= x < x1 and y0 <= y < y1 */
struct Rectangle {
  int x0, x1, y0, y1;
  int point;  // place of the reciprocal lattice point, or -1 to drop the pixels
};

/* The rectangles of an image, ordered by their first row. */
class Rectangles {
public:
  Rectangles() : height_(0) {}
  explicit Rectangles(const std::vector<Rectangle> &rectangles)
      : rectangles_(rectangles), height_(0) {
    std::stable_sort(rectangles_.begin(), rectangles_.end(), by_row);
    for (std::size_t i = 0; i < rectangles_.size(); ++i)
      height_ = std::max(height_, rectangles_[i].y1 - rectangles_[i].y0);
  }

  /* Takes the pixels of a row out of their voxels. */
  void apply(const Places &all, int row, int nfast, int *places) const {
    if (rectangles_.empty()) return;
    const Rectangle first = {0, 0, row - height_ + 1, 0, 0};
    std::vector<Rectangle>::const_iterator r =
      std::lower_bound(rectangles_.begin(), rectangles_.end(), first, by_row);
    const int offset = int(all.voxels.n_places());
    for (; r != rectangles_.end() && r->y0 <= row; ++r) {
      if (row >= r->y1) continue;
      const bool keep = all.keep_peaks && r->point >= 0;
      const int place = keep ? offset + r->point : NOWHERE;
      for (int x = std::max(r->x0, 0); x < std::min(r->x1, nfast); ++x)
        places[x] = places[x] == NOWHERE ? NOWHERE : place;
    }
  }

private:
  static bool by_row(const Rectangle &a, const Rectangle &b) {
    return a.y0 < b.y0;
  }

  std::vector<Rectangle> rectangles_;
  int height_;  // of the highest
};

/* Background of an image, photons in each pixel:
 *
 *     b(x, y) = rate base(x, y) + [ profile(s) + grid(x, y) ] unit weight(x, y)
 *
 * The profile is linear between its values at s_start + i/inv_step and constant beyond
 * them; the grid is bilinear between nodes at pixel coordinates i/inv_spacing. Null
 * pointers for what there is not. The variance is that of the base alone, in photons^2:
 * what is smooth has an error common to all pixels of a voxel, which is no sum. */
struct Background {
  const float *base, *base_variance;
  float rate;
  const float *profile;
  int n_profile;
  float s_start, inv_step;
  const float *grid;
  int grid_fast, grid_slow;
  float inv_spacing;
  float unit;

  Background()
      : base(0),
        base_variance(0),
        rate(0),
        profile(0),
        n_profile(0),
        s_start(0),
        inv_step(0),
        grid(0),
        grid_fast(0),
        grid_slow(0),
        inv_spacing(0),
        unit(0) {}
  bool any() const {
    return base || profile || grid;
  }
};

/* Where the pixels of a row lie on the profile: number of the value before each, and
 * how far beyond that it is, 0 to 1. It depends on the beam alone, so all images of a
 * sweep share it. */
struct ProfilePlaces {
  std::vector<int> before;
  std::vector<float> fraction;

  explicit ProfilePlaces(int n) : before(n), fraction(n), row_(-1) {}

  bool is_of(int row, const Background &b, const Frame &f) const {
    return row == row_ && n_ == b.n_profile && s_start_ == b.s_start
           && inv_step_ == b.inv_step && inv_wavelength_ == f.inv_wavelength
           && s0_[0] == f.s0[0] && s0_[1] == f.s0[1] && s0_[2] == f.s0[2];
  }
  void set(int row, const Background &b, const Frame &f) {
    row_ = row;
    n_ = b.n_profile;
    s_start_ = b.s_start;
    inv_step_ = b.inv_step;
    inv_wavelength_ = f.inv_wavelength;
    std::copy(f.s0, f.s0 + 3, s0_);
  }

private:
  int row_, n_;
  float s_start_, inv_step_, inv_wavelength_, s0_[3];
};

DIALS_DIFFUSE_CLONES inline void find_on_profile(const Background &background,
                                                 const Frame &frame,
                                                 const float *ex,
                                                 const float *ey,
                                                 const float *ez,
                                                 int n,
                                                 int *before,
                                                 float *fraction) {
  const Background b = background;
  const Frame f = frame;
  const float last = float(b.n_profile - 1);
  for (int i = 0; i < n; ++i) {
    float rx = ex[i] * f.inv_wavelength - f.s0[0];
    float ry = ey[i] * f.inv_wavelength - f.s0[1];
    float rz = ez[i] * f.inv_wavelength - f.s0[2];
    float s = std::sqrt(rx * rx + ry * ry + rz * rz);
    float at = (s - b.s_start) * b.inv_step;
    at = at > 0.0f ? at : 0.0f;
    at = at < last ? at : last;
    int k = int(at);
    k = k < b.n_profile - 2 ? k : b.n_profile - 2;
    before[i] = k;
    fraction[i] = at - float(k);
  }
}

/* Adds the profile, an intensity, at n pixels of a row */
DIALS_DIFFUSE_CLONES inline void add_profile(
  const float *DIALS_DIFFUSE_RESTRICT profile,
  const int *DIALS_DIFFUSE_RESTRICT before,
  const float *DIALS_DIFFUSE_RESTRICT fraction,
  int n,
  float *DIALS_DIFFUSE_RESTRICT out) {
  for (int i = 0; i < n; ++i) {
    float low = profile[before[i]], high = profile[before[i] + 1];
    out[i] += low + fraction[i] * (high - low);
  }
}

/* Adds the grid, an intensity, at n pixels of a row: between two nodes it is linear. */
DIALS_DIFFUSE_CLONES inline void add_grid(const Background &background,
                                          int row,
                                          int n,
                                          float *out) {
  const Background b = background;
  const float at = (row + 0.5f) * b.inv_spacing;
  const int below = std::min(int(at), b.grid_slow - 2);
  const float v = std::min(at - float(below), 1.0f);
  const float *lower = b.grid + std::size_t(below) * b.grid_fast;
  const float *upper = lower + b.grid_fast;
  for (int j = 0; j + 1 < b.grid_fast; ++j) {
    const float left = lower[j] + v * (upper[j] - lower[j]);
    const float right = lower[j + 1] + v * (upper[j + 1] - lower[j + 1]);
    const int first = int(std::ceil(float(j) / b.inv_spacing - 0.5f));
    const int next = int(std::ceil(float(j + 1) / b.inv_spacing - 0.5f));
    const int end = j + 2 < b.grid_fast ? std::min(next, n) : n;
    for (int i = std::max(first, 0); i < end; ++i) {
      float u = (float(i) + 0.5f) * b.inv_spacing - float(j);
      u = u < 1.0f ? u : 1.0f;
      out[i] += left + u * (right - left);
    }
  }
}

/* Intensities to photons of n pixels of a row, with the measured background added */
DIALS_DIFFUSE_CLONES inline void to_photons(const Background &background,
                                            const int *weight,
                                            std::size_t at,
                                            int n,
                                            float *out,
                                            float *variance) {
  const Background b = background;
  for (int i = 0; i < n; ++i)
    out[i] *= b.unit * float(weight[i]);
  if (!b.base) return;
  const float rate2 = b.rate * b.rate;
  const float *base = b.base + at, *base_variance = b.base_variance + at;
  for (int i = 0; i < n; ++i) {
    out[i] += b.rate * base[i];
    variance[i] = rate2 * base_variance[i];
  }
}

/* Leaves out the pixels of a row where the background was not measured */
inline void drop_unmeasured(const Background &b, std::size_t at, int n, int *places) {
  if (!b.base) return;
  for (int i = 0; i < n; ++i)
    places[i] = b.base[at + i] == b.base[at + i] ? places[i] : NOWHERE;
}

/* Whether each of n pixels can be used in any image: not masked, and within the
 * resolution limits. The same arithmetic as in `voxels_of_pixels`. */
DIALS_DIFFUSE_CLONES inline void find_usable(const Frame &frame,
                                             const float *ex,
                                             const float *ey,
                                             const float *ez,
                                             const int *weight,
                                             int n,
                                             int *usable) {
  const Frame f = frame;
  for (int i = 0; i < n; ++i) {
    float rx = ex[i] * f.inv_wavelength - f.s0[0];
    float ry = ey[i] * f.inv_wavelength - f.s0[1];
    float rz = ez[i] * f.inv_wavelength - f.s0[2];
    float s2 = rx * rx + ry * ry + rz * rz;
    usable[i] = (s2 >= f.s2_min) & (s2 <= f.s2_max) & (weight[i] > 0);
  }
}

/* The pixels of a row from the first to the last that can be used. Only these are
 * looked at in every image: of a square detector, limited to the largest whole circle,
 * a fifth is beyond it. */
struct Span {
  int first, last;  // first <= i < last

  Span() : first(0), last(0), row_(-1) {}

  /* Finds them, unless they are known from the image before, of the same sweep */
  void find(const PanelView &p, int row, const Frame &f, std::vector<int> &scratch) {
    if (row == row_ && inv_wavelength_ == f.inv_wavelength && s2_min_ == f.s2_min
        && s2_max_ == f.s2_max && std::equal(s0_, s0_ + 3, f.s0))
      return;
    row_ = row;
    inv_wavelength_ = f.inv_wavelength;
    s2_min_ = f.s2_min;
    s2_max_ = f.s2_max;
    std::copy(f.s0, f.s0 + 3, s0_);
    const std::size_t at = std::size_t(row) * p.nfast;
    int *usable = &scratch[0];
    find_usable(f, p.ex + at, p.ey + at, p.ez + at, p.weight + at, p.nfast, usable);
    first = 0;
    last = p.nfast;
    while (first < last && !usable[first])
      ++first;
    while (first < last && !usable[last - 1])
      --last;
  }

private:
  int row_;
  float inv_wavelength_, s2_min_, s2_max_, s0_[3];
};

/* Scratch space for one row of n pixels */
template <typename T>
struct Row {
  std::vector<int> places;                  // where each pixel belongs
  std::vector<float> background, variance;  // photons, photons^2 of each pixel
  ProfilePlaces on_profile;
  std::vector<int> begin;  // of each run of neighbouring pixels in one voxel, and n
  std::vector<int> sums;   // number of the sums of each run, or -1
  std::vector<typename sum_of<T>::type> values;  // sum before each pixel
  std::vector<int64_t> weights;                  // likewise
  std::vector<double> backgrounds, variances;    // likewise

  explicit Row(int n)
      : places(n),
        background(n),
        variance(n),
        on_profile(n),
        begin(n + 1),
        sums(n),
        values(n + 1),
        weights(n + 1),
        backgrounds(n + 1),
        variances(n + 1) {}

  /* The background of each pixel and its variance, and their sums */
  void find_background(const Background &b,
                       const Frame &frame,
                       const PanelView &p,
                       int row,
                       const Span &span) {
    const int n = int(places.size());
    const int first = span.first, n_used = span.last - span.first;
    const std::size_t at = std::size_t(row) * n;
    float *out = &background[0];
    std::fill(out, out + n, 0.0f);
    if (b.profile) {
      int *before = &on_profile.before[0];
      float *fraction = &on_profile.fraction[0];
      if (!on_profile.is_of(row, b, frame)) {
        find_on_profile(b, frame, p.ex + at, p.ey + at, p.ez + at, n, before, fraction);
        on_profile.set(row, b, frame);
      }
      add_profile(b.profile, before + first, fraction + first, n_used, out + first);
    }
    if (b.grid) add_grid(b, row, n, out);
    const std::size_t from = at + first;
    to_photons(b, p.weight + from, from, n_used, out + first, &variance[first]);
    add_up(out + first, &places[first], n_used, &backgrounds[first]);
    if (b.base) add_up(&variance[first], &places[first], n_used, &variances[first]);
  }

  /* Finds the runs of the pixels of a span and returns their number; without branches,
   * as a run ends every few pixels and no processor could predict where. Pixels that
   * belong nowhere make runs too. */
  int find_runs(const Span &span) {
    const int *place = &places[0];
    int *first = &begin[0];
    int run = 0;
    first[0] = span.first;
    for (int i = span.first + 1; i < span.last; ++i) {
      first[run + 1] = i;
      run += place[i] != place[i - 1];
    }
    first[run + 1] = span.last;
    return run + 1;
  }
};

/* Finds the sums that each run of a row is added to */
template <typename T>
void find_sums(Row<T> &row,
               int n_runs,
               const PanelView &p,
               const Frame &f,
               const Places &all,
               int y,
               VoxelTable &table) {
  const std::size_t at = std::size_t(y) * p.nfast;
  for (int r = 0; r < n_runs; ++r) {
    int place = row.places[row.begin[r]];
    if (place < NOWHERE) {
      const std::size_t i = at + row.begin[r];
      place = place_of_peak(f, all, p.ex[i], p.ey[i], p.ez[i], -2 - place);
    }
    row.sums[r] = place == NOWHERE ? -1 : table.find(place);
  }
}

/* Adds the runs of one row to their voxels: neighbouring pixels mostly share one. The
 * sums are spread over more memory than processors keep at hand, so they are fetched
 * `AHEAD` runs before they are needed. */
template <typename T>
void add_runs(Row<T> &row,
              const PanelView &p,
              const Frame &f,
              const Places &all,
              int y,
              const Span &span,
              const Background *background,
              VoxelTable &table) {
  const int AHEAD = 16;
  const int n_runs = row.find_runs(span);
  find_sums(row, n_runs, p, f, all, y, table);
  for (int r = 0; r < n_runs; ++r) {
    if (r + AHEAD < n_runs && row.sums[r + AHEAD] >= 0)
      DIALS_DIFFUSE_PREFETCH(&table[row.sums[r + AHEAD]]);
    if (row.sums[r] < 0) continue;
    const int begin = row.begin[r], end = row.begin[r + 1];
    const double n = end - begin;
    Sums &sums = table[row.sums[r]];
    sums.value += double(row.values[end] - row.values[begin]);
    sums.weight += double(row.weights[end] - row.weights[begin]);
    sums.x += 0.5 * n * (begin + end);  // pixel centres are at i + 1/2
    sums.y += n * (y + 0.5);
    sums.z += n * f.z;
    sums.n_pixels += end - begin;
    if (!background) continue;
    sums.background += row.backgrounds[end] - row.backgrounds[begin];
    if (background->base) sums.variance += row.variances[end] - row.variances[begin];
  }
}

/* What else is known of an image of a panel */
struct Extras {
  std::vector<Frame> others;  // other lattices of the image, whose peaks are dropped
  Rectangles rectangles;
  Background background;
};

/* An image of a panel and its frame */
template <typename T>
struct Image {
  Frame frame;
  const T *data;
  const Extras *extras;  // or null
};

/* Leaves out the pixels near the lattice points of other crystals */
inline void drop_others(const std::vector<Frame> &others,
                        const PanelView &p,
                        const Places &all,
                        int row,
                        std::vector<int> &scratch,
                        int *places) {
  const std::size_t at = std::size_t(row) * p.nfast;
  const float *ex = p.ex + at, *ey = p.ey + at, *ez = p.ez + at;
  for (std::size_t o = 0; o < others.size(); ++o) {
    const Frame f = frame_of_row(others[o], row);
    voxel_places(f, all.voxels, ex, ey, ez, p.nfast, &scratch[0]);
    for (int i = 0; i < p.nfast; ++i)
      places[i] = scratch[i] < NOWHERE ? NOWHERE : places[i];
  }
}

/* Adds the rows first..last-1 of a panel. Each row is done for all images before the
 * next: what neighbouring frames share, geometry and voxels, is then still at hand. */
template <typename T>
void add_rows(const PanelView &p,
              const std::vector<Image<T> > &images,
              const Places &all,
              int first,
              int last,
              VoxelTable &table) {
  const int n = p.nfast;
  Row<T> r(n);
  std::vector<int> scratch(n);
  Span span;
  int *places = &r.places[0];
  T lowest, highest;
  trusted_limits(p, lowest, highest);
  for (int row = first; row < last; ++row) {
    const std::size_t at = std::size_t(row) * n;
    add_up(p.weight + at, places, n, &r.weights[0]);
    for (std::size_t i = 0; i < images.size(); ++i) {
      const Frame f = frame_of_row(images[i].frame, row);
      const T *data = images[i].data + at;
      const Extras *extras = images[i].extras;
      span.find(p, row, f, scratch);
      const int x0 = span.first, n_used = span.last - span.first;
      if (n_used == 0) continue;
      const std::size_t from = at + x0;
      int *used = places + x0;
      voxel_places(f, all.voxels, p.ex + from, p.ey + from, p.ez + from, n_used, used);
      reject(data + x0, p.weight + from, lowest, highest, n_used, used);
      if (extras) {
        drop_others(extras->others, p, all, row, scratch, places);
        extras->rectangles.apply(all, row, n, places);
        drop_unmeasured(extras->background, from, n_used, used);
      }
      add_up(data + x0, used, n_used, &r.values[x0]);
      const Background *background = 0;
      if (extras && extras->background.any()) background = &extras->background;
      if (background) r.find_background(*background, f, p, row, span);
      add_runs(r, p, f, all, row, span, background, table);
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
  Accumulator(const Places &places, int n_threads) : places_(places) {
    if (n_threads < 1) throw std::invalid_argument("n_threads must be positive");
    tables_.assign(n_threads, VoxelTable(places));
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

  /* The sums of all voxels and lattice points seen, in C order; empties the tables. */
  std::vector<Sums> finish() {
    std::vector<Sums> all;
    for (std::size_t t = 0; t < tables_.size(); ++t) {
      all.insert(all.end(), tables_[t].sums().begin(), tables_[t].sums().end());
      tables_[t].clear();
    }
    for (std::size_t i = 0; i < all.size(); ++i)
      all[i].voxel = places_.c_order(all[i].voxel);
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

  const Places &places() const {
    return places_;
  }

private:
  template <typename T>
  void band(std::size_t t, const PanelView &p, const std::vector<Image<T> > &images) {
    const int64_t n = tables_.size();
    const int first = int(p.nslow * t / n), last = int(p.nslow * (t + 1) / n);
    add_rows(p, images, places_, first, last, tables_[t]);
  }

  Places places_;
  std::vector<VoxelTable> tables_;
};

}  // namespace dials_diffuse

#endif
