// One of csrc/cuda's streaming passes on the host, for tests/csrc/test_cuda_on_host.py:
//
//   rows ELEMENT WIDTH TIMING SEED        e.g. rows bf16 256 late 1
//   columns ELEMENT WIDTH TIMING SEED
//
// print a line a case, or end with status 1 and what went wrong: WRONG, LOCKED, LEFT, BARRIER, OUTSIDE, GONE, ...
#include <cstdlib>
#include <string>

#include "cases.h"
#include "machine.h"

using namespace on_host;

static Timing timing_of(const std::string& name) {
  if (name != "late" && name != "early" && name != "any") fail("USAGE: no timing %s", name.c_str());
  return name == "late" ? Timing::late : name == "early" ? Timing::early : Timing::any;
}

int main(int count, char** arguments) {
  if (count != 5) fail("USAGE: %s ELEMENT WIDTH TIMING SEED", arguments[0]);
  const std::string element = arguments[1];
  if (element != "bf16" && element != "fp16") fail("USAGE: no element %s", element.c_str());
  Setting setting{element == "bf16" ? vmf::cuda::Element::bf16 : vmf::cuda::Element::fp16, std::atoi(arguments[2])};
  set_schedule(timing_of(arguments[3]), static_cast<unsigned>(std::atoi(arguments[4])));
  run_cases(setting);
}
