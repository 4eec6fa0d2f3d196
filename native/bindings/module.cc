#include "bindings/bindings.hpp"

NB_MODULE(_native, module) {
  module.doc() = "Native core of commlib. Private: use commlib.Runtime.";
  commlib::bindings::register_errors(module);
  commlib::bindings::register_operations(module);
  commlib::bindings::register_engine(module);
  commlib::bindings::register_fabric(module);
  commlib::bindings::register_goodput(module);
  commlib::bindings::register_machine(module);
}
