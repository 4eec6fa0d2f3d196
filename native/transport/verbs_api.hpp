// libibverbs, loaded at run time: one build serves hosts with and without it. Only what libibverbs
// exports is in the table; posting and polling are inline functions of its header.
#pragma once

#include <infiniband/verbs.h>

#include <string>

namespace commlib {

#define COMMLIB_VERBS_FUNCTIONS(X) \
  X(ack_async_event)               \
  X(alloc_pd)                      \
  X(close_device)                  \
  X(create_ah)                     \
  X(create_cq)                     \
  X(create_qp)                     \
  X(dealloc_pd)                    \
  X(dereg_mr)                      \
  X(destroy_ah)                    \
  X(destroy_cq)                    \
  X(destroy_qp)                    \
  X(event_type_str)                \
  X(fork_init)                     \
  X(free_device_list)              \
  X(get_async_event)               \
  X(get_device_list)               \
  X(get_device_name)               \
  X(modify_qp)                     \
  X(open_device)                   \
  X(query_device)                  \
  X(query_gid)                     \
  X(query_port)                    \
  X(reg_mr)                        \
  X(resize_cq)                     \
  X(wc_status_str)

// Not in every release that we run with.
#define COMMLIB_VERBS_OPTIONAL_FUNCTIONS(X) \
  X(reg_dmabuf_mr)                          \
  X(reg_mr_iova2)

struct VerbsApi {
#define COMMLIB_VERBS_MEMBER(name) decltype(&::ibv_##name) name = nullptr;
  COMMLIB_VERBS_FUNCTIONS(COMMLIB_VERBS_MEMBER)
  COMMLIB_VERBS_OPTIONAL_FUNCTIONS(COMMLIB_VERBS_MEMBER)
#undef COMMLIB_VERBS_MEMBER
  std::string path;  // of the library
};

// Loads the library at the first call. Null if it is not there or lacks a function; `reason`, if
// given, says which.
const VerbsApi* load_verbs(std::string* reason = nullptr);

}  // namespace commlib
