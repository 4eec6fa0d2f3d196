// Native set-up errors become the Python exceptions of commlib.errors, values included.
#include <nanobind/stl/string.h>

#include "bindings/bindings.hpp"
#include "common/error.hpp"
#include "transport/transport.hpp"

namespace nb = nanobind;

namespace commlib::bindings {
namespace {

void raise(const char* name, const char* message, const nb::dict& values) {
  const nb::object type = nb::module_::import_("commlib.errors").attr(name);
  const nb::object error = type(message, **values);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(const std::exception_ptr& pointer, void*) {
  nb::dict values;
  try {
    std::rethrow_exception(pointer);
  } catch (const CapacityException& error) {
    values["needed"] = error.needed();
    values["available"] = error.available();
    raise("CapacityError", error.what(), values);
  } catch (const RegistrationException& error) {
    values["needed"] = error.needed();
    values["available"] = error.available();
    raise("CapacityError", error.what(), values);
  } catch (const ConfigException& error) {
    raise("ConfigError", error.what(), values);
  } catch (const TransportException& error) {
    values["call"] = error.call();
    values["code"] = error.code();
    values["peer"] = error.peer() < 0 ? nb::none() : nb::cast(error.peer());
    raise("TransportError", error.what(), values);
  }
}

}  // namespace

void register_errors(nb::module_&) { nb::register_exception_translator(translate); }

}  // namespace commlib::bindings
