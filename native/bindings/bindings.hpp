// One register function per subject; module.cc calls them all.
#pragma once

#include <nanobind/nanobind.h>

namespace commlib::bindings {

void register_errors(nanobind::module_& module);
void register_engine(nanobind::module_& module);
void register_goodput(nanobind::module_& module);
void register_machine(nanobind::module_& module);
void register_operations(nanobind::module_& module);

}  // namespace commlib::bindings
