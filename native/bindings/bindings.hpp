// One register function per subject; module.cc calls them all.
#pragma once

#include <nanobind/nanobind.h>

#include "common/fault.hpp"

namespace commlib::bindings {

void register_errors(nanobind::module_& module);
void register_engine(nanobind::module_& module);
void register_fabric(nanobind::module_& module);
void register_goodput(nanobind::module_& module);
void register_machine(nanobind::module_& module);
void register_operations(nanobind::module_& module);

nanobind::dict fault_dict(const FaultRecord& fault);

}  // namespace commlib::bindings
