// What the cases tell the runtime that records their launches.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

void start_case(const std::string& name, int capability);  // compute capability times 10 that the device pretends to have
void end_case(cudaError_t error);                          // what the launcher returned
