#include <boost/python.hpp>
#include <string>

namespace dials_diffuse { namespace boost_python {

  std::string version() {
    return "0.1.0";
  }

  BOOST_PYTHON_MODULE(dials_diffuse_ext) {
    boost::python::def("version", &version);
  }

}}  // namespace dials_diffuse::boost_python
