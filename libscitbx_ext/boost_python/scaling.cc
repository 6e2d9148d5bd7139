/* Bindings of the sums for scaling. */
#include <boost/python.hpp>
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include <scitbx/array_family/boost_python/flex_fwd.h>
#include <scitbx/array_family/flex_types.h>
#include <scitbx/array_family/shared.h>

#include "../scaling_sums.h"

namespace dials_diffuse { namespace boost_python {

  namespace af = scitbx::af;
  namespace bp = boost::python;

  /* Rows and the cells of their terms, kept alive. */
  class ScalingBlock {
  public:
    ScalingBlock(const af::shared<int> &start,
                 const af::shared<float> &photons,
                 const af::shared<float> &normalisation)
        : start_(start),
          photons_(photons),
          normalisation_(normalisation),
          has_curvatures_(false) {
      if (start.size() < 1 || start[0] != 0
          || std::size_t(start.back()) != photons.size()
          || normalisation.size() != photons.size())
        throw std::invalid_argument("start, photons and normalisation do not fit");
      for (std::size_t i = 1; i < start.size(); ++i)
        if (start[i] < start[i - 1])
          throw std::invalid_argument("the limits of groups must ascend");
      weight_ = af::shared<float>(photons.size(), 1.0f);
    }

    void add_term(int role, const af::shared<int> &cell, int n_cells) {
      if (role < inner || role > additive)
        throw std::invalid_argument("the role of a term is 0, 1 or 2");
      if (cell.size() != photons_.size())
        throw std::invalid_argument("a term needs a cell for each row");
      for (std::size_t i = 0; i < cell.size(); ++i)
        if (cell[i] < 0 || cell[i] >= n_cells)
          throw std::invalid_argument("a row has a cell that its term has not");
      roles_.push_back(Role(role));
      cells_.push_back(cell);
      gradients_.push_back(af::shared<double>(n_cells, 0.0));
      curvatures_.push_back(af::shared<double>(n_cells, 0.0));
    }

    void set_weights(const af::shared<float> &weight) {
      if (weight.size() != photons_.size())
        throw std::invalid_argument("a weight is needed for each row");
      weight_ = weight;
    }

    void set_reference(const af::shared<float> &intensity,
                       const af::shared<float> &weight) {
      if (intensity.size() != n_groups() || weight.size() != n_groups())
        throw std::invalid_argument(
          "an intensity and a weight are needed for each group");
      // isfinite first: where cctbx traps floating-point exceptions, NaN > 0 is one
      for (std::size_t i = 0; i < weight.size(); ++i) {
        if (!std::isfinite(weight[i]) || weight[i] < 0
            || (weight[i] > 0 && !std::isfinite(intensity[i])))
          throw std::invalid_argument(
            "weights must be finite and not negative, and intensities finite");
      }
      reference_ = intensity;
      reference_weight_ = weight;
    }

    std::size_t n_groups() const {
      return start_.size() - 1;
    }

    std::size_t n_rows() const {
      return photons_.size();
    }

    double evaluate(const bp::list &values, bool curvatures) {
      std::vector<ScalingTerm> terms = terms_with(values);
      for (std::size_t k = 0; k < terms.size(); ++k) {
        std::fill(gradients_[k].begin(), gradients_[k].end(), 0.0);
        terms[k].gradient = gradients_[k].begin();
        if (!curvatures) continue;
        std::fill(curvatures_[k].begin(), curvatures_[k].end(), 0.0);
        terms[k].curvature = curvatures_[k].begin();
      }
      has_curvatures_ = curvatures;
      intensity_ = af::shared<double>(n_groups(), 0.0);
      return add_scaling_sums(rows(), terms, intensity_.begin());
    }

    bp::tuple responses(const bp::list &values) const {
      const std::vector<ScalingTerm> terms = terms_with(values);
      af::shared<float> response(n_rows(), 0.0f), offset(n_rows(), 0.0f);
      expected_responses(rows(), terms, response.begin(), offset.begin());
      return bp::make_tuple(response, offset);
    }

    /* Copies: the next evaluation overwrites the arrays. */
    af::shared<double> gradient(int k) const {
      return gradients_.at(k).deep_copy();
    }

    af::shared<double> curvature(int k) const {
      if (!has_curvatures_)
        throw std::runtime_error("the last evaluation was without curvatures");
      return curvatures_.at(k).deep_copy();
    }

    af::shared<double> intensities() const {
      return intensity_;
    }

  private:
    ScalingRows rows() const {
      ScalingRows result = {start_.begin(),
                            n_groups(),
                            photons_.begin(),
                            normalisation_.begin(),
                            weight_.begin(),
                            reference_.size() ? reference_.begin() : 0,
                            reference_weight_.begin()};
      return result;
    }

    std::vector<ScalingTerm> terms_with(const bp::list &values) const {
      if (std::size_t(bp::len(values)) != roles_.size())
        throw std::invalid_argument("values are needed for each term");
      std::vector<ScalingTerm> terms;
      for (std::size_t k = 0; k < roles_.size(); ++k) {
        const af::shared<double> value = bp::extract<af::shared<double> >(values[k])();
        if (value.size() != gradients_[k].size())
          throw std::invalid_argument("a value is needed for each cell of a term");
        ScalingTerm term = {roles_[k], cells_[k].begin(), value.begin(), 0, 0};
        terms.push_back(term);
      }
      return terms;
    }

    af::shared<int> start_;
    af::shared<float> photons_, normalisation_, weight_;
    af::shared<float> reference_, reference_weight_;
    std::vector<Role> roles_;
    std::vector<af::shared<int> > cells_;
    std::vector<af::shared<double> > gradients_, curvatures_;
    af::shared<double> intensity_;
    bool has_curvatures_;
  };

  void wrap_scaling() {
    using namespace boost::python;
    class_<ScalingBlock, boost::noncopyable>("ScalingBlock", no_init)
      .def(init<const af::shared<int> &,
                const af::shared<float> &,
                const af::shared<float> &>(
        (arg("start"), arg("photons"), arg("normalisation"))))
      .def(
        "add_term", &ScalingBlock::add_term, (arg("role"), arg("cell"), arg("n_cells")))
      .def("set_weights", &ScalingBlock::set_weights, (arg("weight")))
      .def("set_reference",
           &ScalingBlock::set_reference,
           (arg("intensity"), arg("weight")))
      .def(
        "evaluate", &ScalingBlock::evaluate, (arg("values"), arg("curvatures") = true))
      .def("responses", &ScalingBlock::responses, (arg("values")))
      .def("gradient", &ScalingBlock::gradient, (arg("term")))
      .def("curvature", &ScalingBlock::curvature, (arg("term")))
      .def("intensities", &ScalingBlock::intensities)
      .add_property("n_groups", &ScalingBlock::n_groups)
      .add_property("n_rows", &ScalingBlock::n_rows);
  }

}}  // namespace dials_diffuse::boost_python
