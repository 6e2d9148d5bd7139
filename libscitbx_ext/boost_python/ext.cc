/* Bindings of the pixel loop: arrays come and go as flex arrays. */
#include <boost/python.hpp>
#include <algorithm>
#include <cmath>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <scitbx/array_family/boost_python/flex_fwd.h>
#include <scitbx/array_family/flex_types.h>
#include <scitbx/array_family/shared.h>
#include <scitbx/array_family/versa.h>
#include <scitbx/mat3.h>
#include <scitbx/sym_mat3.h>
#include <scitbx/vec3.h>

#include "../pixel_loop.h"

namespace dials_diffuse { namespace boost_python {

  namespace af = scitbx::af;
  namespace bp = boost::python;
  using scitbx::mat3;
  using scitbx::sym_mat3;
  using scitbx::vec3;

  /* Releases the GIL for its lifetime. Meanwhile no Python object and no af handle may
   * be copied: their reference counts are not atomic. */
  class gil_release {
  public:
    gil_release() : state_(PyEval_SaveThread()) {}
    ~gil_release() {
      PyEval_RestoreThread(state_);
    }
    gil_release(const gil_release &) = delete;
    gil_release &operator=(const gil_release &) = delete;

  private:
    PyThreadState *state_;
  };

  /* A panel's arrays, kept alive, and its numbers. */
  class Panel {
  public:
    Panel(const af::shared<float> &ex,
          const af::shared<float> &ey,
          const af::shared<float> &ez,
          const af::shared<int> &weight,
          int nfast,
          int nslow,
          double trusted_min,
          double trusted_max)
        : ex_(ex), ey_(ey), ez_(ez), weight_(weight) {
      const std::size_t n = std::size_t(nfast) * nslow;
      if (nfast < 1 || nslow < 1)
        throw std::invalid_argument("image_size must be positive");
      if (ex.size() != n || ey.size() != n || ez.size() != n || weight.size() != n)
        throw std::invalid_argument("the arrays do not have nfast x nslow elements");
      PanelView view = {ex_.begin(),
                        ey_.begin(),
                        ez_.begin(),
                        weight_.begin(),
                        nfast,
                        nslow,
                        trusted_min,
                        trusted_max};
      view_ = view;
    }
    const PanelView &view() const {
      return view_;
    }

  private:
    af::shared<float> ex_, ey_, ez_;
    af::shared<int> weight_;
    PanelView view_;
  };

  /* The exclusion ellipsoid g as the triangle u of g = u^T u (Cholesky), and what it
   * does to the change of w over the image. */
  void set_exclusion(Frame &f,
                     const sym_mat3<double> &g,
                     const mat3<double> &sweep,
                     const vec3<double> &ndiv) {
    const double u11 = std::sqrt(g[0]);
    const double u12 = g[3] / u11, u13 = g[4] / u11;
    const double u22 = std::sqrt(g[1] - u12 * u12);
    const double u23 = (g[5] - u12 * u13) / u22;
    const double u33 = std::sqrt(g[2] - u13 * u13 - u23 * u23);
    if (!(u11 > 0 && u22 > 0 && u33 > 0))
      throw std::invalid_argument("the exclusion must be a positive matrix");
    const double triangle[6] = {u11, u22, u33, u12, u13, u23};
    for (int i = 0; i < 6; ++i)
      f.u[i] = float(triangle[i]);
    const double rows[3][3] = {{u11, u12, u13}, {0, u22, u23}, {0, 0, u33}};
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) {
        double sum = 0;
        for (int k = 0; k < 3; ++k)
          sum += rows[i][k] / ndiv[k] * sweep[3 * k + j];
        f.u_sweep[3 * i + j] = float(sum);
      }
  }

  /* Whether a pixel can come near a lattice point that is not nearest to it at the
   * angle of its row: the region and the way within the image reach beyond half a cell.
   */
  bool reaches_next_point(const Frame &f,
                          const mat3<double> &sweep,
                          const vec3<double> &ndiv,
                          double s_max) {
    const mat3<double> u(f.u[0], f.u[3], f.u[4], 0, f.u[1], f.u[5], 0, 0, f.u[2]);
    const mat3<double> inverse = u.inverse();  // its rows have the extents as lengths
    const double growth = std::sqrt(1 + f.growth * s_max * s_max);
    const double widths = f.spread ? 1.0 : 0.5;
    for (int i = 0; i < 3; ++i) {
      const vec3<double> extent(inverse[3 * i], inverse[3 * i + 1], inverse[3 * i + 2]);
      const vec3<double> way(sweep[3 * i], sweep[3 * i + 1], sweep[3 * i + 2]);
      if (extent.length() * growth + widths * way.length() * s_max / ndiv[i] > 0.5)
        return true;
    }
    return false;
  }

