/* Bindings of the pixel loop: arrays come and go as flex arrays. */
#include <boost/python.hpp>
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

  Frame make_frame(const mat3<double> &w,
                   const vec3<double> &s0,
                   double wavelength,
                   double s_min,
                   double s_max,
                   const vec3<double> &ndiv,
                   const bp::object &exclusion,
                   double z) {
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
    sym_mat3<double> g(0.0);
    if (f.exclude) g = bp::extract<sym_mat3<double> >(exclusion)();
    for (int i = 0; i < 6; ++i)
      f.g[i] = float(g[i]);
    f.z = z;
    return f;
  }

  Box make_box(const vec3<int> &half_size) {
    if (half_size.min() < 0) throw std::invalid_argument("negative size of the grid");
    const Box box(half_size.begin());
    if (box.n_places() > 2147483647)
      throw std::invalid_argument("the grid has too many voxels");
    return box;
  }

  Accumulator *make_accumulator(const vec3<int> &half_size, int n_threads) {
    return new Accumulator(make_box(half_size), n_threads);
  }

  /* Adds images of one type, each with its frame. */
  template <typename T>
  void add(Accumulator &self,
           const PanelView &view,
           const bp::list &frames,
           const bp::list &images) {
    typedef af::versa<T, af::flex_grid<> > flex_type;
    std::vector<Image<T> > views;
    for (int i = 0; i < bp::len(images); ++i) {
      const flex_type &data = bp::extract<const flex_type &>(images[i])();
      if (data.size() != std::size_t(view.nfast) * view.nslow)
        throw std::invalid_argument("the image has another size than its panel");
      Image<T> image = {bp::extract<const Frame &>(frames[i])(), data.begin()};
      views.push_back(image);
    }
    gil_release nogil;
    self.add(view, views);
  }

  void add_images(Accumulator &self,
                  const Panel &panel,
                  const bp::list &frames,
                  const bp::list &images) {
    if (bp::len(frames) != bp::len(images))
      throw std::invalid_argument("as many frames as images are needed");
    if (bp::len(images) == 0) return;
    typedef af::versa<int, af::flex_grid<> > flex_int;
    if (bp::extract<const flex_int &>(images[0]).check())
      add<int>(self, panel.view(), frames, images);
    else
      add<double>(self, panel.view(), frames, images);
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
    for (std::size_t i = 0; i < n; ++i) {
      voxel[i] = int(sums[i].voxel);
      n_pixels[i] = int(sums[i].n_pixels);
      value[i] = sums[i].value;
      weight[i] = sums[i].weight;
      x[i] = sums[i].x;
      y[i] = sums[i].y;
      z[i] = sums[i].z;
    }
    bp::dict result;
    result["voxel"] = voxel;
    result["n_pixels"] = n_pixels;
    result["value"] = value;
    result["weight"] = weight;
    result["x"] = x;
    result["y"] = y;
    result["z"] = z;
    return result;
  }

  /* Number in the C-ordered box of the voxel of each pixel, or -1: the loop's geometry
   * alone. */
  af::shared<int> voxels(const vec3<int> &half_size,
                         const Panel &panel,
                         const Frame &frame) {
    const Box box = make_box(half_size);
    const PanelView &p = panel.view();
    af::shared<int> result(std::size_t(p.nfast) * p.nslow);
    voxel_places(frame, box, p.ex, p.ey, p.ez, p.nfast * p.nslow, result.begin());
    for (std::size_t i = 0; i < result.size(); ++i)
      if (result[i] >= 0) result[i] = int(box.c_order(result[i]));
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

  BOOST_PYTHON_MODULE(dials_diffuse_ext) {
    using namespace bp;
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
         arg("z")));
    class_<Accumulator, boost::noncopyable>("Accumulator", no_init)
      .def("__init__",
           make_constructor(&make_accumulator,
                            default_call_policies(),
                            (arg("half_size"), arg("n_threads") = 1)))
      .def("add_images", &add_images, (arg("panel"), arg("frames"), arg("images")))
      .def("finish", &finish);
    def("voxels", &voxels, (arg("half_size"), arg("panel"), arg("frame")));
  }

}}  // namespace dials_diffuse::boost_python
