#include "cli/version.hpp"

#include <hdf5.h>
#include <toml++/toml.h>
#include <torch/headeronly/version.h>
#include <xxhash.h>

#include <boost/version.hpp>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/log.hpp"
#include "device/device.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {

std::string version() { return UPCYCLE_VERSION; }

std::vector<std::pair<std::string, std::string>> library_versions() {
  unsigned major = 0, minor = 0, release = 0;
  H5get_libversion(&major, &minor, &release);
  const unsigned xxhash = XXH_versionNumber();
  const std::string spdlog = log::library_version();
  std::vector<std::pair<std::string, std::string>> libraries = {
      {"LibTorch", TORCH_VERSION},
      {"HDF5", text(major, ".", minor, ".", release, ", parallel")},
      {"toml++", text(TOML_LIB_MAJOR, ".", TOML_LIB_MINOR, ".", TOML_LIB_PATCH)},
      {"spdlog", spdlog.substr(spdlog.find(' ') + 1)},
      {"Boost", text(BOOST_VERSION / 100000, ".", BOOST_VERSION / 100 % 1000, ".", BOOST_VERSION % 100)},
      {"nlohmann-json",
       text(NLOHMANN_JSON_VERSION_MAJOR, ".", NLOHMANN_JSON_VERSION_MINOR, ".", NLOHMANN_JSON_VERSION_PATCH)},
      {"xxHash", text(xxhash / 10000, ".", xxhash / 100 % 100, ".", xxhash % 100)},
  };
  if (device::cuda_built_in()) libraries.emplace_back("CUDA", device::cuda_version());
  return libraries;
}

std::string version_page() {
  std::string page = "upcycle " + version() + "\n\nLibraries\n";
  for (const auto& [name, number] : library_versions())
    page += "  " + name + std::string(16 - name.size(), ' ') + number + "\n";
  page += "\nTransports\n";
  for (const std::string& transport : transports_built_in()) page += "  " + transport + "\n";
  return page;
}

}  // namespace upcycle