  Frame make_frame(const mat3<double> &w,
                   const vec3<double> &s0,
                   double wavelength,
                   double s_min,
                   double s_max,
                   const vec3<double> &ndiv,
                   const bp::object &exclusion,
                   double z,
                   double growth,
                   const bp::object &sweep,
                   bool spread,
                   double growth_radial,
                   double radial) {
    if (!(wavelength > 0))
      throw std::invalid_argument("the wavelength must be positive");
    Frame f;
    for (int i = 0; i < 9; ++i)
      f.w[i] = float(w[i]);
    for (int i = 0; i < 3; ++i) {
      f.s0[i] = float(s0[i]);
      f.inv_ndiv[i] = float(1.0 / ndiv[i]);
    }
    f.inv_wavelength = float(1.0 / wavelength);
    f.s2_min = float(s_min * s_min);
    f.s2_max = float(s_max * s_max);
    f.exclude = !exclusion.is_none();
    f.growth = float(growth);
    f.growth_radial = float(growth_radial);
    f.radial = float(radial);
    f.z = z;
    mat3<double> change(0.0);
    f.sweeps = !sweep.is_none();
    if (f.sweeps) change = bp::extract<mat3<double> >(sweep)();
    for (int i = 0; i < 9; ++i)
      f.sweep[i] = float(change[i]);
    std::fill(f.u, f.u + 6, 0.0f);
    std::fill(f.u_sweep, f.u_sweep + 9, 0.0f);
    if (f.exclude)
      set_exclusion(f, bp::extract<sym_mat3<double> >(exclusion)(), change, ndiv);
    f.spread = spread && f.sweeps;
    f.wide = f.exclude && f.sweeps && reaches_next_point(f, change, ndiv, s_max);
    f.t_min = -0.5f;
    f.t_max = 0.5f;
    return f;
  }

  Box make_box(const vec3<int> &half_size) {
    if (half_size.min() < 0) throw std::invalid_argument("negative size of the grid");
    return Box(half_size.begin());
  }

  /* Where sums are kept. `absent` has a flag for each lattice point, in C order. */
  Places make_places(const vec3<int> &half_size,
                     const bp::object &half_points,
                     const bp::object &absent) {
    Places places(make_box(half_size));
    if (!half_points.is_none())
      places = Places(places.voxels, make_box(bp::extract<vec3<int> >(half_points)()));
    if (places.n_bricks() * 64 > 2147483647)
      throw std::invalid_argument("the grid has too many voxels");
    if (absent.is_none()) return places;
    const af::shared<bool> flags = bp::extract<af::shared<bool> >(absent)();
    if (int64_t(flags.size()) != places.points.n_voxels())
      throw std::invalid_argument("absent needs a flag for each lattice point");
    places.absent.assign(places.points.n_places(), 0);
    const int *half = places.points.half;
    std::size_t i = 0;
    for (int h = -half[0]; h <= half[0]; ++h)
      for (int k = -half[1]; k <= half[1]; ++k)
        for (int l = -half[2]; l <= half[2]; ++l)
          places.absent[places.points.place(h, k, l)] = flags[i++];
    return places;
  }

  Accumulator *make_accumulator(const vec3<int> &half_size,
                                int n_threads,
                                const bp::object &half_points,
                                const bp::object &absent) {
    return new Accumulator(make_places(half_size, half_points, absent), n_threads);
  }

  /* What else is known of an image, and the arrays it refers to, kept alive. */
  class ImageExtras {
  public:
    void add_other(const Frame &frame) {
      extras_.others.push_back(frame);
    }

