// Lets torch's CPU build hold fake tensors on the device `cuda`, and run autograd over them: a device
// guard and CUDA hooks that answer and do nothing. It is imported before torch, which asks only once.
#include <Python.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
c10::Device only_device() { return c10::Device(c10::DeviceType::CUDA, 0); }
}  // namespace

namespace c10::impl {
struct IdleGuard final : public NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return only_device(); }
  Device getDevice() const override { return only_device(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, only_device()); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, only_device()); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, only_device()); }
  Stream exchangeStream(Stream) const noexcept override {
    return Stream(Stream::DEFAULT, only_device());
  }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, IdleGuard)
}  // namespace c10::impl

namespace at {
struct IdleHooks : public CUDAHooksInterface {
  IdleHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  void deviceSynchronize(DeviceIndex) const override {}
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, IdleHooks)
}  // namespace at

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "fake_cuda", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_fake_cuda() { return PyModule_Create(&definition); }
