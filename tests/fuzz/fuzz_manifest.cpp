// libFuzzer: a manifest.json of any bytes. Only UserError may leave what reads it; what is read, written and read again is the same.
#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "base/error.hpp"
#include "checkpoint/digest.hpp"
#include "checkpoint/manifest.hpp"
#include "checkpoint/safetensors_header.hpp"

namespace {

namespace fs = std::filesystem;

void store(const fs::path& path, const void* bytes, size_t size) {
  const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file < 0 || write(file, bytes, size) != static_cast<ssize_t>(size)) std::abort();
  close(file);
}

/// A step directory in memory, with a file of tensors and a text beside the manifest; removed at the end.
struct Folder {
  Folder() {
    std::string name = "/dev/shm/upcycle-fuzz-XXXXXX";
    if (mkdtemp(name.data()) == nullptr) std::abort();
    step = fs::path(name) / "step-00000001";
    fs::create_directory(step);
    store(step / "weights.h5", "four", 4);
    store(step / "note.txt", "four", 4);
  }
  ~Folder() { fs::remove_all(step.parent_path()); }
  fs::path step;
};

const fs::path& checkpoint() {
  static const Folder folder;
  return folder.step;
}

/// What is read, written and read again is the same.
void read_and_write() {
  using namespace upcycle;
  std::string first;
  try {
    const Manifest manifest = read_manifest(checkpoint());
    if (!reads_schema(manifest.schema_version) || manifest.step < 0) std::abort();
    first = to_text(manifest);
    check_complete(checkpoint(), manifest);
    for (const auto& [kind, summary] : manifest.tensors.items()) {
      for (const auto& part : summary.value("parts", nlohmann::json::array())) {
        if (!manifest.files.contains(part.get<std::string>())) std::abort();
      }
    }
    const bool of_this_step = step_directory(manifest.step) == checkpoint().filename();
    if (newest_checkpoint(checkpoint().parent_path()) != (of_this_step ? std::optional(checkpoint()) : std::nullopt)) std::abort();
  } catch (const UserError& error) {
    if (error.what()[0] == '\0') std::abort();
  }
  if (first.empty()) return;
  store(checkpoint() / kManifestFile, first.data(), first.size());
  if (to_text(read_manifest(checkpoint())) != first) std::abort();
}

/// With the digest that it would have, had this program written it; else no mutation comes further than that. Empty where it is no object.
std::string with_digest(std::string_view bytes) {
  try {
    nlohmann::json manifest = upcycle::parse_json(bytes, "manifest.json");
    if (!manifest.is_object()) return "";
    manifest.erase("digest");
    manifest["digest"] = upcycle::digest_of(manifest.dump());
    return manifest.dump();
  } catch (const upcycle::UserError&) {
    return "";
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  store(checkpoint() / upcycle::kManifestFile, bytes, size);
  read_and_write();
  const std::string honest = with_digest({reinterpret_cast<const char*>(bytes), size});
  if (honest.empty()) return 0;
  store(checkpoint() / upcycle::kManifestFile, honest.data(), honest.size());
  read_and_write();
  return 0;
}