    /* Columns x0, x1, y0, y1, h, k, l of each rectangle; without indices, pixels are
     * dropped. */
    void set_rectangles(const af::shared<int> &columns, const vec3<int> &half_points) {
      if (columns.size() % 7 != 0)
        throw std::invalid_argument("a rectangle has seven numbers");
      const Box points = make_box(half_points);
      std::vector<Rectangle> rectangles;
      for (const int *c = columns.begin(); c != columns.end(); c += 7) {
        Rectangle r = {c[0], c[1], c[2], c[3], points.place(c[4], c[5], c[6])};
        rectangles.push_back(r);
      }
      extras_.rectangles = Rectangles(rectangles);
    }

    void set_base(const af::shared<float> &base,
                  const af::shared<float> &variance,
                  double rate) {
      if (base.size() != variance.size())
        throw std::invalid_argument("base and variance differ in size");
      base_ = base;
      base_variance_ = variance;
      extras_.background.base = base_.begin();
      extras_.background.base_variance = base_variance_.begin();
      extras_.background.rate = float(rate);
    }

    void set_profile(const af::shared<float> &profile, double s_start, double s_step) {
      if (profile.size() < 2 || !(s_step > 0))
        throw std::invalid_argument("a profile needs two values and a positive step");
      profile_ = profile;
      extras_.background.profile = profile_.begin();
      extras_.background.n_profile = int(profile.size());
      extras_.background.s_start = float(s_start);
      extras_.background.inv_step = float(1.0 / s_step);
    }

    void set_grid(const af::shared<float> &grid, int nfast, int nslow, double spacing) {
      if (nfast < 2 || nslow < 2 || !(spacing > 0)
          || grid.size() != std::size_t(nfast) * nslow)
        throw std::invalid_argument("a grid needs two nodes along either axis");
      grid_ = grid;
      extras_.background.grid = grid_.begin();
      extras_.background.grid_fast = nfast;
      extras_.background.grid_slow = nslow;
      extras_.background.inv_spacing = float(1.0 / spacing);
    }

    /* Intensity to photons: what a weight of 1 stands for in this image */
    void set_unit(double unit) {
      extras_.background.unit = float(unit);
    }

    const Extras &get(std::size_t n_pixels) const {
      if (extras_.background.base && base_.size() != n_pixels)
        throw std::invalid_argument("the background has another size than its panel");
      return extras_;
    }

  private:
    Extras extras_;
    af::shared<float> base_, base_variance_, profile_, grid_;
  };

  /* Adds images of one type, each with its frame. */
  template <typename T>
  void add(Accumulator &self,
           const PanelView &view,
           const bp::list &frames,
           const bp::list &images,
           const bp::object &extras) {
    typedef af::versa<T, af::flex_grid<> > flex_type;
    std::vector<Image<T> > views;
    for (int i = 0; i < bp::len(images); ++i) {
      const flex_type &data = bp::extract<const flex_type &>(images[i])();
      const std::size_t n = std::size_t(view.nfast) * view.nslow;
      if (data.size() != n)
        throw std::invalid_argument("the image has another size than its panel");
      Image<T> image = {bp::extract<const Frame &>(frames[i])(), data.begin(), 0};
      if (!extras.is_none())
        image.extras = &bp::extract<const ImageExtras &>(extras[i])().get(n);
      views.push_back(image);
    }
    gil_release nogil;
    self.add(view, views);
  }

  void add_images(Accumulator &self,
                  const Panel &panel,
                  const bp::list &frames,
                  const bp::list &images,
                  const bp::object &extras) {
    if (bp::len(frames) != bp::len(images))
      throw std::invalid_argument("as many frames as images are needed");
    if (!extras.is_none() && bp::len(extras) != bp::len(images))
      throw std::invalid_argument("as many extras as images are needed");
    if (bp::len(images) == 0) return;
    typedef af::versa<int, af::flex_grid<> > flex_int;
    if (bp::extract<const flex_int &>(images[0]).check())
      add<int>(self, panel.view(), frames, images, extras);
    else
      add<double>(self, panel.view(), frames, images, extras);
  }

