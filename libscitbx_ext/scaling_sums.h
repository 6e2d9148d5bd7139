/* The sums over observations that a refinement of scales needs, free of Python.
 *
 * A row is one observation with y photons less background and the normalisation m; rows
 * are sorted by group, that is by symmetry-unique voxel. The model expects
 *
 *     m a (b I + c) = x I + o,     x = m a b,     o = m a c
 *
 * photons, with the products a of the outer and b of the inner factors and the sum c of
 * the offsets. Every term of the model has one value for each of its cells, and a row
 * knows its cell of every term. A group may have an intensity R of a reference map,
 * with the weight v: one more observation, of x = 1 and o = 0. I is that of the least
 * squares of its group,
 *
 *     (sum(w x (y - o)) + v R) / (sum(w x^2) + v)
 *
 * The functional is sum(w r^2) + sum(v (R - I)^2) with the residuals r = y - o - x I;
 * as it is stationary in I, its derivatives are those at constant I.
 */
#ifndef DIALS_DIFFUSE_SCALING_SUMS_H
#define DIALS_DIFFUSE_SCALING_SUMS_H

#include <cstddef>
#include <vector>

namespace dials_diffuse {

enum Role { inner = 0, outer = 1, additive = 2 };

/* Rows in memory of somebody else. `start` has one more element than there are groups.
 */
struct ScalingRows {
  const int *start;
  std::size_t n_groups;
  const float *photons;           // y
  const float *normalisation;     // m
  const float *weight;            // w
  const float *reference;         // R of each group; may be 0
  const float *reference_weight;  // v, 0 for groups without
};

/* A term of the model: the cell of each row, the value of each cell. `gradient` is
 * that with respect to the logarithm of the value of a factor, and to the value of an
 * offset; `curvature`, unless it is 0, the diagonal of its second derivatives, less
 * what the group's I takes up. */
struct ScalingTerm {
  Role role;
  const int *cell;
  const double *value;
  double *gradient;
  double *curvature;
};

/* Adds to the gradients and curvatures of the terms, and returns the functional.
 * `intensity` gets I of each group. */
inline double add_scaling_sums(const ScalingRows &rows,
                               std::vector<ScalingTerm> &terms,
                               double *intensity) {
  std::vector<double> as, bs, xs, os;
  double total = 0;
  for (std::size_t group = 0; group < rows.n_groups; ++group) {
    const std::size_t first = rows.start[group];
    const std::size_t n = rows.start[group + 1] - first;
    if (as.size() < n) {
      as.resize(n);
      bs.resize(n);
      xs.resize(n);
      os.resize(n);
    }
    const double v = rows.reference ? rows.reference_weight[group] : 0.0;
    const double known = v > 0 ? rows.reference[group] : 0.0;
    double numerator = v * known, denominator = v;
    for (std::size_t j = 0; j < n; ++j) {
      const std::size_t i = first + j;
      double a = 1, b = 1, c = 0;
      for (std::size_t k = 0; k < terms.size(); ++k) {
        const double value = terms[k].value[terms[k].cell[i]];
        if (terms[k].role == inner)
          b *= value;
        else if (terms[k].role == outer)
          a *= value;
        else
          c += value;
      }
      const double m = rows.normalisation[i], w = rows.weight[i];
      as[j] = a;
      bs[j] = b;
      xs[j] = m * a * b;
      os[j] = m * a * c;
      numerator += w * xs[j] * (rows.photons[i] - os[j]);
      denominator += w * xs[j] * xs[j];
    }
    const double mean = denominator > 0 ? numerator / denominator : 0.0;
    intensity[group] = mean;
    total += v * (known - mean) * (known - mean);
    for (std::size_t j = 0; j < n; ++j) {
      const std::size_t i = first + j;
      const double w = rows.weight[i];
      if (!(w > 0)) continue;
      const double residual = rows.photons[i] - os[j] - xs[j] * mean;
      // What the fit of I leaves of the weight of a row.
      const double rest = denominator > 0 ? 1 - w * xs[j] * xs[j] / denominator : 1;
      total += w * residual * residual;
      for (std::size_t k = 0; k < terms.size(); ++k) {
        const ScalingTerm &term = terms[k];
        const double slope = term.role == inner   ? xs[j] * mean
                             : term.role == outer ? xs[j] * mean + os[j]
                                                  : rows.normalisation[i] * as[j];
        term.gradient[term.cell[i]] -= 2 * w * residual * slope;
        if (term.curvature)
          term.curvature[term.cell[i]] += 2 * w * slope * slope * rest;
      }
    }
  }
  return total;
}

/* x and o of each row. */
inline void expected_responses(const ScalingRows &rows,
                               const std::vector<ScalingTerm> &terms,
                               float *response,
                               float *offset) {
  const std::size_t n = rows.n_groups ? rows.start[rows.n_groups] : 0;
  for (std::size_t i = 0; i < n; ++i) {
    double a = rows.normalisation[i], b = 1, c = 0;
    for (std::size_t k = 0; k < terms.size(); ++k) {
      const double value = terms[k].value[terms[k].cell[i]];
      if (terms[k].role == inner)
        b *= value;
      else if (terms[k].role == outer)
        a *= value;
      else
        c += value;
    }
    response[i] = float(a * b);
    offset[i] = float(a * c);
  }
}

}  // namespace dials_diffuse

#endif
