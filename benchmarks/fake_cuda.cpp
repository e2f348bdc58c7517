// What a build of PyTorch without CUDA lacks for fake tensors on "cuda": that there is such a device, and its stream.
//
// PyTorch itself patches this in where CUDA is built in but no card is there (ensureCUDADeviceGuardSet). Nothing is
// allocated and nothing runs; the library must be loaded before PyTorch asks for the first time, hence LD_PRELOAD.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

// The registry looks for this name.
struct CUDAHooks : public at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs /*unused*/) {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  bool hasPrimaryContext(c10::DeviceIndex /*unused*/) const override {
    return true;
  }
  void init() const override {}
};

struct Guard : public c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override {
    return kDevice;
  }
  c10::Device exchangeDevice(c10::Device /*unused*/) const override {
    return kDevice;
  }
  c10::Stream getStream(c10::Device /*unused*/) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kDevice);
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override {
    return stream;
  }
};

} // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
} // namespace at
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