  bp::dict finish(Accumulator &self) {
    std::vector<Sums> sums;
    {
      gil_release nogil;
      sums = self.finish();
    }
    const std::size_t n = sums.size();
    af::shared<int> voxel(n), n_pixels(n);
    af::shared<double> value(n), weight(n), x(n), y(n), z(n);
    af::shared<double> background(n), variance(n);
    for (std::size_t i = 0; i < n; ++i) {
      voxel[i] = int(sums[i].voxel);
      n_pixels[i] = int(sums[i].n_pixels);
      value[i] = sums[i].value;
      weight[i] = sums[i].weight;
      x[i] = sums[i].x;
      y[i] = sums[i].y;
      z[i] = sums[i].z;
      background[i] = sums[i].background;
      variance[i] = sums[i].variance;
    }
    bp::dict result;
    result["voxel"] = voxel;
    result["n_pixels"] = n_pixels;
    result["value"] = value;
    result["weight"] = weight;
    result["x"] = x;
    result["y"] = y;
    result["z"] = z;
    result["background"] = background;
    result["variance"] = variance;
    return result;
  }

  /* Number in the C-ordered box of the voxel of each pixel, or -1: the loop's geometry
   * alone. Pixels near a Bragg position have none. */
  af::shared<int> voxels(const vec3<int> &half_size,
                         const Panel &panel,
                         const Frame &frame) {
    const Places all = make_places(half_size, bp::object(), bp::object());
    const PanelView &p = panel.view();
    af::shared<int> result(std::size_t(p.nfast) * p.nslow);
    for (int row = 0; row < p.nslow; ++row) {
      const std::size_t at = std::size_t(row) * p.nfast;
      const Frame f = frame_of_row(frame, row);
      int *out = result.begin() + at;
      voxel_places(f, all.voxels, p.ex + at, p.ey + at, p.ez + at, p.nfast, out);
    }
    for (std::size_t i = 0; i < result.size(); ++i)
      result[i] = result[i] >= 0 ? int(all.c_order(result[i])) : NOWHERE;
    return result;
  }

  /* Images of many megabytes are allocated and freed one after the other. Without this
   * the C library returns the memory to the system each time, and the system clears
   * it page by page for the next image. */
  void keep_freed_memory() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
  }

  void wrap_scaling();

  BOOST_PYTHON_MODULE(dials_diffuse_ext) {
    using namespace bp;
    wrap_scaling();
    def("keep_freed_memory", &keep_freed_memory);
    class_<Panel>("Panel", no_init)
      .def(init<const af::shared<float> &,
                const af::shared<float> &,
                const af::shared<float> &,
                const af::shared<int> &,
                int,
                int,
                double,
                double>((arg("ex"),
                         arg("ey"),
                         arg("ez"),
                         arg("weight"),
                         arg("nfast"),
                         arg("nslow"),
                         arg("trusted_min"),
                         arg("trusted_max"))));
    class_<Frame>("Frame", no_init);
    def("make_frame",
        &make_frame,
        (arg("w"),
         arg("s0"),
         arg("wavelength"),
         arg("s_min"),
         arg("s_max"),
         arg("ndiv"),
         arg("exclusion"),
         arg("z"),
         arg("growth") = 0.0,
         arg("sweep") = object(),
         arg("spread") = false,
         arg("growth_radial") = 0.0,
         arg("radial") = 0.0));
    class_<ImageExtras>("ImageExtras")
      .def("add_other", &ImageExtras::add_other, (arg("frame")))
      .def("set_rectangles",
           &ImageExtras::set_rectangles,
           (arg("columns"), arg("half_points")))
      .def(
        "set_base", &ImageExtras::set_base, (arg("base"), arg("variance"), arg("rate")))
      .def("set_profile",
           &ImageExtras::set_profile,
           (arg("profile"), arg("s_start"), arg("s_step")))
      .def("set_grid",
           &ImageExtras::set_grid,
           (arg("grid"), arg("nfast"), arg("nslow"), arg("spacing")))
      .def("set_unit", &ImageExtras::set_unit, (arg("unit")));
    class_<Accumulator, boost::noncopyable>("Accumulator", no_init)
      .def("__init__",
           make_constructor(&make_accumulator,
                            default_call_policies(),
                            (arg("half_size"),
                             arg("n_threads") = 1,
                             arg("half_points") = object(),
                             arg("absent") = object())))
      .def("add_images",
           &add_images,
           (arg("panel"), arg("frames"), arg("images"), arg("extras") = object()))
      .def("finish", &finish);
    def("voxels", &voxels, (arg("half_size"), arg("panel"), arg("frame")));
  }

}}  // namespace dials_diffuse::boost_python
