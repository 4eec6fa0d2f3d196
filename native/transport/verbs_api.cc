#include "transport/verbs_api.hpp"

#include <dlfcn.h>

#include <optional>

namespace commlib {
namespace {

constexpr const char* kLibrary = "libibverbs.so.1";

std::string path_of(void* function) {
  Dl_info info{};
  return dladdr(function, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : kLibrary;
}

template <typename Function>
bool find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

// The library stays loaded: its providers hold threads and file descriptors of their own.
std::optional<VerbsApi> load(std::string* reason) {
  void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    *reason = error != nullptr ? error : std::string(kLibrary) + " cannot be loaded";
    return std::nullopt;
  }
  VerbsApi api;
#define COMMLIB_VERBS_FIND(name)                                 \
  if (!find(library, "ibv_" #name, &api.name)) {                 \
    *reason = std::string(kLibrary) + " has no ibv_" #name "()"; \
    return std::nullopt;                                         \
  }
  COMMLIB_VERBS_FUNCTIONS(COMMLIB_VERBS_FIND)
#undef COMMLIB_VERBS_FIND
#define COMMLIB_VERBS_TRY(name) find(library, "ibv_" #name, &api.name);
  COMMLIB_VERBS_OPTIONAL_FUNCTIONS(COMMLIB_VERBS_TRY)
#undef COMMLIB_VERBS_TRY
  api.path = path_of(reinterpret_cast<void*>(api.get_device_list));
  // Kernels before 5.12 give a fork's parent new pages for those that the card knows, unless told
  // so before the first registration. Newer ones need nothing, and say so by an error.
  api.fork_init();
  return api;
}

}  // namespace

const VerbsApi* load_verbs(std::string* reason) {
  static std::string failure;
  static const std::optional<VerbsApi> api = load(&failure);
  if (!api && reason != nullptr) *reason = failure;
  return api ? &*api : nullptr;
}

}  // namespace commlib
