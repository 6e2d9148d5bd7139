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
 * add their value to `value`, their normalisation to `normalisation`, 1 to `n_pixels`,
 * and their position to the sums of x, y and z.
 *
 * Sums are exact, whatever the order of the pixels: integer values, 24-bit weights of
 * similar size and integer coordinates, all summed in double precision. So the result
 * does not depend on the number of threads.
 *
 * Free of Python; threads are std::thread. OpenMP must not be used: the stubs in cctbx'
 * libomptbx make every thread run the whole loop. */
#ifndef DIALS_DIFFUSE_PIXEL_LOOP_H
#define DIALS_DIFFUSE_PIXEL_LOOP_H

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstddef>
#include <stdexcept>
#include <thread>
#include <vector>

/* One object file for every x86 processor, the best instructions for the one at hand.
 * Contraction to fused multiply-add is off (SConscript), so all give the same bits. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define DIALS_DIFFUSE_CLONES __attribute__((target_clones("avx512f", "avx2", "sse4.1", "default")))
#define DIALS_DIFFUSE_INLINE inline __attribute__((always_inline))
#else
#define DIALS_DIFFUSE_CLONES
#define DIALS_DIFFUSE_INLINE inline
#endif

namespace dials_diffuse {

  /* What is fixed for a panel and a beam: arrays of nslow x nfast elements, slow axis
   * first. A normalisation of zero marks a masked pixel. */
  struct PanelView {
    const float *ex, *ey, *ez;    // pixel directions, unit vectors
    const float *normalisation;  // P x solid angle x efficiency x air transmission
    int nfast, nslow;
    double trusted_min, trusted_max;  // inclusive, in units of the raw image
    double gain, pedestal;            // photons = (value - pedestal) / gain
  };

  /* The grid's bounding box: voxel indices from -half to half on each axis. */
  struct Box {
    int half[3];
    int64_t size() const {
      int64_t n = 1;
      for (int i = 0; i < 3; ++i) n *= 2 * int64_t(half[i]) + 1;
      return n;
    }
  };

  /* What changes from frame to frame. */
  struct Frame {
    float w[9];          // diag(ndiv) (S R F A)^-1, row by row, Angstrom
    float s0[3];         // incident beam, 1/Angstrom
    float inv_wavelength;  // 1/Angstrom
    float s2_min, s2_max;  // limits of |rlp|^2, 1/Angstrom^2
    float inv_ndiv[3];
    bool exclude;        // leave out pixels near Bragg positions
    /* Exclusion ellipsoid g(dh, dh) < 1 with dh = h/ndiv - nearest integer; symmetric
     * matrix as g11, g22, g33, g12, g13, g23. */
    float g[6];
    double z;         // frame number of the centre of the image
    double exposure;  // factor on the normalisation
  };

  /* The sums of one voxel on one panel. */
  struct Sums {
    int64_t key;  // panel * box.size() + place of the voxel in the box
    double value, normalisation, x, y, z;
    int64_t n_pixels;
  };

  inline void add(Sums &to, const Sums &from) {
    to.value += from.value;
    to.normalisation += from.normalisation;
    to.x += from.x;
    to.y += from.y;
    to.z += from.z;
    to.n_pixels += from.n_pixels;
  }

  /* Hash table of voxel sums: open addressing over slots that never move. */
  class VoxelTable {
  public:
    VoxelTable() : index_(1 << 12, -1), shift_(64 - 12) {}

    int slot(int64_t key) {
      std::size_t mask = index_.size() - 1;
      std::size_t i = (uint64_t(key) * 0x9E3779B97F4A7C15ull) >> shift_;
      while (index_[i] >= 0) {
        if (sums_[index_[i]].key == key) return index_[i];
        i = (i + 1) & mask;
      }
      Sums empty = {key, 0, 0, 0, 0, 0, 0};
      index_[i] = int(sums_.size());
      sums_.push_back(empty);
      if (2 * sums_.size() > index_.size()) grow();
      return int(sums_.size()) - 1;
    }

    Sums &operator[](int slot) {
      return sums_[slot];
    }
    const std::vector<Sums> &sums() const {
      return sums_;
    }

    void clear() {
      sums_.clear();
      std::fill(index_.begin(), index_.end(), -1);
    }

  private:
    void grow() {
      index_.assign(2 * index_.size(), -1);
      --shift_;
      std::size_t mask = index_.size() - 1;
      for (std::size_t s = 0; s < sums_.size(); ++s) {
        std::size_t i = (uint64_t(sums_[s].key) * 0x9E3779B97F4A7C15ull) >> shift_;
        while (index_[i] >= 0) i = (i + 1) & mask;
        index_[i] = int(s);
      }
    }

    std::vector<int> index_;
    std::vector<Sums> sums_;
    int shift_;
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
    const int size_k = 2 * nk + 1, size_l = 2 * nl + 1;
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
      int place = (ih * size_k + ik) * size_l + il;
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
                                          const float *normalisation,
                                          T lowest,
                                          T highest,
                                          int n,
                                          int *places) {
    for (int i = 0; i < n; ++i) {
      bool good = (data[i] >= lowest) & (data[i] <= highest) & (normalisation[i] > 0);
      places[i] = good ? places[i] : -1;
    }
  }
  DIALS_DIFFUSE_CLONES inline void reject(const int *data,
                                          const float *normalisation,
                                          int lowest,
                                          int highest,
                                          int n,
                                          int *places) {
    reject_pixels(data, normalisation, lowest, highest, n, places);
  }
  DIALS_DIFFUSE_CLONES inline void reject(const double *data,
                                          const float *normalisation,
                                          double lowest,
                                          double highest,
                                          int n,
                                          int *places) {
    reject_pixels(data, normalisation, lowest, highest, n, places);
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

  template <typename T>
  struct value_sum;  // exact for integer images
  template <>
  struct value_sum<int> {
    typedef int64_t type;
  };
  template <>
  struct value_sum<double> {
    typedef double type;
  };

  /* Adds one row of a panel. Neighbouring pixels mostly share a voxel, and a voxel of
   * this row was mostly seen in the row above: `above` keeps the slot of each column. */
  template <typename T>
  void add_row(const PanelView &p,
               const Frame &f,
               const T *data,
               int64_t first_key,
               int row,
               const std::vector<int> &places,
               std::vector<int> &above,
               VoxelTable &table) {
    const float *weight = p.normalisation + std::size_t(row) * p.nfast;
    const double inv_gain = 1.0 / p.gain;
    int i = 0;
    while (i < p.nfast) {
      const int place = places[i];
      if (place < 0) {
        ++i;
        continue;
      }
      const int begin = i;
      typename value_sum<T>::type value = 0;
      double w = 0;
      do {
        value += data[i];
        w += weight[i];
        ++i;
      } while (i < p.nfast && places[i] == place);
      const double n = i - begin;
      const int64_t key = first_key + place;
      int slot = above[begin];
      if (slot < 0 || table[slot].key != key) slot = table.slot(key);
      std::fill(above.begin() + begin, above.begin() + i, slot);
      Sums &sums = table[slot];
      sums.value += (double(value) - n * p.pedestal) * inv_gain;
      sums.normalisation += w * f.exposure;
      sums.x += n * begin + 0.5 * n * n;  // pixel centres are at i + 1/2
      sums.y += n * (row + 0.5);
      sums.z += n * f.z;
      sums.n_pixels += i - begin;
    }
  }

  /* Adds the rows first..last-1 of a panel. */
  template <typename T>
  void add_rows(const PanelView &p,
                const Frame &f,
                const Box &box,
                const T *data,
                int64_t first_key,
                int first,
                int last,
                VoxelTable &table) {
    std::vector<int> places(p.nfast), above(p.nfast, -1);
    T lowest, highest;
    trusted_limits(p, lowest, highest);
    for (int row = first; row < last; ++row) {
      const std::size_t at = std::size_t(row) * p.nfast;
      voxel_places(f, box, p.ex + at, p.ey + at, p.ez + at, p.nfast, &places[0]);
      reject(data + at, p.normalisation + at, lowest, highest, p.nfast, &places[0]);
      add_row(p, f, data + at, first_key, row, places, above, table);
    }
  }

  /* Collects the images of one block: all frames that make one observation per voxel. */
  class Accumulator {
  public:
    Accumulator(const Box &box, int n_threads) : box_(box), tables_(n_threads) {
      if (n_threads < 1) throw std::invalid_argument("n_threads must be positive");
      for (int i = 0; i < 3; ++i)
        if (box.half[i] < 0) throw std::invalid_argument("negative size of the grid");
      if (box.size() > 2147483647)
        throw std::invalid_argument("the grid has more than 2^31 - 1 voxels");
    }

    /* Adds a panel of an image; the rows are dealt out to the threads in bands. */
    template <typename T>
    void add(int panel, const PanelView &p, const Frame &f, const T *data) {
      const int64_t first_key = panel * box_.size();
      const int n = int(tables_.size());
      std::vector<std::thread> team;
      for (int t = 1; t < n; ++t)
        team.push_back(std::thread(&Accumulator::band<T>, this, t, first_key, p, f, data));
      band(0, first_key, p, f, data);
      for (std::size_t t = 0; t < team.size(); ++t) team[t].join();
    }

    /* The sums of all voxels seen, ordered by panel and voxel; empties the tables. */
    std::vector<Sums> finish() {
      std::vector<Sums> all;
      for (std::size_t t = 0; t < tables_.size(); ++t) {
        all.insert(all.end(), tables_[t].sums().begin(), tables_[t].sums().end());
        tables_[t].clear();
      }
      std::vector<std::pair<int64_t, int> > order(all.size());
      for (std::size_t i = 0; i < all.size(); ++i)
        order[i] = std::make_pair(all[i].key, int(i));
      std::sort(order.begin(), order.end());
      std::vector<Sums> result;
      result.reserve(all.size());
      for (std::size_t i = 0; i < order.size(); ++i) {
        const Sums &sums = all[order[i].second];
        if (!result.empty() && result.back().key == sums.key)
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
    void band(int t, int64_t first_key, PanelView p, Frame f, const T *data) {
      const int64_t n = tables_.size();
      add_rows(p, f, box_, data, first_key, int(p.nslow * t / n),
               int(p.nslow * (t + 1) / n), tables_[t]);
    }

    Box box_;
    std::vector<VoxelTable> tables_;
  };

}  // namespace dials_diffuse

#endif
